"""``embax predict``: what a trained run makes of the rows of a file."""

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from embax.cli.errors import CommandError
from embax.cli.guarded import Debug, one_line


def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data: Annotated[str, typer.Argument(help="Parquet or CSV: a path, folder or pattern.")],
    to: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    top: Annotated[int | None, typer.Option(min=1, help="Write that many items for each user instead (mf).")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; the newest by default.")] = None,
    debug: Debug = False,
) -> None:
    """Write the rows of DATA with a column `score` to the file TO, by the run in RUN.

    A click model's score is the probability of the label; a retrieval model's that of the pair of user and item.
    """
    if to.suffix != ".parquet" or to.is_dir():
        raise CommandError(f"TO {to} must be a file whose name ends in .parquet")
    with one_line(debug):
        import tempfile

        from embax.data.files import Files
        from embax.tasks import predict as work_of
        from embax.tasks.run_folder import RunFolder
        from embax.tasks.work import opened

        with tempfile.TemporaryDirectory() as made:
            work, state, found = opened(RunFolder(run), step)
            files = Files(data, made, work_of.types_of(work))
            to.parent.mkdir(parents=True, exist_ok=True)
            if top is not None:
                rows = work_of.recommend(work, state, files, to, top)
            else:
                with tqdm(total=files.rows, desc="predicting", unit=" rows", unit_scale=True) as bar:
                    rows = work_of.predict(work, state, files, to, bar.update)
    typer.echo(f"{to}: {rows:,} rows, by step {found}")
