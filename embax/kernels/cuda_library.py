"""The library of the CUDA kernels: load it, register its calls, have its kernels compiled for the cards at hand.

The library needs no part of CUDA to load: it opens the driver itself, and carries the kernels as text. NVRTC, which
comes with JAX's CUDA plugin, compiles one program a kernel when it is first wanted; compiled ones are kept on disk
(``cubins``). A JAX program is traced only after its kernels were compiled, so that trouble can still send it another
way. One that was not traced here (it comes out of a cache) has its kernels compiled by the same function before it
runs.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax

from embax.kernels import cubins, native, nvrtc

LIBRARY_VARIABLE = "EMBAX_CUDA_LIBRARY"
"""Environment variable that names another library file than the one installed with embax."""

_LOCK = threading.RLock()
_Compiler = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_TEXT, _INT, _LONG = ctypes.c_char_p, ctypes.c_int, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "embax_cuda_why_not": (_TEXT, ()),
    "embax_cuda_platform": (_TEXT, ()),
    "embax_cuda_architectures": (_INT, (ctypes.POINTER(_INT), _INT)),
    "embax_cuda_set_compiler": (None, (_Compiler,)),
    "embax_cuda_add": (None, (_TEXT, _INT, ctypes.c_char_p, ctypes.c_size_t)),
    "embax_cuda_sources": (_INT, ()),
    "embax_cuda_source_name": (_TEXT, (_INT,)),
    "embax_cuda_source_text": (_TEXT, (_INT,)),
    "embax_cuda_optimizers": (_TEXT, ()),
    "embax_cuda_gather_programs": (_TEXT, (_INT, _INT, _LONG, _INT, _INT, _INT)),
    "embax_cuda_product_programs": (_TEXT, (_INT, _INT, _LONG, _INT)),
    "embax_cuda_samples_programs": (_TEXT, ()),
    "embax_cuda_runs_programs": (_TEXT, ()),
    "embax_cuda_row_gradient_programs": (_TEXT, (_INT, _LONG, _LONG, _INT)),
    "embax_cuda_update_programs": (_TEXT, (_TEXT, _INT, _INT, _LONG, _LONG, _INT, _INT)),
    "embax_cuda_scratch_numbers": (_LONG, (_LONG,)),
    "embax_cuda_scratch_rows": (_LONG, (_LONG,)),
    "embax_cuda_most_blocks": (_INT, ()),
}
_MOST_CARDS = 256
_callbacks: list[Any] = []  # a function lives as long as the library that may call it


class Loaded(NamedTuple):
    """The library, ready: its calls are registered, and what it is to compile with is known.

    Attributes:
      library: its functions, by ctypes.
      platform: the JAX platform its calls are registered for: "CUDA".
      architectures: of the cards at hand, each once: 90 is compute capability 9.0.
      compiler: makes cubins.
      sources: the kernels' files, by the name they are included by.
      reason: what was found, as a line to read.
    """

    library: Any
    platform: str
    architectures: tuple[int, ...]
    compiler: Any
    sources: dict[str, str]
    reason: str


def is_named() -> bool:
    """Returns whether ``EMBAX_CUDA_LIBRARY`` names the library."""
    return bool(os.environ.get(LIBRARY_VARIABLE))


def file() -> Path:
    """Returns where the library is."""
    named = os.environ.get(LIBRARY_VARIABLE)
    return Path(named) if named else Path(__file__).parent / "_native" / "libembax_cuda.so"


def load() -> Loaded:
    """Returns the library, loaded and registered once per process.

    Raises:
      native.Refusal: it cannot be used; the text says why.
      nvrtc.NvrtcError: there is nothing to compile with.
    """
    with _LOCK:
        return _load(file())


@functools.cache
def _load(path: Path) -> Loaded:
    if not path.exists() and is_named():
        raise native.Refusal(f"{LIBRARY_VARIABLE}={path}: there is no such file")
    if not path.exists():
        built = (
            "embax was installed without a C++ compiler, or not on Linux, or this is a checkout without `make native`"
        )
        raise native.Refusal(f"{path} is missing: {built}")
    library = native.open_library(path)
    versions = native.check_ffi(library, "embax_cuda_ffi_api", [*native.CUDA_TARGETS, *_FUNCTIONS])
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    why_not = library.embax_cuda_why_not()
    if why_not:
        raise native.Refusal(why_not.decode())
    platform = library.embax_cuda_platform().decode()
    architectures = _of_jax(platform) or _architectures(library)
    compiler = nvrtc.find()
    sources = {
        library.embax_cuda_source_name(i).decode(): library.embax_cuda_source_text(i).decode()
        for i in range(library.embax_cuda_sources())
    }
    _register(library, platform)
    names = ", ".join(f"sm_{architecture}" for architecture in architectures)
    reason = f"{names}; {compiler!r}; {versions}"
    loaded = Loaded(library, platform, architectures, compiler, sources, reason)
    _callbacks.append(_Compiler(functools.partial(_compile, loaded)))
    library.embax_cuda_set_compiler(_callbacks[-1])
    atexit.register(library.embax_cuda_set_compiler, _Compiler())  # nobody is to call Python when it is gone
    return loaded


def _of_jax(platform: str) -> tuple[int, ...]:
    """Returns the architectures of the cards that JAX uses in this process, which may be fewer than there are."""
    found = (device.compute_capability.split(".") for device in jax.local_devices() if device.platform == "gpu")
    return tuple(sorted({10 * int(major) + int(minor) for major, minor in found})) if platform == "CUDA" else ()


def _architectures(library: Any) -> tuple[int, ...]:
    numbers = (_INT * _MOST_CARDS)()
    count = library.embax_cuda_architectures(numbers, _MOST_CARDS)
    if count < 0:
        raise native.Refusal(f"the CUDA driver reports error {-count}")
    if not count:
        raise native.Refusal("the CUDA driver finds no card")
    return tuple(sorted(set(numbers[:count])))


def _register(library: Any, platform: str) -> None:
    for target in native.CUDA_TARGETS:
        capsule = jax.ffi.pycapsule(getattr(library, target))
        if platform == "CUDA":
            stages = {"initialize": jax.ffi.pycapsule(getattr(library, f"{target}_initialize")), "execute": capsule}
            jax.ffi.register_ffi_target(target, stages, platform=platform)
        else:  # XLA has no such stage on CPU
            jax.ffi.register_ffi_target(target, capsule, platform=platform)


# ---- compiling -------------------------------------------------------------------------------------------------------


class _Compiled:
    """What this process has compiled, or found on disk: programs with their architectures, and why others failed."""

    def __init__(self):
        self.done: set[tuple[str, int]] = set()
        self.failed: dict[tuple[str, int], str] = {}
        self.kept = cubins.Cubins(cubins.default_folder())


_compiled = _Compiled()


def prepare(programs: str) -> str | None:
    """Has the kernels of a call compiled for the cards at hand.

    Args:
      programs: as the library names them, a line each.

    Returns:
      None, or why they cannot be compiled.
    """
    loaded = load()
    for program in programs.splitlines():
        for architecture in loaded.architectures:
            if not _compile(loaded, program.encode(), architecture):
                return _compiled.failed[program, architecture]
    return None


def _compile(loaded: Loaded, program: bytes, architecture: int) -> int:
    """Hands the library a program's machine code; returns 1 if it has it. Never raises: C++ calls it."""
    name = program.decode()
    with _LOCK:
        if (name, architecture) in _compiled.done:
            return 1
        if (name, architecture) in _compiled.failed:
            return 0
        try:
            source = f'#include "cuda/kernels.h"\nEMBAX_CUDA_KERNEL({name})\n'
            image = _compiled.kept.get(
                _key(loaded, name, architecture),
                lambda: loaded.compiler.compile(source, loaded.sources, architecture),
            )
            loaded.library.embax_cuda_add(program, architecture, image, len(image))
        except Exception as error:  # whatever is wrong with a compiler, JAX and the reference backend still work
            _compiled.failed[name, architecture] = f"{name}, sm_{architecture}: {error}"
            return 0
        _compiled.done.add((name, architecture))
        return 1


def _key(loaded: Loaded, program: str, architecture: int) -> str:
    """Returns everything that a program's machine code depends on."""
    text = "".join(f"{name}\n{text}\n" for name, text in sorted(loaded.sources.items()))
    digest = hashlib.sha256(text.encode()).hexdigest()
    version = ".".join(map(str, loaded.compiler.version))
    return f"{program}\nsm_{architecture}\nNVRTC {version}\n{' '.join(nvrtc.OPTIONS)}\nsources {digest}\n"


@functools.cache
def fall_back(what: str, why: str) -> None:
    """Prints, once, that something runs on the reference backend instead, and why.

    Raises:
      RuntimeError: with several processes: if one alone fell back, they would run different programs, and wait for each
        other for ever.
    """
    if jax.process_count() > 1:
        process = f"process {jax.process_index()} of {jax.process_count()}"
        raise RuntimeError(
            f"CUDA kernels cannot be used for {what} in {process} ({why}); "
            "all processes must run the same program: set EMBAX_BACKEND=reference in all of them"
        )
    print(f"embax: CUDA kernels are off for {what} ({why}); using the reference backend", file=sys.stderr)
