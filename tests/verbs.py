"""The verbs of the command line, run in this process, and what a run leaves on disk."""

import contextlib
import io
import json
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embax import cli

SMALL = ("--batch-size", 64, "--hidden", 4, "--embedding-dim", 2, "--baseline", "rate")


def embax(*args):
    """Returns the exit code, stdout and the lines of stderr, but for progress bars."""
    jax.devices()  # before --devices would make some
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["embax", *map(str, args)], None
    # Optax mixes dtypes.
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), jax.numpy_dtype_promotion("standard"):
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        finally:
            sys.argv = argv
    lines = err.getvalue().replace("\r", "\n").split("\n")
    return code, out.getvalue(), [line for line in lines if line.startswith("embax")]


def trained(data, output, *args):
    """Trains a small model of the column y, and returns the run's document."""
    code, _, err = embax("train", data, "--label", "y", "--output", output, *SMALL, *args)
    assert (code, err) == (0, []), err
    return json.loads((output / "run.json").read_text("utf-8"))


def agreeing(rows=640, seed=0, values=3):
    """A table whose label says whether two columns agree: no sum of weights can tell."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, values, (2, rows))
    return pa.table({"a": [f"v{i}" for i in a], "b": b, "y": (a == b).astype(np.int8)})


def written(path, table, group=100):
    """Writes a table as Parquet, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def lines(output, kind=None):
    """Returns the lines of metrics.jsonl; they are JSON, which has no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = [json.loads(line, parse_constant=refuse) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def bits(output, folder):
    """Returns the newest checkpoint as bytes: every table with its slots, the dense parameters."""
    from embax.checkpoint import export_table
    from embax.tasks.run_folder import RunFolder
    from embax.tasks.work import opened

    run = RunFolder(output)
    folder.mkdir(exist_ok=True)
    found = {}
    for number, table in enumerate(run.document()["tables"]):
        path = folder / f"{number}.safetensors"
        export_table(run.step(), table["name"], path)
        found[table["name"]] = path.read_bytes()
    with jax.numpy_dtype_promotion("standard"):
        _, state, step = opened(run)
    leaves = jax.tree.leaves_with_path(state.params)
    return found | {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves} | {"step": step}


def measures(output):
    """Returns the evaluations but for what hangs on time: none."""
    return {(line["split"], line["step"]): line for line in lines(output, "evaluation")}
