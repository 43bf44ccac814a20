"""Every CUDA kernel compiles for every kind of card, by PyPI's NVRTC; and what is done where something is missing."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import emulated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, table_spec
from test_nvrtc import PACKAGES, _package

import embax
from embax.id_batch import StackIds
from embax.kernels import cubins, cuda, cuda_calls, cuda_library, cuda_trial, native, nvrtc

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)
LONG = 128 * 128  # entries that have tiles and fields
NATIVE = ROOT / "embax" / "kernels" / "_native" / "libembax_cuda.so"
needs_library = pytest.mark.skipif(not NATIVE.exists(), reason="the CUDA host library is not built")


@pytest.fixture(scope="module")
def library():
    """The library that a wheel holds; nothing of it needs a card until a kernel is launched."""
    if not NATIVE.exists():
        pytest.skip("the CUDA host library is not built")
    library = native.open_library(NATIVE)
    for name, (result, arguments) in cuda_library._FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _sources(library):
    names = [library.embax_cuda_source_name(i).decode() for i in range(library.embax_cuda_sources())]
    return {name: library.embax_cuda_source_text(i).decode() for i, name in enumerate(names)}


def _lookup_programs(library):
    found = set(library.embax_cuda_samples_programs().decode().splitlines())
    for table, out, dim, one, gained, levelled in (
        (0, 0, 128, 1, 0, 0),
        (1, 1, 64, 1, 0, 0),
        (2, 0, 10, 1, 0, 1),
        (0, 0, 128, 0, 0, 0),
        (1, 0, 7, 0, 1, 0),
        (0, 2, 600, 0, 1, 1),
    ):
        found |= {*library.embax_cuda_gather_programs(table, out, dim, one, gained, levelled).decode().splitlines()}
    for table, gradients, dim, levelled in ((0, 0, 16, 0), (1, 0, 100, 1), (2, 0, 3, 0)):
        found |= {*library.embax_cuda_product_programs(table, gradients, dim, levelled).decode().splitlines()}
    return found


def _update_programs(library, dtypes=None, dims=None):
    """Every optimizer, with dtypes, lengths of rows and gains in turns, or with all that are given."""
    found = set(library.embax_cuda_row_gradient_programs(1, 33, LONG, 1).decode().splitlines())
    for i, name in enumerate(library.embax_cuda_optimizers().split()):
        for table in dtypes or (i % 3,):
            for dim in dims or ((64, 128, 6, 1, 600)[i % 5],):
                flags = i % 2, int(i == 0)
                text = library.embax_cuda_update_programs(name, table, i % 2, dim, LONG, *flags)
                found |= {*text.decode().splitlines()}
    return found


def _compile_all(library, compiler, programs, architecture):
    if architecture not in compiler.architectures():
        pytest.skip(f"{compiler!r} does not know sm_{architecture}")
    sources = _sources(library)
    for program in sorted(programs):
        text = f'#include "cuda/kernels.h"\nEMBAX_CUDA_KERNEL({program})\n'
        assert compiler.compile(text, sources, architecture).startswith(b"\x7fELF"), program


def test_every_optimizer_of_the_cpu_has_a_kernel(library):
    names = library.embax_cuda_optimizers().decode().split()
    assert len(names) == len(set(names)) and set(names) == native.optimizers()


@pytest.mark.parametrize("part", [_lookup_programs, _update_programs])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(part, architecture, library):
    compiler = nvrtc.Nvrtc(_package(13))
    _compile_all(library, compiler, part(library), architecture)


def test_the_older_compiler_too(library):
    _compile_all(library, nvrtc.Nvrtc(_package(12)), _lookup_programs(library), 90)


@pytest.mark.nightly
@pytest.mark.parametrize("major", sorted(PACKAGES))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_in_every_form(major, architecture, library):
    programs = _update_programs(library, range(3), (1, 6, 64, 128, 600)) | _lookup_programs(library)
    _compile_all(library, nvrtc.Nvrtc(_package(major)), programs, architecture)


# ---- what is done where something is missing -------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """An emulated backend that has compiled nothing and said nothing, and that no later test sees."""
    if jax.default_backend() != "cpu" or emulated.why_not():
        pytest.skip("needs a host compiler, and JAX on CPU")
    emulated.install(monkeypatch)
    monkeypatch.setattr(cuda_library, "_compiled", cuda_library._Compiled())
    monkeypatch.setattr(cuda_library._compiled, "kept", cubins.Cubins(None))
    for cached in (cuda_library._load, cuda_library.fall_back, cuda_trial._found):
        cached.cache_clear()
    yield monkeypatch
    for cached in (cuda_library._load, cuda_library.fall_back, cuda_trial._found):
        cached.cache_clear()


class Broken(emulated.HostCompiler):
    """A compiler that does not get some programs through."""

    def __init__(self, part="embax"):
        self.part = part

    def compile(self, source, headers, architecture):
        if self.part in source:
            raise nvrtc.NvrtcError("this card is too new")
        return super().compile(source, headers, architecture)


def test_no_card_changes_nothing(monkeypatch, capfd):
    """On a machine without one nothing is loaded, nothing is said."""
    monkeypatch.delenv(cuda_library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(cuda_library, "load", None)
    if jax.default_backend() != "cpu":
        pytest.skip("there is a card")
    assert cuda.unavailable() == "the default JAX backend is cpu"
    assert embax.kernels.choose().name != "cuda" and capfd.readouterr().err == ""


@needs_library
def test_no_driver_is_a_reason(monkeypatch, capfd):
    if jax.default_backend() != "cpu":
        pytest.skip("there is a card")
    for cached in (cuda_library._load, cuda_library.fall_back, cuda_trial._found):
        cached.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("there is a driver")
    except OSError:
        pass
    why_not = "there is no CUDA driver (libcuda.so.1)"
    assert cuda.unavailable() == why_not and cuda.unavailable() == why_not
    line = f"embax: CUDA kernels are off for this process ({why_not}); using the reference backend\n"
    assert capfd.readouterr().err == line
    assert embax.kernels.choose() == ("reference", f"not cpu: the default JAX backend is gpu; not cuda: {why_not}")


def test_no_library_is_a_reason(fresh, tmp_path, capfd):
    fresh.setenv(cuda_library.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    assert "there is no such file" in cuda.unavailable()
    (tmp_path / "none.so").write_bytes(b"no library")
    for cached in (cuda_library._load, cuda_trial._found):
        cached.cache_clear()
    assert "library failed to load" in cuda.unavailable()


def test_a_compiler_that_is_not_there_is_a_reason(fresh, capfd):
    def find():
        raise nvrtc.NvrtcError("no NVRTC")

    fresh.setattr(nvrtc, "find", find)
    assert cuda.unavailable() == "no NVRTC"
    assert "embax: CUDA kernels are off for this process (no NVRTC); using the reference" in capfd.readouterr().err


def test_a_compiler_that_fails_is_a_reason(fresh, capfd):
    fresh.setattr(nvrtc, "find", Broken)
    assert cuda.unavailable() == "embax::cuda::CountRuns, sm_90: this card is too new"


def test_a_trial_that_fails_is_a_reason(fresh, capfd):
    fresh.setattr(cuda_trial, "_WANTED", ([[4.0, 6.0], [0.0, 1.0], [0.0, 0.5]], cuda_trial._WANTED[1]))
    assert cuda.unavailable().startswith("a trial gave [[4.0, 6.0], [0.0, 1.0], [0.0, 0.0]], rows")
    with pytest.raises(ValueError, match="backend 'cuda' .* cannot run here: a trial gave"):
        embax.kernels.choose("cuda")


def test_one_kernel_that_fails_sends_its_calls_to_the_reference(fresh, capfd):
    fresh.setattr(nvrtc, "find", lambda: Broken("Step<"))
    spec = feature(table_spec(rows=9), inputs=(3,))
    results = []
    for backend in ("cuda", "reference"):
        plan = embax.plan(spec, backend=backend)
        tables = embax.init(plan, jax.random.key(0))
        activations, residuals = embax.lookup(plan, tables, embax.preprocess(plan, np.array([[1], [4], [1]])))
        results.append((activations, embax.update(plan, tables, residuals, activations, 0)))
    for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("embax: CUDA")]
    assert len(lines) == 1 and lines[0].startswith("embax: CUDA kernels are off for updates (embax::cuda::Step<")
    assert lines[0].endswith("sm_90: this card is too new); using the reference backend")


def test_one_of_several_processes_does_not_fall_back_alone(fresh):
    fresh.setattr(nvrtc, "find", Broken)
    fresh.setattr(jax, "process_count", lambda: 2)
    text = (
        r"for this process in process 0 of 2 \(.*too new\); all processes must run the same program: set EMBAX_BACKEND"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            cuda.unavailable()
    fresh.setenv("EMBAX_BACKEND", "reference")
    assert embax.kernels.choose().name == "reference"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_other_accelerators_are_left_alone(platform, monkeypatch, capfd):
    """JAX calls AMD's cards "gpu" as well."""
    device = type("Device", (), {"client": type("Client", (), {"platform_version": "rocm 60300"})})
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert cuda.unavailable() == f"the default JAX backend is {platform}" and capfd.readouterr().err == ""


def test_the_cards_are_those_that_jax_uses(monkeypatch):
    """Another card of the machine is not asked for its kernels."""
    cards = [type("Card", (), {"platform": kind, "compute_capability": capability})
             for kind, capability in (("gpu", "9.0"), ("gpu", "12.0"), ("gpu", "9.0"), ("cpu", None))]  # fmt: skip
    monkeypatch.setattr(jax, "local_devices", lambda: cards)
    assert cuda_library._of_jax("CUDA") == (90, 120) and cuda_library._of_jax("cpu") == ()


def test_what_was_prepared_is_all_that_is_launched(fresh):
    """Nothing is left to be compiled when a program runs: Python asks for the kernels that the bindings launch."""
    assert cuda.unavailable() is None
    rng = np.random.default_rng(0)
    table, ids = jnp.ones((50, 6)), jnp.asarray(rng.integers(0, 50, LONG), jnp.int32)

    def all_of_them(table, ids):
        taken = cuda.take(table, ids)
        rows = cuda.sum_rows(ids, taken, None, None, 50)
        state = cuda.apply(embax.Adam(0.1), embax.init_slots(embax.Adam(0.1), table), rows, _hyper())
        return taken, state, cuda.distinct_rows(ids, 50), many_lookups(table, ids[:130])

    one_table = table_spec(rows=50, dim=6)
    plan = embax.plan([feature(one_table, name=f"x{i}", inputs=(1,)) for i in range(130)])

    def many_lookups(table, ids):  # more features, of one id each, than one launch has room for
        offsets = jnp.arange(131, dtype=jnp.int32)
        return cuda.gather_pool(plan.stacks[0], table, StackIds(ids, offsets, None, (1,) * 130, (1,) * 130))

    lowered = jax.jit(all_of_them).lower(table, ids)
    known = set(cuda_library._compiled.done)
    assert {name.split("::")[2].split("<")[0] for name, _ in known} >= {"GatherOne", "FieldSums", "Step", "WriteRuns"}
    lowered.compile()(table, ids)
    assert cuda_library._compiled.done == known


def test_a_program_that_was_not_traced_here_is_compiled_when_it_runs(fresh):
    assert cuda.unavailable() is None
    jitted = jax.jit(cuda_calls.gather_rows)  # by the calls alone: nothing is prepared
    np.testing.assert_array_equal(jitted(jnp.ones((3, 5)), jnp.array([2, 0], jnp.int32)), np.ones((2, 5)))
    assert ("embax::cuda::GatherOne<float, float, 5, false>", 90) in cuda_library._compiled.done


def _hyper():
    return embax.Adam(0.1).modifiers(0), embax.Adam(0.1).hyperparameters(0)


@needs_library
def test_kernels_are_kept_on_disk(tmp_path, library):
    """A second process finds what the first compiled; another source, compiler or card has a key of its own."""
    loaded = cuda_library.Loaded(library, "CUDA", (90,), nvrtc.Nvrtc(_package(13)), _sources(library), "")
    kept, program = cubins.Cubins(tmp_path), "embax::cuda::CountRuns"
    text = f'#include "cuda/kernels.h"\nEMBAX_CUDA_KERNEL({program})\n'
    key = cuda_library._key(loaded, program, 90)
    first = kept.get(key, lambda: loaded.compiler.compile(text, loaded.sources, 90))
    code = (
        "import sys\nfrom embax.kernels import cubins\n"
        "found = cubins.Cubins(sys.argv[1]).get(sys.argv[2], lambda: sys.exit('not kept'))\n"
        "print(len(found))"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), key], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and int(done.stdout) == len(first), done.stderr
    changed = loaded._replace(sources=loaded.sources | {"portable.h": "// another"})
    keys = {key, cuda_library._key(changed, program, 90), cuda_library._key(loaded, program, 80)}
    assert len(keys) == 3
