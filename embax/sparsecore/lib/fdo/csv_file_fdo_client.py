"""Statistics in files of text."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embax.sparsecore.fdo_files import Collected
from embax.sparsecore.lib.fdo.fdo_client import FDOClient
from embax.sparsecore.statistics import SparseDenseMatmulInputStats


class CSVFileFDOClient(FDOClient):
    """Keeps statistics in ``.csv`` files: lines of a column's name and a batch's numbers, one file at each ``publish``.

    Args:
      base_dir: the folder of the files.
      retain_history: whether every batch keeps its line; else the largest numbers are kept.

    >>> import tempfile
    >>> stats = SparseDenseMatmulInputStats({"t": np.array([3, 4])}, {"t": np.array([3, 2])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     client = CSVFileFDOClient(folder)
    ...     client.record(stats)
    ...     client.publish()
    ...     CSVFileFDOClient(folder).load().max_unique_ids_per_partition["t"].tolist()
    [3, 2]
    """

    def __init__(self, base_dir: Any, retain_history: bool = True):
        self._collected = Collected(base_dir, "csv", retain_history)

    def record(self, data: Any) -> None:
        """Adds the statistics of a batch, as preprocessing returns them, or a mapping of its fields."""
        self._collected.add(data)

    def publish(self) -> None:
        """Writes what this process has collected."""
        self._collected.write(_write)

    def load(self) -> SparseDenseMatmulInputStats:
        """Returns the largest of all processes' numbers; FileNotFoundError if there are none."""
        return self._collected.read(_read)


def _write(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "values"])
        writer.writerows([name, " ".join(map(str, row))] for name, rows in columns.items() for row in rows)


def _read(path: Path) -> Mapping[str, np.ndarray]:
    found: dict[str, list[list[int]]] = {}
    with path.open(newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for name, numbers in reader:
            found.setdefault(name, []).append([int(number) for number in numbers.split()])
    return {name: np.array(rows) for name, rows in found.items()}
