"""The reference backend lowered for GPUs: no scatter adds up duplicates; what is lowered for decides, not what is here.

XLA's scatter-add of duplicate indices is unrepeatable on GPUs, and slow in some releases.
"""

import dataclasses
import functools
import re

import flax_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import feature, table_spec
from jax import export

import embax
from embax import sorted_rows
from embax.kernels import reference

BATCH, ROWS, DIM = 12, 500, 4
SCATTER = re.compile(r'"stablehlo\.scatter"\(.*?<\{(?P<attributes>.*?)\}> \(\{(?P<body>.*?)\}\) :', re.DOTALL)


def lowered(function, *args, platform="cuda"):
    """Returns the StableHLO of ``function`` as it is exported for ``platform``."""
    leaves, structure = jax.tree.flatten(args)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves))))
    return export.export(flat, platforms=[platform])(*leaves).mlir_module()


def unsafe_scatters(text):
    """Returns how many scatters there are, and which may meet an index twice; those that add are named so."""
    found = list(SCATTER.finditer(text))
    assert len(found) == text.count('"stablehlo.scatter"(')
    unsafe = [match for match in found if "unique_indices = true" not in match["attributes"]]
    return len(found), ["adds" if "stablehlo.add" in match["body"] else "replaces" for match in unsafe]


def assert_safe(function, *args, scatters):
    """Asserts that all scatters of ``function``, at least so many, name each index once."""
    count, unsafe = unsafe_scatters(lowered(function, *args))
    assert not unsafe and count >= scatters


def problem(form, dtype="float32"):
    table = table_spec(rows=ROWS, dim=DIM, optimizer=embax.Adagrad(0.1), combiner="mean", dtype=dtype)
    plan = embax.plan(feature(table, inputs=(BATCH, 3) if form == "dense" else (BATCH,)), backend="reference")
    rng = np.random.default_rng(0)
    lengths = np.full(BATCH, 3) if form == "dense" else np.resize([2, 0, 0, 7, 1], BATCH)
    bags = [rng.integers(0, ROWS, length) for length in lengths]
    weights = [rng.random(length) for length in lengths] if form == "weighted" else None
    batch = embax.preprocess(plan, np.stack(bags) if form == "dense" else bags, weights)
    return plan, embax.init(plan, jax.random.key(0)), batch


# ---- the detector ------------------------------------------------------------------------------------------------


def test_offenders_are_found():
    table, rows, values = jnp.zeros((9, 2)), jnp.array([3, 3, 1]), jnp.ones((3, 2))
    assert unsafe_scatters(lowered(lambda t, r, v: t.at[r].add(v), table, rows, values)) == (1, ["adds"])
    assert unsafe_scatters(lowered(lambda t, r, v: t.at[r].set(v), table, rows, values)) == (1, ["replaces"])
    assert unsafe_scatters(lowered(lambda t, r, v: t.at[r].add(v, unique_indices=True), table, rows, values)) == (1, [])
    assert unsafe_scatters(lowered(lambda t, r: t[r], table, rows)) == (0, [])
    assert unsafe_scatters(lowered(jax.grad(lambda t, r: t[r].sum()), table, rows)) == (1, ["adds"])


def test_what_is_lowered_for_decides():
    """The form for CPU, which this machine is, has what a GPU must not get."""
    plan, tables, batch = problem("ragged")

    def forward(tables, batch):
        return embax.lookup(plan, tables, batch)[0]

    assert "adds" in unsafe_scatters(lowered(forward, tables, batch, platform="cpu"))[1]
    assert_safe(forward, tables, batch, scatters=2)
    keys = jnp.arange(7, dtype=jnp.int32)
    find = functools.partial(reference.distinct_rows, rows=9)
    for platform, operands in (("cuda", 2), ("cpu", 1)):
        sorts = re.findall(r'"stablehlo\.sort"\((.*?)\)', lowered(find, keys, platform=platform))
        assert [sort.count("%") for sort in sorts] == [operands]


# ---- every walk of the backend -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["dense", "ragged", "weighted"])
def test_steps(form, dtype):
    plan, tables, batch = problem(form, dtype)

    def step(tables, batch, turn):
        activations, residuals = embax.lookup(plan, tables, batch)
        return embax.update(plan, tables, residuals, activations, turn)

    assert_safe(step, tables, batch, jnp.int32(0), scatters=2 if form == "dense" else 4)

    def apart(tables, batch, turn):
        activations, residuals = embax.lookup(plan, tables, batch)
        gradients = embax.row_gradients(plan, residuals, activations)
        doubled = {name: gradient + gradient for name, gradient in gradients.items()}
        return embax.apply_row_gradients(plan, tables, doubled, turn)

    assert_safe(apart, tables, batch, jnp.int32(0), scatters=6)


def test_steps_of_tracked_tables_and_of_long_batches():
    """A batch of more than one chunk loops over them; one of a single chunk does not."""
    plan, tables, batch = problem("ragged")
    tables, stack = embax.track(plan, tables), batch.stacks["item"]

    def step(tables, ids):
        batch = embax.IdBatch({"item": dataclasses.replace(stack, ids=ids)}, statistics)
        activations, residuals = embax.lookup(plan, tables, batch)
        return embax.update(plan, tables, residuals, activations, 0)

    statistics = batch.statistics
    long = jax.ShapeDtypeStruct((1, sorted_rows.WIDE_CHUNK + 5), jnp.int32)
    for ids, loops in ((stack.ids, 2), (long, 4)):
        text = lowered(step, tables, ids)
        assert unsafe_scatters(text)[1] == [] and text.count("stablehlo.while") == loops


def test_derivatives_with_respect_to_weights_and_tables():
    plan, tables, batch = problem("weighted")

    def loss(table, gains):
        state = {"item": embax.TableState(table, tables["item"].slots)}
        found = dataclasses.replace(batch, stacks={"item": dataclasses.replace(batch.stacks["item"], gains=gains)})
        return (embax.lookup(plan, state, found)[0] ** 2).sum()

    assert_safe(jax.grad(loss, (0, 1)), tables["item"].table, batch.stacks["item"].gains, scatters=4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", ["dense", "weighted"])
def test_quantized_lookups(form, bits, monkeypatch):
    monkeypatch.setenv("EMBAX_BACKEND", "reference")
    plan, tables, batch = problem(form)
    served = embax.quantize_tables(plan, tables, bits=bits)
    assert_safe(lambda tables, batch: embax.lookup(plan, tables, batch)[0], served, batch, scatters=1)
    assert_safe(embax.take, served["item"].table, jnp.arange(5), scatters=0)


def test_bare_arrays(monkeypatch):
    monkeypatch.setenv("EMBAX_BACKEND", "reference")
    table, ids = jnp.ones((ROWS, DIM)), jnp.array([[3, 3], [-1, 7]])
    assert_safe(embax.take, table, ids, scatters=0)
    gradient = functools.partial(embax.take_gradient, vocabulary_size=ROWS)
    assert_safe(gradient, ids, jnp.ones((2, 2, DIM)), scatters=2)
    optimizer = embax.Adam(0.1)

    def step(state, ids, cotangents):
        return embax.apply_rows(optimizer, state, gradient(ids, cotangents))

    assert_safe(step, embax.init_slots(optimizer, table), ids, jnp.ones((2, 2, DIM)), scatters=5)


# ---- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_layers(flavour, monkeypatch):
    monkeypatch.setenv("EMBAX_BACKEND", "reference")
    swap = flax_models.sparse(flavour, embax.Adagrad(0.1))
    batch = flax_models.Batches("recommender", 50).next()
    trained = flax_models.run(flavour, "recommender", swap, optax.sgd(0.1), 50, batch)
    if flavour == "linen":
        assert_safe(trained.jitted, *trained.arguments, batch, scatters=8)
        return
    graph, state = nnx.split(trained.arguments)

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        trained.jitted(model, optimizer, batch)
        return nnx.as_pure(nnx.state((model, optimizer)))

    assert_safe(step, state, batch, scatters=8)


# ---- the same numbers --------------------------------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch):
    """Makes this machine take the form for GPUs, in chunks of seven."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, **_: default(*operands))
    monkeypatch.setattr(sorted_rows, "CPU_CHUNK", 1)
    monkeypatch.setattr(sorted_rows, "WIDE_CHUNK", 7)


@pytest.mark.parametrize("form", ["dense", "ragged", "weighted"])
def test_both_forms_agree(form, request):
    plan, tables, batch = problem(form)
    stack, state, ids = plan.stacks[0], tables["item"], jax.tree.map(jnp.asarray, batch.stacks["item"].shard(0))
    values = jnp.sin(jnp.arange(BATCH * DIM, dtype=jnp.float32)).reshape(BATCH, DIM)

    optimizer = embax.Adagrad(0.1)
    hyper = optimizer.modifiers(0), optimizer.hyperparameters(0)

    def run():
        pooled = reference.gather_pool(stack, state.table, ids)
        sparse = reference.row_gradients(stack, ids, pooled[0], (values,))
        stepped = reference.update(stack, state, ids, pooled[0], (values,), hyper)
        applied = reference.apply(optimizer, state, sparse, hyper)
        return pooled, sparse, stepped, applied, reference.distinct_rows(ids.ids, ROWS), reference.sample_of_ids(ids)

    expected = jax.jit(run)()
    request.getfixturevalue("wide")
    found = jax.jit(lambda: run())()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
