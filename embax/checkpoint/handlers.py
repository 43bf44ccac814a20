"""What Orbax calls to write the tables and, last of all, the document; Orbax does the rest.

Orbax makes a step's folder, waits for all processes, calls ``finalize`` in the order in which the items are registered,
and marks the folder as whole: until then it is no step.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from embax.checkpoint import deltas, tables
from embax.checkpoint.document import files_of, write_document
from embax.checkpoint.held import Held
from embax.checkpoint.increments import Base
from embax.checkpoint.tables import Piece
from embax.table_state import TableState

TABLES, DENSE, DOCUMENT = "tables", "dense", "embax"


class TablesHandler(ocp.AsyncCheckpointHandler):
    """Writes tables in pieces: as they come, or from a copy on the host while training goes on."""

    def save(self, directory: Any, args: "TablesArgs") -> None:
        """Writes the tables before it returns; the memory of a few pieces is needed."""
        args.write(Path(directory), args.turns())

    async def async_save(self, directory: Any, args: "TablesArgs") -> list:
        """Copies the rows to the host, if training is to go on meanwhile, and returns what writes them."""
        turns = args.turns()
        kept = [turns] if args.waits else [list(turns)]

        async def write():
            args.write(Path(directory), kept.pop())

        return [CommitFutureAwaitingContractedSignals(write(), name="embax_tables")]

    def restore(self, directory: Any, args: Any = None) -> Any:
        """Raises: ``Checkpoints.restore`` reads tables."""
        raise NotImplementedError("tables are read by embax.checkpoint.Checkpoints.restore")


class DocumentHandler(ocp.AsyncCheckpointHandler):
    """Writes the document, when every other file of the step is there."""

    def __init__(self):
        self._args: DocumentArgs | None = None

    def save(self, directory: Any, args: "DocumentArgs") -> None:
        """Remembers the document."""
        del directory
        self._args = args

    async def async_save(self, directory: Any, args: "DocumentArgs") -> list:
        """Remembers the document."""
        self.save(directory, args)
        return []

    def finalize(self, directory: Any) -> None:
        """Writes it, with the size and checksum of every file beside it."""
        folder, args = Path(directory), self._args
        assert args is not None
        write_document(folder, args.body, files_of(folder.parent, args.known))

    def restore(self, directory: Any, args: Any = None) -> Any:
        """Raises: ``Checkpoints.restore`` reads the document."""
        raise NotImplementedError("the document is read by embax.checkpoint.Checkpoints.restore")


@ocp.args.register_with_handler(TablesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class TablesArgs(ocp.args.CheckpointArgs):
    """What ``TablesHandler`` writes.

    Attributes:
      tables: as they are held, and their states.
      waits: whether the caller waits until it is written.
      base: the step that has all but the rows written since; None to write everything.
    """

    tables: list[tuple[Held, TableState]]
    waits: bool
    base: Base | None = None

    def turns(self) -> Iterator[list[Piece]]:
        """Yields what is to be written."""
        return tables.turns(self.tables) if self.base is None else deltas.turns(self.base.delta, self.tables)

    def write(self, folder: Path, turns: Iterable[list[Piece]]) -> None:
        """Writes it."""
        if self.base is not None and jax.process_index() == 0:
            self.base.share(folder)
        tables.write(folder, turns)


@ocp.args.register_with_handler(DocumentHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DocumentArgs(ocp.args.CheckpointArgs):
    """What ``DocumentHandler`` writes, and what is known of files that the step shares with another."""

    body: dict
    known: dict[str, dict]


def registry() -> Any:
    """Returns the items of a checkpoint in the order in which they are finished: the document last."""
    made = ocp.handlers.DefaultCheckpointHandlerRegistry()
    made.add(TABLES, TablesArgs, TablesHandler())
    made.add(DENSE, ocp.args.StandardSave, ocp.StandardCheckpointHandler())
    made.add(DOCUMENT, DocumentArgs, DocumentHandler())
    return made
