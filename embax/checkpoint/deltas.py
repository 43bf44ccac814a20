"""The rows that were written since a checkpoint, as a step of another one has them beside its tables.

Beside the tables of a step there may be deltas, in order: of every table the numbers of its rows that were written
since the delta before, and their values, those of each process apart. A row is that of the last delta that has it. A
table of six rows, a delta of the rows 4 and 1, and one of row 4::

    table     0 1 2 3 4 5
    delta.0     B     C         rows 4 1, values C B
    delta.1           D         row  4,   value  D
    is        0 B 2 3 D 5
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from embax.checkpoint import arrays
from embax.checkpoint.errors import CheckpointError
from embax.checkpoint.held import Held
from embax.checkpoint.tables import Piece, Source, folder_of
from embax.exchange.pieces import Part, pick
from embax.table_state import TableState

KEPT = 128 << 20  # bytes of a delta's array that are kept while rows are read: those of neighbours lie near each other
NUMBERS = "row.numbers"  # the array with the numbers of the rows; in the folder of a part the dot would be written %2E


class Written(NamedTuple):
    """The rows of a stack that were written.

    Attributes:
      lists: rising int32 rows of this process's devices, by the number of the device: as ``pick`` takes them.
      rows: the same rows by their numbers in the stack.
      longest: of the lists of all processes.
      size: rows of every list that are taken at a time.
    """

    lists: dict[int, np.ndarray]
    rows: dict[int, np.ndarray]
    longest: int
    size: int = 1


def written(held: Held, touched: Any) -> Written:
    """Returns which rows of a stack are marked."""
    part, devices = held.part("table"), held.devices
    if devices is None:
        found = np.flatnonzero(np.asarray(touched.rows)).astype(np.int32)
        return Written({0: found}, {0: found}, len(found))
    mine, lists = _own_pieces(part), {}
    if part.split in ("columns", "whole"):
        every = np.flatnonzero(np.asarray(touched.rows.addressable_data(0))).astype(np.int32)
        for number, found in enumerate(np.array_split(every, part.pieces)):
            lists[number] = found
        longest = len(lists[0])  # the first ones are the longest
        lists = {number: found for number, found in lists.items() if number in mine}
    else:
        local = held.stack.local_rows
        for shard in touched.rows.addressable_shards:
            if shard.replica_id == 0:
                number = (shard.index[0].start or 0) // local
                lists[number] = np.flatnonzero(np.asarray(shard.data)).astype(np.int32)
        longest = max((len(found) for found in lists.values()), default=0)
        if jax.process_count() > 1:
            longest = int(multihost_utils.process_allgather(np.int32(longest)).max())
    return Written(lists, {number: _of_stack(held, part, number, found) for number, found in lists.items()}, longest)


def _own_pieces(part: Part) -> set[int]:
    """Returns the numbers of the pieces that this process has to bring."""
    assert part.devices is not None
    sharding = part.devices.sharding(P(part.devices.table_axes))
    made = jax.make_array_from_callback((part.pieces,), sharding, lambda index: np.zeros(part.pieces, np.int8)[index])
    return {shard.index[0].start or 0 for shard in made.addressable_shards if shard.replica_id == 0}


def _of_stack(held: Held, part: Part, number: int, rows: np.ndarray) -> np.ndarray:
    if part.split == "dealt":
        return rows * held.stack.shards + number
    return rows + number * held.stack.local_rows if part.split == "ranges" else rows


def turns(delta: str, tables: Iterable[tuple[Held, TableState]]) -> Iterator[list[Piece]]:
    """Yields the rows of all tables that were written, as pieces; every process takes the same turns.

    Args:
      delta: the folder of the delta among the tables.
      tables: as they are held, and their states, which are tracked.
    """
    for held, state in tables:
        found, parts = written(held, state.touched), held.parts(state)
        # One size for all: turn by turn, device by device the rows come in the order of their numbers.
        size = min(arrays.piece_rows(held.stack.rows, part.shape[1], part.dtype) for part in parts.values())
        size = min(size, 1 << max(0, found.longest - 1).bit_length())
        for name, array in parts.items():
            yield from _turns_of(delta, held, found._replace(size=size), name, array)
        yield from _turns_of(delta, held, found._replace(size=size), NUMBERS, None)


def _turns_of(delta: str, held: Held, found: Written, name: str, array: Any) -> Iterator[list[Piece]]:
    width, dtype = (1, np.dtype(np.int32)) if array is None else (array.shape[1], array.dtype)
    filling = {
        table.name: _Filling(
            _folder(Path(delta), held.name(table), name) / str(jax.process_index()),
            (sum(len(_of_table(rows, table)) for rows in found.rows.values()), width),
            dtype,
        )
        for table in held.stack.tables
    }
    size = found.size
    for start in range(0, found.longest, size):
        values = None if array is None else _picked(held.part(name), array, found, start, size)
        pieces = []
        for number in sorted(found.rows):
            rows = found.rows[number][start : start + size]
            for table in held.stack.tables:
                own = _of_table(rows, table)
                if values is None:
                    new = own[:, None] - np.int32(table.row_offset)
                else:
                    first = np.searchsorted(rows, table.row_offset)
                    new = values[number][first : first + len(own)]
                pieces += filling[table.name].add(new)
        yield pieces
    yield [piece for one in filling.values() for piece in one.rest()]


def _of_table(rows: np.ndarray, table: Any) -> np.ndarray:
    """Returns those of rising rows of a stack that are of one table."""
    first, last = np.searchsorted(rows, [table.row_offset, table.row_offset + table.vocabulary_size])
    return rows[first:last]


def _picked(part: Part, array: Any, found: Written, start: int, size: int) -> dict[int, np.ndarray]:
    """Returns ``size`` rows of each of this process's lists, from place ``start`` on."""

    def asked(number):
        rows = np.zeros(size, np.int32)
        own = found.lists.get(number, rows[:0])[start : start + size]
        rows[: len(own)] = own
        return rows

    if part.devices is None:
        return {0: np.asarray(pick(part, array, jnp.asarray(asked(0))))}
    sharding = part.devices.sharding(P(part.devices.table_axes))
    shape = (part.pieces * size,)

    def piece(index: Any) -> np.ndarray:
        return asked((index[0].start or 0) // size)

    made = pick(part, array, jax.make_array_from_callback(shape, sharding, piece)).addressable_shards
    return {(s.index[0].start or 0) // size: np.asarray(s.data) for s in made if s.replica_id == 0}


class _Filling:
    """Rows of an array on disk as they come, handed on in whole pieces."""

    def __init__(self, place: Path, shape: tuple[int, int], dtype: Any):
        self.place, self.shape, self.done, self.kept = place, shape, 0, []
        self.size = arrays.piece_rows(*shape, dtype) if shape[0] else 1

    def add(self, rows: np.ndarray) -> list[Piece]:
        """Returns the pieces that are full now."""
        if len(rows):
            self.kept.append(rows)
        whole = sum(map(len, self.kept)) // self.size * self.size
        return self._taken(whole) if whole else []

    def rest(self) -> list[Piece]:
        """Returns the last piece, if there is one that is not full."""
        return self._taken(sum(map(len, self.kept))) if self.kept else []

    def _taken(self, count: int) -> list[Piece]:
        rows = np.concatenate(self.kept)
        first, self.done = self.done, self.done + count
        self.kept = [rows[count:]] if len(rows) > count else []
        return [
            Piece(self.place, self.shape, first + at, rows[at : min(at + self.size, count)])
            for at in range(0, count, self.size)
        ]


class Overlay:
    """The deltas of one array of a checkpoint, to be laid over rows that were read from the table below.

    Args:
      tables: the folder of the tables.
      body: the document.
      table: its name there.
      part: "table", or a slot.
    """

    def __init__(self, tables: Path, body: Mapping[str, Any], table: str, part: str):
        self.layers = []
        known = body["tables"][table]["parts"][part]
        for delta in body["deltas"]:
            below = _folder(Path(delta), table, NUMBERS)
            for process in _processes(body, below):
                rows = arrays.open_array(tables / below / process, (None, 1), "int32")
                values_at = folder_of(tables / delta, table, part) / process
                values = arrays.open_array(values_at, (rows.shape[0], known["width"]), known["dtype"], KEPT)
                numbers = arrays.arrived(rows.read(), tables / below / process)[:, 0]
                self.layers.append(_Layer(numbers, values, values_at))

    def over(self, first: int, rows: np.ndarray) -> np.ndarray:
        """Returns the rows from ``first`` on as they are with all deltas: ``rows``, or a copy."""
        for layer in self.layers:
            begin, end = np.searchsorted(layer.rows, [first, first + len(rows)])
            if begin == end:
                continue
            if not rows.flags.writeable:
                rows = rows.copy()
            rows[layer.rows[begin:end] - first] = layer.values(begin, end)
        return rows


def source_of(tables: Path, body: Mapping[str, Any], table: str, part: str) -> Source:
    """Returns an array of a checkpoint; see ``Overlay``."""
    known = body["tables"][table]["parts"][part]
    return Source(folder_of(tables / body["base"], table, part), known, Overlay(tables, body, table, part).over)


class _Layer:
    """One array of a delta: rising rows, and where the value of each stands."""

    def __init__(self, rows: np.ndarray, stored: Any, folder: Path):
        rising = bool((rows[1:] > rows[:-1]).all())
        self.order = None if rising else np.argsort(rows, kind="stable")
        self.rows = rows if self.order is None else rows[self.order]
        self.stored, self.folder = stored, folder

    def values(self, begin: int, end: int) -> np.ndarray:
        if self.order is None:
            return self._read(self.stored[begin:end])
        places = self.order[begin:end]
        low, high = int(places.min()), int(places.max()) + 1
        if high - low <= 8 * len(places):  # mostly neighbours: read once, and chosen here
            return self._read(self.stored[low:high])[places - low]
        return self._read(self.stored.oindex[places])

    def _read(self, part: Any) -> np.ndarray:
        return arrays.arrived(part.read(), self.folder)


def _folder(delta: Path, table: str, name: str) -> Path:
    return folder_of(delta, table, "table").with_name(NUMBERS) if name == NUMBERS else folder_of(delta, table, name)


def _processes(body: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns the processes that wrote rows into the folder of an array, as the document has them."""
    prefix = f"tables/{folder.as_posix()}/"
    found = {name[len(prefix) :].split("/")[0] for name in body["files"] if name.startswith(prefix)}
    if not all(name.isdigit() for name in found):
        raise CheckpointError(f"{folder}: {sorted(found)} are no numbers of processes; load another step")
    return sorted(found, key=int)
