"""preprocess: every form of the same ids is the same batch, and its activations are the oracle's."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from helpers import feature, table_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from id_cases import (
    BATCH,
    DEPTH,
    FORMS,
    POSITIONS,
    ROWS,
    SHAPES,
    allowed_ids,
    case_features,
    case_tables,
    check,
    coo,
    deep,
    expected,
    joined,
)  # fmt: skip

import embax
from embax.id_batch import bucket

pytestmark = pytest.mark.once

KINDS = tuple(SHAPES)
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4", ">i8")
# Multiples of a quarter: their sums are exact, so that "adds up to zero" means the same everywhere.
quarters = st.integers(-8, 8).map(lambda n: n / 4)


def plan_of(kind, backend=None, capacity=40, **own):
    features = case_features(kind, **own)
    return features, embax.plan(features, backend=backend, capacity=dict.fromkeys(features, capacity))


def rows_of(ids, depth, longest=POSITIONS + 1):
    level = st.lists(ids, max_size=longest)
    return level if depth == 1 else st.lists(st.lists(ids, max_size=2), max_size=longest)


def samples(features, kind, batch=BATCH):
    one = {
        name: st.lists(rows_of(st.sampled_from(allowed_ids(spec)), DEPTH[kind]), min_size=batch, max_size=batch)
        for name, spec in features.items()
    }
    return st.fixed_dictionaries(one)


def draw_weights(data, ids, depth):
    count = sum(len(joined(rows) if depth == 1 else joined(joined(rows))) for rows in ids.values())
    flat = iter(data.draw(st.lists(quarters, min_size=count, max_size=count)))
    return {name: deep(rows, depth, lambda row: [next(flat) for _ in row]) for name, rows in ids.items()}


def assert_same(one, other, message=""):
    assert jax.tree.structure(one) == jax.tree.structure(other), message
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype, message
        np.testing.assert_array_equal(a, b, err_msg=message)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_activations_are_the_oracles(kind, weighted, backend):
    features, plan = plan_of(kind, backend)

    @settings(max_examples=12)
    @given(st.data())
    def check_one(data):
        ids = data.draw(samples(features, kind))
        weights = draw_weights(data, ids, DEPTH[kind]) if weighted else None
        check(features, plan, embax.preprocess(plan, ids, weights), ids, weights)

    check_one()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_all_forms_are_one_batch(kind, weighted):
    features, depth = case_features(kind), DEPTH[kind]
    plan = embax.plan(features)

    @settings(max_examples=12)
    @given(st.data())
    def check_one(data):
        ids = data.draw(samples(features, kind))
        weights = draw_weights(data, ids, depth) if weighted else None
        wanted = embax.preprocess(plan, ids, weights)
        for form, make in FORMS.items():
            leaves = {name: make(rows, depth, "int16") for name, rows in ids.items()}
            beside = weights and {name: make(rows, depth, "float32") for name, rows in weights.items()}
            assert_same(wanted, embax.preprocess(plan, leaves, beside), form)
        if depth == 1 and kind != "sequence":
            leaves = {name: coo(rows, "int64") for name, rows in ids.items()}
            beside = weights and {name: coo(rows, "float64") for name, rows in weights.items()}
            assert_same(wanted, embax.preprocess(plan, leaves, beside), "CooIds")
            beside = weights and {name: leaf.values for name, leaf in beside.items()}
            assert_same(wanted, embax.preprocess(plan, leaves, beside), "CooIds, flat weights")
        leaves = {name: FORMS["RaggedIds"](rows, depth, "int64") for name, rows in ids.items()}
        flat = weights and {n: joined(r) if depth == 1 else joined(joined(r)) for n, r in weights.items()}
        assert_same(wanted, embax.preprocess(plan, leaves, flat), "RaggedIds, flat weights")
        columns = flat and {name: pa.array(values, pa.float32()) for name, values in flat.items()}
        assert_same(wanted, embax.preprocess(plan, leaves, columns), "RaggedIds, a column of weights")

    check_one()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_rectangles(kind, weighted, backend):
    """Dense arrays of any width, layout and origin give the oracle's activations; nested lists the same ones."""
    features, plan = plan_of(kind, backend)
    shape = (BATCH, *(SHAPES[kind][0][1:] or (3,)))
    forms = (
        lambda x: x,
        np.asfortranarray,
        jnp.asarray,
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: np.ascontiguousarray(x[::-1])[::-1],
    )

    @settings(max_examples=10)
    @given(st.data())
    def check_one(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
        make = data.draw(st.sampled_from(forms))
        dtypes = INTEGERS[:4] if make is not jnp.asarray else INTEGERS[:3]
        ids = {
            n: rng.choice(allowed_ids(s), shape).astype(data.draw(st.sampled_from(dtypes))) for n, s in features.items()
        }
        weights = {n: rng.integers(-4, 5, shape).astype("float32") / 4 for n in ids} if weighted else None
        batch = embax.preprocess(
            plan, {n: make(x) for n, x in ids.items()}, weights and {n: make(x) for n, x in weights.items()}
        )
        as_lists = {n: x.tolist() for n, x in ids.items()}
        weight_lists = weights and {n: x.tolist() for n, x in weights.items()}
        check(features, plan, batch, as_lists, weight_lists)
        check(features, plan, embax.preprocess(plan, as_lists, weight_lists), as_lists, weight_lists)
        # A rectangle of ids takes nested weights, and the other way round.
        assert_same(batch, embax.preprocess(plan, ids, weight_lists))
        assert_same(embax.preprocess(plan, as_lists, weights), embax.preprocess(plan, as_lists, weight_lists))

    check_one()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integer_width(dtype):
    features = {"x": feature(table_spec(rows=100), "x", (None,), out_of_range="drop")}
    plan, values = embax.plan(features), np.array([0, 99, 100, 127, 5], dtype)
    wanted = embax.preprocess(plan, {"x": [[0, 99], [], [100, 127, 5]]})
    assert wanted.statistics.out_of_range.tolist() == [[2]]
    assert_same(wanted, embax.preprocess(plan, {"x": embax.RaggedIds(values, np.array([0, 2, 2, 5], np.uint8))}))
    arrow = pa.ListArray.from_arrays([0, 2, 2, 5], pa.array(values.astype(values.dtype.newbyteorder("="))))
    assert_same(wanted, embax.preprocess(plan, {"x": arrow}))
    dense = embax.preprocess(plan, {"x": values})
    assert dense.stacks["item"].ids.tolist() == [[0, 99, 100, 100, 5]]
    assert_same(dense, embax.preprocess(plan, {"x": values.tolist()}))
    assert_same(dense, embax.preprocess(plan, {"x": pa.array(values.astype(values.dtype.newbyteorder("=")))}))


def test_ids_beyond_32_bits_are_dropped_whole():
    table = table_spec(rows=10)
    plan = embax.plan(feature(table, "x", (None,), out_of_range="drop", padding_id=2**64 - 1))
    far = [2**32 + 5, 2**63 + 5, 2**64 - 1, 3]
    for leaf in (
        np.array(far, np.uint64),
        far,
        [far],
        [far[:2], far[2:]],
        [np.array(far, np.uint64)],
        [*far, 2**70][:4],
    ):
        batch = embax.preprocess(plan, leaf)
        ids, statistics = batch.stacks["item"].ids, batch.statistics
        assert sorted(ids[ids < 10].tolist()) == [3]
        assert (statistics.ids.item(), statistics.padding.item(), statistics.out_of_range.item()) == (1, 1, 2)
    batch = embax.preprocess(plan, [[2**70, -(2**70), 1, 2**32 + 1]])
    assert batch.stacks["item"].offsets.tolist() == [[0, 1]] and batch.statistics.out_of_range.item() == 3


@pytest.mark.parametrize("samples", [60_000, 70_000])
def test_coordinates_of_many_samples(samples):
    plan = embax.plan(feature(table_spec(rows=10**6), "x", (None,)))
    rng = np.random.default_rng(0)
    of, values = rng.integers(0, samples, 2 * samples), np.arange(2 * samples)
    order = np.argsort(of, kind="stable")
    ids = embax.RaggedIds.from_lengths(values[order], np.bincount(of, minlength=samples))
    assert_same(
        embax.preprocess(plan, ids, values[order]), embax.preprocess(plan, embax.CooIds(of, values, samples), values)
    )


def test_fixed_size_lists():
    plan = embax.plan(feature(table_spec(), "x", (None, 2)))
    column = pa.array([[9, 9], [1, 2], None, [3, 4]], pa.list_(pa.int16(), 2)).slice(1)
    assert_same(embax.preprocess(plan, [[1, 2], [], [3, 4]]), embax.preprocess(plan, column))
    chunks = pa.chunked_array([column, column])
    assert_same(embax.preprocess(plan, [[1, 2], [], [3, 4]] * 2), embax.preprocess(plan, chunks))


def test_columns_of_nulls_and_no_chunks():
    plan = embax.plan(feature(table_spec(), "x", (None,)))
    for column in (pa.nulls(3), pa.array([None] * 3, pa.list_(pa.int8())), pa.array([[], None, []])):
        assert_same(embax.preprocess(plan, [[], [], []]), embax.preprocess(plan, column))
    assert_same(embax.preprocess(plan, []), embax.preprocess(plan, pa.chunked_array([], pa.list_(pa.int8()))))
    weights = pa.array([[0.5], None, [1.5, 2.0]])
    wanted = embax.preprocess(plan, [[1], [], [2, 3]], [[0.5], [], [1.5, 2.0]])
    assert_same(wanted, embax.preprocess(plan, pa.array([[1], None, [2, 3]]), weights))


def test_whatever_numpy_reads():
    pd = pytest.importorskip("pandas")
    plan = embax.plan(feature(table_spec(), "x", (None,)))
    wanted = embax.preprocess(plan, [[1], [], [2, 3]])
    assert_same(wanted, embax.preprocess(plan, pd.Series([[1], [], [2, 3]], index=[7, 8, 9])))
    assert_same(wanted, embax.preprocess(plan, [pd.Series([1]), None, range(2, 4)]))
    assert_same(embax.preprocess(plan, [1, 2]), embax.preprocess(plan, pd.Series([1, 2], dtype="Int64")))
    assert_same(embax.preprocess(plan, np.array([[1], [2]])), embax.preprocess(plan, pd.DataFrame({"x": [1, 2]})))
    assert_same(embax.preprocess(plan, [1, 2]), embax.preprocess(plan, np.ma.array([1, 2])))
    assert_same(embax.preprocess(plan, [1, 2]), embax.preprocess(plan, jnp.array([1, 2], jnp.int4)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "int8", "uint64"])
def test_weights_of_any_number_type(dtype, backend):
    plan = embax.plan(feature(table_spec(combiner="mean"), "x", (None,)), backend=backend)
    wanted = embax.preprocess(plan, [[1, 2], [3]], [[1.0, 3.0], [2.0]])
    flat = np.array([1, 3, 2]).astype(jnp.dtype(dtype))
    ids = embax.RaggedIds(np.array([1, 2, 3]), np.array([0, 2, 3]))
    assert_same(wanted, embax.preprocess(plan, ids, flat))
    assert wanted.stacks["item"].gains[0, :3].tolist() == [0.25, 0.75, 1.0]


def test_weights_for_some_features():
    features = case_features("ragged")
    plan = embax.plan(features)
    ids = {name: [[1, 2], [3]] for name in features}
    weights = {name: [[0.5, 1.0], [2.0]] if "mean" in name else None for name in features}
    batch = embax.preprocess(plan, ids, weights)
    values, tables = case_tables(plan)
    activations, _ = embax.lookup(plan, tables, batch)
    for name, spec in features.items():
        wanted = expected(spec, values[spec.table_spec.name], ids[name], weights[name])
        np.testing.assert_allclose(activations[name], wanted.activations, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combiner", ["mean", "sqrtn"])
def test_weights_that_add_up_to_zero(combiner, backend):
    plan = embax.plan(feature(table_spec(combiner=combiner), "x", (None,)), backend=backend)
    tables = embax.init(plan, jax.random.key(0))
    zero = [[0.0, 0.0], [2.0, -2.0]] if combiner == "mean" else [[0.0, 0.0], [-0.0, 0.0]]
    activations, _ = embax.lookup(plan, tables, embax.preprocess(plan, [[1, 2], [3, 4]], zero))
    np.testing.assert_array_equal(activations, np.zeros((2, 4)))


def test_weights_of_absent_ids_do_not_count(backend):
    plan = embax.plan(
        feature(table_spec(combiner="mean"), "x", (None,), padding_id=0, out_of_range="drop"), backend=backend
    )
    ids, weights = [[0, 1, 2], [99, 3]], [[np.nan, 1.0, 3.0], [np.inf, 2.0]]
    tables = embax.init(plan, jax.random.key(0))
    for leaf in (ids, FORMS["RaggedIds"](ids, 1, "int64")):
        activations, _ = embax.lookup(plan, tables, embax.preprocess(plan, leaf, weights))
        wanted, _ = embax.lookup(plan, tables, embax.preprocess(plan, [[1, 2], [3]], [[1.0, 3.0], [2.0]]))
        np.testing.assert_array_equal(activations, wanted)


def nothing(kind, batch):
    """Every way to say that there are no ids."""
    leaves = [[[]] * batch, ((),) * batch, [None] * batch, np.array([None] * batch, object), pa.array([None] * batch)]
    leaves += [pa.array([[]] * batch, pa.list_(pa.int8())), np.zeros((0, *SHAPES[kind][0][1:]))][: 2 - bool(batch)]
    inner = embax.RaggedIds([], [0]) if DEPTH[kind] == 2 else np.zeros(0)
    return [*leaves, embax.RaggedIds(inner, [0] * (batch + 1))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [0, BATCH])
def test_batches_without_ids(kind, batch, backend):
    features, plan = plan_of(kind, backend)
    _, tables = case_tables(plan)
    for leaf in nothing(kind, batch):
        ids = dict.fromkeys(features, leaf)
        weighted = embax.preprocess(plan, ids, ids).stacks["mean_sqrtn_sum"]
        got = embax.preprocess(plan, ids)
        np.testing.assert_array_equal(weighted.offsets, got.stacks["mean_sqrtn_sum"].offsets)
        assert (got.stacks["mean_sqrtn_sum"].ids >= 3 * ROWS).all()
        assert sum(int(np.sum(count)) for count in got.statistics) == 0
    activations, residuals = embax.lookup(plan, tables, got)
    for value in activations.values():
        assert value.shape == (batch, *SHAPES[kind][1][1:])
        np.testing.assert_array_equal(value, 0.0)
    if kind == "ragged":
        new = embax.update(plan, tables, residuals, jax.tree.map(jnp.ones_like, activations), 0)
        assert_same(tables, new)


def test_a_rectangle_of_width_zero(backend):
    plan = embax.plan(feature(table_spec(combiner="mean"), "x", (None,)), backend=backend)
    batch = embax.preprocess(plan, np.zeros((3, 0), np.int32), np.zeros((3, 0)))
    activations, _ = embax.lookup(plan, embax.init(plan, jax.random.key(0)), batch)
    np.testing.assert_array_equal(activations, np.zeros((3, 4)))


@pytest.mark.parametrize("capacity", [11, 100])
def test_capacity_changes_no_bit(capacity, backend):
    features = case_features("ragged")
    rng = np.random.default_rng(3)
    ids = {name: [rng.integers(1, ROWS, n).tolist() for n in (4, 0, 5, 2)] for name in features}
    weights = {name: [rng.normal(size=len(r)).tolist() for r in rows] for name, rows in ids.items()}
    reference = embax.plan(features, backend=backend)
    plan = embax.plan(features, backend=backend, capacity=dict.fromkeys(features, capacity))
    _, tables = case_tables(plan)
    for given_weights in (None, weights):
        batch = embax.preprocess(plan, ids, given_weights)
        assert batch.stacks["mean_sqrtn_sum"].ids.shape == (1, capacity * len(features))
        got, residuals = embax.lookup(plan, tables, batch)
        wanted, wanted_residuals = embax.lookup(reference, tables, embax.preprocess(reference, ids, given_weights))
        assert_same(wanted, got)
        if capacity < 100 or given_weights:
            continue
        gradients = jax.tree.map(jnp.ones_like, got)
        new = embax.update(plan, tables, residuals, gradients, 0)
        old = embax.update(reference, tables, wanted_residuals, gradients, 0)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_buckets_waste_at_most_an_eighth():
    counts = range(1, 5000)
    sizes = [bucket(n) for n in counts]
    assert sizes == sorted(sizes) and all(
        n <= size <= max(8, n * 9 / 8 + 1) for n, size in zip(counts, sizes, strict=True)
    )
    assert len(set(sizes)) < 85


def test_a_sequence_keeps_its_first_or_last_positions():
    for truncate, kept in (("keep_first", [[1, 2, 3], [4]]), ("keep_last", [[3, 4, 5], [4]])):
        spec = feature(table_spec(), "x", (None, 3), (None, 3, 4), truncate=truncate)
        batch = embax.preprocess(embax.plan(spec), [[1, 2, 3, 4, 5] if truncate == "keep_last" else [1, 2, 3, 9], [4]])
        assert batch.stacks["item"].ids.tolist() == [[*kept[0], 4, 50, 50]]
        assert batch.statistics.truncated.item() == (2 if truncate == "keep_last" else 1)
        # What is cut off is not looked at.
        embax.preprocess(embax.plan(spec), [[-1, 1, 2, 3] if truncate == "keep_last" else [1, 2, 3, -1]])


def test_positions_of_two_dimensions(backend):
    spec = feature(table_spec(combiner="mean"), "x", (None, 2, 3), (None, 2, 3, 4), truncate="keep_last")
    plan = embax.plan(spec, backend=backend)
    dense = np.arange(12).reshape(2, 2, 3)
    tables = embax.init(plan, jax.random.key(0))
    wanted = np.asarray(tables["item"].table)[dense]
    np.testing.assert_array_equal(embax.lookup(plan, tables, embax.preprocess(plan, dense))[0], wanted)
    assert_same(embax.preprocess(plan, dense), embax.preprocess(plan, dense.tolist()))
    ragged = [[[7], [0, 1, 2], [9, 3, 4, 5]], [[6]]]
    batch = embax.preprocess(plan, ragged)
    assert batch.stacks["item"].ids.tolist() == [[0, 1, 2, 3, 4, 5, 6] + [50] * 5]
    assert batch.statistics.truncated.item() == 2


def shown(tree):
    return repr(jax.tree.map(lambda leaf: leaf.to_pylist() if isinstance(leaf, pa.Array) else leaf, tree))


@pytest.mark.parametrize("weighted", [False, True])
def test_arguments_are_never_written_to(weighted):
    for kind in KINDS:
        features = case_features(kind)
        plan, depth = embax.plan(features), DEPTH[kind]
        rows = [[1, 2, 0], [], [3], [4, 5]] if depth == 1 else [[[1, 2], [0]], [], [[3]], [[4], [5]]]
        weights = deep(rows, depth, lambda row: [0.5 for _ in row])
        for form in ("lists", "arrays", "RaggedIds", "objects of arrays", "Arrow lists"):
            ids, beside = FORMS[form](rows, depth, "int32"), FORMS[form](weights, depth, "float64")
            before = shown((ids, beside))
            for leaf in jax.tree.leaves((ids, beside)):
                if isinstance(leaf, np.ndarray):
                    leaf.setflags(write=False)
            batch = embax.preprocess(
                plan, dict.fromkeys(features, ids), dict.fromkeys(features, beside) if weighted else None
            )
            assert before == shown((ids, beside))
            for leaf in jax.tree.leaves(batch):
                leaf[...] = 0  # the batch is the caller's own, and shares nothing with the arguments
            assert before == shown((ids, beside))


def test_zeros_like_is_the_batch_without_ids(backend):
    features, plan = plan_of("wide", backend)
    _, tables = case_tables(plan)
    for leaf in (np.ones((BATCH, 2), int), [[1, 2]] * BATCH):
        batch = jax.tree.map(jnp.zeros_like, embax.preprocess(plan, dict.fromkeys(features, leaf)))
        activations, residuals = embax.lookup(plan, tables, batch)
        gradients = jax.tree.map(jnp.ones_like, activations)
        assert all((np.asarray(a) == 0).all() for a in activations.values())
        assert_same(tables, embax.update(plan, tables, residuals, gradients, 0))


def test_shapes_do_not_depend_on_the_data():
    plan = embax.plan(feature(table_spec(combiner="mean"), "x", (None, 2), padding_id=0))
    one, other = (embax.preprocess(plan, np.array(x)) for x in ([[1, 2], [3, 4]], [[0, 0], [0, 1]]))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [x.shape for x in jax.tree.leaves(one)] == [x.shape for x in jax.tree.leaves(other)]
