"""The library loader, against libraries that do not fit and on processors of every vector width."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from embax.kernels import native

BUILT = native._native_file().exists()
needs_library = pytest.mark.skipif(not BUILT, reason="the native library is not built (no C++ compiler?)")
PROGRAM = """
import jax, jax.numpy as jnp
from jax._src import xla_bridge
from embax.kernels import native
status = native.load(); native.load()
assert not xla_bridge.backends_are_initialized(), "load() started a backend"
print("available", status.available)
print("computed", int(jax.jit(lambda x: x.sum())(jnp.arange(5))))
"""


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


# Every kernel once, on more ids than one thread gets; prints a digest of all results.
DIGEST = """
import hashlib, os, sys
os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[: int(sys.argv[1])]))
import jax, jax.numpy as jnp, numpy as np
import embax
from embax.kernels import calls, native
digest, rng = hashlib.sha256(), np.random.default_rng(0)
def note(*arrays):
    for array in arrays:
        digest.update(np.asarray(array).tobytes())
ids = rng.integers(0, 3000, (2500, 20), np.int32)
ids[:, :5] = 7  # 12,500 occurrences of one row: its sum is made in blocks
offsets = jnp.arange(0, 50_001, 20, dtype=jnp.int32)
gains = jnp.asarray(rng.normal(size=50_000), jnp.float32)
for dtype in ("float32", "bfloat16", "float16"):
    for dim in (1, 19):
        table = jnp.asarray(rng.normal(size=(3000, dim)), dtype)
        found = calls.Occurrences(jnp.asarray(ids.reshape(-1)), offsets, None, gains)
        acts = calls.gather_pool(table, found, (2500,), dtype)[0]
        note(acts, calls.gather_rows(table, found.ids), *calls.row_gradients(found, acts, (acts,), 3000))
        note(calls.row_products(table, found.ids, offsets, acts))
        for optimizer in (embax.SGD(0.1), embax.RowwiseAdagrad(0.1, row_clip_norm=0.5), embax.Adam(0.1), embax.F2A(0.1),
                          embax.AdagradMomentum(0.1), embax.FTRL(0.1), embax.LaProp(0.1, stochastic_rounding=3)):
            state = embax.init_slots(optimizer, table)
            hyper = (optimizer.modifiers(2), optimizer.hyperparameters(2))
            parts = (state.table, *state.slots)
            note(*calls.update(optimizer.kernel_name(), parts, found, acts, (acts,), hyper))
falling = jnp.asarray(rng.integers(-5, 50_005, 2501), jnp.int32)  # no batch has such offsets
note(*calls.row_gradients(calls.Occurrences(found.ids, falling), acts, (acts,), 3000))
print(native.vector_width(), digest.hexdigest())
"""


def digest_of(threads, width):
    environment = dict(os.environ, EMBAX_CPU_ISA=width, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    environment["PYTHONPATH"] = str(Path(native.__file__).parents[2])
    command = [sys.executable, "-c", DIGEST, str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_library
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let a process choose its cores")
def test_neither_threads_nor_vector_width_change_bits():
    wanted = digest_of(8, "portable")
    assert wanted[0] == "portable"
    assert digest_of(1, "portable") == wanted
    for width in ("avx2", "avx512"):
        ran, digest = digest_of(8, width)  # a processor without it runs another copy: still the same bits
        assert digest == wanted[1], f"{ran} instead of {width}"


ALLOCATOR = """
import jax, jax.numpy as jnp, numpy as np
import embax
table = jnp.ones((200_000, 64))  # 51 MB: on huge pages from the first lookup on
wanted = np.asarray(table[:8] * 3).copy()
print(embax.tune_allocator())
state, ids = embax.init_slots(embax.SGD(1.0), table), jnp.arange(8)
gradient = embax.take_gradient(ids, jnp.full((8, 64), -2.0), vocabulary_size=200_000)
for _ in range(2):
    new = jax.jit(lambda s, g: embax.apply_rows(embax.SGD(1.0), s, g))(state, gradient)
assert (np.asarray(new.table[:8]) == wanted).all() and (new.table[8:] == 1).all()
"""


def test_the_allocator_is_tuned_on_request():
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(Path(native.__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATOR], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(sys.platform.startswith("linux"))]


@needs_library
def test_every_optimizer_with_a_kernel_is_registered():
    import embax

    named = [o() for o in (embax.SGD, embax.Adagrad, embax.RowwiseAdagrad, embax.AdagradMomentum, embax.Adam)]
    named += [embax.LaProp(), embax.FTRL(), embax.F2A(), embax.AdagradMomentum(use_nesterov=True)]
    named += [embax.FTRL(multiply_linear_by_learning_rate=True)]
    assert {optimizer.kernel_name() for optimizer in named} == native.optimizers()


def test_a_library_for_a_newer_ffi_is_refused(tmp_path):
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler to build a library that reports FFI API 0.99")
    source, library = tmp_path / "newer.c", tmp_path / "libnewer.so"
    source.write_text(
        "int embax_ffi_api_major(void) { return 0; }\n"
        "int embax_ffi_api_minor(void) { return 99; }\n"
        + "".join(f"void *{target}(void *frame) {{ return frame; }}\n" for target in native._TARGETS)
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
