"""The reference backend: plain XLA, always there; it defines the meaning and runs on every platform.

Both directions walk through the ids chunk by chunk, so that temporaries stay in cache and do not grow with
the batch times embedding_dim. Six occurrences in chunks of 4 (an update; part is the carried, unfinished sum)::

    sorted rows   0 3 3 5 | 6 6
    chunk 0: sums f, b + e, a;  5 ends here, for the next row is 6: write rows 0, 3, 5;  part = 0
    chunk 1: sum part + c + d;  write row 6

A row whose occurrences cross a boundary is carried over and written once, where its last occurrence stands. Every
row is read once, stepped once and written once, whatever the batch holds; sums run in the order of the samples.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from embax.id_batch import StackIds
from embax.optimizers.base import Optimizer, map_slots
from embax.order import stable_order
from embax.planning import StackPlan
from embax.row_gradients import RowGradients, sum_rows
from embax.specs import QuantizationConfig
from embax.table_state import TableState

NAME = "reference"
# On CPU a chunk of rows fits the second-level cache; elsewhere a batch is one chunk, for width is speed there.
CPU_CHUNK = 4096
# Rectangles up to this wide are unrolled: XLA then fuses all gathers and additions into one loop.
UNROLLED_VALENCY = 32


def unavailable() -> str | None:
    """Returns why this backend cannot be used: it always can."""
    return None


def gather_pool(stack: StackPlan, table: jax.Array, ids: StackIds) -> jax.Array:
    """Returns the activations ``[samples, embedding_dim]``: the gain-weighted sum of each sample's rows."""
    samples = ids.offsets.shape[0] - 1
    if not samples or not ids.ids.shape[0]:
        return jnp.zeros((samples, stack.embedding_dim), stack.activation_dtype)
    pool = _pool_ragged if None in ids.valencies else _pool_rectangles
    return pool(stack, table, ids).astype(stack.activation_dtype)


def update(
    stack: StackPlan, state: TableState, ids: StackIds, token: jax.Array, gradients: jax.Array, hyper: Any
) -> TableState:
    """Returns the state after one optimizer step on every row that ``ids`` touch.

    Args:
      stack: the stack's plan.
      state: the rows and slot variables.
      ids: what was looked up.
      token: an activation, so that the update comes after the lookup (see ``embax.lookup``).
      gradients: float32 ``[samples, embedding_dim]``, of the activations.
      hyper: ``(modifiers, hyperparameters)`` of this step.
    """
    count = ids.ids.shape[0]
    if not count or not gradients.shape[0]:
        return state
    keys = _after(_rows(stack, ids), token)
    order = stable_order(keys, stack.rows)
    chunk = _chunk(count)
    keys = _padded(keys[order], chunk, stack.rows)
    order = _padded(order, chunk, 0)
    following = jnp.append(keys[1:], stack.rows)
    sample = sample_of_ids(ids)
    present = jnp.sum(keys < stack.rows)

    def body(index, carry):
        state, part = carry
        at = index * chunk
        rows, places, after = (jax.lax.dynamic_slice(x, (at,), (chunk,)) for x in (keys, order, following))
        values = gradients[sample[places]]
        if ids.gains is not None:
            values = values * ids.gains[places][:, None]
        starts = jnp.append(False, rows[1:] != rows[:-1])
        segment = jnp.cumsum(starts, dtype=jnp.int32)
        sums = jnp.zeros_like(values).at[0].set(part).at[segment].add(values, indices_are_sorted=True)
        ends = rows != after
        unique = jnp.full(chunk, stack.rows, jnp.int32).at[jnp.where(ends, segment, chunk)].set(rows, mode="drop")
        part = jnp.where(ends[-1], 0.0, sums[segment[-1]])
        return step_rows(stack.optimizer, state, unique, sums, hyper), part

    part = jnp.zeros(gradients.shape[1], gradients.dtype)
    return jax.lax.fori_loop(0, -(-present // chunk), body, (state, part))[0]


def apply(optimizer: Optimizer, state: TableState, gradient: RowGradients, hyper: Any) -> TableState:
    """Returns the state after one optimizer step on every row of ``gradient``."""
    count, total = gradient.rows.shape[0], state.table.shape[0]
    if not count:
        return state
    chunk = _chunk(count)
    valid = (gradient.rows >= 0) & (gradient.rows < total)
    rows = _padded(jnp.where(valid, gradient.rows, total).astype(jnp.int32), chunk, total)
    values = _padded(gradient.values.astype(jnp.float32), chunk, 0)
    used = jnp.max(jnp.where(valid, jnp.arange(1, count + 1), 0))

    def body(index, state):
        at = index * chunk
        part = jax.lax.dynamic_slice(values, (at, 0), (chunk, values.shape[1]))
        return step_rows(optimizer, state, jax.lax.dynamic_slice(rows, (at,), (chunk,)), part, hyper)

    return jax.lax.fori_loop(0, -(-used // chunk), body, state)


def row_gradients(stack: StackPlan, ids: StackIds, token: jax.Array, gradients: jax.Array) -> RowGradients:
    """Returns the gradient of the stack's table: one row for each that ``ids`` touch."""
    if not gradients.shape[0]:
        return RowGradients(jnp.full(0, stack.rows, jnp.int32), gradients[:0], stack.rows)
    values = gradients[sample_of_ids(ids)]
    if ids.gains is not None:
        values = values * ids.gains[:, None]
    return sum_rows(_after(_rows(stack, ids), token), values, stack.rows)


def row_products(stack: StackPlan, table: jax.Array, ids: StackIds, gradients: jax.Array) -> jax.Array:
    """Returns each id's row times its sample's gradient, float32 ``[capacity]``: the derivative of its gain."""
    if not gradients.shape[0]:
        return jnp.zeros(ids.ids.shape, jnp.float32)
    values = _looked_up(stack, table, _rows(stack, ids))
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

    def write(array, values):
        return array.at[rows].set(values.astype(array.dtype), mode="drop", unique_indices=True)

    stepped, slots = optimizer.step_rows(read(state.table), gradients, map_slots(read, state.slots), hyper)
    return TableState(write(state.table, stepped), map_slots(write, state.slots, slots))


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


def _rows(stack: StackPlan, ids: StackIds) -> jax.Array:
    """Returns the rows of ``ids``, with one past the end for whatever is absent."""
    row = ids.ids
    present = (jnp.arange(row.shape[0]) < ids.offsets[-1]) & (row >= 0) & (row < stack.rows)
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
    rows, parts, at = _rows(stack, ids), [], 0
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
    chunk = _chunk(count)
    rows = _padded(_rows(stack, ids), chunk, stack.rows)
    sample = _padded(sample_of_ids(ids), chunk, 0)
    gains = None if ids.gains is None else _padded(ids.gains, chunk, 0.0)

    def body(index, total):
        def part(array):
            return jax.lax.dynamic_slice(array, (index * chunk,), (chunk,))

        values = _looked_up(stack, table, part(rows))
        if gains is not None:
            values = values * part(gains)[:, None]
        return total.at[part(sample)].add(values)

    total = jnp.zeros((ids.offsets.shape[0] - 1, stack.embedding_dim), jnp.float32)
    used = jnp.clip(ids.offsets[-1], 0, count)
    return jax.lax.fori_loop(0, -(-used // chunk), body, total)


def _after(rows: jax.Array, token: jax.Array) -> jax.Array:
    """Returns ``rows``, unchanged, in a form that needs ``token``: an order that XLA cannot take away.

    Whatever the bits of the token, NaN included, the smaller of them and 0 is at most 0, and no row is below 0.
    """
    if not token.size:
        return rows
    bits = jax.lax.bitcast_convert_type(token.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return jnp.maximum(rows, jnp.minimum(bits, 0))


def _chunk(count: int) -> int:
    return min(count, CPU_CHUNK) if jax.default_backend() == "cpu" else count


def _padded(array: jax.Array, chunk: int, fill) -> jax.Array:
    """Returns ``array`` filled up to a multiple of ``chunk``."""
    missing = -array.shape[0] % chunk
    return jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)), constant_values=fill)
