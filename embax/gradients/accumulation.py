"""Gradients of several calls, kept until one update is made of their mean; rows are kept as rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from embax.gradients.norms import scale
from embax.row_gradients import RowGradients, merge_row_gradients


class Pending(NamedTuple):
    """What has come since the last update.

    Attributes:
      count: int32, calls since then; all of them just after the call that completes an update.
      dense: the running mean of the dense gradients, float32 or wider.
      rows: for every table RowGradients with a leading axis: one entry for each call.
    """

    count: Any
    dense: Any
    rows: list


def start(every_k: int, rows: list[RowGradients], dense: Any) -> Pending:
    """Returns room for the gradients of ``every_k`` calls like these."""
    empty = [
        RowGradients(
            jnp.full((every_k, *g.rows.shape), g.vocabulary_size, jnp.int32),
            jnp.zeros((every_k, *g.values.shape), jnp.float32),
            g.vocabulary_size,
        )
        for g in rows
    ]
    # As optax.MultiSteps: in float32 at least.
    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype if g.dtype.itemsize > 4 else jnp.float32), dense)
    return Pending(jnp.int32(0), zeros, empty)


def accumulate(every_k: int, pending: Pending | None, rows: list[RowGradients], dense: Any) -> Pending:
    """Returns ``pending`` with one more call's gradients."""
    if pending is None:
        pending = start(every_k, rows, dense)
    place = pending.count % every_k
    seen = place.astype(jnp.float32)

    def updated(total, gradient):
        before = jnp.where(place == 0, 0, total)
        return before + (gradient.astype(total.dtype) - before) / (seen + 1).astype(total.dtype)

    mean = jax.tree.map(updated, pending.dense, dense)
    kept = [_written(old, new, place) for old, new in zip(pending.rows, rows, strict=True)]
    return Pending(place + 1, mean, kept)


def emitted(every_k: int, pending: Pending) -> tuple[jax.Array, list[RowGradients], Any]:
    """Returns (whether an update is due, mean row gradients, mean dense gradients); no rows where none is due."""
    ready = pending.count == every_k

    def merged(rows):
        return [scale(merge_row_gradients(g), 1 / every_k) for g in rows]

    def nothing(rows):
        none = [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), g) for g in jax.eval_shape(merged, rows)]
        return [g.absent() for g in none]

    return ready, jax.lax.cond(ready, merged, nothing, pending.rows), pending.dense


def _written(old: RowGradients, new: RowGradients, place: Any) -> RowGradients:
    """Returns ``old`` with ``new`` as its entry ``place``; the smaller one of the two is filled up."""
    capacity = max(old.rows.shape[-1], new.rows.shape[-1])
    old, new = _widened(old, capacity), _widened(new, capacity)
    rows = jax.lax.dynamic_update_index_in_dim(old.rows, new.rows, place, 0)
    values = jax.lax.dynamic_update_index_in_dim(old.values, new.values.astype(jnp.float32), place, 0)
    return RowGradients(rows, values, old.vocabulary_size)


def _widened(gradient: RowGradients, capacity: int) -> RowGradients:
    missing = capacity - gradient.rows.shape[-1]
    if not missing:
        return gradient
    before = ((0, 0),) * (gradient.rows.ndim - 1)
    rows = jnp.pad(gradient.rows, (*before, (0, missing)), constant_values=gradient.vocabulary_size)
    values = jnp.pad(gradient.values, (*before, (0, missing), (0, 0)))
    return RowGradients(rows, values, gradient.vocabulary_size)
