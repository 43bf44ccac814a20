"""``embax bench``: a training step of these tables on this machine, beside dense gradients and optax."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

import embax
from embax.cli.errors import CommandError
from embax.cli.plan import read_spec


def bench(
    spec: Annotated[
        Path | None, typer.Argument(help="A JSON file of tables and features, as embax plan takes; see docs/mesh.md.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 8192,
    turns: Annotated[int, typer.Option(min=1, help="Turns of every contender, of four counted steps each.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of ids and initial rows.")] = 0,
    exponent: Annotated[float, typer.Option(min=0.0, help="The r-th most frequent id comes like r ** -this.")] = 1.05,
    max_memory: Annotated[float, typer.Option(min=0.0, help="GB of tables, slots and dense gradients.")] = 4.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time a training step of the tables of SPEC beside what flax and optax do with them.

    Without SPEC: three tables under Adagrad, 186 MB with their slots. All contenders take the same batches, in turns;
    before that their rows after one step are compared.
    """
    for option, value in (("--exponent", exponent), ("--max-memory", max_memory)):
        if not math.isfinite(value):
            raise CommandError(f"{option} {value} must be a finite number")
    if json_path is not None and not json_path.parent.is_dir():
        raise CommandError(f"--json {json_path}: there is no folder {json_path.parent}; make it")
    if json_path is not None and json_path.is_dir():
        raise CommandError(f"--json {json_path} is a folder; name a file")
    features = default_features() if spec is None else read_spec(spec)
    try:
        from embax.tasks import bench as task
    except ModuleNotFoundError as error:
        raise CommandError(f"{error}; pip install 'embax[train]'") from None
    settings = task.Settings(batch_size, turns, seed, exponent, max_memory * task.GB)
    try:
        embax.plan(features)
    except ValueError as error:
        raise CommandError(f"{spec}: {error}") from None
    try:
        found = figures(task.run(features, settings), settings)
    except task.BenchError as error:
        raise CommandError(f"{spec}: {error}" if spec else str(error)) from None
    typer.echo("\n".join(lines(found)))
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"--json {json_path} cannot be written: {error.strerror}") from None


def default_features() -> list[embax.FeatureSpec]:
    """Returns what is measured without a specification: three tables under Adagrad, 186 MB with their slots.

    Items (500,000 rows of 32 numbers, mean) are looked up one by one and as a history of 0 to 8; users (200,000 of 32,
    sum) one by one; words (50,000 of 16, sum) by five.

    >>> [feature.name for feature in default_features()]
    ['item', 'history', 'user', 'words']
    """
    item = _table("item", 500_000, 32, "mean")
    user, word = _table("user", 200_000, 32, "sum"), _table("word", 50_000, 16, "sum")
    return [_feature("item", item, 1), _feature("history", item), _feature("user", user, 1), _feature("words", word, 5)]


def figures(measured: Any, settings: Any) -> dict[str, Any]:
    """Returns what ``embax.tasks.bench.run`` gave under its settings, as JSON has it."""
    from embax.tasks import bench as task

    plan, peer = measured.plan, next((c for c in measured.contenders if c.name == task.DENSE), None)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "optax": importlib.metadata.version("optax"),
        **dataclasses.asdict(settings),
        "ids_a_step": measured.ids_a_step,
        "tables": {t.name: _described(stack, t, task.peer_of(stack)) for stack in plan.stacks for t in stack.tables},
        "longest_list": task.LONGEST,
        "lists": [f.name for f in plan.features if f.pooled and f.valency is None],
        "contenders": {c.name: _times(c, peer, settings.batch_size) for c in measured.contenders},
        "left_out": measured.left_out,
        "rows_compared": measured.rows_compared,
    }


def _described(stack: Any, table: Any, peer: Any) -> dict[str, Any]:
    return {
        "vocabulary_size": table.vocabulary_size,
        "embedding_dim": stack.embedding_dim,
        "dtype": stack.dtype,
        "combiner": table.combiner,
        "optimizer": type(stack.optimizer).__name__,
        "peer": peer.text,
        "compared": peer.same,
    }


def _times(contender: Any, peer: Any, samples: int) -> dict[str, float | None]:
    median = statistics.median(contender.step_seconds)
    return {
        "step_ms_median": 1e3 * median,
        "step_ms_min": 1e3 * min(contender.step_seconds),
        "samples_per_second": samples / median,
        "times_faster_than_peer": None if peer is None else statistics.median(peer.step_seconds) / median,
        "host_ms_median": 1e3 * statistics.median(contender.host_seconds),
        "bytes": contender.bytes,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Returns what to show of ``figures``."""
    tables = found["tables"]
    shown = [
        f"{found['machine']}, jax {found['jax']}, optax {found['optax']}",
        f"{found['batch_size']:,} samples and {found['ids_a_step']:,.0f} ids a step, exponent {found['exponent']:g}, "
        f"seed {found['seed']}; {len(tables)} table{'' if len(tables) == 1 else 's'}",
    ]
    by_text: dict[tuple[str, str], list[str]] = {}
    for name, table in tables.items():
        by_text.setdefault((table["optimizer"], table["peer"]), []).append(name)
    shown += [f"{_few(names)}: {optimizer} beside {text}" for (optimizer, text), names in by_text.items()]
    if found["lists"]:
        many = found["longest_list"]
        shown.append(
            f"{_few(found['lists'])}: 0 to {many} ids a sample; the peer takes {many}, absent ones of weight 0"
        )
    if found["rows_compared"]:
        shown.append(f"after one step {found['rows_compared']:,} touched rows agree with the peer's")
    shown += ["", f"{'':<18}{'ms/step':>10}{'least':>10}{'samples/s':>13}{'to peer':>10}{'host ms':>10}{'MB':>10}"]
    for name, figures in found["contenders"].items():
        ratio = figures["times_faster_than_peer"]
        cells = [f"{figures['step_ms_median']:>10.2f}", f"{figures['step_ms_min']:>10.2f}"]
        cells += [f"{figures['samples_per_second']:>13,.0f}", f"{'-' if ratio is None else f'{ratio:.2f}x':>10}"]
        cells += [f"{figures['host_ms_median']:>10.2f}", f"{_megabytes(figures['bytes']):>10}"]
        shown.append(f"{name:<18}{''.join(cells)}")
    return shown + [f"{name} is left out: {reason}" for name, reason in found["left_out"].items()]


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])} and {len(names) - 4} more"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _table(name: str, rows: int, dim: int, combiner: str) -> embax.TableSpec:
    return embax.TableSpec(
        name=name,
        vocabulary_size=rows,
        embedding_dim=dim,
        combiner=combiner,
        initializer=jax.nn.initializers.zeros,
        optimizer=embax.Adagrad(0.01),
    )


def _feature(name: str, table: embax.TableSpec, *valency: int) -> embax.FeatureSpec:
    shapes = {"input_shape": (None, *valency), "output_shape": (None, table.embedding_dim)}
    return embax.FeatureSpec(name=name, table_spec=table, **shapes)
