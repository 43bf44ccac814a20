"""Statistics in files of NumPy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embax.sparsecore.fdo_files import Collected
from embax.sparsecore.lib.fdo.fdo_client import FDOClient
from embax.sparsecore.statistics import SparseDenseMatmulInputStats


class NPZFileFDOClient(FDOClient):
    """Keeps every batch's statistics in ``.npz`` files, one at each ``publish``.

    Args:
      base_dir: the folder of the files.

    >>> import tempfile
    >>> stats = SparseDenseMatmulInputStats({"t": np.array([3, 4])}, {"t": np.array([3, 2])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     client = NPZFileFDOClient(folder)
    ...     client.record(stats)
    ...     client.publish()
    ...     NPZFileFDOClient(folder).load().max_ids_per_partition["t"].tolist()
    [3, 4]
    """

    def __init__(self, base_dir: Any):
        self._collected = Collected(base_dir, "npz", True)

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
    with path.open("wb") as file:
        np.savez(file, **columns)  # type: ignore[arg-type]


def _read(path: Path) -> Mapping[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)
