"""Initial variables in the SparseCore layout: the values are those of ``embax.init``, whatever the layout.

Block by block, as everywhere: each device makes a block and keeps the rows that stand on it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from embax.sharded_tables import initial_rows
from embax.sparsecore.lib.nn.table_stacking import compute_physical_row_ids
from embax.sparsecore.matmul import EmbeddingVariables
from embax.specs import StackedTableSpec, TableSpec
from embax.table_state import BLOCK_ROWS, table_key


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
    rows = jax.jit(lambda: jnp.zeros(shape, tables[0].dtype), out_shardings=sharding)()
    for table in tables:
        key, whole = table_key(rng, table.name), _Layout(table, stacked, sharding, num_sc)
        for number in range(-(-table.vocabulary_size // BLOCK_ROWS)):
            # Waiting keeps the blocks that are under way from piling up.
            rows = jax.block_until_ready(_with_block(whole, rows, key, jnp.int32(number)))
    slots = stacked.optimizer.slots()
    made = [
        jax.jit(
            functools.partial(jnp.full, slot.shape(shape), slot.initial_value, slot.dtype), out_shardings=sharding
        )()
        for slot in slots
    ]
    return EmbeddingVariables(rows, slots._make(made) if hasattr(slots, "_make") else tuple(made))


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
