"""The native CPU kernels: find the library, check that it fits the running jaxlib, register it.

The library is plain C behind XLA's FFI, so one build serves every Python and every jaxlib from 0.10.2 on. A library
built for a newer FFI than the running jaxlib's would register without a word and then keep JAX from starting its
CPU backend; :func:`load` therefore compares versions before it registers anything.

>>> status = load()
>>> isinstance(status.available, bool) and isinstance(status.reason, str)
True
"""

import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

LIBRARY_VARIABLE = "EMBAX_NATIVE_LIBRARY"
"""Environment variable that names another library file than the one installed with embax."""

_TARGETS = ("embax_gather_pool", "embax_gather_rows", "embax_row_products", "embax_update", "embax_row_gradients")
_TARGETS += ("embax_write_rows", "embax_quantized_pool", "embax_distinct_rows")
CUDA_TARGETS = tuple(
    f"embax_cuda_{name}"
    for name in ("gather_pool", "gather_rows", "row_products", "samples_of", "update", "row_gradients", "distinct_rows")
)
"""The calls of the CUDA kernels, which ``cuda_library`` registers."""

_LOCK = threading.Lock()


class Status(NamedTuple):
    """Whether the native kernels can be called, and why (not)."""

    available: bool
    reason: str


class Refusal(Exception):
    """A library cannot be used; the text says why."""


def load() -> Status:
    """Load and register the native kernels, once per process.

    Never raises. If the kernels cannot be used, the reason is printed to stderr (one line, once) and embax goes on with
    its reference backend. Does not start any JAX backend.
    """
    with _LOCK:
        return _load_once()


def library() -> ctypes.CDLL | None:
    """Returns the loaded library, or None where there is none that can be used. Never raises."""
    return _opened.get("library") if load().available else None


def use_huge_pages() -> bool:
    """Tells the kernels to put tables of 32 MiB and more on huge pages when they first meet them."""
    advise = getattr(library(), "embax_use_huge_pages", None)
    if advise is not None:
        advise(1)
    return advise is not None


def native_calls() -> tuple[str, ...]:
    """Returns the names of the native kernels, as programs on CPU and on CUDA cards call them.

    ``jax.export`` asks who vouches for such calls: a program that calls them runs wherever embax, of this version, is
    installed with its native library.

    >>> import jax, embax
    >>> checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in embax.native_calls()]
    """
    return _TARGETS + CUDA_TARGETS


@functools.cache
def optimizers() -> frozenset[str]:
    """Returns the names of the optimizers that the library has kernels for."""
    loaded = library()
    if loaded is None:
        return frozenset()
    loaded.embax_optimizers.restype = ctypes.c_char_p
    return frozenset(loaded.embax_optimizers().decode().strip(",").split(","))


@functools.cache
def vector_width() -> str:
    """Returns which copy of the kernels this processor runs: avx512, avx2 or portable; "none" without a library."""
    loaded = library()
    if loaded is None:
        return "none"
    loaded.embax_isa.restype = ctypes.c_char_p
    return loaded.embax_isa().decode()


_opened: dict[str, ctypes.CDLL] = {}


@functools.cache
def _load_once() -> Status:
    try:
        return Status(True, _register(open_library(_library_path())))
    except Exception as error:  # whatever is wrong with a library, JAX and the reference backend still work
        reason = str(error) if isinstance(error, Refusal) else f"unexpected {type(error).__name__}: {error}"
        print(f"embax: native CPU kernels are off ({reason}); using the reference backend", file=sys.stderr)
        return Status(False, reason)


def _native_file() -> Path:
    """Where an installation, or `make native` in a checkout, puts the library."""
    name = "libembax_cpu.dll" if sys.platform == "win32" else "libembax_cpu.so"
    return Path(__file__).parent / "_native" / name


def _library_path() -> Path:
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    if not _native_file().exists():
        raise Refusal("not built: embax was installed without a C++ compiler, or runs from an unbuilt checkout")
    return _native_file()


def open_library(path: Path) -> ctypes.CDLL:
    """Returns the library at ``path``, or raises Refusal."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Refusal(f"library failed to load: {error}") from error


def _register(library: ctypes.CDLL) -> str:
    """Register every kernel of a library whose FFI version fits; returns a line for ``embax inspect``."""
    versions = check_ffi(library, "embax_ffi_api", _TARGETS)
    for target in _TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    _opened["library"] = library
    return versions


def check_ffi(library: ctypes.CDLL, version: str, symbols: Sequence[str]) -> str:
    """Returns the FFI versions of a library and of the running jaxlib, as a line to read.

    Args:
      library: any of embax's.
      version: its functions of that name, followed by ``_major`` and ``_minor``, say for which FFI it was built.
      symbols: what else it must have.

    Raises:
      Refusal: it does not fit the running jaxlib, or lacks a symbol.
    """
    try:
        built = tuple(int(getattr(library, f"{version}_{part}")()) for part in ("major", "minor"))
        for symbol in symbols:
            getattr(library, symbol)
    except AttributeError as error:
        raise Refusal(f"library lacks a symbol: {error}") from error
    running = _running_ffi_version()
    versions = f"built for FFI API {built[0]}.{built[1]}, the running jaxlib offers {running[0]}.{running[1]}"
    if built[0] != running[0] or built[1] > running[1]:
        raise Refusal(versions)
    return versions


def _running_ffi_version() -> tuple[int, int]:
    """The FFI version of the running jaxlib, which only the header shipped with it tells."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as error:
        raise Refusal(f"the running jaxlib does not say which FFI API it offers: {error}") from error
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise Refusal(f"the running jaxlib does not say which FFI API it offers: no version in {header}")
    return int(found[0][1]), int(found[1][1])
