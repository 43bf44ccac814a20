"""What a run leaves behind: tables as plain arrays, and the lines that are shown."""

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import embax

MEASURES = ("auc", "logloss", "seconds", "samples_per_second")


def save_arrays(path: Path, plan: embax.Plan, tables: Any, params: Any) -> None:
    """Writes every table with its slots, and the dense parameters, to one ``.npz`` of plain arrays.

    The names are ``table name/table``, ``table name/slot name`` and ``dense/...``. The file replaces an older one
    only when it is complete. ``load_tables(path) == embax.to_arrays(plan, tables)``.
    """
    named = {}
    for table, parts in embax.to_arrays(plan, tables).items():
        named |= {f"{table}/{part}": np.asarray(values) for part, values in parts.items()}
    for place, values in jax.tree.leaves_with_path(params):
        named["dense/" + jax.tree_util.keystr(place, simple=True, separator="/")] = np.asarray(values)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        np.savez(file, **named)
    os.replace(part, path)


def load_tables(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tables of a file that ``save_arrays`` wrote, as ``embax.from_arrays`` takes them.

    Raises:
      ValueError: the file is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            named = {name: stored[name] for name in stored.files}
    except (zipfile.BadZipFile, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not an .npz of plain arrays: {error}") from None
    tables: dict[str, dict[str, np.ndarray]] = {}
    for name, values in named.items():
        table, _, part = name.rpartition("/")
        if not name.startswith("dense/"):
            tables.setdefault(table, {})[part] = values
    return tables


def means(runs: Sequence[Mapping[str, Any]], models: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the mean over ``runs`` of every measure of every model."""
    return {model: {m: float(np.mean([run[model][m] for run in runs])) for m in MEASURES} for model in models}


def table_lines(runs: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """Returns the lines of a table: a row for each seed and model and, of several seeds, for the means."""
    lines = [f"{'seed':<6}{'model':<14}{'test AUC':>10}{'logloss':>10}{'seconds':>10}{'samples/s':>12}"]
    rows = [(str(run["seed"]), run) for run in runs]
    if len(runs) > 1:
        rows.append(("mean", means(runs, models)))
    for seed, run in rows:
        for model in models:
            auc, logloss, seconds, rate = (run[model][measure] for measure in MEASURES)
            lines.append(f"{seed:<6}{model:<14}{auc:>10.4f}{logloss:>10.4f}{seconds:>10.1f}{rate:>12,.0f}")
    return lines
