"""The native CPU kernel against plain loops, and the library loader against libraries that do not fit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from embax.kernels import native

BUILT = native._native_file().exists()
needs_library = pytest.mark.skipif(not BUILT, reason="the native library is not built (no C++ compiler?)")
INT32 = np.iinfo(np.int32)
PROGRAM = """
import jax, jax.numpy as jnp
from jax._src import xla_bridge
from embax.kernels import native
status = native.load(); native.load()
assert not xla_bridge.backends_are_initialized(), "load() started a backend"
print("available", status.available)
print("computed", int(jax.jit(lambda x: x.sum())(jnp.arange(5))))
"""


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


def check(table, ids, offsets, gains):
    got = native.gather_pool_f32(*map(jnp.asarray, (table, ids, offsets)), as_array(gains))
    want, size = oracle(table, ids, offsets, gains)
    assert got.shape == want.shape and got.dtype == jnp.float32
    bound = (len(ids) + 1) * np.finfo(np.float32).eps * size
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)
    return np.asarray(got)


def as_array(gains):
    return None if gains is None else jnp.asarray(gains)


def problem(rows, dim, lengths, *, with_gains, spare=0, seed=0):
    """Ragged samples over a random table; every fifth id names no row; `spare` positions belong to nobody."""
    rng = np.random.default_rng(seed)
    capacity = sum(lengths) + spare
    ids = rng.integers(0, max(rows, 1), capacity, dtype=np.int32)
    ids[::5] = rng.choice([-1, rows, INT32.min, INT32.max], len(ids[::5]))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    gains = rng.standard_normal(capacity).astype(np.float32) if with_gains else None
    return rng.standard_normal((rows, dim)).astype(np.float32), ids, offsets, gains


def run_program(library):
    """The program above in a fresh process that is told to load `library`."""
    environment = dict(os.environ, EMBAX_NATIVE_LIBRARY=str(library), JAX_PLATFORMS="cpu")
    environment["PYTHONPATH"] = str(Path(native.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_library_that_is_built_loads():
    status = native.load()
    assert status.available == BUILT, status.reason
    assert native.load() is status


@needs_library
@pytest.mark.parametrize("with_gains", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 64, 100, 191])
def test_equals_the_loop(dim, with_gains):
    check(*problem(50, dim, [3, 0, 1, 7, 0, 40, 2], with_gains=with_gains, spare=9))


@needs_library
@pytest.mark.parametrize(
    ("rows", "dim", "lengths"), [(4, 8, []), (4, 8, [0, 0]), (0, 8, [3]), (4, 0, [3]), (1, 1, [1])]
)
def test_nothing_to_do(rows, dim, lengths):
    check(*problem(rows, dim, lengths, with_gains=False))
    check(*problem(rows, dim, lengths, with_gains=True))


@needs_library
@hypothesis.settings(deadline=None)
@hypothesis.given(
    ids=st.lists(st.integers(INT32.min, INT32.max) | st.integers(-2, 6), min_size=6, max_size=6),
    offsets=st.lists(st.integers(INT32.min, INT32.max) | st.integers(-2, 8), min_size=4, max_size=4),
)
def test_garbage_stays_inside_the_arrays(ids, offsets):
    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    check(table, np.array(ids, np.int32), np.array(offsets, np.int32), None)


@needs_library
def test_the_gain_of_an_absent_id_is_not_read():
    table = np.ones((2, 3), np.float32)
    gains = np.array([np.nan, 2.0, np.inf], np.float32)
    ids, offsets = np.array([-1, 1, 2], np.int32), np.array([0, 3], np.int32)
    got = native.gather_pool_f32(*map(jnp.asarray, (table, ids, offsets, gains)))
    np.testing.assert_array_equal(got, [[2.0, 2.0, 2.0]])


@needs_library
def test_threads_do_not_change_bits():
    lengths = np.random.default_rng(1).integers(0, 40, 3000)
    table, ids, offsets, gains = problem(1000, 16, list(lengths), with_gains=True)
    assert offsets[-1] > 40_000  # far beyond the size at which threads start
    whole = check(table, ids, offsets, gains)
    parts = [check(table, ids, offsets[s : s + 101], gains) for s in range(0, 500, 100)]  # too few ids for threads
    np.testing.assert_array_equal(whole[:500], np.concatenate(parts))


@needs_library
def test_one_sample_with_very_many_ids():
    check(*problem(100, 8, [0, 50_000, 1], with_gains=True))


@needs_library
def test_inside_jit_scan_and_vmap():
    table, ids, offsets, gains = map(jnp.asarray, problem(20, 5, [2, 3, 0, 4], with_gains=True))
    tables = jnp.stack([table, 2.0 * table, -table])
    want = jnp.stack([native.gather_pool_f32(t, ids, offsets, gains) for t in tables])

    def one(t):
        return native.gather_pool_f32(t, ids, offsets, gains)

    np.testing.assert_array_equal(jax.jit(one)(table), want[0])
    np.testing.assert_array_equal(jax.vmap(one)(tables), want)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, t: (c, one(t)), 0, tables)[1], want)


@needs_library
def test_wrong_arguments_are_named():
    table, ids, offsets, gains = map(jnp.asarray, problem(4, 2, [2, 1], with_gains=True))
    with pytest.raises(TypeError, match="ids must be int32 of rank 1, not float32 of rank 1"):
        native.gather_pool_f32(table, ids.astype(jnp.float32), offsets, gains)
    with pytest.raises(TypeError, match="table must be float32 of rank 2, not bfloat16 of rank 2"):
        native.gather_pool_f32(table.astype(jnp.bfloat16), ids, offsets, gains)
    with pytest.raises(ValueError, match="offsets must hold samples \\+ 1 numbers, not 0"):
        native.gather_pool_f32(table, ids, offsets[:0], gains)
    with pytest.raises(ValueError, match="gains must be empty or hold 3 numbers, one an id, not 2"):
        native.gather_pool_f32(table, ids, offsets, gains[:2])


def test_a_library_for_a_newer_ffi_is_refused(tmp_path):
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler to build a library that reports FFI API 0.99")
    source, library = tmp_path / "newer.c", tmp_path / "libnewer.so"
    source.write_text(
        "int embax_ffi_api_major(void) { return 0; }\n"
        "int embax_ffi_api_minor(void) { return 99; }\n"
        "void *embax_gather_pool_f32(void *frame) { return frame; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    out, err = run_program(library)
    running = ".".join(map(str, native._running_ffi_version()))
    line = f"built for FFI API 0.99, the running jaxlib offers {running}"
    assert f"embax: native CPU kernels are off ({line}); using the reference backend" in err.splitlines()
    assert out.splitlines() == ["available False", "computed 10"]


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_a_file_that_is_no_library_is_refused(tmp_path, content):
    library = tmp_path / "libembax_cpu.so"
    if content is not None:
        library.write_bytes(content)
    out, err = run_program(library)
    lines = [line for line in err.splitlines() if line.startswith("embax:")]
    assert len(lines) == 1 and "are off (library failed to load: " in lines[0]
    assert out.splitlines() == ["available False", "computed 10"]
