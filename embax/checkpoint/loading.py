"""Tables of a checkpoint as those of a plan: whatever devices, stacks, dtypes and vocabularies either has."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from embax import sharded_tables
from embax.checkpoint import tables
from embax.checkpoint.described import described, differences
from embax.checkpoint.errors import CheckpointError
from embax.optimizers.base import map_slots, slot_names
from embax.planning import Plan, StackPlan
from embax.table_state import TableState, init_stack_rows


@dataclasses.dataclass(frozen=True)
class Choice:
    """What may differ between a checkpoint and the plan that it is loaded into.

    Attributes:
      key: as for ``embax.init``; for the new rows of a vocabulary that has grown, which are as init makes them.
      rename: ``{table of the plan: table of the checkpoint}``, where the names differ.
      accept: of a specification that may differ, by name: "optimizer.learning_rate", "optimizer", "initializer",
        "combiner", "quantization".
      fresh_slots: slot variables begin anew, as with another optimizer; those of the checkpoint are not read.
      serving: no slot variables at all: for lookups. Optimizers may differ.
      shrink: a vocabulary may be smaller than in the checkpoint: the rows beyond it are left behind.
    """

    key: Any = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    accept: Collection[str] = ()
    fresh_slots: bool = False
    serving: bool = False
    shrink: bool = False

    @property
    def keeps_slots(self) -> bool:
        """Whether slot variables are those of the checkpoint."""
        return not (self.fresh_slots or self.serving)


def load(folder: Path, stored: Mapping[str, dict], plan: Plan, choice: Choice) -> dict[str, TableState]:
    """Returns the tables of ``plan`` with the rows of a checkpoint.

    Args:
      folder: of its tables.
      stored: what its document says of them, by name.
      plan: whose tables are wanted; others are not read.
      choice: what may differ.

    Raises:
      CheckpointError: tables that are not there or do not fit, all of them listed; damaged files.
    """
    _check_fits(folder, stored, plan, choice)
    return {stack.name: _stack(folder, stored, plan, stack, choice) for stack in plan.stacks}


def _check_fits(folder: Path, stored: Mapping[str, dict], plan: Plan, choice: Choice) -> None:
    found, wanted = [], described(plan)
    unknown = [name for name in choice.rename if name not in wanted]
    if unknown:
        raise CheckpointError(f"restore: rename names table {unknown[0]!r}, and the plan has {sorted(wanted)}")
    for name, table in wanted.items():
        source = choice.rename.get(name, name)
        if source not in stored:
            found.append(f'"{name}": the checkpoint has no table "{source}"; it has {", ".join(sorted(stored))}')
            continue
        accept = {*choice.accept, *(() if choice.keeps_slots else ("optimizer",))}
        found += [f'"{name}": {line}' for line in differences(stored[source], table, accept)]
        found += [f'"{name}": {line}' for line in _sizes(stored[source], table, choice)]
    if found:
        lines = "\n  ".join(found)
        raise CheckpointError(
            f"{folder}: the checkpoint does not fit the plan:\n  {lines}\nplan the tables as they were saved, or say "
            "what may differ: rename=, accept=, fresh_slots=True, shrink=True, key="
        )


def _sizes(stored: dict, wanted: dict, choice: Choice) -> list[str]:
    old, new, found = stored["vocabulary_size"], wanted["vocabulary_size"], []
    if new < old and not choice.shrink:
        found.append(f"vocabulary_size was {old} and is {new}: rows would be lost; pass shrink=True to lose them")
    if new > old and choice.key is None:
        found.append(f"vocabulary_size was {old} and is {new}: pass key=, as for embax.init, for the new rows")
    if choice.keeps_slots and set(stored["parts"]) != set(wanted["parts"]):
        old_slots, new_slots = (sorted(set(parts) - {"table"}) for parts in (stored["parts"], wanted["parts"]))
        found.append(f"slot variables were {old_slots} and are {new_slots}; pass fresh_slots=True to begin them anew")
    return found


def _stack(folder: Path, stored: Mapping[str, dict], plan: Plan, stack: StackPlan, choice: Choice) -> TableState:
    sources = [choice.rename.get(table.name, table.name) for table in stack.tables]
    grown = any(
        table.vocabulary_size > stored[s]["vocabulary_size"] for s, table in zip(sources, stack.tables, strict=True)
    )
    named = {"table": _blank(plan, stack, choice.key if grown else None)}
    slots: Any = () if choice.serving else _fresh_slots(plan, stack)
    if not choice.serving:
        named.update(zip(slot_names(stack.optimizer), slots, strict=True))
    for name in list(named) if choice.keeps_slots else ["table"]:
        part = tables.part_of(plan, stack, name)
        for source, table in zip(sources, stack.tables, strict=True):
            place = tables.folder_of(folder, source, name)
            named[name] = tables.read(place, stored[source]["parts"][name], part, table, named[name])
    rows = named.pop("table")
    return TableState(rows, slots._make(named.values()) if hasattr(slots, "_make") else tuple(named.values()))


def _blank(plan: Plan, stack: StackPlan, key: Any) -> jax.Array:
    if key is not None:
        return init_stack_rows(stack, key, plan.devices)
    if plan.devices is not None:
        return sharded_tables.empty_rows(stack, plan.devices)
    return jnp.zeros((stack.rows, stack.embedding_dim), stack.dtype)


def _fresh_slots(plan: Plan, stack: StackPlan) -> Any:
    if plan.devices is not None:
        return sharded_tables.fresh_slots(stack, plan.devices)
    shape = (stack.rows, stack.embedding_dim)
    return map_slots(lambda slot: slot.full(shape), stack.optimizer.slots())
