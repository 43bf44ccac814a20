"""Which step a save may go on from, so that the rows written since then are all that it has to write.

A step that was saved of tracked tables has a mark, a number drawn at random; tables that were saved or restored carry
the mark of their step, and which rows were written since. Whatever became of that step meanwhile (deleted, replaced by
another of the same number, never finished), the mark tells: without a whole step of that mark a save writes everything.
"""

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from embax.checkpoint.document import read_body, read_document, tables_among
from embax.checkpoint.errors import CheckpointError
from embax.checkpoint.held import Held
from embax.sharded_tables import touched_spec
from embax.table_state import TableState

# Deltas that would together be larger than this part of the tables are not worth it: a save then writes everything.
LARGEST = 0.5


class Base(NamedTuple):
    """The step that a save goes on from: its folder, its document, and the name of the new delta."""

    folder: Path
    body: dict
    delta: str

    def files(self) -> dict[str, dict]:
        """Returns what is known of the files of its tables, which the new step has, too."""
        return tables_among(self.body["files"])

    def share(self, folder: Path) -> None:
        """Makes the files of its tables those of another step: by links, or copies where a disk has none."""
        for name in self.files():
            target = folder / Path(name).relative_to("tables")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.folder / name, target)
            except OSError:
                shutil.copyfile(self.folder / name, target)


def is_tracked(tables: Sequence[tuple[Held, TableState]]) -> bool:
    """Returns whether all tables are tracked; ValueError if only some are."""
    tracked = {held.name(held.stack.tables[0]): state.touched is not None for held, state in tables}
    if len(set(tracked.values())) > 1:
        raise ValueError(
            f"save: rows of {[n for n, is_so in tracked.items() if is_so]} are tracked, and of "
            f"{[n for n, is_so in tracked.items() if not is_so]} not; track all tables, or none"
        )
    return any(tracked.values())


def new_mark() -> int:
    """Returns a mark, the same in all processes."""
    return _of_first(1 + secrets.randbelow((1 << 31) - 2))


def base_of(
    directory: Path, steps: Sequence[int], tables: Sequence[tuple[Held, TableState]], described: dict, most: int
) -> Base | None:
    """Returns the step that a save of tracked tables goes on from; None where it has to write everything.

    Args:
      directory: of the checkpoints.
      steps: that are whole.
      tables: as they are held, and their states.
      described: as the new document has them.
      most: deltas that a step may have.
    """
    marks, share = {int(_here(state.touched.since)) for _, state in tables}, _written_bytes(tables, described)
    found = None
    if len(marks) == 1 and (mark := marks.pop()):
        found = _step_of(directory, steps, mark)
    worth_it = -1
    if found is not None:
        step, body = found
        sizes = {name: known["bytes"] for name, known in tables_among(body["files"]).items() if "crc32c" in known}
        deltas = sum(size for name, size in sizes.items() if name.split("/")[1] in body["deltas"])
        whole = sum(sizes.values()) - deltas
        fits = body["tables"] == described and len(body["deltas"]) < most and deltas + share <= LARGEST * whole
        worth_it = step if fits else -1
    step = _of_first(worth_it)
    if step < 0:
        return None
    folder = directory / str(step)
    body = read_body(folder / "embax", folder)
    return Base(folder, body, f"delta.{len(body['deltas'])}")


def _step_of(directory: Path, steps: Sequence[int], mark: int) -> tuple[int, dict] | None:
    for step in reversed(steps):
        folder = directory / str(step)
        try:
            if read_body(folder / "embax", folder)["mark"] == mark:
                return step, read_document(folder / "embax", folder)
        except CheckpointError:  # a step of which a file is damaged or missing is none to go on from
            continue
    return None


def placed_marks(held: Held, state: TableState) -> TableState:
    """Returns a state whose marks lie as its rows do, wherever somebody has put them: on the host, for one."""
    touched = state.touched
    if touched is None:
        return state
    if held.devices is None:
        return state._replace(touched=jax.tree.map(jnp.asarray, touched))
    rows = jax.device_put(touched.rows, held.devices.sharding(touched_spec(held.stack, held.devices)))
    return state._replace(touched=touched._replace(rows=rows, since=jnp.asarray(touched.since)))


def _written_bytes(tables: Sequence[tuple[Held, TableState]], described: dict) -> int:
    """Returns the bytes of the rows that are marked, of all processes."""
    total = 0
    for held, state in tables:
        parts = described[held.name(held.stack.tables[0])]["parts"].values()
        width = sum(part["width"] * jnp.dtype(part["dtype"]).itemsize for part in parts)
        rows = state.touched.rows
        counts = [
            int(np.count_nonzero(np.asarray(shard.data))) for shard in rows.addressable_shards if not shard.replica_id
        ]
        total += width * sum(counts)
    if jax.process_count() > 1:
        return int(multihost_utils.process_allgather(np.float64(total)).sum())
    return total


def _here(array: Any) -> np.ndarray:
    """Returns an array of which every process has a copy."""
    return np.asarray(array.addressable_data(0))


def _of_first(value: int) -> int:
    """Returns the value of the first process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
