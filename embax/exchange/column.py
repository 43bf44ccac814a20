"""Every device has some columns of all rows: no row is hotter on one device than on another.

All ids go to everybody; every device sums its columns for all samples, and a sample's columns come home by
``all_to_all``. Bits are those of one device. An optimizer that looks at a whole row (a row-wise slot, clipping, a
custom formula) has the touched rows' columns brought together, and keeps its own of the result.
"""

from typing import Any

import jax
import jax.numpy as jnp

from embax import kernels
from embax.exchange.gather import brought_home
from embax.exchange.shards import Here, everybodys, local_stack, on_wire, pooled, products, seeded_here
from embax.id_batch import StackIds
from embax.kernels import reference
from embax.optimizers.base import map_slots
from embax.placement import Devices
from embax.planning import StackPlan
from embax.row_gradients import RowGradients
from embax.table_state import TableState


def lookup(here: Here, table: Any, ids: StackIds) -> jax.Array:
    """Returns the activations of this device's samples, ``[samples, embedding_dim]`` of all features together."""
    stack, devices, backend = here
    shared = devices.shared_axes
    columns = on_wire(devices, pooled(backend, local_stack(stack), table, everybodys(stack, ids, shared)))
    parts = columns[None]
    if shared:
        columns = columns.reshape(devices.size(shared), sum(ids.samples), stack.local_dim)
        parts = jax.lax.all_to_all(columns, shared, 0, 0, tiled=True)
    if devices.table_only_axes:
        parts = jax.lax.all_gather(parts, devices.table_only_axes)
    parts = _ordered(parts.reshape(_sizes(devices) + parts.shape[-2:]), _axes(devices), devices.table_axes)
    return jnp.moveaxis(parts, 0, 1).reshape(-1, stack.embedding_dim).astype(stack.activation_dtype)


def update(
    here: Here, state: TableState, ids: StackIds, token: jax.Array, gradient: jax.Array, hyper: Any
) -> TableState:
    """Returns this device's columns after one step on the rows that anybody's samples touched."""
    stack, devices, backend = here
    every, kernel, local = everybodys(stack, ids, devices.batch_axes), kernels.get(backend), local_stack(stack)
    gradient = _own_columns(stack, devices, gradient)
    if stack.optimizer.element_wise():
        hyper = seeded_here(hyper, devices.table_axes)
        return kernel.update(local, state, every, token, (gradient,), hyper)
    return apply(here, state, kernel.row_gradients(local, every, token, (gradient,)), hyper)


def row_gradients(here: Here, ids: StackIds, token: jax.Array, gradient: jax.Array) -> RowGradients:
    """Returns the gradient of this device's columns."""
    stack, devices, backend = here
    every, kernel = everybodys(stack, ids, devices.batch_axes), kernels.get(backend)
    return kernel.row_gradients(local_stack(stack), every, token, (_own_columns(stack, devices, gradient),))


def apply(here: Here, state: TableState, gradient: RowGradients, hyper: Any) -> TableState:
    """Returns this device's columns after one step on the rows of ``gradient``, of which it has its columns."""
    stack, devices, backend = here
    kernel, width = kernels.get(backend), stack.local_dim
    if stack.optimizer.element_wise():
        return kernel.apply(stack.optimizer, state, gradient, seeded_here(hyper, devices.table_axes))
    nearest = jnp.minimum(gradient.rows, stack.rows - 1)
    position = jax.lax.axis_index(devices.table_axes)

    def whole(values):
        return jax.lax.all_gather(values, devices.table_axes, axis=1, tiled=True)

    def read(array, row_wise=False):
        rows = kernel.take(array, nearest).astype(jnp.float32)
        return rows if row_wise else whole(rows)

    def write(array, values, row_wise=False):
        if not row_wise:
            values = jax.lax.dynamic_slice_in_dim(values, position * width, width, 1)
        return reference.write(array, gradient.rows, values.astype(array.dtype))

    kinds = stack.optimizer.slots()
    slots = map_slots(lambda kind, old: read(old, kind.row_wise), kinds, state.slots)
    rows, slots = stack.optimizer.step_rows(read(state.table), whole(gradient.values.astype(jnp.float32)), slots, hyper)
    rows = reference.narrowed(rows, gradient.rows, state.table.dtype, hyper)
    slots = map_slots(lambda kind, old, new: write(old, new, kind.row_wise), kinds, state.slots, slots)
    return TableState(write(state.table, rows), slots, reference.marked(state.touched, gradient.rows))


def gain_products(here: Here, table: Any, ids: StackIds, cotangent: jax.Array) -> jax.Array:
    """Returns the derivatives of the gains of this device's ids, from those of its activations."""
    stack, devices, backend = here
    every, width = everybodys(stack, ids, devices.shared_axes), stack.local_dim
    if devices.shared_axes:
        cotangent = jax.lax.all_gather(cotangent, devices.shared_axes, tiled=True)
    first = jax.lax.axis_index(devices.table_axes) * width
    cotangent = jax.lax.dynamic_slice_in_dim(cotangent, first, width, 1)
    return brought_home(devices, products(backend, local_stack(stack), table, every, cotangent))


def _own_columns(stack: StackPlan, devices: Devices, gradient: jax.Array) -> jax.Array:
    """Returns this device's columns of everybody's gradients, devices in the order of the batch axes."""
    samples = gradient.shape[0]
    sizes = tuple(devices.size((axis,)) for axis in devices.table_axes)
    parts = on_wire(devices, gradient).reshape(samples, *sizes, stack.local_dim)
    parts = _ordered(jnp.moveaxis(parts, 0, -2), devices.table_axes, _axes(devices), flat=False)
    for axis in devices.table_only_axes:
        parts = jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index(axis), 0, keepdims=False)
    parts = parts.reshape(-1, samples, stack.local_dim)
    if devices.shared_axes:
        parts = jax.lax.all_to_all(parts, devices.shared_axes, 0, 0, tiled=True)
    copies = devices.copies_axes
    if copies:
        parts = jax.lax.all_gather(parts, copies)
    order = copies + devices.shared_axes
    parts = parts.reshape(tuple(devices.size((axis,)) for axis in order) + parts.shape[-2:])
    return _ordered(parts, order, devices.batch_axes).reshape(-1, stack.local_dim)


def _axes(devices: Devices) -> tuple[str, ...]:
    return devices.table_only_axes + devices.shared_axes


def _sizes(devices: Devices) -> tuple[int, ...]:
    return tuple(devices.size((axis,)) for axis in _axes(devices))


def _ordered(parts: jax.Array, present: tuple[str, ...], wanted: tuple[str, ...], flat: bool = True) -> jax.Array:
    """Returns ``parts``, whose first dimensions are the axes ``present``, with them in the order ``wanted``."""
    count = len(present)
    parts = jnp.transpose(parts, [present.index(axis) for axis in wanted] + list(range(count, parts.ndim)))
    return parts.reshape(-1, *parts.shape[count:]) if flat else parts
