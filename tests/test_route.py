"""Rows that travel: what a mesh makes of them is what one device makes, in one round and in several."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, line_of, table_spec
from jax.sharding import Mesh

import embax
from embax.check_step import _inspect
from embax.exchange import route
from embax.exchange.shards import Here

DIM, ROWS, SAMPLES, STEPS = 8, 4000, 61, 3
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
NORMAL = jax.nn.initializers.normal(1.0)  # one object, so that its program is compiled once


pytestmark = pytest.mark.usefixtures("eight_devices")


def _line(size, **settings):
    return embax.Devices(line_of(size), exchange="route", **settings)


def _square(batch_axes, table_axes):
    return embax.Devices(Mesh(np.array(jax.devices()).reshape(2, 4), ("d", "m")), batch_axes, table_axes, "route")


def _custom(gradient, row, accumulator, learning_rate):
    accumulator = accumulator + gradient * gradient
    return row - learning_rate * gradient / jnp.sqrt(accumulator), accumulator


OPTIMIZERS = {
    "adagrad": embax.Adagrad(0.1),
    "rowwise": embax.RowwiseAdagrad(0.1, row_clip_norm=0.5),
    "custom": embax.Custom(0.1, _custom, slot_variable_initializers_tuple=(0.1,)),
}


@functools.cache
def _features(optimizer):
    item = table_spec("item", ROWS, DIM, OPTIMIZERS[optimizer], "sum", initializer=NORMAL)
    user = table_spec("user", 77, DIM, OPTIMIZERS[optimizer], "mean", initializer=NORMAL)
    return {
        "recent": feature(item, "recent", (None, 4)),
        "places": feature(item, "places", (None, 3), (None, 3, DIM)),
        "ragged": feature(user, "ragged", (None,)),
    }


def _plan(optimizer, backend, **settings):
    return embax.plan(_features(optimizer), capacity={"ragged": 256}, backend=backend, **settings)


@functools.cache
def _inputs(number):
    """Returns ids and gradients: spread evenly, half of them one row, or all of them rows of one device."""
    rng = np.random.default_rng(number)
    shapes = {"recent": (SAMPLES, 4), "places": (SAMPLES, 3)}
    ids = {name: rng.integers(0, ROWS, shape) for name, shape in shapes.items()}
    if number == 1:
        ids = {name: np.where(rng.random(part.shape) < 0.5, 133, part) for name, part in ids.items()}
    if number == 2:
        ids = {name: part // 8 * 8 for name, part in ids.items()}
    ids["ragged"] = [rng.integers(0, 77, n) for n in rng.poisson(2, SAMPLES)]
    gradients = {name: rng.normal(size=(SAMPLES, DIM)).astype(np.float32) for name in ("recent", "ragged")}
    return ids, {**gradients, "places": rng.normal(size=(SAMPLES, 3, DIM)).astype(np.float32)}


def _step(plan, tables, batch, gradients, step):
    activations, residuals = embax.lookup(plan, tables, batch)
    return embax.update(plan, tables, residuals, gradients, step), activations


@functools.cache
def _start(optimizer):
    plan = _plan(optimizer, "reference")
    return jax.tree.map(np.asarray, embax.to_arrays(plan, embax.init(plan, jax.random.key(0))))


def _trained(plan, optimizer):
    """Returns the arrays after the last step, and each step's activations."""
    tables, activations = embax.from_arrays(plan, _start(optimizer)), []
    step = jax.jit(functools.partial(_step, plan), donate_argnums=0)
    for number in range(STEPS):
        ids, gradients = _inputs(number)
        tables, found = step(tables, embax.preprocess(plan, ids), gradients, number)
        activations.append(jax.tree.map(np.asarray, found))
    return jax.tree.map(np.asarray, embax.to_arrays(plan, tables)), activations


@functools.cache
def _alone(optimizer, backend):
    return _trained(_plan(optimizer, backend), optimizer)


MESHES = {
    "one": lambda: _line(1),
    "two": lambda: _line(2),
    "four": lambda: _line(4),
    "eight": lambda: _line(8),
    "turned": lambda: _square(("m", "d"), ("d", "m")),
    "copies": lambda: _square(("d", "m"), "m"),
}
CASES = [
    ("reference", "two", "row", "adagrad"),
    ("reference", "four", "table", "rowwise"),
    ("cpu", "one", "row", "adagrad"),
    ("cpu", "two", "table", "rowwise"),
    ("cpu", "four", "row", "custom"),
    ("cpu", "eight", "row", "adagrad"),
    ("cpu", "turned", "table", "adagrad"),
    ("cpu", "copies", "row", "rowwise"),
]


def _checked(backend):
    why_not = embax.kernels.get(backend).unavailable()
    if why_not:
        pytest.skip(f"backend {backend}: {why_not}")
    return backend


@pytest.mark.parametrize(("backend", "mesh", "placement", "optimizer"), CASES)
def test_as_one_device(backend, mesh, placement, optimizer):
    plan = _plan(optimizer, _checked(backend), mesh=MESHES[mesh](), placement=placement)
    arrays, activations = _trained(plan, optimizer)
    wanted_arrays, wanted = _alone(optimizer, backend)
    jax.tree.map(np.testing.assert_array_equal, activations[0], wanted[0])  # later tables differ by rounding
    close = functools.partial(np.testing.assert_allclose, **TOLERANCE)
    jax.tree.map(close, activations, wanted)
    jax.tree.map(close, arrays, wanted_arrays)
    if mesh == "eight":
        again = _trained(plan, optimizer)
        jax.tree.map(np.testing.assert_array_equal, (arrays, activations), again)


@pytest.mark.parametrize("number", range(STEPS))
def test_every_batch_to_the_bit(number):
    plan = _plan("adagrad", _checked("cpu"), mesh=_line(8))
    alone, ids = _plan("adagrad", "cpu"), _inputs(number)[0]
    found, wanted = (
        embax.lookup(p, embax.from_arrays(p, _start("adagrad")), embax.preprocess(p, ids))[0] for p in (plan, alone)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def _rounds(size, number):
    """Returns how many rounds the lookup of a batch takes on that many devices."""
    plan = _plan("adagrad", "reference", mesh=_line(size))
    (stack,) = plan.stacks
    ids = embax.preprocess(plan, _inputs(number)[0]).stacks[stack.name]
    way = route._way(Here(stack, plan.devices, "reference"), ids.shard(0))
    assert not way.single
    counts = [np.bincount(np.unique(part[part < stack.rows]) % size).max() for part in np.asarray(ids.ids)]
    return -(-max(counts) // way.size)


def test_the_batches_need_one_round_and_several():
    assert _rounds(4, 0) == 1 and _rounds(4, 2) == 2 and _rounds(8, 2) > 2


def test_rows_and_gradients_travel_in_their_dtypes():
    table = table_spec("item", ROWS, DIM, embax.SGD(0.5), initializer=NORMAL, dtype=jnp.bfloat16)
    plans = [
        embax.plan(feature(table), backend=_checked("cpu"), mesh=m) for m in (None, _line(4, wire_dtype="float16"))
    ]
    ids, gradients = _inputs(2)[0]["places"], _inputs(2)[1]["recent"].astype(jnp.bfloat16)
    found = []
    for plan in plans:
        tables, batch = embax.init(plan, jax.random.key(0)), embax.preprocess(plan, ids)
        step = jax.jit(functools.partial(_step, plan))
        compiled = step.lower(tables, batch, gradients, 0).compile()
        if plan.devices is not None:
            text = compiled.as_text()
            assert "u16[" in text and not re.search(r"= \(f32\S* .*all-to-all\(", text)
        found.append(compiled(tables, batch, gradients, 0))
    (mesh_tables, mesh_found), (tables, wanted) = found[1], found[0]
    np.testing.assert_array_equal(np.asarray(mesh_found), np.asarray(wanted))
    arrays = [embax.to_arrays(*pair)["item"] for pair in zip(plans, (tables, mesh_tables), strict=True)]
    for part, other in zip(*map(jax.tree.leaves, arrays), strict=True):
        np.testing.assert_allclose(np.asarray(part, np.float32), np.asarray(other, np.float32), rtol=0.02, atol=0.02)


def test_gains_have_their_derivative(backend):
    table = table_spec("item", ROWS, DIM, combiner="mean", initializer=NORMAL)
    features = feature(table, "item", (None, 3))
    rng = np.random.default_rng(0)
    ids, weights = rng.integers(0, ROWS, (30, 3)), jnp.asarray(rng.uniform(0.1, 2, (30, 3)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(30, DIM)), jnp.float32)

    def gradient(plan):
        tables = embax.init(plan, jax.random.key(0))

        def loss(weights):
            batch = embax.preprocess_traced(plan, ids, weights)
            return jnp.sum(embax.lookup(plan, tables, batch)[0] * target)

        return jax.jit(jax.grad(loss))(weights)

    wanted = gradient(embax.plan(features, backend=backend))
    found = gradient(embax.plan(features, backend=backend, mesh=_line(4)))
    np.testing.assert_allclose(found, wanted, **TOLERANCE)


def test_a_donated_step_copies_no_table(backend):
    shards, rows = 4, 40_000
    table = table_spec("item", rows, DIM, initializer=jax.nn.initializers.zeros)
    plan = embax.plan(feature(table), backend=backend, mesh=_line(shards))
    tables = embax.init(plan, jax.random.key(0))
    batch = embax.preprocess(plan, np.random.default_rng(0).integers(0, rows, (256, 3)))
    step = jax.jit(functools.partial(_step, plan), donate_argnums=0)
    compiled = step.lower(tables, batch, jnp.ones((256, DIM)), 0).compile()
    shapes = {f"f32[{count},{DIM}]" for count in (rows, rows // shards)}
    found, writes = _inspect(compiled.as_text(), shapes)
    assert not found and writes == 2
    assert compiled.memory_analysis().temp_size_in_bytes < rows // shards * DIM * 4
    if backend == "cpu":
        assert embax.check_step(step, tables, batch, jnp.ones((256, DIM)), 0).ok


def test_a_batch_without_ids_moves_nothing():
    plan = _plan("adagrad", _checked("cpu"), mesh=_line(2), placement="table")
    tables = embax.from_arrays(plan, _start("adagrad"))
    ids, gradients = _inputs(0)
    batch = jax.tree.map(jnp.zeros_like, embax.preprocess(plan, ids))
    after, activations = _step(plan, tables, batch, gradients, 0)
    assert not any(part.any() for part in activations.values())
    jax.tree.map(np.testing.assert_array_equal, embax.to_arrays(plan, after), _start("adagrad"))


def test_tables_split_where_the_batch_is_not_are_refused():
    with pytest.raises(ValueError, match=r"along \('m',\) it is not; use exchange=\"gather\", or name those axes"):
        _square("d", ("d", "m"))
