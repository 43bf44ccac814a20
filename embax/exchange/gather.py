"""Rows dealt out over devices; ids go to everybody, partial sums come home.

Every device sums, for every sample of all devices, the rows that are its own; the partial sums of a sample are added
up where the sample lives (``psum_scatter``). In the update every device gets all gradients and steps its own rows. A
device sends ids and one partial sum a sample to every other: little where samples have many ids, or devices are few.
"""

from typing import Any

import jax

from embax import kernels
from embax.exchange.shards import everybodys, local_stack, own_rows, seeded_here
from embax.id_batch import StackIds
from embax.kernels import differentiable
from embax.placement import Devices
from embax.planning import StackPlan
from embax.row_gradients import RowGradients
from embax.table_state import TableState


def lookup(stack: StackPlan, devices: Devices, backend: str, table: Any, ids: StackIds) -> jax.Array:
    """Returns the activations of this device's samples, ``[samples, embedding_dim]`` of all features together."""
    every = _own(stack, devices, everybodys(stack, ids, devices.shared_axes))
    (partial,) = differentiable.pool(backend, local_stack(stack, "float32"), table, every)
    if devices.table_only_axes:
        partial = jax.lax.psum(partial, devices.table_only_axes)
    if devices.shared_axes:
        partial = jax.lax.psum_scatter(partial, devices.shared_axes, tiled=True)
    return partial.astype(stack.activation_dtype)


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
    """Returns this device's rows after one step on those that anybody's samples touched."""
    every = _own(stack, devices, everybodys(stack, ids, devices.batch_axes))
    gradient = jax.lax.all_gather(gradient, devices.batch_axes, tiled=True)
    hyper = seeded_here(hyper, devices.table_axes)
    return kernels.get(backend).update(local_stack(stack), state, every, token, (gradient,), hyper)


def row_gradients(
    stack: StackPlan, devices: Devices, backend: str, ids: StackIds, token: jax.Array, gradient: jax.Array
) -> RowGradients:
    """Returns the gradient of this device's rows, by their numbers here."""
    every = _own(stack, devices, everybodys(stack, ids, devices.batch_axes))
    gradient = jax.lax.all_gather(gradient, devices.batch_axes, tiled=True)
    return kernels.get(backend).row_gradients(local_stack(stack), every, token, (gradient,))


def _own(stack: StackPlan, devices: Devices, ids: StackIds) -> StackIds:
    rows = own_rows(stack, ids.ids, devices)
    return StackIds(rows, ids.offsets, ids.gains, ids.samples, ids.valencies)
