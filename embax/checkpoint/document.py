"""The document of a checkpoint: what is in it, and every file of it by size and checksum.

It is written last. A folder without it, or with another number of bytes in a file than it says, is no checkpoint.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from embax.checkpoint.errors import CheckpointError

FORMAT, VERSION, NAME = "embax-checkpoint", 1, "embax.json"


def write_document(folder: Path, body: dict, root: Path) -> None:
    """Writes the document of ``body`` into ``folder``, with every file of the folders in ``root``."""
    body = {"format": FORMAT, "version": VERSION, **body, "files": _files(root)}
    (folder / NAME).write_text(json.dumps({"sha256": _digest(body), "checkpoint": body}, indent=1))


def read_document(folder: Path, root: Path) -> dict:
    """Returns the document's body, after a look at every file that it names.

    Raises:
      CheckpointError: no document, one that is damaged, foreign or newer, or files that are missing, short or changed.
    """
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
    if version != VERSION:
        raise CheckpointError(
            f"{path}: the format has version {version!r}, and this embax reads {VERSION}; install a newer embax"
        )
    if digest != _digest(body):
        raise CheckpointError(f"{path}: the checksum does not fit: the document was changed; load another step")
    for name, known in body["files"].items():
        _check_file(root / name, known)
    return body


def _files(root: Path) -> dict[str, dict]:
    # What lies in `root` itself is Orbax's, who writes there once more when all is done.
    paths = sorted(path for folder in root.iterdir() if folder.is_dir() for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): _known(root, path) for path in paths if path.name != NAME}


def _known(root: Path, path: Path) -> dict[str, Any]:
    kind = "crc32c" if _is_piece(path.relative_to(root).parts) else "sha256"
    return {"bytes": path.stat().st_size, kind: _sum(path, kind)}


def _is_piece(parts: tuple[str, ...]) -> bool:
    """Returns whether a file of a step is a piece of a table, which ends in a checksum of itself."""
    return len(parts) == 6 and parts[0] == "tables" and parts[3] == "c"


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
