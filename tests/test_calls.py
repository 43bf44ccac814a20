"""The native kernels' calls against plain loops, for any input whatever, and inside every JAX construct."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, table_spec
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import embax
from embax.kernels import calls, cpu, native, reference
from embax.row_gradients import RowGradients
from embax.table_state import TableState

pytestmark = pytest.mark.skipif(
    not native._native_file().exists(), reason="the native library is not built (no C++ compiler?)"
)
INT32 = np.iinfo(np.int32)
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ANY_INT32 = st.integers(INT32.min, INT32.max) | st.integers(-2, 8)


def oracle(table, ids, offsets, gains):
    """Sums in float64 and, for the error bound, the sums of absolute terms."""
    bounds = np.clip(offsets.astype(np.int64), 0, len(ids))
    out = np.zeros((len(offsets) - 1, table.shape[1]), np.float64)
    size = np.zeros_like(out)
    for s in range(len(out)):
        for j in range(bounds[s], bounds[s + 1]):
            if 0 <= ids[j] < len(table):
                term = (1.0 if gains is None else float(gains[j])) * table[ids[j]].astype(np.float64)
                out[s] += term
                size[s] += np.abs(term)
    return out, size


def check(table, ids, offsets, gains, dtype="float32", sizes=None):
    table = np.asarray(jnp.asarray(table, dtype))
    found = calls.Occurrences(*map(as_array, (ids, offsets, None, gains)))
    got = calls.gather_pool(jnp.asarray(table), found, sizes or (len(offsets) - 1,), "float32")
    got = np.concatenate([np.asarray(part) for part in got])
    want, size = oracle(table, ids, offsets, gains)
    assert got.shape == want.shape
    assert np.all(np.abs(got.astype(np.float64) - want) <= (len(ids) + 1) * 2.0**-23 * size)


def as_array(values):
    return None if values is None else jnp.asarray(values)


def problem(rows, dim, lengths, *, with_gains, spare=0, seed=0):
    """Ragged samples over a random table; every fifth id names no row; `spare` positions belong to nobody."""
    rng = np.random.default_rng(seed)
    capacity = sum(lengths) + spare
    ids = rng.integers(0, max(rows, 1), capacity, dtype=np.int32)
    ids[::5] = rng.choice([-1, rows, INT32.min, INT32.max], len(ids[::5]))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    gains = rng.standard_normal(capacity).astype(np.float32) if with_gains else None
    return rng.standard_normal((rows, dim)).astype(np.float32), ids, offsets, gains


# ---- gather and pool ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("with_gains", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 64, 100, 191])
def test_pooling_equals_the_loop(dim, with_gains, dtype):
    check(*problem(50, dim, [3, 0, 1, 7, 0, 40, 2], with_gains=with_gains, spare=9), dtype=dtype, sizes=(2, 0, 4, 1))


@pytest.mark.parametrize(
    ("rows", "dim", "lengths"), [(4, 8, []), (4, 8, [0, 0]), (0, 8, [3]), (4, 0, [3]), (1, 1, [1])]
)
def test_nothing_to_pool(rows, dim, lengths):
    check(*problem(rows, dim, lengths, with_gains=False))
    check(*problem(rows, dim, lengths, with_gains=True))


@hypothesis.given(ids=st.lists(ANY_INT32, min_size=6, max_size=6), offsets=st.lists(ANY_INT32, min_size=4, max_size=4))
def test_garbage_stays_inside_the_arrays(ids, offsets):
    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    check(table, np.array(ids, np.int32), np.array(offsets, np.int32), None)


def test_the_gain_of_an_absent_id_is_not_read():
    found = calls.Occurrences(jnp.array([-1, 1, 2]), jnp.array([0, 3]), None, jnp.array([np.nan, 2.0, np.inf]))
    np.testing.assert_array_equal(calls.gather_pool(jnp.ones((2, 3)), found, (1,), "float32")[0], [[2.0, 2.0, 2.0]])


def test_a_large_result_is_streamed_right():
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(1000, 64)).astype(np.float32), rng.integers(-1, 1001, 530_000, np.int32)
    found = calls.Occurrences(jnp.asarray(ids), jnp.arange(530_001, dtype=jnp.int32))
    pooled = np.asarray(calls.gather_pool(jnp.asarray(table), found, (530_000,), "float32")[0])
    present = (ids >= 0) & (ids < 1000)
    np.testing.assert_array_equal(pooled, np.where(present[:, None], table[np.clip(ids, 0, 999)], 0))
    rows = np.asarray(calls.gather_rows(jnp.asarray(table), jnp.asarray(ids)))
    np.testing.assert_array_equal(rows, np.where(present[:, None], table[np.clip(ids, 0, 999)], np.nan))


@pytest.mark.parametrize("dtype", EPSILON)
def test_every_16_bit_number_is_read_and_written(dtype):
    if dtype == "float32":
        return
    bits = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.dtype(dtype))
    table = jnp.broadcast_to(bits[:, None], (2**16, 17))  # strips of 16 and 1: vector code and what is left
    found = calls.Occurrences(jnp.arange(2**16, dtype=jnp.int32), jnp.arange(2**16 + 1, dtype=jnp.int32))
    wide = np.asarray(calls.gather_pool(table, found, (2**16,), "float32")[0])
    with np.errstate(invalid="ignore"):
        wanted = np.asarray(bits).astype(np.float32)[:, None] + np.float32(0)
    wanted = np.where(np.abs(wanted) < np.finfo(np.float32).tiny, 0, wanted)  # XLA flushes these to zero
    np.testing.assert_array_equal(wide, np.broadcast_to(wanted, wide.shape))
    narrow = calls.gather_pool(jnp.asarray(wide), found, (2**16,), dtype)[0]
    np.testing.assert_array_equal(np.asarray(narrow).astype(np.float32), wide)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_is_rounded_to_nearest(dtype):
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(4000, 17)) * 10.0 ** rng.integers(-9, 6, (4000, 17))).astype(np.float32)
    values[:8, 0] = [65504, 65519.996, 65520, 7e4, -7e4, np.inf, -np.inf, np.nan]
    found = calls.Occurrences(jnp.arange(4000, dtype=jnp.int32), jnp.arange(4001, dtype=jnp.int32))
    got = np.asarray(calls.gather_pool(jnp.asarray(values), found, (4000,), dtype)[0]).astype(np.float32)
    with np.errstate(over="ignore"):
        wanted = (values + np.float32(0)).astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(got, wanted)


def test_products_are_the_derivative_of_gains():
    table, ids, offsets, _ = problem(30, 21, [3, 0, 6], with_gains=False, spare=2)
    gradients = np.random.default_rng(1).normal(size=(3, 21)).astype(np.float32)
    got = calls.row_products(*map(jnp.asarray, (table, ids, offsets, gradients)))
    sample = [0, 0, 0, *[2] * 6, -1, -1]
    wanted = [
        table[i].astype(np.float64) @ gradients[s] if s >= 0 and 0 <= i < 30 else 0.0
        for i, s in zip(ids, sample, strict=True)
    ]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# ---- sums and steps ----------------------------------------------------------------------------------------


def sums_of(ids, samples, gains, gradients, rows):
    total = np.zeros((rows, gradients.shape[1]))
    for j, row in enumerate(ids):
        if 0 <= row < rows and 0 <= samples[j] < len(gradients):
            total[row] += (1.0 if gains is None else gains[j]) * gradients[samples[j]].astype(np.float64)
    return total


@hypothesis.given(
    ids=st.lists(ANY_INT32, max_size=12),
    samples=st.lists(ANY_INT32, min_size=12, max_size=12),
    weighted=st.booleans(),
    dim=st.sampled_from([1, 3, 16, 70]),
)
def test_sums_of_any_occurrences(ids, samples, weighted, dim):
    rng, ids = np.random.default_rng(len(ids)), np.array(ids, np.int32)
    samples = np.array(samples[: len(ids)], np.int32)
    gradients, gains = rng.normal(size=(5, dim)).astype(np.float32), rng.normal(size=len(ids)).astype(np.float32)
    gains = gains if weighted else None
    if not len(ids):
        return
    summed = cpu.sum_rows(*map(as_array, (ids, gradients, samples, gains)), 7)
    wanted = sums_of(ids, samples, gains, gradients, 7)
    np.testing.assert_allclose(summed.to_dense(), wanted, rtol=1e-5, atol=1e-5)
    rows = np.asarray(summed.rows)
    touched = sorted({int(i) for i, s in zip(ids, samples, strict=True) if 0 <= i < 7 and 0 <= s < 5})
    assert rows.tolist() == touched + [7] * (len(rows) - len(touched))
    assert not np.asarray(summed.values)[len(touched) :].any()


@hypothesis.given(ids=st.lists(ANY_INT32, min_size=6, max_size=6), offsets=st.lists(ANY_INT32, min_size=4, max_size=4))
def test_a_step_of_garbage_moves_only_rows_it_names(ids, offsets):
    optimizer, table = embax.Adagrad(0.1), jnp.arange(20, dtype=jnp.float32).reshape(5, 4)
    state = embax.init_slots(optimizer, table)
    found = calls.Occurrences(jnp.array(ids, jnp.int32), jnp.array(offsets, jnp.int32))
    hyper = (optimizer.modifiers(0), optimizer.hyperparameters(0))
    parts = (state.table, *state.slots)
    new = calls.update("adagrad", parts, found, table, (jnp.ones((3, 4)),), hyper)
    others = [i for i in range(5) if i not in ids]
    for before, after in zip(parts, new, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])


@pytest.mark.parametrize("dtype", EPSILON)
def test_blocks_of_gradients_are_one_sequence(dtype):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 50, 40_000), jnp.int32)
    blocks = [rng.normal(size=(n, 5)) for n in (1, 0, 9000, 30_000, 999)]
    blocks = [jnp.asarray(block, dtype) for block in blocks]
    whole = jnp.concatenate(blocks)
    apart = calls.row_gradients(calls.Occurrences(ids), ids, blocks, 50)
    together = calls.row_gradients(calls.Occurrences(ids), ids, (whole,), 50)
    np.testing.assert_array_equal(apart[1], together[1])
    wanted = sums_of(np.asarray(ids), np.arange(40_000), None, np.asarray(whole), 50)
    np.testing.assert_allclose(apart[1], wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("count", [1, 128, 129, 4096, 4097, 5000, 70_000])
def test_hot_rows(count):
    rng = np.random.default_rng(count)
    ids = np.where(rng.random(count) < 0.6, 3, rng.integers(0, 9, count)).astype(np.int32)
    values = rng.normal(size=(count, 6)).astype(np.float32)
    summed = cpu.sum_rows(jnp.asarray(ids), jnp.asarray(values), None, None, 9)
    wanted = sums_of(ids, np.arange(count), None, values, 9)
    bound = 4 * 2.0**-23 * count * sums_of(ids, np.arange(count), None, np.abs(values), 9)
    assert np.all(np.abs(np.asarray(summed.to_dense()) - wanted) <= bound + 1e-7)


def test_rows_of_a_hand_made_gradient_may_stand_in_any_order():
    state = embax.init_slots(embax.SGD(1.0), jnp.zeros((200, 2)))
    rows = jnp.asarray(np.random.default_rng(0).permutation(200), jnp.int32)
    values = jnp.stack([rows, 2 * rows], 1).astype(jnp.float32)
    hyper = (embax.SGD(1.0).modifiers(0), embax.SGD(1.0).hyperparameters(0))
    new = cpu.apply(embax.SGD(1.0), state, RowGradients(rows, values, 200), hyper)
    np.testing.assert_array_equal(new.table[:, 1], -2 * np.arange(200))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_at_random_is_the_references(dtype):
    optimizer, rng = embax.SGD(0.1, stochastic_rounding=5), np.random.default_rng(0)
    state = TableState(jnp.asarray(rng.normal(size=(300, 9)), dtype), embax.SGD(0.1).slots())
    rows = jnp.asarray(np.sort(rng.permutation(300)[:200]), jnp.int32)
    values = rng.normal(size=(200, 9)) * 10.0 ** rng.integers(-8, 6, (200, 9))
    gradient = RowGradients(rows, jnp.asarray(values, jnp.float32), 300)
    hyper = (optimizer.modifiers(11), optimizer.hyperparameters(11))
    for backend in (cpu, reference):
        one, two = (backend.apply(optimizer, state, gradient, hyper).table for _ in range(2))
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    np.testing.assert_array_equal(
        np.asarray(cpu.apply(optimizer, state, gradient, hyper).table),
        np.asarray(reference.apply(optimizer, state, gradient, hyper).table),
    )
    other = (optimizer.modifiers(12), optimizer.hyperparameters(12))
    assert (cpu.apply(optimizer, state, gradient, other).table != one).any()


def test_small_steps_are_kept_in_the_mean(backend):
    plain, kept = embax.SGD(1.0), embax.SGD(1.0, stochastic_rounding=0)
    final = {}
    for optimizer in (plain, kept):
        state = TableState(jnp.ones((64, 64), jnp.bfloat16), plain.slots())
        step = jax.jit(functools.partial(_one_step, backend, optimizer))
        for number in range(64):
            state = step(state, number)
        final[optimizer] = float(state.table.astype(jnp.float32).mean())
    assert final[plain] == 1.0  # 64 steps of 2^-10 are lost, each
    assert abs(final[kept] - (1 - 64 * 2**-10)) < 1e-3


def _one_step(backend, optimizer, state, number):
    gradient = RowGradients(jnp.arange(64, dtype=jnp.int32), jnp.full((64, 64), 2.0**-10), 64)
    hyper = (optimizer.modifiers(number), optimizer.hyperparameters(number))
    return embax.kernels.get(backend).apply(optimizer, state, gradient, hyper)


class Doubled(embax.SGD):
    """Another formula than the kernel of the class it inherits from."""

    def update_rows(self, rows, gradients, slots, hyper):
        return rows - 2 * hyper.learning_rate * gradients, slots


def test_a_changed_formula_is_obeyed(backend):
    assert Doubled(0.1).kernel_name() is None and embax.SGD(0.1).kernel_name() == "sgd"
    plan = embax.plan(feature(table_spec(rows=5, optimizer=Doubled(0.5)), inputs=(2,)), backend=backend)
    tables = embax.init(plan, jax.random.key(0))
    before = np.asarray(tables["item"].table)
    _, residuals = embax.lookup(plan, tables, embax.preprocess(plan, np.array([1, 3])))
    after = np.asarray(embax.update(plan, tables, residuals, jnp.ones((2, 4)), 0)["item"].table)
    np.testing.assert_allclose(before[[1, 3]] - after[[1, 3]], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(before[[0, 2, 4]], after[[0, 2, 4]])


def test_rows_beyond_32_bits_are_none():
    optimizer = embax.SGD(1.0)
    hyper = (optimizer.modifiers(0), optimizer.hyperparameters(0))
    with jax.enable_x64(True):
        gradient = RowGradients(jnp.array([1, 2**32 + 3]), jnp.ones((2, 1), jnp.float32), 8)
        new = cpu.apply(optimizer, embax.init_slots(optimizer, jnp.zeros((8, 1), jnp.float32)), gradient, hyper)
    assert np.asarray(new.table).ravel().tolist() == [0, -1, 0, 0, 0, 0, 0, 0]


def test_a_penalty_on_the_derivative_of_weights(backend):
    plan = embax.plan(feature(table_spec(), inputs=(2, 3)), backend=backend)
    tables, ids = embax.init(plan, jax.random.key(0)), jnp.array([[1, 2, 3], [4, 4, 5]])

    def loss(weights):
        batch = embax.preprocess_traced(plan, ids, weights)
        return jnp.tanh(embax.lookup(plan, tables, batch)[0] @ jnp.arange(4.0)).sum()

    weights = jnp.full((2, 3), 0.3)
    exact = jax.grad(lambda w: (jax.grad(loss)(w) ** 2).sum())(weights)
    step = 1e-2 * jnp.eye(6).reshape(6, 2, 3)
    near = [((jax.grad(loss)(weights + s) ** 2).sum() - (jax.grad(loss)(weights - s) ** 2).sum()) / 2e-2 for s in step]
    np.testing.assert_allclose(exact.reshape(-1), near, rtol=5e-2, atol=5e-2)


# ---- inside of JAX -----------------------------------------------------------------------------------------


def _state():
    return TableState(jnp.arange(24, dtype=jnp.float32).reshape(6, 4), embax.SGD(0.5).slots())


def _sgd(state, ids):
    found = calls.Occurrences(ids, jnp.arange(ids.shape[0] + 1, dtype=jnp.int32))
    acts = calls.gather_pool(state.table, found, (ids.shape[0],), "float32")[0]
    hyper = (embax.SGD(0.5).modifiers(0), embax.SGD(0.5).hyperparameters(0))
    return TableState(calls.update("sgd", (state.table,), found, acts, (acts,), hyper)[0], state.slots)


def _wanted(batches):
    table = np.arange(24, dtype=np.float32).reshape(6, 4)
    for ids in batches:
        counts = np.bincount(ids, minlength=6)[:, None]
        table = table - np.float32(0.5) * (counts * table)
    return table


BATCHES = np.array([[0, 3, 3], [5, 0, 1], [2, 2, 2]], np.int32)


def test_steps_in_scan_cond_and_while():
    @jax.jit
    def scanned(state):
        return jax.lax.scan(lambda s, ids: (_sgd(s, ids), None), state, BATCHES)[0]

    @jax.jit
    def looped(state):
        def body(carry):
            i, s = carry
            return i + 1, jax.lax.cond(i >= 0, _sgd, lambda s, _: s, s, jnp.asarray(BATCHES)[i])

        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, state))[1]

    for run in (scanned, looped):
        np.testing.assert_allclose(run(_state()).table, _wanted(BATCHES), rtol=1e-6)


def test_steps_under_vmap_and_on_a_mesh():
    states = TableState(jnp.stack([_state().table] * 3), ())
    batched = jax.jit(jax.vmap(_sgd))(states, BATCHES).table
    for got, ids in zip(batched, BATCHES, strict=True):
        np.testing.assert_allclose(got, _wanted([ids]), rtol=1e-6)
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 CPU devices")
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    tables = jnp.concatenate([_state().table + i for i in range(8)])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 6, 24), jnp.int32)

    def one(table, ids):
        return _sgd(TableState(table, ()), ids).table

    for checked in (True, False):
        mapped = jax.shard_map(one, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"), check_vma=checked)
        got = jax.jit(mapped)(tables, ids).reshape(8, 6, 4)
        for i in range(8):
            np.testing.assert_array_equal(got[i], one(_state().table + i, ids[3 * i : 3 * i + 3]))


def test_shapes_that_do_not_fit_are_named():
    found = calls.Occurrences(jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32), None, jnp.zeros(2))
    with pytest.raises(Exception, match="gains must be empty or hold one number an id"):
        jax.block_until_ready(calls.gather_pool(jnp.zeros((4, 2)), found, (2,), "float32"))
    with pytest.raises(Exception, match="the table must be \\[rows, dim\\] of float32, bfloat16 or float16"):
        jax.block_until_ready(calls.gather_pool(jnp.zeros((4, 2), jnp.int32), found, (2,), "float32"))
    hyper = (embax.SGD(0.5).modifiers(0), embax.SGD(0.5).hyperparameters(0))
    state = (jnp.zeros((4, 2)),)
    with pytest.raises(Exception, match="there is no kernel named nonsense"):
        jax.block_until_ready(calls.update("nonsense", state, found, found.ids, (jnp.zeros((2, 2)),), hyper))
    with pytest.raises(Exception, match="adagrad takes a table and 1 slots"):
        jax.block_until_ready(calls.update("adagrad", state, found, found.ids, (jnp.zeros((2, 2)),), hyper))
