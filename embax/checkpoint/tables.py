"""Tables to disk and back, piece by piece: nobody ever has more than its rows and a few pieces.

On disk a table is ``[vocabulary_size, embedding_dim]`` by its name, each slot variable beside it; nothing is stacked,
padded or in the order of devices.
"""

import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
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
IN_FLIGHT = 16  # pieces on their way to or from the disk: a disk takes its time to say that it has them


class Piece(NamedTuple):
    """Neighbouring rows of a table or a slot, on the host, and where they go."""

    table: str
    part: str
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
    shape = (table.vocabulary_size, array.shape[1])
    size = arrays.piece_rows(*shape, array.dtype)
    for start in range(0, shape[0], part.pieces * size):
        made, pieces = collect(part, size, array, table.row_offset + start), []
        for shard in made.addressable_shards:
            first = start + (shard.index[0].start or 0)
            count = min(size, shape[0] - first)
            if shard.replica_id == 0 and count > 0:
                pieces.append(Piece(held.name(table), name, shape, first, np.asarray(shard.data)[:count]))
        yield pieces


def write(folder: Path, turns: Iterator[list[Piece]] | list[list[Piece]]) -> None:
    """Writes pieces; a few turns are on their way at a time."""
    opened: dict[Path, Any] = {}
    flying: list[list[Any]] = []
    for pieces in turns:
        written = []
        for piece in pieces:
            place = folder_of(folder, piece.table, piece.part)
            if place not in opened:
                opened[place] = arrays.create(place, piece.shape, piece.rows.dtype)
            part = opened[place][piece.first : piece.first + piece.rows.shape[0]]
            written.append(part.write(piece.rows))
        flying.append(written)
        while len(flying) > 1 and sum(map(len, flying)) > IN_FLIGHT:
            _finish(flying.pop(0))
    for written in flying:
        _finish(written)


def _finish(written: list[Any]) -> None:
    for future in written:
        future.result()


def read(folder: Path, known: Mapping[str, Any], part: Part, table: TablePlan, array: jax.Array) -> jax.Array:
    """Returns ``array`` with the rows of one table as they are on disk; rows beyond them stay as they are.

    Args:
      folder: of the array on disk.
      known: what the document says of it: dtype, width, rows.
      part: what ``array`` is.
      table: in the stack.
      array: as it is stored; donated.
    """
    shape = (known["rows"], known["width"])
    stored = arrays.open_array(folder, shape, known["dtype"])
    size, count = arrays.piece_rows(*shape, known["dtype"]), min(shape[0], table.vocabulary_size)
    turn = part.pieces * size
    reach = turn * max(1, IN_FLIGHT // part.pieces)
    asked = {start: _asked(part, stored, start, size, count) for start in range(0, min(count, reach), turn)}
    for start in range(0, count, turn):
        ahead = start + reach
        if ahead < count:
            asked[ahead] = _asked(part, stored, ahead, size, count)
        pieces = _arrived(part, asked.pop(start), (size, shape[1]), array.dtype, folder)
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


def _arrived(part: Part, asked: dict[int, Any], shape: tuple[int, int], dtype: Any, folder: Path) -> jax.Array:
    """Returns the pieces as an array over the devices, in the table's dtype; behind the last row there are zeros."""
    size, rows = shape[0], {}
    for number, future in asked.items():
        rows[number] = np.zeros(shape, dtype)
        if future is not None:
            try:
                found = future.result().astype(dtype, copy=False)
            except ValueError as error:
                raise arrays.damaged(folder, error) from error
            if found.shape == shape:
                rows[number] = found
            else:
                rows[number][: found.shape[0]] = found
    if part.devices is None:
        return jnp.asarray(rows[0])
    sharding = part.devices.sharding(part.pieces_spec())
    whole = (part.pieces * size, shape[1])

    def piece(index: Any) -> np.ndarray:
        return rows[(index[0].start or 0) // size]

    return jax.make_array_from_callback(whole, sharding, piece)
