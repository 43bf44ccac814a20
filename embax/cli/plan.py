"""``embax plan``: what a specification would move and hold on a mesh, without any of its devices."""

import json
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from jax.sharding import AbstractMesh

import embax
from embax.cli.errors import CommandError
from embax.costs import Machine, explain

OPTIMIZERS = {
    "sgd": embax.SGD,
    "adagrad": embax.Adagrad,
    "rowwise_adagrad": embax.RowwiseAdagrad,
    "adagrad_momentum": embax.AdagradMomentum,
    "adam": embax.Adam,
    "laprop": embax.LaProp,
    "ftrl": embax.FTRL,
    "f2a": embax.F2A,
}
TABLE_KEYS = {"vocabulary_size", "embedding_dim", "optimizer", "dtype", "combiner"}
FEATURE_KEYS = {"table", "valency", "positions"}


def plan(
    spec: Annotated[Path, typer.Argument(help="A JSON file of tables and features; see docs/mesh.md.")],
    devices: Annotated[int, typer.Option(min=1, help="Devices of the mesh; none of them need be here.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step, over all devices.")] = 65536,
    placement: Annotated[str, typer.Option(help="auto, row, table, column or replicated.")] = "auto",
    exchange: Annotated[str, typer.Option(help="auto, gather or route.")] = "auto",
    wire: Annotated[float, typer.Option(min=0.001, help="GB/s that a device receives.")] = 25.0,
    memory: Annotated[float, typer.Option(min=0.001, help="GB/s of a device's own memory.")] = 200.0,
) -> None:
    """Print where the tables of SPEC would lie, and what a step would move."""
    features = read_spec(spec)
    try:
        mesh = embax.Devices(AbstractMesh((devices,), ("devices",)), exchange=exchange)
        made = embax.plan(features, mesh=mesh, placement=placement)
    except ValueError as error:
        raise CommandError(f"{spec}: {error}") from None
    many = "devices" if devices > 1 else "device"
    typer.echo(f"{devices} {many}, {batch_size:,} samples a step; bytes are those that one device receives")
    typer.echo(explain(made, batch_size, Machine(wire * 1e9, memory * 1e9)))


def read_spec(path: Path) -> list[embax.FeatureSpec]:
    """Returns the features of a JSON file; CommandError says what in it is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or set(content) != {"tables", "features"}:
        raise CommandError(f'{path} must be {{"tables": {{...}}, "features": {{...}}}}')
    for part in ("tables", "features"):
        if not isinstance(content[part], dict):
            raise CommandError(f'{path}: "{part}" must be an object of names, and is a {type(content[part]).__name__}')
    tables = {name: _table(path, name, entry) for name, entry in content["tables"].items()}
    return [_feature(path, name, entry, tables) for name, entry in content["features"].items()]


def _table(path: Path, name: str, entry: Any) -> embax.TableSpec:
    _check_keys(f'{path}: table "{name}"', entry, {"vocabulary_size", "embedding_dim"}, TABLE_KEYS)
    kind = entry.get("optimizer", "adagrad")
    if not isinstance(kind, str) or kind not in OPTIMIZERS:
        raise CommandError(f'{path}: table "{name}": optimizer {kind!r} must be one of {", ".join(OPTIMIZERS)}')
    settings = {key: entry[key] for key in ("dtype",) if key in entry}
    try:
        return embax.TableSpec(
            name=name,
            vocabulary_size=entry["vocabulary_size"],
            embedding_dim=entry["embedding_dim"],
            combiner=entry.get("combiner", "sum"),
            initializer=jax.nn.initializers.zeros,
            optimizer=OPTIMIZERS[kind](0.01),
            **settings,
        )
    except (ValueError, TypeError) as error:
        raise CommandError(f"{path}: {error}") from None


def _feature(path: Path, name: str, entry: Any, tables: dict[str, embax.TableSpec]) -> embax.FeatureSpec:
    _check_keys(f'{path}: feature "{name}"', entry, {"table"}, FEATURE_KEYS)
    if not isinstance(entry["table"], str) or entry["table"] not in tables:
        raise CommandError(f'{path}: feature "{name}" names table {entry["table"]!r}, which is not in "tables"')
    table, valency, positions = tables[entry["table"]], entry.get("valency"), entry.get("positions")
    tail = () if positions is None else (positions,)
    inputs = (None, *tail) if valency is None else (None, *tail, valency)
    try:
        return embax.FeatureSpec(
            name=name, table_spec=table, input_shape=inputs, output_shape=(None, *tail, table.embedding_dim)
        )
    except (ValueError, TypeError) as error:
        raise CommandError(f"{path}: {error}") from None


def _check_keys(where: str, entry: Any, needed: set[str], known: set[str]) -> None:
    if not isinstance(entry, dict):
        raise CommandError(f"{where} must be an object, and is {entry!r}")
    missing, unknown = sorted(needed - set(entry)), sorted(set(entry) - known)
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise CommandError(f"{where} {what}; it takes {', '.join(sorted(known))}")
