"""The document of a checkpoint: what is in it, and every file of it by size and checksum.

It is written last. A folder without it, or with another number of bytes in a file than it says, is no checkpoint.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from embax.checkpoint.errors import CheckpointError

FORMAT, VERSION, NAME = "embax-checkpoint", 2, "embax.json"
# Version 1 had no deltas.
ADDED = {"mark": 0, "base": "", "deltas": []}


def write_document(folder: Path, body: dict, files: dict[str, dict]) -> None:
    """Writes the document of ``body`` and its files into ``folder``, in one moment in place of one that is there."""
    body = {**body, "format": FORMAT, "version": VERSION, "files": files}
    unfinished = folder / (NAME + ".unfinished")
    with unfinished.open("w") as file:
        file.write(json.dumps({"sha256": _digest(body), "checkpoint": body}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / NAME)


def read_document(folder: Path, root: Path) -> dict:
    """Returns the document's body, after a look at every file that it names.

    Raises:
      CheckpointError: no document, one that is damaged, foreign or newer, or files that are missing, short or changed.
    """
    body = read_body(folder, root)
    for name, known in body["files"].items():
        _check_file(root / name, known)
    return body


def read_body(folder: Path, root: Path) -> dict:
    """Returns the document's body, without a look at the files; errors as ``read_document``."""
    path = folder / NAME
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: there is no such document, so {root} is no embax checkpoint, or an unfinished one; name the "
            "folder of a step, as Checkpoints writes it, or load another step"
        ) from error
    try:
        document = json.loads(text)
        body, digest = document["checkpoint"], document["sha256"]
        version, kind = body["version"], body["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a document of embax, or a damaged one; load another step") from error
    if kind != FORMAT:
        raise CheckpointError(f"{path}: the format is {kind!r}, and not {FORMAT!r}; it was not written by embax")
    if version not in (1, VERSION):
        raise CheckpointError(
            f"{path}: the format has version {version!r}, and this embax reads 1 and {VERSION}; install a newer embax"
        )
    if digest != _digest(body):
        raise CheckpointError(f"{path}: the checksum does not fit: the document was changed; load another step")
    return {**ADDED, **body}


def files_of(root: Path, known: dict[str, dict]) -> dict[str, dict]:
    """Returns what a document says of every file of the folders in ``root``.

    Args:
      root: the folder of a step. What lies in it itself is Orbax's, who writes there once more when all is done.
      known: what is known of some of them.
    """
    paths = sorted(path for folder in root.iterdir() if folder.is_dir() for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(root)): path for path in paths if NAME not in path.name}
    return {name: known.get(name) or _known(root, path) for name, path in names.items()}


def tables_among(files: dict[str, dict]) -> dict[str, dict]:
    """Returns those of a document's files that are of tables: not what Orbax writes beside them."""
    return {name: known for name, known in files.items() if name.startswith("tables/") and name.count("/") > 1}


def _known(root: Path, path: Path) -> dict[str, Any]:
    kind = "crc32c" if _is_piece(path.relative_to(root).parts) else "sha256"
    return {"bytes": path.stat().st_size, kind: _sum(path, kind)}


def _is_piece(parts: tuple[str, ...]) -> bool:
    """Returns whether a file of a step is a piece of an array, which ends in a checksum of itself."""
    return parts[0] == "tables" and len(parts) > 5 and parts[-3] == "c" and parts[-1] == "0"


def _sum(path: Path, kind: str) -> str:
    """Returns the checksum of a file; of a piece the one that it ends in, which is checked when the piece is read."""
    with path.open("rb") as file:
        if kind == "sha256":
            return hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(max(0, path.stat().st_size - 4))
        return file.read().hex()


def _check_file(path: Path, known: dict) -> None:
    try:
        size, kind = path.stat().st_size, "crc32c" if "crc32c" in known else "sha256"
        changed = _sum(path, kind) != known[kind]
    except OSError as error:
        raise CheckpointError(f"{path}: missing ({error.strerror}); load another step, or restore the file") from error
    if size != known["bytes"]:
        raise CheckpointError(
            f"{path}: it has {size} bytes, and was written with {known['bytes']}; load another step, or restore "
            "the file"
        )
    if changed:
        raise CheckpointError(f"{path}: its checksum does not fit: it was changed; load another step")


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
