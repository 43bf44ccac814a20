"""``embax train``: a model of one's own data, from files, without a line of code."""

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from embax.allocator import tune_allocator
from embax.cli.errors import CommandError
from embax.cli.guarded import Debug, one_line
from embax.tasks.settings import FIELDS, Settings, checked, read_file

COMPLETE_JOURNEY = "completejourney"


def train(data: str, **given: Any) -> None:
    """Train a model of the rows in DATA and test it on rows that training has not seen.

    DATA is a Parquet or CSV file, a folder or pattern of such files, or completejourney: simulated grocery transactions
    that pip can install. The run (checkpoints, metrics, vocabularies, report.html) is in the folder --output.
    """
    output, config, seeds, resume, overwrite, debug = (given.pop(name) for name in OPTIONS)
    numbers = None if seeds is None else _seeds(seeds)
    if resume and overwrite:
        raise CommandError("--resume and --overwrite exclude each other: one goes on with a run, one throws it away")
    if numbers is not None and given["seed"] is not None:
        raise CommandError("--seed and --seeds exclude each other; leave one out")
    with one_line(debug), _reading():
        from embax.tasks import work
        from embax.tasks.run_folder import RunFolder

        said = _named(config) | checked({k: v for k, v in given.items() if v is not None})
        if numbers is not None:
            found = _each(numbers, data, said, output, resume, overwrite)
        else:
            found = _one(data, said, output, output, resume, overwrite)
            typer.echo("\n".join(work.summary(found, RunFolder(output))))
    if found["status"] == "interrupted":
        raise typer.Exit(130)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Says what Ctrl-C before the first step leaves: later it is for the run to tell."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("embax: interrupted before the first step; the same command does it again", err=True)
        raise typer.Exit(130) from None


def _one(data: str, said: dict[str, Any], output: Path, shared: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Trains a run in ``output``, its data made in ``shared`` where they are to be made; returns how it ended.

    What the command and its file do not say is as it was where a run goes on, else by default.
    """
    from embax.tasks import completejourney, work
    from embax.tasks.run_folder import RunFolder

    folder = RunFolder(output)
    settings = dataclasses.replace(folder.settings() if resume else Settings(data), **{**said, "data": data})
    if data == COMPLETE_JOURNEY:
        settings = completejourney.settings(RunFolder(shared), settings, said if not resume else FIELDS)
    _devices(settings.devices)
    tune_allocator()
    return work.run(settings, folder, _command(), resume, overwrite)


def _each(
    numbers: Sequence[int], data: str, said: dict[str, Any], output: Path, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """Trains a run for each seed in a folder of its own; prints and writes their measures; returns the last one's."""
    from embax.tasks import seeds
    from embax.tasks.run_folder import RunFolder

    runs: dict[int, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for seed in numbers:
        folder = RunFolder(output / f"seed-{seed}")
        begun = resume and folder.document_path.exists()
        found = runs[seed] = _one(data, said | {"seed": seed}, folder.path, output, begun, overwrite)
        if found["status"] == "interrupted":
            typer.echo(f"seed {seed}: interrupted; the same command with --resume goes on")
            return found
    typer.echo("\n".join(seeds.shown(runs)))
    seeds.write(output / "metrics.json", runs)
    return found


def _seeds(text: str) -> list[int]:
    """Returns the seeds in ``text``: whole numbers from 0, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise CommandError(f"--seeds {text!r} must be different whole numbers from 0, separated by commas, like 0,1,2")
    return [int(part) for part in parts]


OPTIONS = {
    "output": Annotated[Path, typer.Option(help="Folder of the run; made if missing.")],
    "config": Annotated[Path | None, typer.Option(help="TOML file of settings, by the names of these options.")],
    "seeds": Annotated[str | None, typer.Option(help="Seeds, separated by commas: a run each, in OUTPUT/seed-N.")],
    "resume": Annotated[bool, typer.Option("--resume", help="Go on where the run in --output stopped.")],
    "overwrite": Annotated[bool, typer.Option("--overwrite", help="Throw the checkpoints in --output away.")],
    "debug": Debug,
}
DEFAULTS = {
    "output": Path("embax-run"),
    "config": None,
    "seeds": None,
    "resume": False,
    "overwrite": False,
    "debug": False,
}


def _signature() -> inspect.Signature:
    """Returns the arguments of the command: one option for each setting, said once in ``Settings``."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    argument = Annotated[str, typer.Argument(help="Parquet or CSV: a path, folder or pattern; or completejourney.")]
    made = [inspect.Parameter("data", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=argument)]
    for name, kind in OPTIONS.items():
        made.append(inspect.Parameter(name, keyword, default=DEFAULTS[name], annotation=kind))
    for name, field in FIELDS.items():
        if name == "data":
            continue
        said = str(field.type)
        kind = bool if "bool" in said else str if "tuple" in said or "str" in said or "Literal" in said else None
        kind = kind or (float if "float" in said else int)
        flags = (f"--{name.replace('_', '-')}",)
        shown = "" if field.default in (None, (), False) else f" [default: {_text(field.default)}]"
        option = typer.Option(*flags, help=field.metadata["help"] + shown, show_default=False)
        made.append(inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, option]))
    return inspect.Signature(made)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {name: p.annotation for name, p in train.__signature__.parameters.items()}  # type: ignore[attr-defined]


def _named(config: Path | None) -> dict[str, Any]:
    return {} if config is None else read_file(config)


def _devices(count: int) -> None:
    """Makes so many devices of a CPU, or says why not."""
    if count == 1:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX runs already, with devices of its own
    if len(jax.devices()) < count:
        raise CommandError(
            f"--devices {count}: there are {len(jax.devices())} ({jax.default_backend()}); give that or less"
        )


def _command() -> str:
    import shlex

    return shlex.join(["embax", *(word for word in sys.argv[1:] if word != "--resume")])
