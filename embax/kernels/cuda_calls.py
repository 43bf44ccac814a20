"""The calls of the CUDA kernels: operands in order, shapes of the results and of scratch, what is written in place.

Nothing is computed here. Scratch comes as results that nobody reads, so that XLA has it among its temporaries. Each
call has a function beside it that names its kernels, to be compiled beforehand (``cuda_library.prepare``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax.kernels import cuda_library
from embax.kernels.calls import Occurrences
from embax.kernels.operands import DTYPES, call_ffi, hyper_vectors


class Entries(NamedTuple):
    """Occurrences sorted by row, equal rows in order of place.

    Attributes:
      keys: int32 ``[n]``: rows; absent ones, the number of rows, come last.
      samples: int32 ``[n]``: whose gradient each is of; None: entry i is of sample i.
      gains: float32 ``[n]``, or None: every gain is 1.
    """

    keys: Any
    samples: Any = None
    gains: Any = None

    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the three arrays that kernels take."""
        samples = jnp.zeros(0, jnp.int32) if self.samples is None else self.samples
        return self.keys, samples, jnp.zeros(0, jnp.float32) if self.gains is None else self.gains


def gather_pool(
    table: jax.Array,
    found: Occurrences,
    sizes: Sequence[int],
    dtype: Any,
    levels: Sequence[float] = (),
    *,
    one: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns the gain-weighted sums of each sample's rows, in blocks of ``sizes`` samples; see ``calls.gather_pool``.

    Args:
      table: float32, bfloat16 or float16 ``[rows, dim]``.
      found: with offsets, of all blocks.
      sizes: samples of each block.
      dtype: of the result.
      levels: low, high, width, or nothing.
      one: sample s has the one id ``found.ids[s]``, where it is before ``offsets[-1]``.
    """
    shapes = [((size, table.shape[1]), dtype) for size in sizes]
    ids, offsets, _, gains = found.operands()
    return tuple(
        _call("gather_pool", (table, ids, offsets, gains), shapes, levels=np.asarray(levels, np.float32), one=one)
    )


def gather_programs(table: Any, dtype: Any, one: bool, gained: bool, levelled: bool) -> str:
    """Returns the kernels of ``gather_pool``, a line each; of ``gather_rows``: one id a sample."""
    numbers = _number(table.dtype), _number(dtype), table.shape[1], one and not gained, gained, levelled
    return _library().embax_cuda_gather_programs(*numbers).decode()


def gather_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns ``table[rows]`` ``[n, dim]``, NaN where a row is outside of the table."""
    return _call("gather_rows", (table, rows), [((rows.shape[0], table.shape[1]), table.dtype)])[0]


def row_products(
    table: jax.Array, ids: jax.Array, offsets: jax.Array, gradients: jax.Array, levels: Sequence[float] = ()
) -> jax.Array:
    """Returns each id's row times its sample's gradient, float32 ``[n]``; 0 for what is absent."""
    operands = (table, ids, offsets, gradients)
    return _call("row_products", operands, [(ids.shape, jnp.float32)], levels=np.asarray(levels, np.float32))[0]


def product_programs(table: Any, gradients: Any, levelled: bool) -> str:
    """Returns the kernels of ``row_products``, a line each."""
    numbers = _number(table.dtype), _number(gradients.dtype), table.shape[1], levelled
    return _library().embax_cuda_product_programs(*numbers).decode()


def samples_of(offsets: jax.Array, count: int) -> jax.Array:
    """Returns the sample of each of ``count`` places, int32 ``[count]``; behind the last sample, the last."""
    return _call("samples_of", (offsets,), [((count,), jnp.int32)])[0]


def samples_programs() -> str:
    """Returns the kernels of ``samples_of``, a line each."""
    return _library().embax_cuda_samples_programs().decode()


def update(
    kernel: str,
    state: Sequence[jax.Array],
    entries: Entries,
    token: jax.Array,
    gradients: Sequence[Any],
    hyper: Any,
    *,
    apart: bool = False,
) -> list[jax.Array]:
    """Returns ``state`` after one step on the rows that occur, in place where it is donated.

    Args:
      kernel: the optimizer's name in csrc/optimizers.h.
      state: the table and its slots; behind them, where rows are tracked, a byte a row to be set for those stepped.
      entries: the occurrences.
      token: any result of the lookup that the update comes after; not read.
      gradients: of the samples, in blocks of one dtype, ``most_blocks()`` of them at most.
      hyper: ``(Modifiers, hyperparameters)`` of this step.
      apart: no row occurs twice; entries then need no order.
    """
    numbers, common, seed, stochastic = hyper_vectors(hyper)
    first = (*entries.operands(), token, numbers, common, seed)
    shapes = [(part.shape, part.dtype) for part in state]
    if not apart:
        shapes += _scratch(entries.keys.shape[0], state[0].shape[1])
    in_place = {len(first) + index: index for index in range(len(state))}
    operands = (*first, *state, *gradients)
    results = _call("update", operands, shapes, in_place, optimizer=kernel, stochastic=stochastic, apart=apart)
    return results[: len(state)]


def update_programs(kernel: str, table: Any, gradients: Sequence[Any], count: int, gained: bool, apart: bool) -> str:
    """Returns the kernels of ``update`` on ``count`` entries, a line each."""
    dtypes = _number(table.dtype), _number(gradients[0].dtype)
    return (
        _library().embax_cuda_update_programs(kernel.encode(), *dtypes, table.shape[1], count, gained, apart).decode()
    )


def row_gradients(
    entries: Entries, token: jax.Array, gradients: Sequence[jax.Array], rows: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct rows that occur, rising and filled up with ``rows``, and their float32 gradients."""
    count, dim = entries.keys.shape[0], gradients[0].shape[1]
    room = min(count, rows)
    shapes = [((room,), jnp.int32), ((room, dim), jnp.float32), *_scratch(count, dim)]
    operands = (*entries.operands(), token, *gradients)
    unique, values = _call("row_gradients", operands, shapes, rows=np.int64(rows))[:2]
    return unique, values


def row_gradient_programs(gradients: Sequence[Any], count: int, gained: bool) -> str:
    """Returns the kernels of ``row_gradients`` on ``count`` entries, a line each."""
    numbers = _number(gradients[0].dtype), gradients[0].shape[1], count, gained
    return _library().embax_cuda_row_gradient_programs(*numbers).decode()


def distinct_rows(keys: jax.Array, order: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct ones among sorted ``keys``, and the place among them of each key where ``order`` says.

    Both int32: ``[min(n, rows)]``, filled up with ``rows``, and ``[n]``; the place of an absent key is ``min(n,
    rows)``.
    """
    count = keys.shape[0]
    shapes = [((min(count, rows),), jnp.int32), ((count,), jnp.int32), _scratch(count, 0)[0]]
    unique, places, _ = _call("distinct_rows", (keys, order), shapes, rows=np.int64(rows))
    return unique, places


def runs_programs() -> str:
    """Returns the kernels of ``distinct_rows``, a line each."""
    return _library().embax_cuda_runs_programs().decode()


def optimizers() -> frozenset[str]:
    """Returns the names of the optimizers that there are kernels for."""
    return frozenset(_library().embax_cuda_optimizers().decode().split())


def most_blocks() -> int:
    """Returns how many blocks of gradients one call takes."""
    return int(_library().embax_cuda_most_blocks())


def _scratch(count: int, dim: int) -> list[tuple[tuple[int, ...], Any]]:
    library = _library()
    numbers, rows = library.embax_cuda_scratch_numbers(count), library.embax_cuda_scratch_rows(count)
    return [((numbers,), jnp.int32), ((rows, dim), jnp.float32)]


def _number(dtype: Any) -> int:
    return DTYPES.index(jnp.dtype(dtype))


def _library() -> Any:
    return cuda_library.load().library


def _call(
    name: str, operands: Sequence[jax.Array], shapes: Sequence[Any], in_place: dict | None = None, **attributes: Any
) -> list[jax.Array]:
    return call_ffi(f"embax_cuda_{name}", operands, shapes, in_place, **attributes)
