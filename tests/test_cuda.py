"""The CUDA backend beyond what every backend is asked: long runs, rows of all lengths, many features, lowering.

Where there is no card the kernels run on the host (`emulated`); the laws and the battery ask them like any backend.
"""

import functools
import re

import emulated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, line_of, table_spec

import embax
from embax import kernels
from embax.kernels import cuda, cuda_calls, cuda_library
from embax.kernels.calls import Occurrences
from embax.row_gradients import RowGradients

PIECE, FIELD = 128, 128 * 128  # kPiece and its square: how long runs are cut
HERE = jax.default_backend() == "cpu"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    if HERE:
        if why_not := emulated.why_not():
            pytest.skip(why_not)
        emulated.install(monkeypatch)
    if why_not := cuda.unavailable():
        pytest.skip(f"no CUDA backend: {why_not}")


def _hyper(optimizer, step=3):
    return optimizer.modifiers(step), optimizer.hyperparameters(step)


def _stepped(optimizer, table, rows, gradients, gains=None):
    """Returns table and slots after one step on the rows that `rows` name, entry i with gradient i."""
    state = embax.init_slots(optimizer, jnp.asarray(table))

    @jax.jit
    def step(state, rows, gradients, gains):
        entries = cuda.sorted_entries(rows, None, gains)
        parts = (state.table, *state.slots)
        return cuda_calls.update(optimizer.kernel_name(), parts, entries, rows, (gradients,), _hyper(optimizer))

    return [np.asarray(part) for part in step(state, jnp.asarray(rows, jnp.int32), jnp.asarray(gradients), gains)]


def _order(monkeypatch, order):
    if HERE:
        monkeypatch.setenv("EMBAX_EMULATED_ORDER", str(order))


RUNS = {  # begin and length of the one long run
    "none": (0, 1),
    "within a piece": (3, 100),
    "one piece": (PIECE, PIECE),
    "over a boundary": (PIECE - 1, 2),
    "just short of a piece": (PIECE + 1, PIECE - 1),
    "pieces and ends": (PIECE - 5, 3 * PIECE + 9),
    "one field": (FIELD, FIELD),
    "a field and ends": (FIELD - PIECE - 7, FIELD + 2 * PIECE + 20),
}


@pytest.mark.parametrize("run", RUNS)
def test_long_runs_are_added_up_whole(run, monkeypatch):
    begin, length = RUNS[run]
    rows = np.concatenate([np.arange(begin), np.full(length, begin), begin + 1 + np.arange(5)])
    gradients = np.random.default_rng(0).integers(-8, 9, (len(rows), 3)).astype(np.float32)
    table = np.zeros((begin + 9, 3), np.float32)
    shuffled = np.random.default_rng(1).permutation(len(rows))
    stepped, *_ = _stepped(embax.SGD(1.0), table, rows[shuffled], gradients[shuffled])
    wanted = table.astype(np.float64)
    np.subtract.at(wanted, rows, gradients)  # small integers: every order of adding gives the same
    np.testing.assert_array_equal(stepped, wanted)


@pytest.mark.parametrize("dim", [1, 2, 6, 33, 200, 516, 1030])
def test_rows_of_every_length(dim):
    rng = np.random.default_rng(dim)
    table, rows = rng.normal(size=(40, dim)).astype(np.float32), rng.integers(0, 48, 300)
    gradients, gains = rng.normal(size=(300, dim)).astype(np.float32), rng.normal(size=300).astype(np.float32)
    optimizer = embax.RowwiseAdagrad(0.1, row_clip_norm=2.0, l2_weight_decay=0.1)
    ours = _stepped(optimizer, table, np.where(rows < 40, rows, 40), gradients, jnp.asarray(gains))
    state = embax.init_slots(optimizer, jnp.asarray(table))
    summed = kernels.get("reference").sum_rows(
        jnp.asarray(rows, jnp.int32), jnp.asarray(gradients), None, jnp.asarray(gains), 40
    )
    wanted = kernels.get("reference").apply(optimizer, state, summed, _hyper(optimizer))
    for mine, theirs in zip(ours, [wanted.table, *wanted.slots], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_the_same_bits_whatever_comes_first(monkeypatch):
    """No block and no thread waits for another by luck: any order of them gives the same bits."""
    rng = np.random.default_rng(5)
    rows = np.concatenate([rng.integers(0, 500, 3000), np.full(FIELD, 7)])
    gradients = rng.normal(size=(len(rows), 20)).astype(np.float32)
    table = rng.normal(size=(500, 20)).astype(np.float32)
    found = []
    for order in ("forward", "backward", 1, 2) if HERE else range(4):
        _order(monkeypatch, order)
        found.append(_stepped(embax.F2A(0.1), table, rows, gradients))
    for again in found[1:]:
        for one, two in zip(found[0], again, strict=True):
            assert one.tobytes() == two.tobytes()


def test_more_features_than_one_launch_takes():
    most, count = cuda_calls.most_blocks(), 300
    assert count > 2 * most
    table = table_spec(rows=50, dim=4, optimizer=embax.SGD(0.5))
    features = [feature(table, name=f"x{i}", inputs=(1 + i % 3,)) for i in range(count)]
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 50, (1 + i % 3, 1)) for i in range(count)]
    results = []
    for backend in ("cuda", "reference"):
        plan = embax.plan(features, backend=backend)
        tables, batch = embax.init(plan, jax.random.key(0)), embax.preprocess(plan, ids)

        @jax.jit
        def step(tables, batch, plan=plan):
            activations, residuals = embax.lookup(plan, tables, batch)
            return activations, embax.update(plan, tables, residuals, activations, 0)

        results.append(step(tables, batch))
    for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_any_ids_samples_and_offsets_are_safe():
    table = jnp.ones((5, 4))
    ids = jnp.array([2**31 - 1, -(2**31), 5, -1, 4, 0], jnp.int32)
    falling = jnp.array([9, -3, 4, 2, 2**31 - 1], jnp.int32)
    pooled = cuda_calls.gather_pool(table, Occurrences(ids, falling), (4,), jnp.float32)[0]
    assert pooled.shape == (4, 4) and np.isfinite(pooled).all()
    assert np.isnan(cuda_calls.gather_rows(table, ids)[:4]).all()
    entries = cuda_calls.Entries(jnp.sort(jnp.array([0, 0, 4, 5, 5, 5], jnp.int32)), ids)
    rows, sums = cuda_calls.row_gradients(entries, table, (jnp.ones((3, 4)),), 5)
    assert rows.tolist() == [0, 4, 5, 5, 5] and np.isfinite(sums).all()


def test_rows_of_64_bits():
    with jax.enable_x64(True):
        rows, values = jnp.array([3, 2**40, -1, 3]), jnp.ones((4, 2), jnp.float32)
        assert rows.dtype == jnp.int64
        found = jax.jit(functools.partial(cuda.sum_rows, vocabulary_size=5))(rows, values, None, None)
    assert found.rows.tolist() == [3, 5, 5, 5] and found.values[0].tolist() == [2.0, 2.0]


def test_rows_marked_as_touched():
    plan = embax.plan(feature(table_spec(rows=6), inputs=(3,)), backend="cuda")
    tables = embax.track(plan, embax.init(plan, jax.random.key(0)))
    activations, residuals = embax.lookup(plan, tables, embax.preprocess(plan, np.array([[4], [1], [4]])))
    (state,) = embax.update(plan, tables, residuals, activations, 0).values()
    assert state.touched.rows.tolist() == [0, 1, 0, 0, 1, 0]


def test_row_gradients_apply_without_a_sort(monkeypatch):
    optimizer, table = embax.Adagrad(0.1), jnp.ones((7, 3))
    gradient = RowGradients(jnp.array([5, 0, 9, -2, 3]), jnp.ones((5, 3)), 7)
    monkeypatch.setattr(jax.lax, "sort", None)  # not called
    ours = jax.jit(functools.partial(cuda.apply, optimizer))(
        embax.init_slots(optimizer, table), gradient, _hyper(optimizer)
    )
    assert (np.asarray(ours.table) != 1).any(axis=1).tolist() == [True, False, False, True, False, True, False]


# ---- meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("placement", "exchange"), [("row", "gather"), ("row", "route"), ("column", "gather")])
def test_a_mesh_gives_what_one_device_gives(placement, exchange):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    devices = embax.Devices(line_of(4), exchange=exchange)
    table = table_spec(rows=37, dim=8, optimizer=embax.Adam(0.1))
    ids = np.random.default_rng(0).integers(0, 37, (16, 3))
    results = []
    for where in ({}, {"mesh": devices, "placement": placement}):
        plan = embax.plan(feature(table, inputs=(None, 3)), backend="cuda", **where)
        tables, batch = embax.init(plan, jax.random.key(0)), embax.preprocess(plan, ids)

        @jax.jit
        def step(tables, batch, plan=plan):
            activations, residuals = embax.lookup(plan, tables, batch)
            return activations, embax.update(plan, tables, residuals, activations, 0)

        activations, tables = step(tables, batch)
        results.append((activations, embax.to_arrays(plan, tables)))
    for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# ---- lowering --------------------------------------------------------------------------------------------------------


def _step_of(optimizer, ragged, weighted):
    table = table_spec(rows=50, dim=4, optimizer=optimizer, combiner="mean" if weighted else "sum")
    plan = embax.plan(feature(table, inputs=(4,) if ragged else (4, 2)), backend="cuda")
    ids = [[1, 2], [], [3], [4, 4]] if ragged else np.arange(8).reshape(4, 2)
    tables, batch = embax.init(plan, jax.random.key(0)), embax.preprocess(plan, ids)

    def step(tables, batch):
        activations, residuals = embax.lookup(plan, tables, batch)
        return activations, embax.update(plan, tables, residuals, activations, 0)

    return step, tables, batch


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_lowers_for_cuda_in_place(ragged, weighted, monkeypatch):
    real = cuda_library.load()
    monkeypatch.setattr(cuda_library, "load", lambda: real._replace(platform="CUDA"))
    step, tables, batch = _step_of(embax.Adam(0.1), ragged, weighted)
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in embax.native_calls()]
    flat, structure = jax.tree.flatten((tables, batch))
    jitted = jax.jit(lambda *leaves: jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves))))
    text = jax.export.export(jitted, platforms=["cuda"], disabled_checks=checks)(*flat).mlir_module()
    called = re.findall(r"custom_call @(embax_\w+)", text)
    wanted = {"embax_cuda_gather_pool", "embax_cuda_update"} | ({"embax_cuda_samples_of"} if ragged else set())
    assert set(called) == wanted
    (update,) = [line for line in text.splitlines() if "@embax_cuda_update" in line]
    assert len(re.findall("#stablehlo.output_operand_alias<", update)) == 3  # table, momentum, velocity
    assert text.count("stablehlo.sort") == 1 and "stablehlo.scatter" not in text


def test_another_platform_gets_the_reference(monkeypatch):
    real = cuda_library.load()
    monkeypatch.setattr(cuda_library, "load", lambda: real._replace(platform="CUDA"))
    step, tables, batch = _step_of(embax.SGD(0.1), True, False)
    assert "embax_cuda" not in jax.jit(step).lower(tables, batch).as_text()
