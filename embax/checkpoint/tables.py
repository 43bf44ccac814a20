"""Tables to disk and back, piece by piece: nobody ever has more than its rows and a few pieces.

On disk a table is ``[vocabulary_size, embedding_dim]`` by its name, each slot variable beside it; nothing is stacked,
padded or in the order of devices.
"""

import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax.checkpoint import arrays
from embax.checkpoint.held import Held
from embax.exchange.pieces import Part, collect, deal
from embax.planning import TablePlan
from embax.table_state import TableState

LONGEST_NAME = 255
AHEAD = 4  # pieces asked for before they are needed
IN_FLIGHT = 16  # pieces on their way to or from the disk: a disk takes its time to say that it has them


class Piece(NamedTuple):
    """Neighbouring rows of a table or a slot, on the host, and where they go."""

    place: Path
    shape: tuple[int, int]
    first: int
    rows: np.ndarray


def folder_of(root: Path, table: str, part: str) -> Path:
    """Returns where an array is; dots, and characters that a file system may not take, are written as %xx.

    Raises:
      ValueError: a name that is too long for a file system, or empty.
    """
    quoted = [urllib.parse.quote(name, safe="").replace(".", "%2E") for name in (table, part)]
    for name, short in zip((table, part), quoted, strict=True):
        if not 0 < len(short) <= LONGEST_NAME:
            raise ValueError(
                f"table {name!r}: its name on disk would have {len(short)} characters, and must have 1 to "
                f"{LONGEST_NAME}; rename it"
            )
    return root / quoted[0] / quoted[1]


def turns(tables: Iterable[tuple[Held, TableState]]) -> Iterator[list[Piece]]:
    """Yields all rows of all tables as pieces, those of this process's devices; every process takes the same turns."""
    for held, state in tables:
        for name, array in held.parts(state).items():
            for table in held.stack.tables:
                yield from _turns_of(held, table, name, array)


def _turns_of(held: Held, table: TablePlan, name: str, array: jax.Array) -> Iterator[list[Piece]]:
    part = held.part(name)
    shape, place = (table.vocabulary_size, array.shape[1]), folder_of(Path(), held.name(table), name)
    size = arrays.piece_rows(*shape, array.dtype)
    for start in range(0, shape[0], part.pieces * size):
        made, pieces = collect(part, size, array, table.row_offset + start), []
        for shard in made.addressable_shards:
            first = start + (shard.index[0].start or 0)
            count = min(size, shape[0] - first)
            if shard.replica_id == 0 and count > 0:
                pieces.append(Piece(place, shape, first, np.asarray(shard.data)[:count]))
        yield pieces


def write(folder: Path, turns: Iterable[list[Piece]]) -> None:
    """Writes pieces; a few turns are on their way at a time."""
    opened: dict[Path, Any] = {}
    flying: list[list[Any]] = []
    for pieces in turns:
        written = []
        for piece in pieces:
            if piece.place not in opened:
                opened[piece.place] = arrays.create(folder / piece.place, piece.shape, piece.rows.dtype)
            part = opened[piece.place][piece.first : piece.first + piece.rows.shape[0]]
            written.append(part.write(piece.rows))
        flying.append(written)
        while len(flying) > 1 and sum(map(len, flying)) > IN_FLIGHT:
            _finish(flying.pop(0))
    for written in flying:
        _finish(written)


def _finish(written: list[Any]) -> None:
    for future in written:
        future.result()


class Source(NamedTuple):
    """An array on disk: its folder, what the document says of it (dtype, width, rows), what lies over its rows."""

    folder: Path
    known: Mapping[str, Any]
    over: Callable[[int, np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return self.known["rows"], self.known["width"]

    def open(self) -> tuple[Any, int]:
        """Returns the array on disk, without what lies over its rows, and the rows of a piece."""
        dtype = self.known["dtype"]
        return arrays.open_array(self.folder, self.shape, dtype), arrays.piece_rows(*self.shape, dtype)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the first row of every piece, and its rows."""
        (stored, size), (count, _) = self.open(), self.shape
        asked: dict[int, Any] = {}
        for first in range(0, count, size):
            for ahead in range(first, min(first + AHEAD * size, count), size):
                if ahead not in asked:
                    asked[ahead] = stored[ahead : min(ahead + size, count)].read()
            yield first, self.over(first, arrays.arrived(asked.pop(first), self.folder))


def read(source: Source, part: Part, table: TablePlan, array: jax.Array) -> jax.Array:
    """Returns ``array`` with the rows of one table as they are on disk; rows beyond them stay as they are.

    Args:
      source: the array on disk.
      part: what ``array`` is.
      table: in the stack.
      array: as it is stored; donated.
    """
    (stored, size), (rows, width) = source.open(), source.shape
    count = min(rows, table.vocabulary_size)
    turn = part.pieces * size
    reach = turn * max(1, IN_FLIGHT // part.pieces)
    asked = {start: _asked(part, stored, start, size, count) for start in range(0, min(count, reach), turn)}
    for start in range(0, count, turn):
        ahead = start + reach
        if ahead < count:
            asked[ahead] = _asked(part, stored, ahead, size, count)
        pieces = _arrived(part, asked.pop(start), (start, size, width), array.dtype, source)
        # Waiting keeps pieces from piling up; the disk reads on meanwhile.
        array = jax.block_until_ready(deal(part, array, pieces, table.row_offset + start, min(turn, count - start)))
    return array


def _asked(part: Part, stored: Any, start: int, size: int, count: int) -> dict[int, Any]:
    """Returns the reads of this process's pieces, by the number of the piece."""
    numbers = {0} if part.devices is None else {first // size for first in _firsts(part, size).values()}
    asked = {}
    for number in sorted(numbers):
        first, last = start + number * size, min(start + (number + 1) * size, count)
        asked[number] = stored[first:last].read() if first < last else None
    return asked


def _firsts(part: Part, size: int) -> dict[Any, int]:
    assert part.devices is not None
    sharding = part.devices.sharding(part.pieces_spec())
    held = sharding.addressable_devices_indices_map((part.pieces * size, 1))
    return {device: index[0].start or 0 for device, index in held.items()}  # type: ignore[index]


def _arrived(part: Part, asked: dict[int, Any], form: tuple[int, int, int], dtype: Any, source: Source) -> jax.Array:
    """Returns the pieces as an array over the devices, in the table's dtype; behind the last row there are zeros.

    Args:
      part: what they are for.
      asked: the reads, by the number of the piece.
      form: the first row of all, rows of a piece, width.
      dtype: of the table.
      source: where they come from.
    """
    start, size, width = form
    rows = {}
    for number, future in asked.items():
        found = np.zeros((0, width), dtype)
        if future is not None:
            found = source.over(start + number * size, arrays.arrived(future, source.folder)).astype(dtype, copy=False)
        missing = size - found.shape[0]
        rows[number] = np.pad(found, ((0, missing), (0, 0))) if missing else found
    if part.devices is None:
        return jnp.asarray(rows[0])
    sharding = part.devices.sharding(part.pieces_spec())
    whole = (part.pieces * size, width)

    def piece(index: Any) -> np.ndarray:
        return rows[(index[0].start or 0) // size]

    return jax.make_array_from_callback(whole, sharding, piece)
