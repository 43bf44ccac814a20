"""Tables as data: what a checkpoint says of them, and in what a plan differs.

Callables are not data. Of a schedule or an initializer there is the name, for people; whoever loads supplies it.
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import jax.numpy as jnp

from embax.checkpoint.held import Held
from embax.optimizers.base import Optimizer, slot_names
from embax.planning import TablePlan
from embax.table_state import TableState

COMPARED = ("embedding_dim", "layers", "combiner", "quantization", "optimizer")
ACCEPTABLE = ("combiner", "quantization", "optimizer")


def described(tables: Iterable[tuple[Held, TableState | None]]) -> dict[str, dict]:
    """Returns what there is to say of every table, by its name on disk, in words of JSON.

    Args:
      tables: as they are held, and their states: what is without slot variables is so described; None for all of them.
    """
    return {held.name(table): _table(held, table, state) for held, state in tables for table in held.stack.tables}


def _table(held: Held, table: TablePlan, state: TableState | None) -> dict:
    stack = held.stack
    shape, slots = (table.vocabulary_size, stack.embedding_dim), stack.optimizer.slots()
    if state is None:
        named = dict(zip(slot_names(stack.optimizer), slots, strict=True))
        forms = {"table": (stack.dtype, shape[1])} | {n: (s.dtype, s.shape(shape)[1]) for n, s in named.items()}
    else:  # of the arrays: somebody may have cast them
        forms = {name: (array.dtype, array.shape[1]) for name, array in held.parts(state).items()}
    parts = {n: {"dtype": jnp.dtype(kind).name, "rows": shape[0], "width": width} for n, (kind, width) in forms.items()}
    return {
        "vocabulary_size": shape[0],
        "layers": held.layers,
        "embedding_dim": shape[1],
        "combiner": table.combiner,
        "initializer": _plain(table.initializer),
        "optimizer": _optimizer(stack.optimizer),
        "quantization": stack.quantization and list(stack.quantization.as_tuple()),
        "parts": parts,
    }


def _optimizer(optimizer: Optimizer) -> dict:
    settings = {field.name: _plain(getattr(optimizer, field.name)) for field in dataclasses.fields(optimizer)}
    return {"name": type(optimizer).__name__, **settings}


def _plain(value: Any) -> Any:
    """Returns a value of JSON as it is, of anything else its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return {"callable" if callable(value) else "object": name}


def differences(stored: dict, wanted: dict, accept: Collection[str]) -> list[str]:
    """Returns in what a stored table differs from the one it is loaded into, one line each.

    What a checkpoint outlives (placement, stacking, dtype of the rows, a vocabulary that has grown) is no difference.

    Args:
      stored: of the checkpoint.
      wanted: of the plan, as ``described`` has it.
      accept: names that may differ, such as "optimizer.learning_rate"; "optimizer" for all of it.
    """
    found = []
    for name in COMPARED:
        if name in accept:
            continue
        for inner, old, new in _pairs(name, stored.get(name), wanted[name]):
            # The names of callables are for people: they are private to who made them.
            if _kind(old) != _kind(new) and inner not in accept:
                found.append(f"{inner} was {_shown(old)} and is {_shown(new)}")
    return found


def _pairs(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if name != "optimizer" or not isinstance(old, dict):
        return [(name, old, new)]
    if old.get("name") != new["name"]:
        return [(name, old.get("name"), new["name"])]
    return [(f"{name}.{key}", old.get(key), new.get(key)) for key in {**old, **new}]


def _kind(value: Any) -> Any:
    return tuple(value) if isinstance(value, dict) else value


def _shown(value: Any) -> str:
    if isinstance(value, dict) and len(value) == 1:
        return " ".join(next(iter(value.items())))
    return repr(value)
