"""Rows dealt out over devices; ids go to everybody, partial sums come home.

Every device sums, for every sample of all devices, the rows that are its own; the partial sums of a sample are added
up where the sample lives (``psum_scatter``). In the update every device gets all gradients and steps its own rows. A
device sends ids and one partial sum a sample to every other: little where samples have many ids, or devices are few.
"""

from typing import Any

import jax

from embax import kernels
from embax.exchange.shards import Here, everybodys, local_stack, on_wire, own_rows, pooled, products, seeded_here
from embax.id_batch import StackIds
from embax.placement import Devices
from embax.planning import StackPlan
from embax.row_gradients import RowGradients
from embax.table_state import TableState


def lookup(here: Here, table: Any, ids: StackIds) -> jax.Array:
    """Returns the activations of this device's samples, ``[samples, embedding_dim]`` of all features together."""
    stack, devices, backend = here
    every = _own(stack, devices, everybodys(stack, ids, devices.shared_axes))
    partial = pooled(backend, local_stack(stack, "float32"), table, every)
    return brought_home(devices, on_wire(devices, partial)).astype(stack.activation_dtype)


def update(
    here: Here, state: TableState, ids: StackIds, token: jax.Array, gradient: jax.Array, hyper: Any
) -> TableState:
    """Returns this device's rows after one step on those that anybody's samples touched."""
    stack, devices, backend = here
    every = _own(stack, devices, everybodys(stack, ids, devices.batch_axes))
    gradient = jax.lax.all_gather(on_wire(devices, gradient), devices.batch_axes, tiled=True)
    hyper = seeded_here(hyper, devices.table_axes)
    return kernels.get(backend).update(local_stack(stack), state, every, token, (gradient,), hyper)


def row_gradients(here: Here, ids: StackIds, token: jax.Array, gradient: jax.Array) -> RowGradients:
    """Returns the gradient of this device's rows, by their numbers here."""
    stack, devices, backend = here
    every = _own(stack, devices, everybodys(stack, ids, devices.batch_axes))
    gradient = jax.lax.all_gather(on_wire(devices, gradient), devices.batch_axes, tiled=True)
    return kernels.get(backend).row_gradients(local_stack(stack), every, token, (gradient,))


def gain_products(here: Here, table: Any, ids: StackIds, cotangent: jax.Array) -> jax.Array:
    """Returns the derivatives of the gains of this device's ids, from those of its activations."""
    stack, devices, backend = here
    every = _own(stack, devices, everybodys(stack, ids, devices.shared_axes))
    if devices.shared_axes:
        cotangent = jax.lax.all_gather(cotangent, devices.shared_axes, tiled=True)
    return brought_home(devices, products(backend, local_stack(stack), table, every, cotangent))


def brought_home(devices: Devices, partial: jax.Array) -> jax.Array:
    """Returns the sums of everybody's partial results, each where its samples live."""
    if devices.table_only_axes:
        partial = jax.lax.psum(partial, devices.table_only_axes)
    return jax.lax.psum_scatter(partial, devices.shared_axes, tiled=True) if devices.shared_axes else partial


def _own(stack: StackPlan, devices: Devices, ids: StackIds) -> StackIds:
    rows = own_rows(stack, ids.ids, devices)
    return StackIds(rows, ids.offsets, ids.gains, ids.samples, ids.valencies)
