"""``embax inspect``: what a run has: tables, memory, backend, measures; neighbours of a value."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from embax import kernels
from embax.cli.errors import CommandError
from embax.cli.guarded import Debug, one_line


def inspect(
    run: Annotated[Path | None, typer.Argument(help="Folder of a run.")] = None,
    backend: Annotated[bool, typer.Option("--backend", help="Say which backend runs here, and why.")] = False,
    column: Annotated[str | None, typer.Option(help="Column of the value whose neighbours are shown.")] = None,
    value: Annotated[str | None, typer.Option(help="Value whose nearest neighbours are shown, by cosine.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many neighbours.")] = 10,
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; the newest by default.")] = None,
    debug: Debug = False,
) -> None:
    """Show what the run in RUN has, or the nearest neighbours of one of its values."""
    if backend or run is None:
        typer.echo("\n  ".join([_backend(), *kernels.described()]))
    if run is None:
        if not backend:
            raise CommandError("name the folder of a run, or give --backend")
        return
    if (column is None) != (value is None):
        raise CommandError("--column and --value belong together: whose neighbours are to be shown")
    with one_line(debug):
        from embax.tasks.run_folder import RunFolder

        folder = RunFolder(run)
        if value is not None:
            typer.echo("\n".join(neighbours(folder, str(column), value, count, step)))
        else:
            typer.echo("\n".join(described(folder)))


def _backend() -> str:
    try:
        return kernels.chosen()
    except ValueError as error:  # EMBAX_BACKEND names one that cannot run here
        typer.echo("\n".join(kernels.described()))
        raise CommandError(str(error)) from None


def described(folder: Any) -> list[str]:
    """Returns the lines that describe a run."""
    from embax.checkpoint import Checkpoints

    document = folder.document()
    with Checkpoints(folder.checkpoints) as checkpoints:
        steps = checkpoints.steps()
    rows = ", ".join(f"{count:,} {part}" for part, count in document["rows"].items() if count)
    lines = [
        f"{folder.path}: {document['task']}, {document['model']}, {document['status']}, {document['seconds']:.1f} s",
        f"data: {document['data']} ({rows} rows)",
        f"trained with embax {document['embax']}, jax {document['jax']}, backend {document['backend']}, "
        f"{document['devices']} device{'s' * (document['devices'] > 1)}; here: {_backend()}",
        f"checkpoints: {', '.join(map(str, steps)) or 'none'}",
        "",
        f"{'table':<36}{'rows':>12}{'dim':>6}  {'dtype':<10}{'optimizer':<18}{'MB':>10}",
    ]
    for table in document["tables"]:
        shape = f"{table['rows']:>12,}{table['dim']:>6}  {table['dtype']:<10}"
        lines.append(f"{table['name']:<36}{shape}{table['optimizer']:<18}{table['bytes'] / 1e6:>10.2f}")
    total = sum(table["bytes"] for table in document["tables"]) / 1e6
    return [*lines, f"{'all, with slot variables':<82}{total:>12.2f}", *_measures(folder)]


def _measures(folder: Any) -> list[str]:
    """Returns the last evaluation, as the journal has it."""
    path, found = folder.path / "metrics.jsonl", None
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # half a line, of a run that was killed
            read = json.loads(line)
            found = read if read.get("kind") == "evaluation" else found
    if found is None:
        return []
    found = {k: v for k, v in found.items() if k not in ("kind", "epoch")}
    return ["", ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in found.items())]


def neighbours(folder: Any, column: str, text: str, count: int, step: int | None) -> list[str]:
    """Returns lines of the values whose rows are nearest to a value's, by cosine.

    Raises:
      CommandError: no such column, no embeddings of it, or a value that training did not know.
    """
    import pyarrow as pa

    from embax.data.vocabulary import load_all

    tables = {t["name"]: t for t in folder.document()["tables"] if t["column"] == column and t["dim"] > 1}
    if not tables:
        having = sorted({t["column"] for t in folder.document()["tables"] if t["dim"] > 1})
        raise CommandError(f'--column "{column}" has no embeddings; there are {", ".join(having) or "none"}')
    vocabulary = load_all(folder.path / "vocabularies")[column]
    try:
        row = vocabulary.row(text)
    except (KeyError, ValueError, pa.ArrowException):
        raise CommandError(f'--value "{text}": training met no such value in column "{column}"') from None
    rows = _rows(folder, next(iter(tables)), step)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit[row]
    cosines[[0, row]] = -np.inf
    best = np.argsort(-cosines, kind="stable")[: min(count, len(rows) - 2)]
    times = vocabulary.counts.to_pylist()
    lines = [f'{column} "{text}" ({times[row - 1]:,} rows of training), nearest by cosine:']
    return lines + [f"{cosines[i]:>8.4f}  {vocabulary.value(i)}  ({times[i - 1]:,})" for i in map(int, best)]


def _rows(folder: Any, table: str, step: int | None) -> np.ndarray:
    """Returns the rows of one table of a checkpoint, float32."""
    import tempfile

    from embax.checkpoint import export_table

    with tempfile.TemporaryDirectory() as made:
        export_table(folder.step(step), table, Path(made) / "rows.npy")
        return np.load(Path(made) / "rows.npy", allow_pickle=False)
