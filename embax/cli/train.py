"""``embax train``: train on one of the data sets that pip can install."""

from pathlib import Path
from typing import Annotated

import typer

from embax.allocator import tune_allocator
from embax.cli.errors import CommandError

DATA = ("completejourney",)
LEAST_ROWS = 1000


def train(
    data: Annotated[str, typer.Argument(help=f"What to train on: {', '.join(DATA)}.")],
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; each is a run of its own.")] = "0",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 2048,
    embedding_dim: Annotated[int, typer.Option(min=1, help="Length of the click model's embeddings.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder for tables and metrics; made if missing.")] = Path("embax-run"),
    limit_rows: Annotated[int | None, typer.Option(help="Use that many rows, evenly spaced in time.")] = None,
) -> None:
    """Train a click model beside logistic regressions, and test all on later weeks.

    DATA names the data set. completejourney: simulated grocery transactions; was the product sold at a
    loyalty-card discount? Training is on weeks 1 to 44, the test on weeks 45 to 53.
    """
    if data not in DATA:
        raise CommandError(f"there is no data named {data!r}; available: {', '.join(DATA)}")
    if limit_rows is not None and limit_rows < LEAST_ROWS:
        raise CommandError(f"--limit-rows {limit_rows} is too few to train and test on; give at least {LEAST_ROWS}")
    numbers = _seeds(seeds)
    _make_folder(output)
    try:
        from embax.tasks import comparison, completejourney

        transactions = completejourney.load()
    except ModuleNotFoundError as error:
        needed = "" if "embax[train]" in str(error) else "; pip install 'embax[train]'"
        raise CommandError(f"{error}{needed}") from None
    if limit_rows is not None:
        transactions = transactions.thinned(limit_rows)
    rows = len(comparison.split(transactions)[0])
    if batch_size > rows:
        raise CommandError(f"--batch-size {batch_size} is more than the {rows} training rows; give {rows} or less")
    tune_allocator()
    options = {"epochs": epochs, "batch_size": batch_size, "embedding_dim": embedding_dim}
    typer.echo("\n".join(comparison.run(transactions, numbers, output, **options)))


def _seeds(text: str) -> list[int]:
    """Returns the seeds in ``text``: whole numbers from 0, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise CommandError(f"--seeds {text!r} must be different whole numbers from 0, separated by commas, like 0,1,2")
    return [int(part) for part in parts]


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {path} cannot be made a folder: {error.strerror}") from None
