"""preprocess_traced: what preprocess gives, inside jit; what preprocess refuses is absent, counted, trains nothing.

Nothing here depends on the backend: the tests run on the one that embax chooses, for the sake of their compile times.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import feature, table_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from id_cases import BATCH, POSITIONS, ROWS, SHAPES, allowed_ids, case_features, case_tables, expected, joined

import embax

CAPACITY = 20
FORMS = ("dense", "RaggedIds", "CooIds")
CASES = [*((kind, "dense") for kind in SHAPES), ("ragged", "RaggedIds"), ("wide", "CooIds")]


def leaf_of(form, rows, dtype, fill=0):
    """The traced form of nested lists; ragged ones in arrays longer than their ids, filled up with ``fill``."""
    if form == "dense":
        return np.asarray(rows, dtype)
    lengths, flat = [len(row) for row in rows], joined(rows)
    values = np.full(CAPACITY, fill, dtype)
    samples = np.full(CAPACITY, len(rows), np.int32)
    values[: len(flat)], samples[: len(flat)] = flat, np.repeat(np.arange(len(rows)), lengths)
    if form == "RaggedIds":
        return embax.RaggedIds(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    mixed, order = np.random.default_rng(len(flat)).permutation(samples), np.empty(CAPACITY, int)
    for sample in range(len(rows) + 1):  # samples in any order, the ids of each in their own
        order[mixed == sample] = np.flatnonzero(samples == sample)
    return embax.CooIds(mixed, values[order], len(rows))


def flat_of(leaf):
    return leaf.values if isinstance(leaf, (embax.RaggedIds, embax.CooIds)) else leaf


def three_features(kind):
    """One feature for each combiner."""
    features = case_features(kind)
    return {name: features[name] for name in ("sum dropping", "mean padded", "sqrtn dropping")}


def lookup_of(plan, tables):
    @jax.jit
    def run(ids, weights):
        batch = embax.preprocess_traced(plan, ids, weights)
        activations, residuals = embax.lookup(plan, tables, batch)
        return activations, batch.statistics, residuals

    return run


def random_rows(rng, choices, kind, form):
    if form == "dense":
        return rng.choice(choices, (BATCH, *(SHAPES[kind][0][1:] or (3,)))).tolist()
    return [rng.choice(choices, rng.integers(0, 5)).tolist() for _ in range(BATCH)]


def like(rows, make):
    return [like(row, make) if isinstance(row, list) else make() for row in rows]


@pytest.mark.parametrize(("kind", "form"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_same_as_on_the_host(kind, form, weighted):
    features = three_features(kind)
    plan = embax.plan(features)
    values, tables = case_tables(plan)
    run = lookup_of(plan, tables)

    @settings(max_examples=10)
    @given(st.integers(0, 10**6))
    def check(seed):
        rng = np.random.default_rng(seed)
        rows = {name: random_rows(rng, allowed_ids(spec), kind, form) for name, spec in features.items()}
        weights = {n: like(r, lambda: int(rng.integers(-4, 5)) / 4) for n, r in rows.items()} if weighted else None
        ids = {name: leaf_of(form, r, "int16", fill=3) for name, r in rows.items()}
        beside = weights and {name: flat_of(leaf_of(form, r, "float32", np.nan)) for name, r in weights.items()}
        activations, statistics, residuals = run(ids, beside)
        host = embax.preprocess(plan, {n: np.asarray(r) if form == "dense" else r for n, r in rows.items()}, weights)
        for mine, theirs in zip(statistics, host.statistics, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        for name, spec in features.items():
            wanted = expected(spec, values[spec.table_spec.name], rows[name], weights and weights[name])
            np.testing.assert_allclose(activations[name], wanted.activations, rtol=1e-5, atol=1e-5, err_msg=name)
        if form == "dense":
            (mine,), (theirs,) = residuals.batch.stacks.values(), host.stacks.values()
            assert jax.tree.structure(mine) == jax.tree.structure(theirs)
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            np.testing.assert_array_equal(mine.offsets, theirs.offsets)
            if mine.gains is not None:
                absent = theirs.ids == 3 * ROWS
                np.testing.assert_allclose(
                    np.where(absent, 0, mine.gains), np.where(absent, 0, theirs.gains), rtol=1e-6
                )

    check()


@pytest.mark.parametrize(("kind", "form"), [("sequence", "dense"), ("ragged", "dense"), *CASES[-2:]])
def test_what_is_bad_trains_nothing(kind, form):
    """Bad ids and weights among good ones: the step is the oracle's for the good ones; elsewhere no bit moves."""
    features = three_features(kind)
    plan = embax.plan(features)
    values, tables = case_tables(plan)
    rng = np.random.default_rng(5)
    bad_ids, numbers = [-1, -(2**31), ROWS, 2**31 - 1, 120], [0.5, 1.0, np.nan, np.inf, -np.inf, 2.0]
    rows = {name: random_rows(rng, [0, 1, 2, 5] * 3 + bad_ids, kind, form) for name in features}
    weights = {name: like(r, lambda: rng.choice(numbers)) for name, r in rows.items()}
    ids = {name: leaf_of(form, r, "int32", fill=4) for name, r in rows.items()}
    beside = {name: flat_of(leaf_of(form, r, "float32", 1.0)) for name, r in weights.items()}
    activations, statistics, residuals = lookup_of(plan, tables)(ids, beside)
    gradients = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in activations.items()}
    new = embax.to_arrays(plan, embax.update(plan, tables, residuals, gradients, 0))
    assert statistics.bad_weights.sum() > 0 and statistics.out_of_range.sum() > 0
    for index, (name, spec) in enumerate(sorted(features.items())):
        assert np.isfinite(activations[name]).all()
        combiner = spec.table_spec.combiner
        pairs = [list(zip(r, w, strict=True)) for r, w in zip(rows[name], weights[name], strict=True)]
        pairs = [[pair] for pair in joined(pairs)] if kind == "sequence" else pairs
        present = [[(i, w) for i, w in of if 0 <= i < ROWS and i != spec.padding_id] for of in pairs]
        good = [[(i, w) for i, w in of if np.isfinite(w)] for of in present]
        padding = sum(i == spec.padding_id for i, _ in joined(pairs))
        n_present, n_good = len(joined(present)), len(joined(good))
        outside, bad = len(joined(pairs)) - n_present - padding, n_present - n_good
        assert [int(c[0, index]) for c in statistics] == [n_good, padding, outside, 0, bad]
        samples, kept = [[[pair[k] for pair in of] for of in good] for k in (0, 1)]
        gradient = gradients[name].reshape(len(samples), -1)
        table, options = values[combiner], {"hyper": {"learning_rate": 1.0}}
        wanted, _ = oracle.update(table, {}, samples, kept, combiner, gradient, "sgd", **options)
        np.testing.assert_allclose(new[combiner]["table"], wanted, rtol=1e-5, atol=1e-5)
        still = sorted(set(range(ROWS)) - set(joined(samples)))
        assert {3, 4, 6} <= set(still)
        np.testing.assert_array_equal(np.asarray(new[combiner]["table"])[still], table[still])


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_derivatives_with_respect_to_weights(kind, form):
    features = three_features(kind)
    plan = embax.plan(features)
    values, tables = case_tables(plan)
    rng = np.random.default_rng(7)
    rows = {name: random_rows(rng, [0, 2, 3, 5], kind, form) for name in features}
    weights = {name: like(r, lambda: rng.choice([0.25, 0.5, 1.0, -0.75, 2.0])) for name, r in rows.items()}
    for name in weights:
        weights[name][0] = like(weights[name][0], lambda: 0.0)  # a divisor of zero: all derivatives are zero
    ids = {name: leaf_of(form, r, "int32") for name, r in rows.items()}
    beside = {name: flat_of(leaf_of(form, r, "float32")) for name, r in weights.items()}

    @jax.jit
    def loss(weights, scale):
        activations, _ = embax.lookup(plan, tables, embax.preprocess_traced(plan, ids, weights))
        return sum(jnp.sum(a * s) for a, s in zip(jax.tree.leaves(activations), jax.tree.leaves(scale), strict=True))

    shape = (BATCH, *SHAPES[kind][1][1:])
    scale = {name: rng.normal(size=shape).astype(np.float32) for name in features}
    got = jax.grad(loss)(beside, scale)
    for name, spec in features.items():
        wanted = expected(spec, values[spec.table_spec.name], rows[name], weights[name])
        gradients = scale[name].reshape(-1, shape[-1])
        combiner = spec.table_spec.combiner
        flat = joined(oracle.weight_gradients(values[combiner], wanted.samples, wanted.weights, combiner, gradients))
        placed = np.asarray(got[name])
        if form == "CooIds":  # back into the order of the samples; spare room comes last
            placed = placed[np.argsort(ids[name].samples, kind="stable")]
        placed = placed.reshape(-1)
        np.testing.assert_allclose(placed[: len(flat)], flat, rtol=2e-5, atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(placed[len(flat) :], 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_batches_under_vmap(form):
    features = {
        "mean padded": case_features("wide")["mean padded"],
        "sqrtn dropping": case_features("wide")["sqrtn dropping"],
    }
    plan = embax.plan(features)
    _, tables = case_tables(plan)
    rng, many = np.random.default_rng(2), 3
    rows = [{n: random_rows(rng, [0, 1, 2, -1, 99], "wide", form) for n in features} for _ in range(many)]
    ids = [{n: leaf_of(form, r, "int32") for n, r in one.items()} for one in rows]
    numbers = [0.5, np.nan, 2.0]
    weights = [{n: rng.choice(numbers, flat_of(x).shape).astype("float32") for n, x in one.items()} for one in ids]

    def loss(weights, ids):
        batch = embax.preprocess_traced(plan, ids, weights)
        activations = embax.lookup(plan, tables, batch)[0]
        return sum(jnp.sum(a**2) for a in activations.values()), (activations, batch.statistics)

    run = jax.value_and_grad(loss, has_aux=True)
    stacked = jax.tree.map(lambda *x: np.stack(x), *weights), jax.tree.map(lambda *x: np.stack(x), *ids)
    got, one_by_one = jax.jit(jax.vmap(run))(*stacked), jax.jit(run)
    assert np.isfinite(jax.tree.leaves(got[1])[0]).all()
    for index in range(many):
        wanted = one_by_one(weights[index], ids[index])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a[index], b, rtol=1e-5, atol=1e-5)


# ---- any splits, any samples ------------------------------------------------------------------------------

int32s = st.one_of(st.integers(-3, 9), st.integers(-(2**31), 2**31 - 1), st.sampled_from([-(2**31), 2**31 - 1]))


def check_garbage(plan, tables, run, leaf, of_samples, strays):
    """Asserts that the ids of each sample are ``of_samples``, and that of the rest ``strays`` are counted."""
    weights = np.linspace(0.5, 2.0, 6).astype(np.float32)
    activations, statistics, residuals = run({"x": leaf, "y": np.array([[1, 2], [3, 3]])}, {"x": weights, "y": None})
    ids, table = np.asarray(leaf.values), np.asarray(tables["item"].table)
    good = [[i for i in of if 0 <= ids[i] < ROWS] for of in of_samples]
    pooled = oracle.pool(table, [ids[g].tolist() for g in good], [weights[g].tolist() for g in good], "mean")
    np.testing.assert_allclose(activations["x"], pooled, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(activations["y"], [(table[1] + table[2]) / 2, table[3]], rtol=1e-5, atol=1e-5)
    owned = len(joined(of_samples))
    assert statistics.ids[0].tolist() == [len(joined(good)), 4]
    assert statistics.out_of_range[0].tolist() == [owned - len(joined(good)) + strays, 0]
    return residuals


@pytest.fixture(scope="module")
def garbage():
    table = table_spec(rows=ROWS, combiner="mean", optimizer=embax.SGD(1.0))
    plan = embax.plan({"x": feature(table, "x", (None,)), "y": feature(table, "y", (None, 2))})
    tables = embax.init(plan, jax.random.key(1))
    return plan, tables, lookup_of(plan, tables)


@settings(max_examples=60)
@given(values=st.lists(st.integers(-2, 8), min_size=6, max_size=6), splits=st.lists(int32s, min_size=4, max_size=4))
def test_any_splits(garbage, values, splits):
    leaf = embax.RaggedIds(np.array(values, np.int32), np.array(splits, np.int32))
    ends = np.maximum.accumulate(np.clip(splits, 0, 6))
    of_samples = [list(range(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    check_garbage(*garbage, leaf, of_samples, strays=ends[0])


@settings(max_examples=60)
@given(values=st.lists(st.integers(-2, 8), min_size=6, max_size=6), samples=st.lists(int32s, min_size=6, max_size=6))
def test_any_samples(garbage, values, samples):
    leaf = embax.CooIds(np.array(samples, np.int32), np.array(values, np.int32), 3)
    of_samples = [[i for i, sample in enumerate(samples) if sample == s] for s in range(3)]
    strays = sum(not 0 <= sample <= 3 for sample in samples)  # 3, one past the end, is room to spare
    check_garbage(*garbage, leaf, of_samples, strays)


# ---- integers and weights at their limits -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int4"])
def test_narrow_ids_of_large_tables(dtype):
    """A vocabulary beyond the ids' own range: nothing wraps."""
    for rows in (300, 70_000):
        plan = embax.plan(feature(table_spec(rows=rows, dim=1), "x", (None,), padding_id=-7))
        limits = jnp.iinfo(dtype)
        ids = jnp.array([limits.min, limits.max, 5], dtype)
        batch = jax.jit(lambda ids, plan=plan: embax.preprocess_traced(plan, ids))(ids)
        wanted = [id_ if 0 <= id_ < rows else rows for id_ in (limits.min, limits.max, 5)]
        assert batch.stacks["item"].ids.tolist() == [wanted]
        assert batch.statistics.out_of_range.item() == sum(w == rows for w in wanted)


@pytest.mark.parametrize("padding", [2**40, -(2**40), 2**31 - 1, 130, -1])
def test_padding_id_beyond_the_ids(padding):
    plan = embax.plan(feature(table_spec(rows=10), "x", (None,), padding_id=padding))
    for dtype in (jnp.int8, jnp.int32):
        statistics = embax.preprocess_traced(plan, jnp.array([-1, 3, 126], dtype)).statistics
        assert statistics.padding.item() == (padding == -1) and statistics.ids.item() == 1


def test_64_bit_arrays_of_numpy_do_not_wrap():
    plan = embax.plan(feature(table_spec(rows=10), "x", (None,)))
    far = np.array([2**32 + 5, -(2**32) + 5, 7, 2**63 - 1])
    for ids in (far, embax.RaggedIds(far, np.array([0, 4])), embax.CooIds(np.zeros(4, int), far, 1)):
        batch = embax.preprocess_traced(plan, ids)
        assert batch.stacks["item"].ids[0].tolist() == [10, 10, 7, 10] and batch.statistics.out_of_range.item() == 3
    batch = embax.preprocess_traced(plan, embax.RaggedIds(np.array([1, 2]), np.array([0, 2**32 + 1])))
    assert batch.stacks["item"].offsets.tolist() == [[0, 2]]


def test_64_bit_ids_with_x64():
    plan = embax.plan(feature(table_spec(rows=10), "x", (None,), padding_id=2**40))
    with jax.enable_x64(True):
        ids = jnp.array([2**32 + 5, 2**40, 7])
        assert ids.dtype == jnp.int64
        batch = jax.jit(lambda ids: embax.preprocess_traced(plan, ids))(ids)
    assert batch.stacks["item"].ids.tolist() == [[10, 10, 7]] and batch.stacks["item"].ids.dtype == jnp.int32
    assert batch.statistics.padding.item() == batch.statistics.out_of_range.item() == 1


@pytest.mark.parametrize("combiner", ["mean", "sqrtn"])
def test_weights_of_any_size(combiner):
    """Squares and sums of float32 weights neither overflow nor vanish: gains do not depend on the weights' scale."""
    plan = embax.plan(feature(table_spec(combiner=combiner), "x", (None,)))
    ids = embax.RaggedIds(np.array([1, 2, 3]), np.array([0, 2, 3]))

    def gains(weights):
        return embax.preprocess_traced(plan, ids, weights).stacks["item"].gains[0]

    run = jax.jit(
        jax.value_and_grad(lambda w: (jnp.sum(gains(w) * jnp.array([1.0, 2.0, 3.0])), gains(w)), has_aux=True)
    )
    for size in (1e-30, 1e-20, 1.0, 1e20, 3e38):
        weights = np.array([size, size / 2, size], np.float32)
        (_, got), gradient = run(weights)
        wanted = embax.preprocess(plan, ids, weights).stacks["item"].gains[0, :3]
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
        assert np.isfinite(gradient).all()


def test_weights_beside_other_splits_or_samples_are_bad():
    plan = embax.plan(feature(table_spec(), "x", (None,)))
    values, weights = jnp.array([1, 2, 3]), jnp.array([1.0, 2.0, 4.0])
    run = jax.jit(lambda ids, weights: embax.preprocess_traced(plan, ids, weights))
    ragged, coo = embax.RaggedIds(values, jnp.array([0, 2, 3])), embax.CooIds(jnp.array([1, 0, 1]), values, 2)
    same = run(ragged, embax.RaggedIds(weights, ragged.splits))
    assert same.stacks["item"].gains.tolist() == [[1.0, 2.0, 4.0]] and same.statistics.bad_weights.item() == 0
    other = run(ragged, embax.RaggedIds(weights, jnp.array([0, 1, 3])))
    assert other.stacks["item"].ids.tolist() == [[50, 50, 50]] and other.statistics.bad_weights.item() == 3
    assert run(coo, embax.CooIds(coo.samples, weights, 2)).stacks["item"].gains.tolist() == [[2.0, 1.0, 4.0]]
    other = run(coo, embax.CooIds(jnp.array([1, 1, 1]), weights, 2))
    assert other.stacks["item"].ids.tolist() == [[50, 1, 3]] and other.statistics.bad_weights.item() == 1


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_ragged_ids_from_traced_lengths(dtype):
    plan = embax.plan(feature(table_spec(rows=500), "x", (None,)))
    values, lengths = np.arange(450), np.array([120, 100, 120, 0, 110])

    @jax.jit
    def run(values, lengths):
        return embax.preprocess_traced(plan, embax.RaggedIds.from_lengths(values, lengths)).stacks["item"].offsets

    assert run(values, lengths.astype(dtype)).tolist() == [[0, 120, 220, 340, 340, 450]]


def test_everything_in_one_program():
    """Ids made inside jit, in a scan, with donated tables: preprocess_traced, lookup, update."""
    table = table_spec(rows=ROWS, combiner="mean", optimizer=embax.SGD(0.5))
    plan = embax.plan(feature(table, "x", (None, POSITIONS), (None, POSITIONS, 4)))
    tables = embax.init(plan, jax.random.key(0))
    start = np.asarray(tables["item"].table)

    def step(tables, key):
        ids = jax.random.randint(key, (BATCH, POSITIONS), -2, ROWS + 2)
        activations, residuals = embax.lookup(plan, tables, embax.preprocess_traced(plan, ids))
        return embax.update(plan, tables, residuals, jnp.ones_like(activations)), ids

    keys = jax.random.split(jax.random.key(3), 4)
    after, ids = jax.jit(lambda t, k: jax.lax.scan(step, t, k), donate_argnums=0)(tables, keys)
    counts = np.bincount(np.asarray(ids)[(ids >= 0) & (ids < ROWS)], minlength=ROWS)
    np.testing.assert_allclose(after["item"].table, start - 0.5 * counts[:, None], rtol=1e-5, atol=1e-5)
