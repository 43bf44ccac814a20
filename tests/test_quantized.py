"""Rows of 8 and 4 bits against NumPy in float64: the codes, the lookups, both backends, and what is refused."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, table_spec
from hypothesis import given
from hypothesis import strategies as st
from jax import export

import embax
from embax import kernels, quantized
from embax.id_batch import StackIds

pytestmark = pytest.mark.once

BITS, DIMS, ROWS = (8, 4), (1, 2, 3, 5, 16, 64, 100), 11
COMBINERS = {"sum": lambda w: w, "mean": lambda w: w / w.sum(), "sqrtn": lambda w: w / np.sqrt((w * w).sum())}
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
NATIVE = kernels.get("cpu").unavailable() is None
needs_library = pytest.mark.skipif(not NATIVE, reason="the native kernels cannot run here")


# ---- the oracle: the bytes of a row read one by one, sums by loops ---------------------------------------------------


def read_row(data, dim, bits):
    """Returns scale, bias and codes of one row, as csrc/quantized.h lays them out."""
    scale, bias = np.frombuffer(data[:8].tobytes(), np.float32)
    if bits == 8:
        return float(scale), float(bias), [int(byte) for byte in data[8 : 8 + dim]]
    half = (dim + 1) // 2
    codes = [int(data[8 + d]) & 15 if d < half else int(data[8 + d - half]) >> 4 for d in range(dim)]
    return float(scale), float(bias), codes


def read_rows(rows):
    """Returns the table in float64, and the size of the terms that it is made of."""
    parts = [read_row(row, rows.embedding_dim, rows.bits) for row in np.asarray(rows.data)]
    table = np.array([[scale * code + bias for code in codes] for scale, bias, codes in parts])
    sizes = np.array([[abs(scale * code) + abs(bias) for code in codes] for scale, bias, codes in parts])
    return table.reshape(rows.shape), sizes.reshape(rows.shape)


def pool(rows, samples, gains):
    """Returns the gain-weighted sums of samples of ids, and a bound of float32's error."""
    table, sizes = read_rows(rows)
    total, bound = np.zeros((len(samples), rows.embedding_dim)), np.zeros((len(samples), rows.embedding_dim))
    for s, (ids, own) in enumerate(zip(samples, gains, strict=True)):
        for i, gain in zip(ids, own, strict=True):
            if 0 <= i < len(table):
                total[s] += gain * table[i]
                bound[s] += abs(gain) * sizes[i] * (len(ids) + 4) * 2.0**-23
    return total, bound


def random_table(dim, rows=ROWS, dtype="float32", seed=0):
    rng = np.random.default_rng(seed + dim)
    return jnp.asarray(rng.normal(size=(rows, dim)) * rng.uniform(0.01, 10, (rows, 1)) + rng.normal(), dtype)


# ---- codes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", EPSILON)
def test_codes_are_those_of_the_formula(bits, dim, dtype):
    table = random_table(dim, dtype=dtype)
    rows = embax.quantize_rows(table, bits)
    assert rows.shape == table.shape and rows.data.dtype == jnp.uint8 and rows.nbytes == np.asarray(rows.data).nbytes
    assert rows.data.shape == (ROWS, 8 + (dim if bits == 8 else -(-dim // 2)))
    for row, data in zip(np.asarray(table, np.float64), np.asarray(rows.data), strict=True):
        scale, bias, codes = read_row(data, dim, bits)
        wanted = (row.max() - row.min()) / (2**bits - 1)
        assert bias == row.min() and abs(scale - wanted) <= 2.0**-22 * wanted
        # Half to even, but for what float32 cannot tell from a half.
        exact = (row - bias) / (scale or 1.0)
        assert np.all(np.abs(np.array(codes) - exact) <= 0.5 + 2.0**-14)
    if dim > 1:
        spread = np.asarray(table, np.float64)
        scales = np.ptp(spread, axis=1, keepdims=True) / (2**bits - 1)
        errors = np.abs(np.asarray(rows.dequantize(), np.float64) - spread)
        assert np.all(errors <= scales * (0.5 + 2.0**-14) + 2.0**-22 * np.abs(spread).max())


def test_half_goes_to_the_even_code():
    rows = embax.quantize_rows(jnp.array([[0.0, 0.5, 1.5, 2.5, 255.0]]))
    assert read_row(np.asarray(rows.data)[0], 5, 8) == (1.0, 0.0, [0, 0, 2, 2, 255])
    rows = embax.quantize_rows(jnp.array([[0.0, 0.5, 1.5, 2.5, 15.0]]), bits=4)
    assert read_row(np.asarray(rows.data)[0], 5, 4) == (1.0, 0.0, [0, 0, 2, 2, 15])


@pytest.mark.parametrize("bits", BITS)
def test_repeated_numbers_are_exact(bits, backend, monkeypatch):
    monkeypatch.setenv("EMBAX_BACKEND", backend)
    table = np.repeat(np.array([[0.1], [-3e38], [1e-30], [0.0]], np.float32), 5, 1)
    rows = embax.quantize_rows(table, bits)
    assert np.array_equal(rows.dequantize(), table) and np.array_equal(embax.take(rows, np.arange(4)), table)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_that_is_not_finite_is_a_row_of_nan(bits, backend, monkeypatch):
    monkeypatch.setenv("EMBAX_BACKEND", backend)
    bad = [
        [np.nan, 1, 2],
        [np.inf, 1, 2],
        [-np.inf, 1, 2],
        [np.inf, -np.inf, 0],
        [np.nan, np.nan, np.inf],
        [3e38, -3e38, 0],
    ]
    rows = embax.quantize_rows(np.array([*bad, [1, 2, 3]], np.float32), bits)
    for taken in (rows.dequantize(), embax.take(rows, jnp.arange(7))):
        assert np.isnan(taken[:6]).all()
        np.testing.assert_allclose(taken[6], [1, 2, 3], atol=1.01 / (2**bits - 1))


@pytest.mark.parametrize("where", [jnp.asarray, np.asarray])
def test_a_row_of_nan_in_a_large_table(where):
    """XLA's reductions of large arrays on CPU take the least of NaN and a number for the number."""
    table = np.array(random_table(16, 4000))
    table[::10, 3] = np.nan
    taken = np.asarray(embax.quantize_rows(where(table)).dequantize())
    assert np.array_equal(np.isnan(taken), np.broadcast_to(np.isnan(table).any(1, keepdims=True), table.shape))


@pytest.mark.parametrize("bits", BITS)
def test_blocks_change_nothing(bits, monkeypatch, tmp_path):
    table = np.array(random_table(5, 29))
    whole = embax.quantize_rows(table, bits)
    monkeypatch.setattr(quantized, "BLOCK_NUMBERS", 41)  # blocks of 8 rows, the last one of 5
    mapped = np.memmap(tmp_path / "table", np.float32, "w+", shape=table.shape)
    mapped[:] = table
    jitted = jax.jit(lambda table: embax.quantize_rows(table, bits))
    for rows in (embax.quantize_rows(table, bits), embax.quantize_rows(jnp.asarray(table), bits), jitted(table)):
        assert np.array_equal(rows.data, whole.data)
    assert np.array_equal(embax.quantize_rows(mapped, bits).data, whole.data)
    assert embax.quantize_rows(table[:0], bits).shape == (0, 5)


def test_peak_memory_is_the_result_and_a_block():
    table = jax.ShapeDtypeStruct((1_000_000, 16), jnp.float32)
    compiled = jax.jit(embax.quantize_rows).lower(table).compile()
    analysis = compiled.memory_analysis()
    assert analysis.output_size_in_bytes < 24_000_100
    assert analysis.temp_size_in_bytes < 24_000_000 + 3 * 4 * quantized.BLOCK_NUMBERS


# ---- lookups -------------------------------------------------------------------------------------------------------


def plan_of(dim, backend, dtype, activation_dtype):
    """Rectangles and ragged ids for every combiner in one stack; a sum without any gains in another."""
    features, stacks = {}, {"gained": ["sum", "mean", "sqrtn"], "plain": ["plain"]}
    for name in ("sum", "mean", "sqrtn", "plain"):
        combiner = "sum" if name == "plain" else name
        table = table_spec(name, ROWS, dim, embax.SGD(0.1), combiner, dtype=dtype)
        features[name] = feature(table, name, (6, 4))
        features["ragged_" + name] = feature(table, "ragged_" + name, (6,))
    return embax.plan(features, stacks=stacks, backend=backend, activation_dtype=activation_dtype)


def inputs_of(plan):
    """Returns ids and weights; ``mean`` has weights for its rectangles only, ``plain`` for none."""
    rng, ids, weights = np.random.default_rng(0), {}, {}
    for name in (found.name for found in plan.features):
        lengths = rng.integers(0, 6, 6) if name.startswith("ragged") else [4] * 6
        ids[name] = [rng.integers(0, ROWS, n) for n in lengths]
        weights[name] = [rng.uniform(0.1, 2, n).astype(np.float32) for n in lengths]
        if not name.startswith("ragged"):
            ids[name], weights[name] = np.array(ids[name]), np.array(weights[name])
    return ids, {name: None if name.endswith(("plain", "ragged_mean")) else w for name, w in weights.items()}


def _sweep():
    yield from ((dim, "float32", "float32") for dim in DIMS)
    yield from ((dim, dtype, dtype) for dim in (3, 64) for dtype in ("bfloat16", "float16"))
    yield 5, "bfloat16", "float32"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("dim", "dtype", "activation_dtype"), list(_sweep()))
def test_lookup_against_the_oracle(dim, dtype, activation_dtype, bits, backend):
    plan = plan_of(dim, backend, dtype, activation_dtype)
    served = embax.quantize_tables(plan, embax.init(plan, jax.random.key(dim)), bits)
    ids, weights = inputs_of(plan)
    batch = embax.preprocess(plan, ids, weights)
    assert batch.stacks["plain"].gains is None and batch.stacks["gained"].gains is not None
    activations, _ = embax.lookup(plan, served, batch)
    for stack, table in ((own, table) for own in plan.stacks for table in own.tables):
        rows = served[stack.name].table
        rows = dataclasses.replace(rows, data=rows.data[table.row_offset : table.row_offset + ROWS])
        for name in (table.name, "ragged_" + table.name):
            own = [np.ones(len(i)) for i in ids[name]] if weights[name] is None else weights[name]
            gains = [COMBINERS.get(table.name, COMBINERS["sum"])(np.asarray(w, np.float64)) for w in own]
            wanted, bound = pool(rows, ids[name], gains)
            assert activations[name].dtype == activation_dtype
            limit = 2 * bound + EPSILON[activation_dtype] * np.abs(wanted) + 1e-7
            assert np.all(np.abs(np.asarray(activations[name], np.float64) - wanted) <= limit), name


ANY = st.one_of(st.integers(-2, ROWS + 2), st.sampled_from([-(2**31), 2**31 - 1, -ROWS]))


@functools.cache
def small(dim, bits):
    plan = embax.plan(feature(table_spec(rows=ROWS, dim=dim, optimizer=embax.SGD(0.1)), inputs=(5,)))
    return plan.stacks[0], embax.quantize_rows(random_table(dim), bits)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def pooled(backend, dim, bits, ids, offsets, gains):
    stack, rows = small(dim, bits)
    return rows.lookup_pooled(stack, backend, StackIds(ids, offsets, gains, (2, 0, 3), (None, None, None)))


FORMS = st.sampled_from([(5, 8), (5, 4)])
CUTS = st.lists(st.integers(0, 16), min_size=6, max_size=6)


@given(st.lists(ANY, min_size=16, max_size=16), CUTS, FORMS, st.booleans())
def test_any_ids(ids, offsets, form, weighted):
    ids, offsets = np.array(ids, np.int32), np.sort(np.array(offsets, np.int32))
    offsets[0] = 0
    gains = np.linspace(-2, 2, 16, dtype=np.float32)
    gains[(ids < 0) | (ids >= ROWS)] = np.nan  # of what is absent: not read
    cuts = list(zip(offsets[:-1], offsets[1:], strict=True))
    own = [gains[a:b] if weighted else np.ones(b - a) for a, b in cuts]
    wanted, bound = pool(small(*form)[1], [ids[a:b] for a, b in cuts], own)
    for backend in ("reference", "cpu") if NATIVE else ("reference",):
        parts = pooled(backend, *form, ids, offsets, gains if weighted else None)
        assert [part.shape[0] for part in parts] == [2, 0, 3]
        assert np.all(np.abs(np.concatenate(parts) - wanted) <= bound + 1e-7), backend


@needs_library
@given(st.lists(ANY, min_size=6, max_size=6), FORMS)
def test_any_offsets(offsets, form):
    ids, offsets = np.arange(16, dtype=np.int32) - 2, np.array(offsets, np.int32)
    bounds = np.clip(offsets.astype(np.int64), 0, 16)
    samples = [ids[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    wanted, bound = pool(small(*form)[1], samples, [np.ones(len(s)) for s in samples])
    got = np.concatenate(pooled("cpu", *form, ids, offsets, None))
    assert np.all(np.abs(got - wanted) <= bound + 1e-7)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_take(dim, bits, backend, monkeypatch):
    monkeypatch.setenv("EMBAX_BACKEND", backend)
    rows = embax.quantize_rows(random_table(dim), bits)
    table, sizes = read_rows(rows)
    ids = np.array([[[0, ROWS - 1, -1]], [[-ROWS, 3, 3]]])
    for take in (embax.take, jax.jit(embax.take)):
        taken = take(rows, ids)
        assert taken.shape == (*ids.shape, dim) and taken.dtype == jnp.float32
        assert np.all(np.abs(taken - table[ids]) <= 2.0**-22 * sizes[ids])
    outside = np.array([ROWS, -ROWS - 1, 2**40, -(2**31)])
    assert np.isnan(embax.take(rows, outside)).all()
    assert [embax.take(rows, np.zeros(shape, int)).shape for shape in ((), (0, 2))] == [(dim,), (0, 2, dim)]
    np.testing.assert_allclose(embax.take(rows, np.arange(ROWS)), rows.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_backends_agree_and_one_id_is_its_row(bits):
    plan = embax.plan(feature(table_spec(rows=ROWS, dim=24), inputs=(None, 1)))
    batch, reference = embax.preprocess(plan, np.arange(ROWS)[:, None]), dataclasses.replace(plan, backend="reference")
    served = embax.quantize_tables(plan, {"item": embax.TableState(random_table(24), ())}, bits)
    activations = embax.lookup(plan, served, batch)[0]
    assert np.array_equal(activations, embax.take(served["item"].table, np.arange(ROWS)))
    np.testing.assert_allclose(activations, embax.lookup(reference, served, batch)[0], rtol=1e-5, atol=1e-6)


# ---- bits ----------------------------------------------------------------------------------------------------------

DIGESTS = """
import hashlib, numpy as np, jax.numpy as jnp, embax, test_quantized
from embax.kernels import native
for dim in (1, 3, 24, 64, 100):
    for bits in (8, 4):
        for part in test_quantized.large(dim, bits):
            print(hashlib.sha256(np.asarray(part).tobytes()).hexdigest())
print(native.vector_width())
"""


def large(dim, bits, samples=2000, valency=20, first=0, count=None):
    """Returns the activations of ``count`` samples out of many: of all of them, threads share the work."""
    rng = np.random.default_rng(0)
    ids = rng.integers(-2, 502, (samples, valency)).astype(np.int32)
    gains = rng.normal(size=ids.shape).astype(np.float32)
    plan = embax.plan(feature(table_spec(rows=500, dim=dim, optimizer=embax.SGD(0.1)), inputs=(samples, valency)))
    rows = embax.quantize_rows(random_table(dim, 500), bits)
    ids, gains = (part[first : None if count is None else first + count] for part in (ids, gains))
    offsets = jnp.arange(len(ids) + 1, dtype=jnp.int32) * valency
    found = StackIds(jnp.asarray(ids.ravel()), offsets, jnp.asarray(gains.ravel()), (len(ids),), (valency,))
    return rows.lookup_pooled(plan.stacks[0], "cpu", found)


@needs_library
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [3, 64])
def test_threads_do_not_change_bits(dim, bits):
    (whole,) = large(dim, bits)
    parts = [large(dim, bits, first=first, count=500)[0] for first in range(0, 2000, 500)]
    assert np.array_equal(whole, np.concatenate(parts))


@needs_library
@pytest.mark.nightly
def test_vector_widths_do_not_change_bits():
    seen, folder = {}, os.path.dirname(__file__)
    for isa in ("portable", "avx2", "avx512"):
        environment = {**os.environ, "EMBAX_CPU_ISA": isa, "PYTHONPATH": folder}
        done = subprocess.check_output([sys.executable, "-c", DIGESTS], env=environment, text=True)
        *digests, used = done.split()
        seen[used] = digests
    assert "portable" in seen and len(seen["portable"]) == 10
    assert len({tuple(digests) for digests in seen.values()}) == 1, list(seen)


@needs_library
@pytest.mark.parametrize(("dim", "bits"), [(48, 8), (48, 4), (64, 8), (64, 4)])
def test_results_too_large_for_a_cache(dim, bits):
    samples = (28 << 20) // (4 * dim)
    plan = embax.plan(feature(table_spec(rows=ROWS, dim=dim), inputs=(samples, 1)), backend="cpu")
    rows = embax.quantize_rows(random_table(dim), bits)
    served, ids = {"item": embax.TableState(rows, ())}, np.arange(samples)[:, None] % ROWS
    activations = np.asarray(embax.lookup(plan, served, embax.preprocess(plan, ids))[0])
    assert np.array_equal(activations, np.asarray(embax.take(rows, np.arange(ROWS)))[ids[:, 0]])


# ---- transformations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_vmap_and_scan(bits, backend, monkeypatch):
    monkeypatch.setenv("EMBAX_BACKEND", backend)
    tables = [embax.quantize_rows(random_table(3, seed=seed), bits) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tables)
    ids = jnp.array([[0, 5], [10, -1]])
    wanted = np.stack([embax.take(table, own) for table, own in zip(tables, ids, strict=True)])
    assert stacked.shape == (2, ROWS, 3)
    np.testing.assert_allclose(jax.vmap(embax.take)(stacked, ids), wanted, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(embax.take, (None, 0))(tables[0], ids), embax.take(tables[0], ids), rtol=1e-6)
    scanned = jax.lax.scan(lambda carry, own: (carry, embax.take(carry, own)), tables[0], ids)[1]
    np.testing.assert_allclose(scanned, embax.take(tables[0], ids), rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_derivative_of_gains(bits, backend):
    stack, rows = small(5, bits)
    ids, offsets = jnp.array([3, 10, 99, 0, 4], jnp.int32), jnp.array([0, 2, 2, 4, 4, 4], jnp.int32)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)

    def loss(gains):
        parts = rows.lookup_pooled(stack, backend, StackIds(ids, offsets, gains, (2, 3), (None, None)))
        return (jnp.concatenate(parts) * weights).sum()

    table = np.asarray(rows.dequantize())
    wanted = [table[3] @ weights[0], table[10] @ weights[0], 0, table[0] @ weights[2], 0]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.ones(5)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_export(bits, backend):
    plan = embax.plan(feature(table_spec(), inputs=(None, 2)), backend=backend)
    batch = embax.preprocess(plan, np.array([[1, 2], [3, 3]]))
    leaves, structure = jax.tree.flatten(
        (embax.quantize_tables(plan, embax.init(plan, jax.random.key(0)), bits), batch)
    )

    def forward(*leaves):
        return embax.lookup(plan, *jax.tree.unflatten(structure, leaves))[0]

    platforms = ["cpu"] if backend == "cpu" else ["cpu", "cuda", "tpu"]
    checks = [export.DisabledSafetyCheck.custom_call("embax_quantized_pool")]
    exported = export.export(jax.jit(forward), platforms=platforms, disabled_checks=checks)(*leaves)
    again = export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(*leaves), forward(*leaves), rtol=1e-6)


def test_levels_are_rounded_before():
    config = embax.QuantizationConfig(min_value=-1.0, max_value=1.0, num_buckets=3)
    plan = embax.plan(feature(table_spec(rows=2, dim=4, quantization_config=config), inputs=(None, 1)))
    tables = embax.from_arrays(plan, {"item": {"table": np.array([[-9, -0.2, 0.7, 0.1], [1, 0.4, 0, 3]])}})
    batch = embax.preprocess(plan, np.array([[0], [1]]))
    wanted = [[-1, 0, 1, 0], [1, 0, 0, 1]]
    assert np.array_equal(embax.lookup(plan, tables, batch)[0], wanted)
    np.testing.assert_allclose(embax.lookup(plan, embax.quantize_tables(plan, tables), batch)[0], wanted, atol=0.0041)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "bits", "error", "text"),
    [
        (np.ones((2, 2), np.float32), 3, ValueError, "quantize_rows: bits=3 is neither 8 nor 4"),
        (np.ones((2, 2), np.float32), True, ValueError, "bits=True is neither 8 nor 4"),
        (np.ones(2, np.float32), 8, ValueError, r"table has shape \(2,\); it must be \[vocabulary_size, embedding_dim"),
        (np.ones((2, 0), np.float32), 8, ValueError, r"table has shape \(2, 0\); it must be"),
        (np.ones((2, 2), int), 8, ValueError, "table is int64, not one of float32, bfloat16, float16; convert it"),
        (np.ones((2, 2)), 8, ValueError, "table is float64, not one of float32"),
        ([[1.0]], 8, TypeError, r"a list is not an array \[vocabulary_size, embedding_dim\]; pass one"),
    ],
)
def test_bad_tables(table, bits, error, text):
    with pytest.raises(error, match=text):
        embax.quantize_rows(table, bits)


def test_quantized_tables_do_not_train():
    plan = embax.plan(feature(table_spec(optimizer=embax.SGD(0.1)), inputs=(None, 2)))
    tables = embax.init(plan, jax.random.key(0))
    served = embax.quantize_tables(plan, tables, 4)
    activations, residuals = embax.lookup(plan, served, embax.preprocess(plan, np.array([[1, 2]])))
    text = 'stack "item": the rows are quantized to 4 bits, for lookups only; update the tables that they were made'
    with pytest.raises(ValueError, match=text):
        embax.update(plan, served, residuals, activations, 0)
    with pytest.raises(ValueError, match=text):
        embax.to_arrays(plan, served)
    gradient = embax.row_gradients(plan, residuals, activations)["item"]
    with pytest.raises(ValueError, match="apply_rows: the rows are quantized to 4 bits"):
        embax.apply_rows(embax.SGD(0.1), served["item"], gradient)
    with pytest.raises(TypeError, match='quantize_tables: stack "item": the rows are quantized to 4 bits already'):
        embax.quantize_tables(plan, served)
    with pytest.raises(ValueError, match='quantize_tables: stack "item": bits=2 is neither 8 nor 4'):
        embax.quantize_tables(plan, tables, 2)
    other = embax.plan(feature(table_spec(rows=51), inputs=(None, 2)))
    with pytest.raises(ValueError, match=r'stack "item": the table has shape \(50, 4\), and the plan says \(51, 4\)'):
        embax.lookup(other, served, embax.preprocess(other, np.array([[1, 2]])))


@needs_library
def test_the_binding_refuses_rows_of_another_width():
    rows = embax.quantize_rows(random_table(5))
    with pytest.raises(Exception, match="result 0 has 6 columns, which do not fit rows of 13 bytes"):
        embax.take(dataclasses.replace(rows, embedding_dim=6), np.array([0]))
