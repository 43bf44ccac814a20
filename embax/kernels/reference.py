"""The reference backend: plain XLA, always there; it defines the meaning and runs on every platform.

Rectangles are pooled by one fused loop over their gathers; ragged ids chunk by chunk. An update walks the sorted
occurrences (``embax.sorted_rows``): every touched row is read once, stepped once and written once, whatever the batch
holds, and temporaries do not grow with the batch (on CPU; elsewhere not beyond those of 2^20 ids).

No scatter names an index twice, for GPUs add such up in any order, or slowly; only forms for CPU do, where a sum is one
after another. The platform that a program is lowered for chooses the form.
"""

import functools
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
from embax.sorted_rows import (
    CPU_CHUNK,
    by_platform,
    in_chunks,
    in_order,
    padded,
    varying_with,
    walk,
    walk_in_order,
)
from embax.specs import QuantizationConfig
from embax.table_state import TableState

NAME = "reference"
# Rectangles up to this wide are unrolled: XLA then fuses all gathers and additions into one loop.
UNROLLED_VALENCY = 32


def unavailable() -> str | None:
    """Returns why this backend cannot be used: it always can."""
    return None


def reason() -> str:
    """Returns what this backend runs on."""
    return "plain XLA, on every platform"


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
    keys, order = in_order(keys, rows)
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
    step = step or step_rows
    valid = (gradient.rows >= 0) & (gradient.rows < total)
    used = jnp.max(jnp.where(valid, jnp.arange(1, count + 1, dtype=jnp.int32), 0))

    def chunks(limit, rows, values, used, state):
        chunk = min(count, limit)
        rows, values = padded(rows, chunk, total), padded(values, chunk, 0)

        def body(index, state):
            at = index * chunk
            part = jax.lax.dynamic_slice(values, (at, jnp.int32(0)), (chunk, values.shape[1]))
            return step(optimizer, state, jax.lax.dynamic_slice(rows, (at,), (chunk,)), part, hyper)

        return in_chunks(limit, chunk, rows.shape[0], used, body, varying_with(state, rows, values))

    rows = jnp.where(valid, gradient.rows, total).astype(jnp.int32)
    return by_platform(chunks, rows, gradient.values.astype(jnp.float32), used, state)


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
    """Returns ``array`` with its distinct ``rows`` replaced; those past the end are skipped.

    XLA's CPU backend has no 16-bit scatter: it converts the whole table to float32 and back (52 ms for 2,000,000 rows
    of 16 and 64 ids, against 0.1), where writing row by row does not. It updates float16 where it is, and bfloat16 from
    jax 0.12 on; before that every bfloat16 write converts the table, so that one scatter for all rows is the least.
    """
    if array.dtype.itemsize >= 4 or (array.dtype != jnp.float16 and jax.__version_info__ < (0, 12)):
        return _scatter(array, rows, values)
    return jax.lax.platform_dependent(array, rows, values, cpu=_write_narrow, default=_scatter)


def _scatter(array: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    return array.at[rows].set(values, mode="drop", unique_indices=True)


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
    begins = jnp.clip(ids.offsets[1:], 0, capacity)
    number = {"cpu": functools.partial(_begun_counted, capacity), "default": functools.partial(_begun_last, capacity)}
    return jnp.clip(jax.lax.platform_dependent(begins, **number), 0, samples - 1)


def _begun_counted(capacity: int, begins: jax.Array) -> jax.Array:
    """Returns how many samples but the first have begun at each of ``capacity`` places: the form for CPU.

    Empty samples begin at the same place and add up, which CPUs do fastest (1.2 ms for 163,840 places against 1.8).
    """
    return jnp.cumsum(jnp.zeros(capacity + 1, jnp.int32).at[begins].add(1)[:-1], dtype=jnp.int32)


def _begun_last(capacity: int, begins: jax.Array) -> jax.Array:
    """Returns how many samples but the first have begun at each of ``capacity`` places, each place written once."""
    begins = jax.lax.cummax(begins)  # as they are in a good batch; no place is named twice in a bad one either
    place = jnp.where(jnp.append(begins[1:] != begins[:-1], True), begins, capacity)
    begun = jnp.zeros(capacity, jnp.int32)
    numbers = jnp.arange(1, begins.shape[0] + 1, dtype=jnp.int32)
    return jax.lax.cummax(begun.at[place].set(numbers, mode="drop", unique_indices=True))


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
    def values_of(rows, gains=None):
        values = _looked_up(stack, table, rows)
        return values if gains is None else values * gains[:, None]

    return pool_in_order(stack, ids, values_of)


def pool_in_order(stack: StackPlan, ids: StackIds, values_of: Callable) -> jax.Array:
    """Returns the sums of each sample, float32 ``[samples, embedding_dim]``, whatever its length.

    Args:
      stack: the stack's plan.
      ids: there are some, of some samples.
      values_of: maps ``[m]`` present rows, and their gains where there are any, to float32 ``[m, embedding_dim]``.
    """
    count, samples = ids.ids.shape[0], ids.offsets.shape[0] - 1
    places = jnp.arange(count, dtype=jnp.int32)
    used = jnp.clip(ids.offsets[-1], 0, count)
    sample = jnp.where(places < used, sample_of_ids(ids), samples)
    rows = present_rows(stack, ids)
    operands = (rows,) if ids.gains is None else (rows, ids.gains)
    total = jnp.zeros((samples, stack.embedding_dim), jnp.float32)
    total = varying_with(total, sample, values_of(*(array[:1] for array in operands)))

    def added(total, sample, used, operands):
        chunk = min(count, CPU_CHUNK)
        arrays = padded(sample, chunk, samples), *(padded(array, chunk, 0) for array in operands)

        def body(index, total):
            part, *parts = (jax.lax.dynamic_slice(array, (index * chunk,), (chunk,)) for array in arrays)
            return total.at[part].add(values_of(*parts), mode="drop")

        return jax.lax.fori_loop(0, -(-used // chunk), body, total)

    def walked(total, sample, used, operands):
        del used

        def values_at(places):
            return values_of(*(array[places] for array in operands))

        def write(total, samples, sums, ranks):
            return total.at[samples].set(sums, mode="drop", unique_indices=True)

        return walk_in_order(sample, places, samples, stack.embedding_dim, values_at, write, total)

    # A CPU adds one after another: 18 ms where the walk takes 45 (8,192 samples of 20 ids, D = 64).
    return jax.lax.platform_dependent(total, sample, used, operands, cpu=added, default=walked)


def after(rows: jax.Array, token: jax.Array) -> jax.Array:
    """Returns ``rows``, unchanged, in a form that needs ``token``: an order that XLA cannot take away.

    Whatever the bits of the token, NaN included, the smaller of them and 0 is at most 0, and no row is below 0.
    """
    if not token.size:
        return rows
    bits = jax.lax.bitcast_convert_type(token.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return jnp.maximum(rows, jnp.minimum(bits, 0))
