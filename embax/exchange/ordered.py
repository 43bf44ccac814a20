"""A table of its own on a mesh, without a plan: its rows stand in their order, as a model's array has them.

Six rows on 4 devices, filled up to 8: rows 0 1 on device 0, 2 3 on device 1, 4 5 on device 2, and none on device 3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from embax.exchange.one_stack import Home
from embax.optimizers.base import Optimizer
from embax.placement import ORDERED_PLACEMENTS, as_devices, chosen_exchange
from embax.planning import StackPlan, TablePlan, check_columns
from embax.sharded_tables import initial_rows
from embax.specs import float_dtype
from embax.stacking import MAX_STACK_ROWS


def ordered_home(
    name: str, shape: tuple[int, int], dtype: Any, optimizer: Optimizer, mesh: Any, placement: str
) -> Home:
    """Returns where a table lives on a mesh.

    Args:
      name: of the table, for messages.
      shape: ``(vocabulary_size, embedding_dim)``.
      dtype: float32, bfloat16 or float16.
      optimizer: of its rows.
      mesh: a Mesh or Devices.
      placement: "block" (neighbouring rows together), "column" or "replicated".

    Raises:
      ValueError: another placement or dtype, columns that the devices cannot share, or no mesh.
    """
    what, devices = f'table "{name}"', as_devices(mesh)
    if devices is None:
        raise ValueError(f"{what}: placement={placement!r} needs devices to place rows on; pass mesh=")
    if placement not in ORDERED_PLACEMENTS:
        raise ValueError(
            f"{what}: placement={placement!r} must be one of {', '.join(ORDERED_PLACEMENTS)}; rows are dealt out "
            "otherwise by a plan (embax.plan, FeatureEmbed)"
        )
    if isinstance(devices.mesh, AbstractMesh):
        raise ValueError(f"{what}: an AbstractMesh has no devices to place rows on; give a jax.sharding.Mesh")
    shards, dtype = 1 if placement == "replicated" else devices.table_shards, float_dtype(what, "dtype", dtype)
    check_columns(what, shape[1], placement, shards)
    if shape[0] > MAX_STACK_ROWS - (shards - 1):
        raise ValueError(f"{what}: {shape[0]} rows are more than {MAX_STACK_ROWS}, the most that a table can have")
    stack = StackPlan(
        name=name,
        tables=(TablePlan(name, shape[0], 0, None, "sum"),),
        features=(),
        rows=shape[0],
        embedding_dim=shape[1],
        dtype=dtype,
        activation_dtype=dtype,
        optimizer=optimizer,
        quantization=None,
        placement=placement,
        shards=shards,
        exchange=chosen_exchange(devices, [1]),
    )
    return Home(stack, devices)


def stored(home: Home, rows: Any) -> jax.Array:
    """Returns the array that is stored of ``rows`` ``[V, D]``: filled up with zeros, split over the devices."""
    missing = home.stack.stored_rows - rows.shape[0]
    if missing:
        rows = (jnp if isinstance(rows, jax.Array) else np).pad(rows, ((0, missing), (0, 0)))
    return jax.device_put(rows, home.devices.sharding(home.table_spec()))


def made(home: Home, initializer: Callable, key: jax.Array) -> jax.Array:
    """Returns the array that is stored of ``initializer(key, (V, D), dtype)``, each device's part made there."""
    stack = home.stack

    def make(key):
        rows = initial_rows(initializer, key, (stack.rows, stack.embedding_dim), jnp.dtype(stack.dtype))
        return jnp.pad(rows, ((0, stack.stored_rows - stack.rows), (0, 0)))

    return jax.jit(make, out_shardings=home.devices.sharding(home.table_spec()))(key)
