"""Every device has the whole table: lookups stay at home, and every device takes the same step.

All ids and all gradients go to everybody, so that each adds them up in the same order: the copies stay equal, bit for
bit. Of a small table it is the summed gradient that travels, whole; every device gets the same sum.
"""

from typing import Any

import jax
import jax.numpy as jnp

from embax import kernels
from embax.exchange.shards import Here, everybodys, local_stack, on_wire, pooled, products, together
from embax.id_batch import StackIds
from embax.placement import sums_travel
from embax.row_gradients import RowGradients
from embax.table_state import TableState


def lookup(here: Here, table: Any, ids: StackIds) -> jax.Array:
    """Returns the activations of this device's samples, ``[samples, embedding_dim]`` of all features together."""
    stack, _, backend = here
    return pooled(backend, local_stack(stack), table, together(ids))


def update(
    here: Here, state: TableState, ids: StackIds, token: jax.Array, gradient: jax.Array, hyper: Any
) -> TableState:
    """Returns the table after one step on the rows that anybody's samples touched."""
    stack, devices, backend = here
    if sums_travel(stack.rows, sum(ids.samples), devices.batch_shards):
        summed = row_gradients(here, ids, token, gradient)
        return kernels.get(backend).apply(stack.optimizer, state, summed, hyper)
    every = everybodys(stack, ids, devices.batch_axes)
    gradient = jax.lax.all_gather(on_wire(devices, gradient), devices.batch_axes, tiled=True)
    return kernels.get(backend).update(local_stack(stack), state, every, token, (gradient,), hyper)


def row_gradients(here: Here, ids: StackIds, token: jax.Array, gradient: jax.Array) -> RowGradients:
    """Returns the gradient of the table."""
    stack, devices, backend = here
    if sums_travel(stack.rows, sum(ids.samples), devices.batch_shards):
        return _summed(here, ids, token, gradient)
    every = everybodys(stack, ids, devices.batch_axes)
    gradient = jax.lax.all_gather(on_wire(devices, gradient), devices.batch_axes, tiled=True)
    return kernels.get(backend).row_gradients(local_stack(stack), every, token, (gradient,))


def _summed(here: Here, ids: StackIds, token: jax.Array, gradient: jax.Array) -> RowGradients:
    """Returns the gradient of a small table: each device's sums for all its rows, added up."""
    stack, devices, backend = here
    own = kernels.get(backend).row_gradients(local_stack(stack), together(ids), token, (gradient,))
    touched = jnp.zeros((stack.rows, 1), jnp.float32).at[own.rows].set(1, mode="drop", unique_indices=True)
    sums = jnp.concatenate([touched, own.to_dense().astype(jnp.float32)], axis=1)
    sums = jax.lax.psum(sums, devices.batch_axes)
    rows = jnp.where(sums[:, 0] > 0, jnp.arange(stack.rows, dtype=jnp.int32), stack.rows)
    return RowGradients(rows, sums[:, 1:], stack.rows)


def gain_products(here: Here, table: Any, ids: StackIds, cotangent: jax.Array) -> jax.Array:
    """Returns the derivatives of the gains of this device's ids, from those of its activations."""
    stack, _, backend = here
    return products(backend, local_stack(stack), table, together(ids), cotangent)
