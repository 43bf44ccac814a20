"""Host work on ids: C++ and NumPy agree whatever the numbers are; the quick way through preprocess is the long one."""

import importlib
import pickle
from contextlib import contextmanager
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import feature, table_spec
from hypothesis import given
from hypothesis import strategies as st

import embax
from embax.kernels import host, native

pytestmark = pytest.mark.once

preprocess_module = importlib.import_module("embax.preprocess")
DTYPES = [np.dtype(t) for t in host.TYPES]
FAR = [-(2**63), -(2**32) + 3, -(2**31), -2, -1, 0, 1, 3, 6, 7, 49, 50, 255, 2**31 - 1, 2**32 - 1, 2**32 + 3, 2**63 - 1]
WAYS = ("native", "NumPy", "long")


def need_native():
    if native.library() is None:
        pytest.skip("no native library")
    assert host._functions() is not None, "the native library has no host functions: build it anew"


@contextmanager
def way(name):
    """Within, preprocess goes one way: at once in C++, at once in NumPy, or feature by feature."""
    functions = host._functions() if name == "native" else None
    with mock.patch.object(host, "_functions", lambda: functions):
        if name != "long":
            yield
        else:
            with mock.patch.object(preprocess_module, "_at_once", lambda plan, leaves: None):
                yield


def numbers(dtype, likely=(0, 1, 3, 6)):
    """Arrays of any numbers that the dtype holds, most of them likely ids."""
    info = np.iinfo(dtype)
    far = [n for n in [*FAR, 2**63 + 5, 2**64 - 1] if info.min <= n <= info.max]
    one = st.one_of(st.sampled_from(likely), st.sampled_from(likely), st.sampled_from(far))
    return st.lists(one, max_size=40).map(lambda values: np.array(values, dtype))


def drawn_rule(data):
    vocabulary = data.draw(st.sampled_from([1, 7, 50, 200, 2**31 - 2]))
    offset = data.draw(st.integers(0, min(9, 2**31 - 2 - vocabulary)))
    absent = data.draw(st.integers(vocabulary + offset, min(vocabulary + offset + 5, 2**31 - 2)))
    padding = data.draw(st.one_of(st.none(), st.sampled_from(FAR)))
    combiner = data.draw(st.sampled_from(["sum", "mean", "sqrtn"]))
    return host.Rule(vocabulary, offset, absent, padding, data.draw(st.booleans()), combiner)


def drawn_splits(data, count, hostile):
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    splits = np.array([0, *cuts, count], data.draw(st.sampled_from([np.int32, np.int64])))
    if hostile and data.draw(st.booleans()):
        info = np.iinfo(splits.dtype)
        wrong = st.sampled_from([info.min, -1, 0, 1, count, count + 1, info.max])
        splits[data.draw(st.integers(0, len(splits) - 1))] = data.draw(wrong)
    return splits


def drawn_source(data, hostile):
    ids = data.draw(numbers(data.draw(st.sampled_from(DTYPES))))
    if data.draw(st.booleans()):
        splits = drawn_splits(data, ids.size, hostile)
        return host.Source(ids, len(splits) - 1, None, splits)
    divisors = [n for n in range(1, ids.size + 1) if ids.size % n == 0] or [0, 3]
    valency = data.draw(st.sampled_from(divisors))
    samples = ids.size // valency if valency else data.draw(st.integers(0, 3))
    if hostile:
        samples += data.draw(st.sampled_from([0, 0, -1, 1, 2**31]))
        valency += data.draw(st.sampled_from([0, 0, -1, 1, 2**62]))
    return host.Source(ids, samples, valency, None)


def filled(rule, source, gains, name):
    """The arrays after a job in the middle of them, and whether it was done; places outside must stay as they are."""
    samples = min(max(source.samples, 0), 50)
    counts = np.full((5, 1, 3), -7, np.int32)
    out = host.Arrays(source.ids.size + 5, samples + 5, gains, counts)
    arrays = [a[0] for a in (out.ids, out.offsets, out.gains) if a is not None]
    for array in arrays:
        array[:] = -7
    out.at, out.sample = 2, 3
    with way(name):
        done = host.fill(rule, source, out, 1)
    ids, offsets = arrays[0], arrays[1]
    for array in (ids, *arrays[2:]):
        assert (array[:2] == -7).all() and (array[2 + source.ids.size :] == -7).all()
    assert (offsets[:4] == -7).all() and (offsets[4 + samples :] == -7).all()
    assert (counts[:, 0, [0, 2]] == -7).all() and (counts[3:] == -7).all()
    if not done:
        return None
    assert out.sample == 3 + source.samples
    return [a[2 : out.at].tolist() for a in (ids, *arrays[2:])], offsets.tolist(), counts.tolist(), out.at


@pytest.mark.parametrize("hostile", [False, True])
def test_native_and_numpy_fill_the_same(hostile):
    need_native()

    @given(st.data(), st.booleans())
    def check_one(data, gains):
        rule, source = drawn_rule(data), drawn_source(data, hostile)
        assert filled(rule, source, gains, "native") == filled(rule, source, gains, "NumPy")

    check_one()


@pytest.mark.parametrize("name", WAYS[:2])
def test_the_example_of_the_header(name):
    if name == "native":
        need_native()
    rule = host.Rule(10, 100, 120, -1, True, "mean")
    ids = np.array([7, -1, 3, 12, 9, 0])
    third, half = float(np.float32(1) / 3), 0.5
    for source, rows, ends, gains in (
        (host.Source(ids, 2, 3, None), [107, 120, 103, 120, 109, 100], [0, 3, 6], [half] * 6),
        (host.Source(ids, 2, None, np.array([0, 3, 6])), [107, 103, 109, 100], [0, 2, 4], [half] * 4),
        (host.Source(ids[[0, 2, 4]], 1, 3, None), [107, 103, 109], [0, 3], [third] * 3),
    ):
        counts = np.zeros((5, 1, 1), np.int32)
        out = host.Arrays(source.ids.size, source.samples, True, counts)
        with way(name):
            assert host.fill(rule, source, out, 0)
        out.cut(out.at, 120)
        assert (out.ids.tolist(), out.offsets.tolist()) == ([rows], [ends])
        assert out.gains is not None and out.gains.tolist() == [gains]
        assert counts[:3, 0, 0].tolist() == ([4, 1, 1] if source.ids.size == 6 else [3, 0, 0])


@pytest.mark.parametrize("name", WAYS[:2])
def test_no_room_is_refused(name):
    if name == "native":
        need_native()
    source = host.Source(np.zeros(6, np.int32), 3, 2, None)
    for capacity, samples in ((5, 3), (6, 2)):
        out = host.Arrays(capacity, samples, False, np.zeros((5, 1, 1), np.int32))
        with way(name):
            assert not host.fill(host.Rule(9, 0, 9, None, False), source, out, 0)


rows_of_a_table = st.lists(st.one_of(st.integers(-3, 12), st.sampled_from([-(2**31), 2**31 - 1])), max_size=300)


@given(rows_of_a_table, st.sampled_from([0, 1, 7, 2**11, 2**22, 2**31 - 1]), st.integers(1, 10**5))
def test_distinct_rows(rows, bound, scale):
    rows = np.clip(np.array(rows, np.int64) * scale, -(2**31), 2**31 - 1).astype(np.int32)
    for name in WAYS[:2]:  # without a library both are NumPy
        with way(name):
            unique, inverse = host.distinct_rows(rows, bound)
        assert unique.dtype == inverse.dtype == np.int32 and unique.shape == inverse.shape == rows.shape
        wanted = sorted({row for row in rows.tolist() if 0 <= row < bound})
        assert unique.tolist() == wanted + [bound] * (len(rows) - len(wanted))
        if rows.size:
            np.testing.assert_array_equal(unique[inverse], np.where((rows >= 0) & (rows < bound), rows, bound))
            assert (inverse <= len(wanted)).all()


@given(
    st.lists(st.lists(st.integers(-3, 23), max_size=9), max_size=30),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
)
def test_partitions(samples, part_rows, parts, spare):
    """Of parts of a table: rows of a sample count once, distinct rows once."""
    rows = np.array([row for sample in samples for row in sample] + [2] * spare, np.int32)
    offsets = np.cumsum([0, *map(len, samples)]).astype(np.int32)
    end = part_rows * parts
    once = [row // part_rows for sample in samples for row in set(sample) if 0 <= row < end]
    distinct = [row // part_rows for row in {row for sample in samples for row in sample} if 0 <= row < end]
    wanted = [np.bincount(np.array(found, int), minlength=parts) for found in (once, distinct)]
    for name in WAYS[:2]:
        with way(name):
            np.testing.assert_array_equal(host.partitions(rows, offsets, part_rows, parts), wanted)


@pytest.mark.parametrize("sizes", [(1,) * 50, (3, 2000, 0, 700, 1025, 64), (0, 0), ()])
@pytest.mark.parametrize("part_rows, parts", [(2**31 - 1, 1), (500_000, 4), (300, 3), (1, 7)])
def test_partitions_of_long_samples_and_large_tables(sizes, part_rows, parts):
    rng = np.random.default_rng(len(sizes))
    rows = (rng.zipf(1.2, sum(sizes)) * 7919 % (part_rows * parts + 3)).astype(np.int32)
    offsets = np.cumsum([0, *sizes]).astype(np.int32)
    both = []
    for name in WAYS[:2]:
        with way(name):
            both.append(host.partitions(rows, offsets, part_rows, parts))
    np.testing.assert_array_equal(*both)
    assert not sum(sizes) or both[0][0].sum() > 0


def test_rows_that_shards_share():
    """Six ids of the example in csrc/host_layout.h, of two features; absent ones; where samples end."""
    ids, offsets = np.array([0, 1, 2, 3, 4, 99, 5, 1], np.int32), np.array([0, 2, 6, 6, 8], np.int32)
    features = np.array([[3, 1, 2], [1, 0, 0]])
    out = host.Laid(np.zeros(8, np.int32), np.zeros(4, np.int32), 10, np.zeros(2, np.int32), np.zeros(2, np.int32))
    with way("native"):
        assert host.lay(ids, offsets, features, 5, 99, out)
        assert not host.lay(ids, offsets, features[:1], 5, 99, out)  # a sample of no feature
        assert not host.lay(ids, offsets[::-1], features, 5, 99, out)
        assert not host.lay(ids, offsets, features, 2**31, 99, out)
        assert host.lay(ids, offsets, features, 5, 99, out)
    assert out.rows.tolist() == [7, 2, 8, 3, 9, 10, 7, 5]
    assert out.ends.tolist() == [12, 16, 16, 18]
    assert out.ids_of.tolist() == [2, 5] and out.distinct_of.tolist() == [2, 4]
    with way("NumPy"):
        assert not host.lay(ids, offsets, features, 5, 99, out)


@pytest.mark.parametrize("size", [1000, 163_840])
def test_distinct_rows_of_a_large_batch(size):
    rng = np.random.default_rng(0)
    for bound in (50, 10**6, 2**31 - 1):
        rows = rng.integers(-5, min(bound + 5, 2**31 - 1), size).astype(np.int32)
        both = []
        for name in WAYS[:2]:
            with way(name):
                both.append(host.distinct_rows(rows[::2], bound))
        np.testing.assert_array_equal(both[0], both[1])


# ---- preprocess ----------------------------------------------------------------------------------------------


def result(plan, ids, name):
    """What preprocess returns, leaf by leaf with its static parts; or the error, word by word."""
    with way(name):
        try:
            batch = embax.preprocess(plan, ids)
        except (ValueError, TypeError) as error:
            return type(error), str(error)
    leaves, structure = jax.tree.flatten(batch)
    for leaf in leaves:
        assert type(leaf) is np.ndarray and leaf.flags.writeable
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(batch.stacks))
    return structure, [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]


def assert_one_result(plan, ids):
    results = [result(plan, ids, name) for name in WAYS]
    assert results[0] == results[2]
    assert results[1] == results[2]


LAYOUTS = {
    "as it is": lambda x: x,
    "Fortran": np.asfortranarray,
    "every second": lambda x: np.repeat(x, 2, axis=0)[::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "unaligned": lambda x: np.frombuffer(b"?" + x.tobytes(), x.dtype, offset=1).reshape(x.shape) if x.size else x,
    "JAX": lambda x: jax.numpy.asarray(x) if x.dtype.itemsize < 8 else x,
}


def drawn_leaf(data, samples):
    ids = data.draw(numbers(data.draw(st.sampled_from(DTYPES)), (0, 1, 2, 3)))
    layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    if data.draw(st.booleans()):
        splits = np.array([0, *sorted(data.draw(st.lists(st.integers(0, ids.size), min_size=2, max_size=2))), ids.size])
        if not data.draw(st.integers(0, 5)):
            splits = drawn_splits(data, ids.size, True)
        return embax.RaggedIds(layout(ids), splits.astype(data.draw(st.sampled_from(["int32", "int64", "int16"]))))
    width = data.draw(st.sampled_from([None, 0, 1, 2, 3]))
    if width is None:
        return layout(np.resize(ids, samples) if ids.size else np.zeros(samples, ids.dtype))
    return layout(np.resize(ids, (samples, width)) if ids.size else np.zeros((samples, width), ids.dtype))


@given(st.data())
def test_every_way_gives_one_result(data):
    need_native()
    features, leaves, capacity = {}, {}, {}
    for name in ("a", "b", "c")[: data.draw(st.integers(1, 3))]:
        table = table_spec(
            name, rows=data.draw(st.sampled_from([4, 60])), combiner=data.draw(st.sampled_from(COMBINERS))
        )
        batch = data.draw(st.sampled_from([None, None, None, 3, 2]))
        inputs = data.draw(st.sampled_from([(batch,), (batch,), (batch, 2)]))
        padding = data.draw(st.sampled_from([None, None, 0, -1, 2**64 - 1]))
        lenient = data.draw(st.sampled_from(["drop", "drop", "error"]))
        features[name] = feature(table, name, inputs, padding_id=padding, out_of_range=lenient)
        leaves[name] = drawn_leaf(data, 3)
        if not data.draw(st.integers(0, 3)):
            capacity[name] = data.draw(st.sampled_from([2, 40]))
    stacks = data.draw(st.sampled_from(["auto", "none"]))
    assert_one_result(embax.plan(features, capacity=capacity, stacks=stacks), leaves)


COMBINERS = ("sum", "mean", "sqrtn")
SEQUENCES = {
    "sequence": ((None, 3), (None, 3, 4), (5, 3)),
    "pooled sequence": ((None, 3, 2), (None, 3, 4), (5, 3, 2)),
    "grid": ((2, 3, 2), (2, 3, 2, 4), (2, 3, 2)),
}


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences(kind, combiner):
    need_native()
    inputs, outputs, shape = SEQUENCES[kind]
    rng = np.random.default_rng(0)
    plan = embax.plan(feature(table_spec(combiner=combiner), "x", inputs, outputs, padding_id=0))
    for ids in (
        rng.integers(0, 4, shape),
        rng.integers(1, 50, shape, np.int32),
        np.full(shape, 50),
        np.ones((2, 2), int),
    ):
        assert_one_result(plan, ids)
    assert preprocess_module._at_once(plan, [rng.integers(0, 4, shape)]) is not None
    assert_one_result(plan, embax.RaggedIds(np.arange(4), np.array([0, 1, 4])))


@pytest.mark.parametrize("size", [(64,), (64, 20), (600, 20), (3, 9000), (1, 20_000)])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_large_batches(size, dtype):
    """Blocks begin and end inside of an array, with ids that are absent here and there."""
    need_native()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, size).astype(dtype)
    lengths = rng.poisson(7, 500)
    splits = np.concatenate([[0], np.cumsum(lengths)])
    for combiner in COMBINERS:
        for rows, padding in ((1000, None), (900, None), (1000, 3)):
            spec = feature(
                table_spec(rows=rows, combiner=combiner), "x", (None,), padding_id=padding, out_of_range="drop"
            )
            plan = embax.plan(spec)
            assert_one_result(plan, ids)
            assert preprocess_module._at_once(plan, [ids]) is not None
            ragged = embax.RaggedIds(rng.integers(0, 1000, splits[-1]).astype(dtype), splits)
            assert_one_result(plan, ragged)
            assert preprocess_module._at_once(plan, [ragged]) is not None


def test_a_plan_that_has_preprocessed_is_the_same_plan():
    plan = embax.plan({"x": feature(table_spec(initializer=jax.nn.initializers.ones), "x", (None,), padding_id=0)})
    twin = pickle.loads(pickle.dumps(plan))
    ids = {"x": np.array([1, 0, 2])}
    before = (hash(plan), repr(plan))
    wanted = result(plan, ids, "long")
    assert result(plan, ids, WAYS[1]) == wanted
    assert (hash(plan), repr(plan)) == before and plan == twin and hash(twin) == hash(plan)
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and result(again, ids, WAYS[1]) == wanted


def test_arguments_that_may_not_be_written():
    plan = embax.plan(feature(table_spec(), "x", (None,)))
    for leaf in (np.array([1, 2, 3]), embax.RaggedIds(np.array([1, 2, 3]), np.array([0, 2, 3]))):
        for array in jax.tree.leaves(leaf):
            array.setflags(write=False)
        for name in WAYS:
            batch = embax.preprocess(plan, leaf)
            assert result(plan, leaf, name) == result(plan, leaf, "long")
            assert not any(np.shares_memory(a, b) for a in jax.tree.leaves(batch) for b in jax.tree.leaves(leaf))
