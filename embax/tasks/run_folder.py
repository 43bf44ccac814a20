"""The folder of a run: what it is, its vocabularies, its checkpoints, its numbers::

run.json        what was run, on what, with which settings
vocabularies/   values of the rows of every table
checkpoints/    tables, slots, dense parameters and the place in the data
metrics.jsonl   losses and measures
tensorboard/    the same for TensorBoard
report.html     all of it on a page
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from embax.data.columns import Columns
from embax.data.files import DataError
from embax.data.scan import Scale, Scanned
from embax.data.split import Split
from embax.data.vocabulary import load_all, save_all
from embax.tasks.settings import Settings, checked

FORMAT = 1
KEYS = ("task", "model", "data", "settings", "columns", "rows", "seen", "split", "fingerprint", "tables", "status")


class RunFolder:
    """The files of a run.

    Args:
      path: of the folder.
    """

    def __init__(self, path: Any):
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Where steps are."""
        return self.path / "checkpoints"

    @property
    def document_path(self) -> Path:
        """The record of the run."""
        return self.path / "run.json"

    def step(self, step: int | None = None) -> Path:
        """Returns the folder of a step, None for the newest; DataError where there is none."""
        from embax.checkpoint import Checkpoints

        self.document()
        with Checkpoints(self.checkpoints) as checkpoints:
            steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"step {step}"
            raise DataError(f"{self.checkpoints} has not {wanted}; there are {', '.join(map(str, steps)) or 'none'}")
        return self.checkpoints / str(steps[-1] if step is None else step)

    def make(self) -> None:
        """Makes the folder; DataError where that cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--output {self.path} cannot be made a folder: {error.strerror}") from None

    def clear(self) -> None:
        """Throws away what another run, or an attempt at this one, has left."""
        for path in (self.document_path, self.path / "report.html"):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path / "vocabularies"):
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, document: dict[str, Any]) -> None:
        """Writes the record, whole."""
        part = self.document_path.with_suffix(".part")
        part.write_text(json.dumps({"format": FORMAT, **document}, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(part, self.document_path)

    def document(self) -> dict[str, Any]:
        """Returns the record; DataError for a folder that has none, or one of another format."""
        path = self.document_path
        try:
            found = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{self.path} is no folder of a run: there is no {path.name}; `embax train` makes one"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); it may be damaged: train anew") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            made = found.get("format") if isinstance(found, dict) else None
            raise DataError(f"{path} is of format {made}, and this embax reads {FORMAT}; use the embax that wrote it")
        missing = [key for key in KEYS if key not in found]
        if missing:
            raise DataError(f'{path} has no "{missing[0]}"; it may be damaged: train anew')
        return found

    def settings(self) -> Settings:
        """Returns the settings of the run."""
        return Settings(
            **checked({k: v for k, v in self.document()["settings"].items() if v is not None}, str(self.path))
        )

    def keep(self, scanned: Scanned) -> None:
        """Writes vocabularies; scales and counts go into the record."""
        save_all(self.path / "vocabularies", scanned.vocabularies)

    def known(self) -> tuple[Columns, Scanned, Split]:
        """Returns what columns are for, what was seen of them, and which row was for what."""
        document = self.document()
        columns, seen = document["columns"], document["seen"]
        scanned = Scanned(
            load_all(self.path / "vocabularies"),
            {name: Scale(*scale) for name, scale in seen["scales"].items()},
            document["rows"],
            seen["positive"],
        )
        roles = {name: tuple(columns[name]) for name in ("categorical", "bags", "numeric")}
        return Columns(columns["label"], **roles), scanned, Split(**document["split"])
