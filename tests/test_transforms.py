"""Gradients behind every transformation: the same numbers as dense ones, or an error that names the way out."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import embax
import embax.nnx
from tests import transform_cases

CASES = transform_cases.all_cases()
WAYS = ("sparse", "prefetched", "plain")
PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"


def _parameters():
    for index, case in enumerate(CASES):
        for way in WAYS:
            # What is right costs a compilation for each operation outside of jit: a sample, and slow but for the first.
            expected = getattr(case, way)
            eager = expected.error or case.eager and way == "sparse"
            # Outside of jit JAX knows the length of a fori_loop, and prefetched rows are then right.
            for jit in (True, False) if eager and expected is not transform_cases.JAX_LOOP else (True,):
                sampled = not (way == "prefetched" and case.framework != "jax") or index % 4 == 0
                marks = [] if (jit and sampled) or expected.error or not index else [pytest.mark.slow]
                name = f"{case.framework}-{case.name}-{way}{'' if jit else '-eager'}"
                yield pytest.param(index, way, jit, marks=marks, id=name.replace("`", "").replace(" ", "_"))


@functools.cache
def _truth(index):
    return jax.tree.map(np.asarray, CASES[index].problem().run("dense", True))


@pytest.mark.parametrize("index, way, jit", list(_parameters()))
def test_as_expected(index, way, jit):
    expected, problem = getattr(CASES[index], way), CASES[index].problem()
    if expected.error is None:
        _assert_close(jax.tree.map(np.asarray, problem.run(way, jit)), _truth(index))
        return
    with pytest.raises(expected.error) as caught:
        problem.run(way, jit)
    message = str(caught.value)
    assert [word for word in expected.words if word not in message] == [], message
    if expected.error is embax.SparseGradientError:
        # A layer that is not asked through embax does not know where it is in the model.
        names = problem.names() + [name.split("/")[-1] for name in problem.names() if way != "sparse"]
        assert any(f'table "{name}"' in message for name in names), message


def _assert_close(found, wanted):
    found, wanted = jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(wanted)
    assert [str(path) for path, _ in found] == [str(path) for path, _ in wanted]
    for (path, mine), (_, theirs) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: CASES[index].name)
def test_the_truth_is_no_trivial_one(index):
    """Gradients of zero throughout, or NaN, would agree with much."""
    case = CASES[index]
    if case.sparse.error or "no lookup" in case.name or "stop_gradient" in case.name:
        return
    leaves = [leaf for leaf in jax.tree.leaves(_truth(index)) if np.issubdtype(leaf.dtype, np.floating)]
    assert all(np.abs(np.nan_to_num(leaf)).max() > 1e-6 for leaf in leaves)
    assert "NaN" in case.name or all(np.isfinite(leaf).all() for leaf in leaves)


def test_a_shard_map_that_splits_the_table_is_refused():
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("devices")

    def loss(table):
        local = jax.shard_map(lambda table: table[jnp.zeros(1, jnp.int32)], mesh=mesh, in_specs=split, out_specs=split)
        return jnp.sum(local(table))

    with pytest.raises(embax.SparseGradientError, match='table "word".*shard_map splits it.*PartitionSpec()'):
        embax.value_and_grad(loss)(embax.Table(jnp.ones((8, 2)), embax.SGD(0.1), "word"))


def test_the_cases_have_names_of_their_own():
    names = [(case.framework, case.name) for case in CASES]
    assert len(set(names)) == len(names)


def test_the_page_has_the_table():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == transform_cases.markdown().splitlines(), "run python -m tests.transform_cases"


PLAIN = {
    "grad": lambda loss, x: jax.grad(loss)(x),
    "value_and_grad": lambda loss, x: jax.value_and_grad(loss)(x),
    "vjp": lambda loss, x: jax.vjp(loss, x),
    "jvp": lambda loss, x: jax.jvp(loss, (x,), (x,)),
    "linearize": lambda loss, x: jax.linearize(loss, x),
    "jacrev": lambda loss, x: jax.jacrev(loss)(x),
    "jacfwd": lambda loss, x: jax.jacfwd(loss)(x),
    "hessian": lambda loss, x: jax.hessian(loss)(x),
    "grad in jit": lambda loss, x: jax.jit(jax.grad(loss))(x),
    "grad in vmap": lambda loss, x: jax.vmap(lambda _: jax.grad(loss)(x))(jnp.arange(2)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_derivative_raises(name):
    table = embax.Table(jnp.ones((4, 2)), embax.SGD(0.1), "word")
    inner = jax.jit(lambda table: jnp.sum(table[jnp.array([1, -1, 1])] ** 2))
    inner(table)
    with pytest.raises(embax.SparseGradientError, match='table "word".*embax.prefetch'):
        PLAIN[name](inner, table)


@pytest.mark.parametrize("gradient", [nnx.grad, nnx.value_and_grad, lambda f: nnx.jit(nnx.grad(f))])
def test_every_plain_nnx_derivative_raises(gradient):
    """The table itself is no Param, and would be a constant to nnx.grad."""
    layer = embax.nnx.Embed(4, 2, optimizer=embax.SGD(0.1), rngs=nnx.Rngs(0))
    loss = nnx.jit(lambda layer: jnp.sum(layer(jnp.array([1, -1, 1])) ** 2))
    loss(layer)
    with pytest.raises(embax.SparseGradientError, match='table "embedding".*embax.nnx.value_and_grad'):
        gradient(loss)(layer)
