"""Errors of data and packages as the command line shows them: one line, unless ``--debug`` asks for all."""

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from embax.cli.errors import CommandError

Debug = Annotated[bool, typer.Option("--debug", help="Show where in the code an error comes from.")]


@contextlib.contextmanager
def one_line(debug: bool) -> Iterator[None]:
    """Turns errors that a user can mend into CommandError; leaves all as they are with ``debug``."""
    try:
        yield
    except ModuleNotFoundError as error:
        if debug:
            raise
        needed = "" if "embax[train]" in str(error) else "; pip install 'embax[train]'"
        raise CommandError(f"{error}{needed}") from None
    except ValueError as error:
        # DataError and CheckpointError are ValueErrors, as is what the specification refuses.
        if debug or not _meant_for_users(error):
            raise
        raise CommandError(str(error)) from None
    except OSError as error:
        if debug or error.strerror is None:
            raise
        named = "" if error.filename is None else f"{error.filename}: "
        raise CommandError(f"{named}{error.strerror}; free, mend or name another place") from None


def _meant_for_users(error: ValueError) -> bool:
    from embax.checkpoint import CheckpointError
    from embax.data.files import DataError

    return isinstance(error, (DataError, CheckpointError))
