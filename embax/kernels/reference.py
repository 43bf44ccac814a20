"""The reference backend: plain XLA, always there; it defines the meaning and runs on every platform.

Rectangles are pooled by one fused loop over their gathers; ragged ids chunk by chunk. An update walks the sorted
occurrences (``embax.sorted_rows``): every touched row is read once, stepped once and written once, whatever the batch
holds, and temporaries do not grow with the batch.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from embax.id_batch import StackIds
from embax.optimizers.base import Optimizer, map_slots
from embax.planning import StackPlan
from embax.rounding import rounded
from embax.row_gradients import RowGradients, sum_occurrences
from embax.sorted_rows import chunk_of, padded, stable_order, varying_with, walk
from embax.specs import QuantizationConfig
from embax.table_state import TableState

NAME = "reference"
# Rectangles up to this wide are unrolled: XLA then fuses all gathers and additions into one loop.
UNROLLED_VALENCY = 32


def unavailable() -> str | None:
    """Returns why this backend cannot be used: it always can."""
    return None


def gather_pool(stack: StackPlan, table: jax.Array, ids: StackIds) -> tuple[jax.Array, ...]:
    """Returns the activations of each feature, ``[samples, embedding_dim]``: the gain-weighted sums of rows."""
    samples = ids.offsets.shape[0] - 1
    if not samples or not ids.ids.shape[0]:
        pooled = jnp.zeros((samples, stack.embedding_dim), stack.activation_dtype)
    else:
        pool = _pool_ragged if None in ids.valencies else _pool_rectangles
        pooled = pool(stack, table, ids).astype(stack.activation_dtype)
    ends = itertools.accumulate(ids.samples)
    return tuple(pooled[end - count : end] for end, count in zip(ends, ids.samples, strict=True))


def update(
    stack: StackPlan, state: TableState, ids: StackIds, token: jax.Array, gradients: tuple, hyper: Any
) -> TableState:
    """Returns the state after one optimizer step on every row that ``ids`` touch.

    Args:
      stack: the stack's plan.
      state: the rows and slot variables.
      ids: what was looked up.
      token: an activation, so that the update comes after the lookup (see ``embax.lookup``).
      gradients: of the activations, floating point ``[samples, embedding_dim]`` for each feature.
      hyper: ``(modifiers, hyperparameters)`` of this step.
    """
    if not ids.ids.shape[0] or not sum(ids.samples):
        return state

    def step(state, rows, sums, ranks):
        return step_rows(stack.optimizer, state, rows, sums, hyper)

    keys = after(present_rows(stack, ids), token)
    values_at = _values_at(_joined(gradients), sample_of_ids(ids), ids.gains)
    return walk(keys, stack.rows, stack.embedding_dim, values_at, step, state)


def row_gradients(stack: StackPlan, ids: StackIds, token: jax.Array, gradients: tuple) -> RowGradients:
    """Returns the gradient of the stack's table: one row for each that ``ids`` touch."""
    values = _joined(gradients)
    if not values.shape[0]:
        return RowGradients(jnp.full(0, stack.rows, jnp.int32), values, stack.rows)
    return sum_rows(after(present_rows(stack, ids), token), values, sample_of_ids(ids), ids.gains, stack.rows)


def sum_rows(rows: jax.Array, values: jax.Array, samples: Any, gains: Any, vocabulary_size: int) -> RowGradients:
    """Returns the sums of ``gains[i] * values[samples[i]]`` over the occurrences i of each row, float32.

    Args:
      rows: int32 ``[n]``; outside of ``[0, vocabulary_size)``: none.
      values: floating point ``[m, D]``.
      samples: int32 ``[n]``, or None: occurrence i has the value i.
      gains: float32 ``[n]``, or None: every gain is 1.
      vocabulary_size: rows of the table.
    """
    like = jax.ShapeDtypeStruct(values.shape[1:], jnp.float32)
    return sum_occurrences(rows, _values_at(values, samples, gains), like, vocabulary_size)


def _values_at(values: jax.Array, samples: Any, gains: Any) -> Callable:
    def values_at(places):
        found = values[places if samples is None else samples[places]].astype(jnp.float32)
        return found if gains is None else found * gains[places][:, None]

    return values_at


def _joined(gradients: tuple) -> jax.Array:
    return jnp.concatenate([part.astype(jnp.float32) for part in gradients])


def take(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the rows ``[n]`` of ``table`` at int32 ``rows``, NaN where there is none."""
    return jnp.take(table, rows, axis=0, mode="fill")


def distinct_rows(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct rows among int32 ``ids`` ``[n]``, and each id's place among them.

    Ids outside of ``[0, rows)`` are absent. The rows, int32 ``[min(n, rows)]``, rise and are filled up with ``rows``;
    the place, int32 ``[n]``, of an absent id is ``min(n, rows)``.

    >>> unique, places = distinct_rows(jnp.array([4, 1, 4, 0, 9, 1]), 5)
    >>> unique.tolist(), places.tolist()
    ([0, 1, 4, 5, 5], [2, 1, 2, 0, 5, 1])
    """
    count, room = ids.shape[0], min(ids.shape[0], rows)
    if not room:
        return jnp.zeros(0, jnp.int32), jnp.zeros(count, jnp.int32)
    keys = jnp.where((ids >= 0) & (ids < rows), ids, rows).astype(jnp.int32)
    order = stable_order(keys, rows)
    keys = keys[order]
    begins = jnp.append(keys[0] < rows, (keys[1:] != keys[:-1]) & (keys[1:] < rows))
    ranks = jnp.cumsum(begins, dtype=jnp.int32) - 1
    unique = jnp.full(room, rows, jnp.int32)
    unique = unique.at[jnp.where(begins, ranks, room)].set(keys, mode="drop", unique_indices=True)
    places = jnp.zeros(count, jnp.int32).at[order].set(jnp.where(keys < rows, ranks, room), unique_indices=True)
    return unique, places


def apply(
    optimizer: Optimizer, state: TableState, gradient: RowGradients, hyper: Any, step: Callable | None = None
) -> TableState:
    """Returns the state after one optimizer step on every row of ``gradient``; ``step`` is ``step_rows``, or alike."""
    count, total = gradient.rows.shape[0], state.table.shape[0]
    if not count:
        return state
    chunk, step = chunk_of(count), step or step_rows
    valid = (gradient.rows >= 0) & (gradient.rows < total)
    rows = padded(jnp.where(valid, gradient.rows, total).astype(jnp.int32), chunk, total)
    values = padded(gradient.values.astype(jnp.float32), chunk, 0)
    used = jnp.max(jnp.where(valid, jnp.arange(1, count + 1, dtype=jnp.int32), 0))

    def body(index, state):
        at = index * chunk
        part = jax.lax.dynamic_slice(values, (at, jnp.int32(0)), (chunk, values.shape[1]))
        return step(optimizer, state, jax.lax.dynamic_slice(rows, (at,), (chunk,)), part, hyper)

    return jax.lax.fori_loop(0, -(-used // chunk), body, varying_with(state, rows, values))


def row_products(stack: StackPlan, table: jax.Array, ids: StackIds, gradients: jax.Array) -> jax.Array:
    """Returns each id's row times its sample's gradient, float32 ``[capacity]``: the derivative of its gain."""
    if not gradients.shape[0]:
        return jnp.zeros(ids.ids.shape, jnp.float32)
    values = _looked_up(stack, table, present_rows(stack, ids))
    return jnp.sum(values * gradients[sample_of_ids(ids)], axis=-1)


def step_rows(optimizer: Optimizer, state: TableState, rows: jax.Array, gradients: jax.Array, hyper: Any) -> TableState:
    """Returns the state with ``rows`` read, stepped in float32 and written back; others do not move.

    Args:
      optimizer: the formula.
      state: rows and slot variables.
      rows: int32 ``[n]``, distinct; those past the end are skipped.
      gradients: float32 ``[n, embedding_dim]``.
      hyper: ``(modifiers, hyperparameters)``.
    """

    def read(array):
        return jnp.take(array, rows, axis=0, mode="clip").astype(jnp.float32)

    stepped, slots = optimizer.step_rows(read(state.table), gradients, map_slots(read, state.slots), hyper)
    stepped = narrowed(stepped, rows, state.table.dtype, hyper)
    slots = map_slots(lambda old, new: write(old, rows, new.astype(old.dtype)), state.slots, slots)
    return TableState(write(state.table, rows, stepped), slots, marked(state.touched, rows))


def marked(touched: Any, rows: jax.Array) -> Any:
    """Returns ``touched`` with its distinct ``rows`` marked, where rows are tracked; those past the end are skipped."""
    if touched is None:
        return None
    return touched._replace(rows=touched.rows.at[rows].set(jnp.uint8(1), mode="drop", unique_indices=True))


def narrowed(stepped: jax.Array, rows: jax.Array, dtype: Any, hyper: Any) -> jax.Array:
    """Returns float32 rows as they are stored: rounded to nearest, or at random if the optimizer says so."""
    seed = hyper[0].rounding_seed
    if seed is None or jnp.dtype(dtype).itemsize != 2:
        return stepped.astype(dtype)
    return rounded(stepped, rows, dtype, seed)


def write(array: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Returns ``array`` with its distinct ``rows`` replaced; those past the end are skipped."""
    if _writes_row_by_row(array):
        return _write_narrow(array, rows, values)
    return array.at[rows].set(values, mode="drop", unique_indices=True)


def _writes_row_by_row(array: jax.Array) -> bool:
    """Returns whether a scatter into ``array`` would cost the whole table, and writing row by row would not.

    XLA's CPU backend has no 16-bit scatter: it converts the whole table to float32 and back (52 ms for 2,000,000 rows
    of 16 and 64 ids, against 0.1). It updates float16 where it is, and bfloat16 from jax 0.12 on; before that every
    bfloat16 write converts the table, so that one scatter for all rows is the least.
    """
    if array.dtype.itemsize >= 4 or jax.default_backend() != "cpu":
        return False
    return array.dtype == jnp.float16 or jax.__version_info__ >= (0, 12)


def _write_narrow(array: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Returns ``array`` with ``rows`` replaced, one after another; those past the end are skipped."""
    total, width = array.shape
    zero = jnp.int32(0)

    def write(index, array):
        row = jnp.minimum(rows[index], total - 1)
        old = jax.lax.dynamic_slice(array, (row, zero), (1, width))
        new = jax.lax.dynamic_slice(values, (index, zero), (1, width))
        return jax.lax.dynamic_update_slice(array, jax.lax.select(rows[index] < total, new, old), (row, zero))

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rows.shape[0]), write, array)


def sample_of_ids(ids: StackIds) -> jax.Array:
    """Returns the sample of each place of ``ids.ids``, int32 ``[capacity]``, within the samples there are."""
    capacity, samples = ids.ids.shape[0], ids.offsets.shape[0] - 1
    if None not in ids.valencies:
        parts, first = [], 0
        for count, valency in _rectangles(ids):
            parts.append(first + jnp.arange(count * valency, dtype=jnp.int32) // max(valency, 1))
            first += count
        return jnp.concatenate(parts)
    # A sample begins where its offset says; empty samples begin at the same place and add up.
    begins = jnp.zeros(capacity + 1, jnp.int32).at[jnp.clip(ids.offsets[1:], 0, capacity)].add(1)
    return jnp.clip(jnp.cumsum(begins[:-1], dtype=jnp.int32), 0, samples - 1)


def quantize(rows: jax.Array, config: QuantizationConfig) -> jax.Array:
    """Returns float32 rows clipped and rounded to the config's levels."""
    low, high, levels = config.as_tuple()
    width = (high - low) / (levels - 1)
    return low + jnp.round((jnp.clip(rows, low, high) - low) / width) * width


def present_rows(stack: StackPlan, ids: StackIds) -> jax.Array:
    """Returns the rows of ``ids``, with one past the end for whatever is absent."""
    row = ids.ids
    present = (jnp.arange(row.shape[0], dtype=jnp.int32) < ids.offsets[-1]) & (row >= 0) & (row < stack.rows)
    return jnp.where(present, row, stack.rows)


def _looked_up(stack: StackPlan, table: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the rows as float32, zeros where there is none."""
    values = jnp.take(table, rows, axis=0, mode="clip").astype(jnp.float32)
    if stack.quantization is not None:
        values = quantize(values, stack.quantization)
    return jnp.where((rows < stack.rows)[:, None], values, 0.0)


def _rectangles(ids: StackIds) -> list[tuple[int, int]]:
    """Returns (samples, valency) of neighbouring features of one valency taken together."""
    pairs = zip(ids.samples, ids.valencies, strict=True)
    return [(sum(s for s, _ in group), v or 0) for v, group in itertools.groupby(pairs, key=lambda pair: pair[1])]


def _pool_rectangles(stack: StackPlan, table: jax.Array, ids: StackIds) -> jax.Array:
    rows, parts, at = present_rows(stack, ids), [], 0
    for samples, valency in _rectangles(ids):
        size = samples * valency
        gains = None if ids.gains is None else ids.gains[at : at + size].reshape(samples, valency)
        parts.append(_pool_rectangle(stack, table, rows[at : at + size].reshape(samples, valency), gains))
        at += size
    return jnp.concatenate(parts)


def _pool_rectangle(stack: StackPlan, table: jax.Array, rows: jax.Array, gains: jax.Array | None) -> jax.Array:
    samples, valency = rows.shape

    def term(j):
        values = _looked_up(stack, table, rows[:, j])
        return values if gains is None else values * gains[:, j, None]

    if valency == 0:
        return jnp.zeros((samples, stack.embedding_dim), jnp.float32)
    if valency > UNROLLED_VALENCY:
        return jax.lax.fori_loop(1, valency, lambda j, total: total + term(j), term(0))
    total = term(0)
    for j in range(1, valency):
        total = total + term(j)
    return total


def _pool_ragged(stack: StackPlan, table: jax.Array, ids: StackIds) -> jax.Array:
    count = ids.ids.shape[0]
    chunk = chunk_of(count)
    rows = padded(present_rows(stack, ids), chunk, stack.rows)
    sample = padded(sample_of_ids(ids), chunk, 0)
    gains = None if ids.gains is None else padded(ids.gains, chunk, 0.0)

    def body(index, total):
        def part(array):
            return jax.lax.dynamic_slice(array, (index * chunk,), (chunk,))

        values = _looked_up(stack, table, part(rows))
        if gains is not None:
            values = values * part(gains)[:, None]
        return total.at[part(sample)].add(values)

    total = jnp.zeros((ids.offsets.shape[0] - 1, stack.embedding_dim), jnp.float32)
    used = jnp.clip(ids.offsets[-1], 0, count)
    return jax.lax.fori_loop(0, -(-used // chunk), body, varying_with(total, rows, table))


def after(rows: jax.Array, token: jax.Array) -> jax.Array:
    """Returns ``rows``, unchanged, in a form that needs ``token``: an order that XLA cannot take away.

    Whatever the bits of the token, NaN included, the smaller of them and 0 is at most 0, and no row is below 0.
    """
    if not token.size:
        return rows
    bits = jax.lax.bitcast_convert_type(token.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return jnp.maximum(rows, jnp.minimum(bits, 0))
