"""The deltas of a step laid over its tables, on disk: one document in place of the other is the moment it counts."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from embax.checkpoint import tables
from embax.checkpoint.deltas import source_of
from embax.checkpoint.document import files_of, read_document, tables_among, write_document


def compact_step(folder: Path) -> None:
    """Gives a step tables without deltas, if it has any; files that it no longer needs are deleted.

    Args:
      folder: of the step.

    Raises:
      CheckpointError: a damaged step, which stays as it is.
    """
    document, root = folder / "embax", folder / "tables"
    body = read_document(document, folder)
    _sweep(root, body)  # of a compaction that was cut short there may be something left
    if not body["deltas"]:
        return
    base = f"base.{1 + int(body['base'].rpartition('.')[2] or 0)}"
    tables.write(root / base, _merged(root, body))
    prefix = f"tables/{base}/"
    files = files_of(folder, body["files"])
    for name in tables_among(files):
        if not name.startswith(prefix):
            del files[name]
    body |= {"base": base, "deltas": []}
    write_document(document, body, files)
    _sweep(root, {**body, "files": files})


def _merged(root: Path, body: dict) -> Iterator[list[tables.Piece]]:
    for table, known in body["tables"].items():
        for part in known["parts"]:
            source = source_of(root, body, table, part)
            place = tables.folder_of(Path(), table, part)
            for first, rows in source.pieces():
                yield [tables.Piece(place, source.shape, first, rows)]


def _sweep(root: Path, body: dict) -> None:
    """Deletes what a document does not name."""
    named = {name.split("/")[1] for name in tables_among(body["files"])}
    for entry in root.iterdir():
        if entry.is_dir() and entry.name not in named:
            shutil.rmtree(entry)
