"""``embax export``: tables of a run as files that others read, with what their rows stand for."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from embax.cli.errors import CommandError
from embax.cli.guarded import Debug, one_line

FORMATS = ("parquet", "npy", "safetensors")
LONGEST = 200  # bytes of a table's name in the name of a file


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    to: Annotated[Path, typer.Argument(help="Folder to write into; made if missing.")],
    table: Annotated[str | None, typer.Option(help="One table; all of them by default.")] = None,
    format: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.")] = "parquet",
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; the newest by default.")] = None,
    debug: Debug = False,
) -> None:
    """Write the tables of the run in RUN into the folder TO, a file each.

    Parquet has id, value and embedding in each row; npy and safetensors have the rows, and <table>.values.parquet
    beside them says what each stands for. Row 0 is what training did not know.
    """
    if format not in FORMATS:
        raise CommandError(f"--format {format!r} must be one of {', '.join(FORMATS)}")
    with one_line(debug):
        import pyarrow as pa
        import pyarrow.parquet as pq

        from embax.checkpoint import export_table
        from embax.data.vocabulary import load_all
        from embax.tasks.run_folder import RunFolder

        folder = RunFolder(run)
        columns = {one["name"]: one["column"] for one in folder.document()["tables"]}
        if table is not None and table not in columns:
            raise CommandError(f"--table {table!r}: there is no such table; there are {', '.join(columns)}")
        source, vocabularies = folder.step(step), load_all(folder.path / "vocabularies")
        to.mkdir(parents=True, exist_ok=True)
        files = _file_names(columns)
        for name in [table] if table is not None else columns:
            known = vocabularies[columns[name]].values
            values = pa.concat_arrays([pa.nulls(1, known.type), known])
            path = to / f"{files[name]}.{format}"
            export_table(source, name, path, values if format == "parquet" else None)
            if format != "parquet":
                pq.write_table(pa.table({"value": values}), path.with_name(f"{path.stem}.values.parquet"))
            typer.echo(str(path))


def _file_names(tables: Iterable[str]) -> dict[str, str]:
    """Returns a name of a file for each table: dots for slashes, cut where it is long, each once."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for table in tables:
        short = re.sub(r'[/\\:*?"<>|\x00-\x1f]', ".", table).encode()[:LONGEST].decode(errors="ignore")
        name, number = short, 1
        while name.casefold() in taken:
            number += 1
            name = f"{short}-{number}"
        taken.add(name.casefold())
        found[table] = name
    return found
