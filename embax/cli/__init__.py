"""The ``embax`` command: one file per verb. An error is one line on stderr and exit code 2."""

import sys


def main() -> None:
    """Runs the command line and exits: 0 when all went well, 2 after an error, 130 when interrupted."""
    try:
        import typer

        from embax.cli.bench import bench
        from embax.cli.errors import CommandError
        from embax.cli.export import export
        from embax.cli.inspect import inspect
        from embax.cli.plan import plan
        from embax.cli.predict import predict
        from embax.cli.train import train
    except ModuleNotFoundError as error:
        if (error.name or "embax").partition(".")[0] == "embax":
            raise
        if sys.argv[1:] == ["inspect", "--backend"]:  # what a bare machine is asked first
            sys.exit(_backends())
        sys.exit(_said(f"the command line needs the package {error.name}; pip install 'embax[train]'"))

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


def _backends() -> int:
    """Prints what runs here, and why, without any package of the command line."""
    from embax import kernels

    try:
        print("\n  ".join([kernels.chosen(), *kernels.described()]))
    except ValueError as error:
        return _said(str(error))
    return 0


def _no_verb() -> None:
    """Embedding tables for JAX, looked up, pooled and trained in place."""


def _said(text: str) -> int:
    """Prints an error in one line and returns its exit code."""
    print("embax:", " ".join(text.split()), file=sys.stderr)
    return 2
