"""The native CPU kernels: find the library, check that it fits the running jaxlib, register it, call it.

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
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

LIBRARY_VARIABLE = "EMBAX_NATIVE_LIBRARY"
"""Environment variable that names another library file than the one installed with embax."""

_TARGETS = ("embax_gather_pool_f32",)
_LOCK = threading.Lock()


class Status(NamedTuple):
    """Whether the native kernels can be called, and why (not)."""

    available: bool
    reason: str


class _Refusal(Exception):
    """The library cannot be used; the text says why."""


def load() -> Status:
    """Load and register the native kernels, once per process.

    Never raises. If the kernels cannot be used, the reason is printed to stderr (one line, once) and embax goes on with
    its reference backend. Does not start any JAX backend.
    """
    with _LOCK:
        return _load_once()


def gather_pool_f32(table: jax.Array, ids: jax.Array, offsets: jax.Array, gains: jax.Array | None = None) -> jax.Array:
    """Sum the rows of each sample: ``out[s] = sum(gains[j] * table[ids[j]] for j in sample s)``.

    Sample ``s`` owns the positions ``offsets[s] <= j < offsets[s + 1]``. An id outside ``[0, rows)`` is absent and adds
    nothing; offsets are clamped into ``[0, capacity]``. The bits do not depend on the number of threads. Not
    differentiable. CPU only.

    Args:
      table: float32 ``[rows, dim]``.
      ids: int32 ``[capacity]``.
      offsets: int32 ``[samples + 1]``.
      gains: float32 ``[capacity]``; None (or an empty array) for a gain of 1 everywhere.

    Returns:
      float32 ``[samples, dim]``.

    Raises:
      RuntimeError: the native kernels are not available; the text says why.
      TypeError: an argument has another dtype or rank than stated above.
      ValueError: no offsets, or gains of another length than ids.
    """
    status = load()
    if not status.available:
        raise RuntimeError(f"gather_pool_f32 needs the native CPU kernels, which are off: {status.reason}")
    gain_array = jnp.zeros((0,), jnp.float32) if gains is None else gains
    _require("table", table, jnp.float32, 2)
    _require("ids", ids, jnp.int32, 1)
    _require("offsets", offsets, jnp.int32, 1)
    _require("gains", gain_array, jnp.float32, 1)
    capacity, samples = ids.shape[0], offsets.shape[0] - 1
    if samples < 0:
        raise ValueError("gather_pool_f32: offsets must hold samples + 1 numbers, not 0")
    if gain_array.shape[0] not in (0, capacity):
        wanted = f"be empty or hold {capacity} numbers, one an id"
        raise ValueError(f"gather_pool_f32: gains must {wanted}, not {gain_array.shape[0]}")
    out = jax.ShapeDtypeStruct((samples, table.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("embax_gather_pool_f32", out, vmap_method="sequential")
    return call(table, ids, offsets, gain_array)


def _require(name: str, array: jax.Array, dtype, rank: int) -> None:
    if array.dtype != dtype or array.ndim != rank:
        wanted, got = f"{jnp.dtype(dtype).name} of rank {rank}", f"{array.dtype.name} of rank {array.ndim}"
        raise TypeError(f"gather_pool_f32: {name} must be {wanted}, not {got}")


@functools.cache
def _load_once() -> Status:
    try:
        return Status(True, _register(_open(_library_path())))
    except Exception as error:  # whatever is wrong with a library, JAX and the reference backend still work
        reason = str(error) if isinstance(error, _Refusal) else f"unexpected {type(error).__name__}: {error}"
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
        raise _Refusal("not built: embax was installed without a C++ compiler, or runs from an unbuilt checkout")
    return _native_file()


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _Refusal(f"library failed to load: {error}") from error


def _register(library: ctypes.CDLL) -> str:
    """Register every kernel of a library whose FFI version fits; returns a line for ``embax inspect``."""
    try:
        built = (int(library.embax_ffi_api_major()), int(library.embax_ffi_api_minor()))
        handlers = [getattr(library, target) for target in _TARGETS]
    except AttributeError as error:
        raise _Refusal(f"library lacks a symbol: {error}") from error
    running = _running_ffi_version()
    versions = f"built for FFI API {built[0]}.{built[1]}, the running jaxlib offers {running[0]}.{running[1]}"
    if built[0] != running[0] or built[1] > running[1]:
        raise _Refusal(versions)
    for target, handler in zip(_TARGETS, handlers, strict=True):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return versions


def _running_ffi_version() -> tuple[int, int]:
    """The FFI version of the running jaxlib, which only the header shipped with it tells."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as error:
        raise _Refusal(f"the running jaxlib does not say which FFI API it offers: {error}") from error
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise _Refusal(f"the running jaxlib does not say which FFI API it offers: no version in {header}")
    return int(found[0][1]), int(found[1][1])
