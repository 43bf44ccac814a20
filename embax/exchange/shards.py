"""One device's view of a stack: which of everybody's ids name its rows, and everybody's gradients for them.

Three samples on each of 2 devices, a stack of 6 rows dealt out by row % 2; what device 0 sees::

    ids of device 0    4 1 | 3 |           offsets 0 2 3 3
    ids of device 1    0 | 0 5 | 2         offsets 0 1 3 4
    everybody's        4 1 | 3 | | 0 | 0 5 | 2
    its rows (id / 2)  2 - | - | | 0 | 0 - | 1         - is absent: another device's row
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from embax import kernels
from embax.id_batch import StackIds
from embax.placement import Devices
from embax.planning import StackPlan
from embax.rounding import mixed


class Here(NamedTuple):
    """What an exchange is told: the stack, its devices, and the backend that does the row work on each."""

    stack: StackPlan
    devices: Devices
    backend: str


def local_stack(stack: StackPlan, activation_dtype: str | None = None) -> StackPlan:
    """Returns the stack as a kernel on one device sees it: its rows, its columns, nobody else."""
    return dataclasses.replace(
        stack,
        rows=stack.local_rows,
        embedding_dim=stack.local_dim,
        activation_dtype=activation_dtype or stack.activation_dtype,
        placement="row",
        shards=1,
    )


def pooled(backend: str, stack: StackPlan, table: Any, ids: StackIds) -> jax.Array:
    """Returns the activations of ids of one feature; rows that are no plain array (quantized ones) pool themselves."""
    if hasattr(table, "lookup_pooled"):
        return table.lookup_pooled(stack, backend, ids)[0]
    return kernels.get(backend).gather_pool(stack, table, ids)[0]


def products(backend: str, stack: StackPlan, table: Any, ids: StackIds, gradients: jax.Array) -> jax.Array:
    """Returns each id's row times its sample's gradient; rows that are no plain array know their own."""
    if hasattr(table, "row_products"):
        return table.row_products(stack, ids, gradients)
    return kernels.get(backend).row_products(stack, table, ids, gradients)


def together(ids: StackIds) -> StackIds:
    """Returns the same ids as those of one feature: the kernels then make one result."""
    valencies = set(ids.valencies)
    valency = valencies.pop() if len(valencies) == 1 else None
    return dataclasses.replace(ids, samples=(sum(ids.samples),), valencies=(valency,))


def everybodys(stack: StackPlan, ids: StackIds, axes: Sequence[str]) -> StackIds:
    """Returns the ids of all devices along ``axes`` as one CSR of one feature, device after device."""
    ids = together(ids)
    if not axes:
        return ids
    capacity, samples = ids.ids.shape[0], ids.samples[0]
    # What stands behind the last offset means nothing; in the middle of everybody's ids it must be absent.
    rows = jnp.where(jnp.arange(capacity, dtype=jnp.int32) < ids.offsets[-1], ids.ids, stack.rows)
    every = jax.lax.all_gather(rows, axes)
    devices = every.shape[0]
    firsts = jax.lax.all_gather(ids.offsets[:-1], axes) + capacity * jnp.arange(devices, dtype=jnp.int32)[:, None]
    return StackIds(
        ids=every.reshape(-1),
        offsets=jnp.append(firsts.reshape(-1), jnp.int32(devices * capacity)),
        gains=None if ids.gains is None else jax.lax.all_gather(ids.gains, axes).reshape(-1),
        samples=(devices * samples,),
        valencies=ids.valencies,
    )


def owners(stack: StackPlan, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the device that has each row of the stack, ``shards`` for absent ones, and the row's number there."""
    present = (rows >= 0) & (rows < stack.rows)
    if stack.placement == "row":
        owner, local = rows % stack.shards, rows // stack.shards
    else:
        owner, local = rows // stack.local_rows, rows % stack.local_rows
    return jnp.where(present, owner, stack.shards), jnp.where(present, local, stack.local_rows)


def own_rows(stack: StackPlan, rows: jax.Array, devices: Devices) -> jax.Array:
    """Returns the numbers that rows of the stack have on this device, ``local_rows`` where they are another's."""
    owner, local = owners(stack, rows)
    return jnp.where(owner == jax.lax.axis_index(devices.table_axes), local, stack.local_rows)


def on_wire(devices: Devices, values: jax.Array) -> jax.Array:
    """Returns ``values`` as they travel: rounded to the wire's dtype where there is one."""
    return values if devices.wire_dtype is None else values.astype(devices.wire_dtype)


def seeded_here(hyper: Any, axes: Sequence[str]) -> Any:
    """Returns the hyperparameters with a seed for stochastic rounding that differs from device to device."""
    modifiers, own = hyper
    if modifiers.rounding_seed is None:
        return hyper
    here = jax.lax.axis_index(tuple(axes)).astype(jnp.uint32)
    return modifiers._replace(rounding_seed=modifiers.rounding_seed + mixed(here)), own
