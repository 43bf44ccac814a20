"""The ``embax`` command: one file per verb. An error is one line on stderr and exit code 2."""

import sys


def main() -> None:
    """Runs the command line and exits: 0 when all went well, 2 after an error, 130 when interrupted."""
    try:
        import typer
    except ModuleNotFoundError:
        sys.exit(_said("the command line needs the package typer; pip install 'embax[train]'"))
    from embax.cli.bench import bench
    from embax.cli.errors import CommandError
    from embax.cli.export import export
    from embax.cli.inspect import inspect
    from embax.cli.plan import plan
    from embax.cli.predict import predict
    from embax.cli.train import train

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback()(_no_verb)
    for verb in (train, inspect, export, predict, bench, plan):
        app.command()(verb)
    usage_error = typer.BadParameter.__base__
    try:
        sys.exit(app(prog_name="embax", args=sys.argv[1:] or ["--help"], standalone_mode=False))
    except usage_error as error:  # type: ignore[misc]
        sys.exit(_said(error.format_message()))  # type: ignore[attr-defined]
    except CommandError as error:
        sys.exit(_said(str(error)))
    except (typer.Abort, KeyboardInterrupt):
        print("embax: interrupted; what was saved before is as it was", file=sys.stderr)
        sys.exit(130)


def _no_verb() -> None:
    """Embedding tables for JAX, looked up, pooled and trained in place."""


def _said(text: str) -> int:
    """Prints an error in one line and returns its exit code."""
    print("embax:", " ".join(text.split()), file=sys.stderr)
    return 2
