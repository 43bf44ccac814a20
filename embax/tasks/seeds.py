"""Several runs that differ in their seed: the measures of each, and their mean."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEAN = "mean"


def means(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean of each number that all runs have."""
    first, *others = runs.values()
    names = [name for name, value in first.items() if isinstance(value, float) and all(name in run for run in others)]
    return {name: sum(run[name] for run in runs.values()) / len(runs) for name in names}


def shown(runs: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Returns a table of the runs' test measures, the baseline's beside the model's, and of their mean."""
    mean = means(runs)
    wide = max(map(len, mean), default=0) + 2
    head = f"{'seed':<6}" + "".join(f"{name:>{wide}}" for name in mean)
    rows = [
        f"{seed!s:<6}" + "".join(f"{run[name]:>{wide}.4f}" for name in mean)
        for seed, run in [*runs.items(), (MEAN, mean)]
    ]
    baselines = {run["baseline"] for run in runs.values() if "baseline" in run}
    return [*(f"baseline: {name}" for name in sorted(baselines)), head, *rows]


def write(path: Path, runs: Mapping[int, Mapping[str, Any]]) -> None:
    """Writes what ``shown`` shows, and how each run ended, as JSON."""
    part = path.with_name(path.name + ".part")
    found = {"runs": [{"seed": seed, **run} for seed, run in runs.items()], MEAN: means(runs)}
    part.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    os.replace(part, path)
