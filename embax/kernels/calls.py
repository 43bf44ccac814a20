"""The calls of the native CPU kernels: operands in order, shapes of the results, what is written in place.

Nothing is computed here. ``embax.kernels.native`` loads the library; csrc/ffi_*.cc check what they are given.
Operands that are left out go as empty arrays. The results do not depend on the number of threads, bit for bit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax.kernels import native
from embax.kernels.operands import call_ffi, hyper_vectors


class Occurrences(NamedTuple):
    """Which rows a batch names, and the sample of each: by ``offsets``, by ``samples``, or each its own.

    Attributes:
      ids: int32 ``[n]``; outside of the table: absent.
      offsets: int32 ``[samples + 1]``, or None.
      samples: int32 ``[n]``, or None.
      gains: float32 ``[n]``, or None: every gain is 1.
    """

    ids: Any
    offsets: Any = None
    samples: Any = None
    gains: Any = None

    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns the four arrays that the kernels take."""
        none = jnp.zeros(0, jnp.int32)
        offsets, samples = (none if part is None else part for part in (self.offsets, self.samples))
        return self.ids, offsets, samples, jnp.zeros(0, jnp.float32) if self.gains is None else self.gains


def gather_pool(
    table: jax.Array, found: Occurrences, sizes: Sequence[int], dtype: Any, levels: Sequence[float] = ()
) -> tuple[jax.Array, ...]:
    """Returns the gain-weighted sums of each sample's rows, in blocks of ``sizes`` samples.

    Args:
      table: float32, bfloat16 or float16 ``[rows, dim]``; summed in float32.
      found: with offsets, of all blocks.
      sizes: samples of each block.
      dtype: of the result.
      levels: low, high, width of the levels that rows are rounded to; empty: they are not.
    """
    ids, offsets, _, gains = found.operands()
    shapes = [((size, table.shape[1]), dtype) for size in sizes]
    return tuple(_call("embax_gather_pool", (table, ids, offsets, gains), shapes, levels=_floats(levels)))


def gather_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns ``table[rows]`` ``[n, dim]``, NaN where a row is outside of the table."""
    return _call("embax_gather_rows", (table, rows), [((rows.shape[0], table.shape[1]), table.dtype)])[0]


def row_products(
    table: jax.Array, ids: jax.Array, offsets: jax.Array, gradients: jax.Array, levels: Sequence[float] = ()
) -> jax.Array:
    """Returns each id's row times its sample's gradient, float32 ``[n]``; 0 for what is absent."""
    operands = (table, ids, offsets, gradients)
    return _call("embax_row_products", operands, [(ids.shape, jnp.float32)], levels=_floats(levels))[0]


def update(
    kernel: str, state: Sequence[jax.Array], found: Occurrences, token: jax.Array, gradients: Sequence[Any], hyper: Any
) -> list[jax.Array]:
    """Returns ``state`` after one step on the rows that occur, in place where it is donated.

    Args:
      kernel: the optimizer's name in csrc/optimizers.h.
      state: the table and its slots; behind them, where rows are tracked, a byte a row to be set for those stepped.
      found: the occurrences.
      token: any result of the lookup that the update comes after; not read.
      gradients: of the samples, in one or more blocks of one dtype.
      hyper: ``(Modifiers, hyperparameters)`` of this step.
    """
    numbers, common, seed, stochastic = hyper_vectors(hyper)
    first = (*found.operands(), token, numbers, common, seed)
    shapes = [(part.shape, part.dtype) for part in state]
    in_place = {len(first) + index: index for index in range(len(state))}
    operands = (*first, *state, *gradients)
    return _call("embax_update", operands, shapes, in_place, optimizer=kernel, stochastic=stochastic)


def row_gradients(
    found: Occurrences, token: jax.Array, gradients: Sequence[jax.Array], rows: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct rows that occur, rising and filled up with ``rows``, and their float32 gradients."""
    room = min(found.ids.shape[0], rows)
    shapes = [((room,), jnp.int32), ((room, gradients[0].shape[1]), jnp.float32)]
    unique, values = _call("embax_row_gradients", (*found.operands(), token, *gradients), shapes, rows=np.int64(rows))
    return unique, values


def distinct_rows(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct rows among ``ids``, rising and filled up with ``rows``, and each id's place among them.

    Both int32: ``[min(n, rows)]`` and ``[n]``; the place of what is outside of ``[0, rows)`` is ``min(n, rows)``.
    """
    shapes = [((min(ids.shape[0], rows),), jnp.int32), (ids.shape, jnp.int32)]
    unique, places = _call("embax_distinct_rows", (ids,), shapes, rows=np.int64(rows))
    return unique, places


def write_rows(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Returns ``table`` with its distinct ``rows`` replaced by ``values`` of its dtype; those outside are skipped."""
    shape = [(table.shape, table.dtype)]
    return _call("embax_write_rows", (rows, values, table), shape, {2: 0})[0]


def _floats(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, np.float32)


def _call(
    target: str, operands: Sequence[jax.Array], shapes: Sequence[Any], in_place: dict | None = None, **attributes: Any
) -> list[jax.Array]:
    status = native.load()
    if not status.available:
        raise RuntimeError(f"{target} needs the native CPU kernels, which are off: {status.reason}")
    return call_ffi(target, operands, shapes, in_place, **attributes)
