"""Tables of a checkpoint as those of a plan: whatever devices, stacks, dtypes and vocabularies either has."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from embax import sharded_tables
from embax.checkpoint import tables
from embax.checkpoint.deltas import source_of
from embax.checkpoint.described import ACCEPTABLE, described, differences
from embax.checkpoint.errors import CheckpointError
from embax.checkpoint.held import Held, check_names
from embax.sharded_tables import fresh_slots
from embax.table_state import TableState, init_slots, init_stack_rows
from embax.touched import untouched


@dataclasses.dataclass(frozen=True)
class Choice:
    """What may differ between a checkpoint and the plan that it is loaded into.

    Attributes:
      key: as for ``embax.init``; for the new rows of a vocabulary that has grown, which are as init makes them.
      rename: ``{table of the plan: table of the checkpoint}``, where the names differ.
      accept: of a specification that may differ, by name: "optimizer.learning_rate", "optimizer", "combiner",
        "quantization".
      fresh_slots: slot variables begin anew, as with another optimizer; those of the checkpoint are not read.
      serving: no slot variables at all: for lookups. Optimizers may differ.
      shrink: a vocabulary may be smaller than in the checkpoint: the rows beyond it are left behind.
      track: rows that steps write from here on are tracked, as by ``embax.track``, and counted from this checkpoint.
    """

    key: Any = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    accept: Collection[str] = ()
    fresh_slots: bool = False
    serving: bool = False
    shrink: bool = False
    track: bool = False

    def __post_init__(self):
        if self.serving and self.track:
            raise TypeError("restore: serving=True is for lookups, and track=True for training; leave one of them out")

    @property
    def goes_on(self) -> bool:
        """Whether a later save may go on from the checkpoint: tables and slots are, by their names, what it has."""
        return self.keeps_slots and all(name == source for name, source in self.rename.items())

    @property
    def keeps_slots(self) -> bool:
        """Whether slot variables are those of the checkpoint."""
        return not (self.fresh_slots or self.serving)


Wanted = Sequence[tuple[Held, TableState | None]]


def check_fits(folder: Path, stored: Mapping[str, dict], wanted: Wanted, choice: Choice) -> None:
    """Raises CheckpointError for tables that are not in a checkpoint or do not fit: all of them are listed.

    Args:
      folder: of the step.
      stored: what its document says of its tables, by name.
      wanted: stacks, and the states whose rows stay where the checkpoint has none.
      choice: what may differ.
    """
    check_names([held for held, _ in wanted])
    _check_accept(choice.accept)
    found, tables = [], described((held, None) for held, _ in wanted)
    given = {held.name(table) for held, state in wanted if _has_rows(state) for table in held.stack.tables}
    unknown = [name for name in choice.rename if name not in tables]
    if unknown:
        raise CheckpointError(f"restore: rename names table {unknown[0]!r}, and the tables wanted are {sorted(tables)}")
    for name, table in tables.items():
        source = choice.rename.get(name, name)
        if source not in stored:
            found.append(f'"{name}": the checkpoint has no table "{source}"; it has {", ".join(sorted(stored))}')
            continue
        accept = {*choice.accept, *(() if choice.keeps_slots else ("optimizer",))}
        found += [f'"{name}": {line}' for line in differences(stored[source], table, accept)]
        found += [f'"{name}": {line}' for line in _sizes(stored[source], table, choice, name in given)]
    if found:
        lines = "\n  ".join(found)
        raise CheckpointError(
            f"{folder}: the checkpoint does not fit the plan:\n  {lines}\nplan the tables as they were saved, or say "
            "what may differ: rename=, accept=, fresh_slots=True, shrink=True, key="
        )


def load(folder: Path, body: Mapping[str, Any], held: Held, state: TableState | None, choice: Choice) -> TableState:
    """Returns the state of a stack with the rows of a checkpoint.

    Args:
      folder: of its tables.
      body: its document; ``check_fits`` has found that its tables fit.
      held: the stack.
      state: whose rows a vocabulary that has grown keeps where the checkpoint has none; None for fresh ones.
      choice: what may differ.

    Raises:
      CheckpointError: damaged files.
    """
    stack, stored = held.stack, body["tables"]
    sources = {table.name: choice.rename.get(held.name(table), held.name(table)) for table in stack.tables}
    grown = any(table.vocabulary_size > stored[sources[table.name]]["vocabulary_size"] for table in stack.tables)
    begin = _blank(held, choice)
    if grown and _has_rows(state):
        copied = jax.tree.map(jnp.copy, state)
        begin = copied if choice.keeps_slots else begin._replace(table=copied.table)
    made = held.parts(begin)
    for name in list(made) if choice.keeps_slots else ["table"]:
        part = held.part(name)
        for table in stack.tables:
            source = source_of(folder, body, sources[table.name], name)
            made[name] = tables.read(source, part, table, made[name])
    rows, slots = made.pop("table"), begin.slots
    slots = slots._make(made.values()) if hasattr(slots, "_make") else tuple(made.values())
    if not choice.track and (state is None or state.touched is None):
        return TableState(rows, slots)
    return TableState(rows, slots, untouched(stack, held.devices, body["mark"] if choice.goes_on else 0))


def _has_rows(state: TableState | None) -> bool:
    """Returns whether a state is of arrays, and not of their shapes."""
    return state is not None and isinstance(state.table, jax.Array)


def _sizes(stored: dict, wanted: dict, choice: Choice, given: bool) -> list[str]:
    old, new, found = stored["vocabulary_size"], wanted["vocabulary_size"], []
    if max(stored.get("layers", 1), wanted["layers"]) > 1 and old != new:
        return [f"its {wanted['layers']} layers had {old} rows together and have {new}: layers cannot grow or shrink"]
    if new < old and not choice.shrink:
        found.append(f"vocabulary_size was {old} and is {new}: rows would be lost; pass shrink=True to lose them")
    if new > old and not given and wanted["initializer"] is None:
        found.append(
            f"vocabulary_size was {old} and is {new}: give a model that has rows, not its shapes, for the new ones"
        )
    elif new > old and not given and choice.key is None:
        found.append(f"vocabulary_size was {old} and is {new}: pass key=, as for embax.init, for the new rows")
    if choice.keeps_slots and set(stored["parts"]) != set(wanted["parts"]):
        old_slots, new_slots = (sorted(set(parts) - {"table"}) for parts in (stored["parts"], wanted["parts"]))
        found.append(f"slot variables were {old_slots} and are {new_slots}; pass fresh_slots=True to begin them anew")
        return found
    for name, known in wanted["parts"].items() if choice.keeps_slots else ():
        width = stored["parts"][name]["width"]
        if name != "table" and width != known["width"]:
            found.append(f"{name} had {width} numbers a row and has {known['width']}; pass fresh_slots=True")
    return found


def _check_accept(accept: Any) -> None:
    """Raises unless ``accept`` names what may differ."""
    if isinstance(accept, str):
        raise TypeError(f"restore: accept={accept!r} must be a collection of names; write accept=({accept!r},)")
    for name in accept:
        if name not in ACCEPTABLE and not name.startswith("optimizer."):
            raise ValueError(
                f"restore: accept names {name!r}; it takes {', '.join(ACCEPTABLE)}, and settings of the optimizer "
                "such as optimizer.learning_rate"
            )


def _blank(held: Held, choice: Choice) -> TableState:
    stack, devices = held.stack, held.devices
    if choice.key is not None and all(table.initializer is not None for table in stack.tables):
        rows = init_stack_rows(stack, choice.key, devices)
    elif devices is not None:
        rows = sharded_tables.empty_rows(stack, devices)
    else:
        rows = jnp.zeros((stack.rows, stack.embedding_dim), stack.dtype)
    if choice.serving:
        return TableState(rows, ())
    return init_slots(stack.optimizer, rows) if devices is None else TableState(rows, fresh_slots(stack, devices))
