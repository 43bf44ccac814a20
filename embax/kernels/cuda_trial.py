"""Whether the CUDA kernels work here: six ids are looked up and added up on the first card before anything else is."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax.kernels import cuda_calls, cuda_library
from embax.kernels.calls import Occurrences

# Ids 2 0 | 0 7 -1 | in rows 0..3: sums r2 + r0, r0 and nothing; gradients 1, 10 and 100.
_TABLE = np.arange(8, dtype=np.float32).reshape(4, 2)
_IDS, _OFFSETS = np.array([2, 0, 0, 7, -1, 3], np.int32), np.array([0, 2, 5, 5], np.int32)
_GRADIENTS = np.repeat(np.array([[1], [10], [100]], np.float32), 2, axis=1)
_WANTED = [[4.0, 6.0], [0.0, 1.0], [0.0, 0.0]], [[11.0, 11.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


def tried(file: Path) -> str | None:
    """Returns why the library at ``file`` is not used, None if it is: it loads, and six ids come out right.

    Raises:
      RuntimeError: one of several processes cannot use it.
    """
    why_not = _found(file)
    if why_not:
        cuda_library.fall_back("this process", why_not)
    return why_not


@functools.cache
def _found(file: Path) -> str | None:
    del file  # a library that is named later is another
    try:
        cuda_library.load()
        return cuda_library.prepare(cuda_calls.runs_programs()) or _aside(_trial)
    except Exception as error:  # whatever is wrong, JAX and the reference backend still work
        return str(error)


def _aside(check: Callable[[], str | None]) -> str | None:
    """Runs ``check`` in a thread of its own: nothing that is being traced here is seen there."""
    found: list[Any] = []

    def run():
        try:
            found.append(check())
        except Exception as error:
            found.append(f"a trial failed: {type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@jax.jit
def _six(table, ids, offsets, gradients):
    looked_up = cuda_calls.gather_pool(table, Occurrences(ids, offsets), (3,), jnp.float32)[0]
    places = jnp.arange(6, dtype=jnp.int32)
    rows = jnp.where((places < offsets[-1]) & (ids >= 0) & (ids < 4), ids, 4)
    keys, samples = jax.lax.sort((rows, cuda_calls.samples_of(offsets, 6)), num_keys=1, is_stable=True)
    return looked_up, *cuda_calls.row_gradients(cuda_calls.Entries(keys, samples), looked_up, (gradients,), 4)


def _trial() -> str | None:
    """Returns what is wrong with the results."""
    device = jax.local_devices()[0]
    given = (jax.device_put(array, device) for array in (_TABLE, _IDS, _OFFSETS, _GRADIENTS))
    with jax.transfer_guard("allow"):
        looked_up, rows, sums = map(np.asarray, _six(*given))
    if looked_up.tolist() != _WANTED[0] or rows.tolist() != [0, 2, 4, 4] or sums.tolist() != _WANTED[1]:
        return f"a trial gave {looked_up.tolist()}, rows {rows.tolist()}, sums {sums.tolist()}"
    return None
