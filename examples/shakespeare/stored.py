"""Checkpoints for any number of devices: tables are saved as tables, and laid out again when they are read."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from embax.sparsecore.lib.nn import table_stacking


def save(folder, table_specs, variables, num_shards, rest):
    """Saves the tables with their slot variables, and the rest of a training state, any pytree."""
    tables = table_stacking.unshard_and_unstack_tables(table_specs, variables, num_shards)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), {"tables": tables, "rest": rest})


def restore(folder, table_specs, variables, num_shards, rest):
    """Returns variables and rest as they were saved; given are those of a fresh state, where the new ones shall be."""
    tables = table_stacking.unshard_and_unstack_tables(table_specs, variables, num_shards)
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"tables": tables, "rest": rest})
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(Path(folder).absolute(), wanted)
    stacked = table_stacking.stack_and_shard_tables(table_specs, found["tables"], num_shards)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), stacked, variables), found["rest"]
