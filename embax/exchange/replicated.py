"""Every device has the whole table: lookups stay at home, and every device takes the same step.

All ids and all gradients go to everybody, so that each adds them up in the same order: the copies stay equal, bit for
bit.
"""

from typing import Any

import jax

from embax import kernels
from embax.exchange.shards import everybodys, local_stack, pooled, together
from embax.id_batch import StackIds
from embax.placement import Devices
from embax.planning import StackPlan
from embax.row_gradients import RowGradients
from embax.table_state import TableState


def lookup(stack: StackPlan, devices: Devices, backend: str, table: Any, ids: StackIds) -> jax.Array:
    """Returns the activations of this device's samples, ``[samples, embedding_dim]`` of all features together."""
    return pooled(backend, local_stack(stack), table, together(ids))


def update(
    stack: StackPlan,
    devices: Devices,
    backend: str,
    state: TableState,
    ids: StackIds,
    token: jax.Array,
    gradient: jax.Array,
    hyper: Any,
) -> TableState:
    """Returns the table after one step on the rows that anybody's samples touched."""
    every = everybodys(stack, ids, devices.batch_axes)
    gradient = jax.lax.all_gather(gradient, devices.batch_axes, tiled=True)
    return kernels.get(backend).update(local_stack(stack), state, every, token, (gradient,), hyper)


def row_gradients(
    stack: StackPlan, devices: Devices, backend: str, ids: StackIds, token: jax.Array, gradient: jax.Array
) -> RowGradients:
    """Returns the gradient of the table."""
    every = everybodys(stack, ids, devices.batch_axes)
    gradient = jax.lax.all_gather(gradient, devices.batch_axes, tiled=True)
    return kernels.get(backend).row_gradients(local_stack(stack), every, token, (gradient,))


def gain_products(
    stack: StackPlan, devices: Devices, backend: str, table: Any, ids: StackIds, cotangent: jax.Array
) -> jax.Array:
    """Returns the derivatives of the gains of this device's ids, from those of its activations."""
    return kernels.get(backend).row_products(local_stack(stack), table, together(ids), cotangent)
