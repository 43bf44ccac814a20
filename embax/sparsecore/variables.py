"""Initial variables in the SparseCore layout: the values are those of ``embax.init``, whatever the layout.

Block by block, as everywhere: each device makes a block and keeps the rows that stand on it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from embax.sharded_tables import initial_rows
from embax.sparsecore.layout import check_made_for, compute_physical_row_ids, get_table_stacks, of_tables
from embax.sparsecore.matmul import EmbeddingVariables
from embax.specs import StackedTableSpec, TableSpec
from embax.table_state import BLOCK_ROWS, table_key


def check_order(mesh: Any) -> None:
    """Raises ValueError unless a mesh has the first devices of ``jax.devices()``, in their order."""
    if list(mesh.devices.flat) != jax.devices()[: mesh.size]:
        raise ValueError(
            "init_embedding_variables: the mesh has other devices than the first of jax.devices(), or another order; "
            "make it of these, or pass bypass_mesh_check=True"
        )


def check_axes(sharding: Any) -> None:
    """Raises ValueError for axes in another order than the mesh's: inside of a shard_map that order is not known."""
    axes = sharding.spec[0] if sharding.spec else None
    if isinstance(axes, tuple) and axes != tuple(axis for axis in sharding.mesh.axis_names if axis in axes):
        raise ValueError(
            f"init_embedding_variables: {sharding.spec} names axes in another order than the mesh, "
            f"{sharding.mesh.axis_names}; name them in the mesh's order, or use a layer"
        )


def all_variables(
    rng: jax.Array, table_specs: Any, sharding: NamedSharding, num_sc_per_device: int
) -> dict[str, EmbeddingVariables]:
    """Returns rows and slots of every stack by its name.

    Args:
      rng: of all tables.
      table_specs: any pytree of stacked TableSpecs.
      sharding: of ``P(axis, None)``, or of ``P(axis, None, None)`` for arrays that lead with the device.
      num_sc_per_device: SparseCores of each device.

    Raises:
      ValueError: another sharding, tables in no stack or one of other SparseCores.
    """
    spec, mesh = sharding.spec, sharding.mesh
    if len(spec) not in (2, 3) or spec[0] is None or any(axis is not None for axis in spec[1:]):
        raise ValueError(f"init_embedding_variables: {spec} must be P(axis, None), or P(axis, None, None) for pmap")
    axes = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    count = math.prod(mesh.shape[axis] for axis in axes)
    stacks = get_table_stacks(table_specs)
    for members in stacks.values():
        if members[0].is_stacked():
            check_made_for(members[0].stacked_table_spec, count, num_sc_per_device)
        of_tables(members, count * num_sc_per_device)  # which refuses others
    rows = NamedSharding(mesh, P(axes, None))
    made = {name: initial_variables(rng, members, rows, count * num_sc_per_device) for name, members in stacks.items()}
    if len(spec) == 2:
        return made
    lead = functools.partial(jax.jit, out_shardings=sharding)(
        lambda tree: jax.tree.map(lambda part: part.reshape(count, -1, part.shape[-1]), tree)
    )
    return lead(made)


def initial_variables(
    rng: jax.Array, tables: list[TableSpec], sharding: NamedSharding, num_sc: int
) -> EmbeddingVariables:
    """Returns rows and slots of a stack, each device's made there.

    Args:
      rng: of all tables; each folds its name into it.
      tables: of the stack.
      sharding: of the stack's rows, by the first dimension.
      num_sc: SparseCores of all devices.
    """
    stacked = tables[0].stacked_table_spec
    shape = (stacked.stack_vocab_size, stacked.stack_embedding_dim)
    rows = _full(shape, 0, tables[0].dtype, sharding)
    for table in tables:
        key, whole = table_key(rng, table.name), _Layout(table, stacked, sharding, num_sc)
        for number in range(-(-table.vocabulary_size // BLOCK_ROWS)):
            # Waiting keeps the blocks that are under way from piling up.
            rows = jax.block_until_ready(_with_block(whole, rows, key, jnp.int32(number)))
    slots = stacked.optimizer.slots()
    made = [_full(slot.shape(shape), slot.initial_value, slot.dtype, sharding) for slot in slots]
    return EmbeddingVariables(rows, slots._make(made) if hasattr(slots, "_make") else tuple(made))


def _full(shape: tuple[int, ...], value: float, dtype: Any, sharding: NamedSharding) -> jax.Array:
    array = jax.jit(functools.partial(jnp.full, shape, value, dtype), out_shardings=sharding)()
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    return jax.sharding.reshard(array, sharding)  # whose type says so inside of jit, too


class _Layout:
    """Where the rows of a table stand; compared by identity, so that a table's blocks share one program."""

    def __init__(self, table: TableSpec, stacked: StackedTableSpec, sharding: NamedSharding, num_sc: int):
        self.table, self.stacked, self.sharding, self.num_sc = table, stacked, sharding, num_sc

    def rows_of(self, ids: jax.Array) -> jax.Array:
        """Returns where ids stand in the stack."""
        setting = self.table.setting_in_stack
        where = setting.shard_rotation, setting.row_offset_in_shard
        return compute_physical_row_ids(self.num_sc, self.stacked.stack_vocab_size, *where, ids)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _with_block(layout: _Layout, rows: jax.Array, key: jax.Array, number: jax.Array) -> jax.Array:
    table, sharding = layout.table, layout.sharding
    axes = sharding.spec[0]

    def local(rows: jax.Array, key: jax.Array, number: jax.Array) -> jax.Array:
        # A table of fewer rows than a block makes no more of them than it has.
        size = min(BLOCK_ROWS, table.vocabulary_size)
        shape = (size, table.embedding_dim)
        block = initial_rows(table.initializer, jax.random.fold_in(key, number), shape, rows.dtype)
        ids = number * BLOCK_ROWS + jnp.arange(size, dtype=jnp.int32)
        own = layout.rows_of(ids) - jax.lax.axis_index(axes) * rows.shape[0]
        outside = (own < 0) | (own >= rows.shape[0]) | (ids >= table.vocabulary_size)
        own = jnp.where(outside, rows.shape[0], own)
        return rows.at[own, : table.embedding_dim].set(block, mode="drop", unique_indices=True)

    specs = sharding.spec, P(), P()
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)(
        rows, key, number
    )
