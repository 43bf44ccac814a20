"""Tables to be saved or loaded: those of a plan, with what stands before their names on disk."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from embax.exchange.pieces import Part
from embax.optimizers.base import slot_names
from embax.placement import Devices
from embax.planning import Plan, StackPlan, TablePlan
from embax.sharded_tables import part_specs
from embax.table_state import TableState


class Held(NamedTuple):
    """A stack of tables, the devices that hold it, and how its tables are called on disk: prefix + name.

    A table of several ``layers`` has their rows one layer after another.
    """

    stack: StackPlan
    devices: Devices | None
    prefix: str = ""
    layers: int = 1

    def name(self, table: TablePlan) -> str:
        """Returns the name of a table on disk."""
        return self.prefix + table.name

    def part(self, name: str) -> Part:
        """Returns the part "table", or a slot by its name."""
        if self.devices is None:
            return Part(self.stack, None, P())
        return Part(self.stack, self.devices, part_specs(self.stack, self.devices)[name])

    def parts(self, state: TableState) -> dict[str, Any]:
        """Returns the arrays of a state by name: "table", and the slots if there are any."""
        slots = zip(slot_names(self.stack.optimizer), state.slots, strict=True) if len(state.slots) else ()
        return {"table": state.table, **dict(slots)}


def held_by(plan: Plan) -> list[Held]:
    """Returns the stacks of a plan."""
    return [Held(stack, plan.devices) for stack in plan.stacks]


def check_names(held: list[Held]) -> None:
    """Raises ValueError for two tables of one name: they would be written over each other."""
    names = collections.Counter(one.name(table) for one in held for table in one.stack.tables)
    for name, count in names.items():
        if count > 1:
            raise ValueError(f'two tables would be called "{name}" in a checkpoint; rename a table or a layer')


def states_of(held: list[Held], tables: Mapping[str, TableState]) -> list[tuple[Held, TableState]]:
    """Returns the stacks with their states."""
    return [(one, tables[one.stack.name]) for one in held]
