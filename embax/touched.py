"""Which rows the steps have written: one byte a row beside a stack's slots, for saves that write only those.

Bytes and not bits, so that threads and devices mark rows without waiting for each other. Six rows after a batch with
the ids 4 1 4::

    rows     0 1 0 0 1 0
    since    the checkpoint that the rows are counted from; 0 for none
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from embax.placement import Devices
from embax.planning import Plan, StackPlan
from embax.sharded_tables import full, touched_spec
from embax.table_state import TableState, check_slots


class Touched(NamedTuple):
    """The rows of a stack that steps have written since a checkpoint.

    Attributes:
      rows: uint8 ``[rows]``, as the table is stored: 1 for rows that were written.
      since: int32 scalar, the mark of that checkpoint; 0 for none.
    """

    rows: Any
    since: Any


def track(plan: Plan, tables: Mapping[str, TableState]) -> dict[str, TableState]:
    """Returns the tables with a byte a row, in which every step from now on marks the rows that it writes.

    ``Checkpoints.save`` then writes these rows only, where it can. Tables whose rows are tracked already begin anew:
    what they are counted from is forgotten.

    Args:
      plan: what ``embax.plan`` gave.
      tables: ``{stack: TableState}``.

    Raises:
      ValueError: tables of another plan, or quantized ones.

    >>> import jax, jax.numpy as jnp, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=4, embedding_dim=1, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.SGD(0.5))
    >>> plan = embax.plan(embax.FeatureSpec(name="x", table_spec=table, input_shape=(None,), output_shape=(None, 1)))
    >>> tables = embax.track(plan, embax.init(plan, jax.random.key(0)))
    >>> _, residuals = embax.lookup(plan, tables, embax.preprocess(plan, [[2, 0]]))
    >>> embax.update(plan, tables, residuals, jnp.ones((1, 1)), step=0)["item"].touched.rows.tolist()
    [1, 0, 1, 0]
    """
    check_slots(plan, tables)
    return {s.name: tables[s.name]._replace(touched=untouched(s, plan.devices)) for s in plan.stacks}


def untouched(stack: StackPlan, devices: Devices | None, since: int = 0) -> Touched:
    """Returns that no row of a stack was written since the checkpoint of that mark."""
    if devices is None:
        return untouched_rows(stack.rows, since)
    if devices.inside():
        raise ValueError("track: inside of a shard_map there are shards only; call it outside, with the whole tables")
    rows = full((stack.stored_rows,), jnp.uint8, 0, devices.sharding(touched_spec(stack, devices)))
    return Touched(rows, full((), jnp.int32, since, devices.sharding(jax.sharding.PartitionSpec())))


def untouched_rows(rows: int, since: int = 0) -> Touched:
    """Returns that none of the rows of a table on one device was written."""
    return Touched(jnp.zeros(rows, jnp.uint8), jnp.int32(since))
