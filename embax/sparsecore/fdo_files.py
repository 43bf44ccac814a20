"""Statistics in files, one of each process at each time: what both file clients share.

A file has the columns ``<stack>_max_ids``, ``<stack>_max_unique_ids``, ``<stack>_required_buffer_size`` and
``<stack>_id_drop_counters``, a row for each batch, or one with the largest. Of every process the newest file counts.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from embax.sparsecore.statistics import SparseDenseMatmulInputStats

SUFFIXES = {
    "max_ids_per_partition": "_max_ids",
    "max_unique_ids_per_partition": "_max_unique_ids",
    "required_buffer_size_per_sc": "_required_buffer_size",
    "id_drop_counters": "_id_drop_counters",
}


class Collected:
    """Rows of numbers by the name of a column.

    Args:
      folder: of the files; made when something is written.
      ending: of the files' names.
      keeps_all: whether every batch keeps its row; else the largest numbers are kept.
    """

    def __init__(self, folder: Any, ending: str, keeps_all: bool):
        self.folder, self.ending, self.keeps_all = Path(folder), ending, keeps_all
        self.columns: dict[str, np.ndarray] = {}

    def add(self, data: Any) -> None:
        """Adds the statistics of a batch: SparseDenseMatmulInputStats, or a mapping of its fields.

        Raises:
          ValueError: there are no ids per partition in it.
        """
        for field, suffix in SUFFIXES.items():
            known = data.get(field) if isinstance(data, Mapping) else getattr(data, field, None)
            if known is None and field.startswith("max"):
                raise ValueError(f"record: the statistics have no {field}; give what preprocessing returns")
            for stack, numbers in (known or {}).items():
                row = np.atleast_1d(np.asarray(numbers, np.int64))
                self._put(stack + suffix, row.reshape(-1, row.shape[-1]))

    def _put(self, name: str, rows: np.ndarray) -> None:
        if name in self.columns:
            rows = np.concatenate([_as_wide(self.columns[name], rows), _as_wide(rows, self.columns[name])])
        self.columns[name] = rows if self.keeps_all else rows.max(0, keepdims=True)

    def write(self, write: Callable[[Path, dict], None]) -> None:
        """Writes a new file of this process, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"fdo_stats_{jax.process_index()}_{time.time_ns()}.{self.ending}"
        unfinished = path.with_name(f".{path.name}")
        write(unfinished, self.columns)
        os.replace(unfinished, path)

    def read(self, read: Callable[[Path], Mapping[str, np.ndarray]]) -> SparseDenseMatmulInputStats:
        """Returns the largest numbers of the newest file of each process, and goes on from them.

        Raises:
          FileNotFoundError: there is none.
          ValueError: a file with another column.
        """
        newest: dict[int, tuple[int, Path]] = {}
        pattern = re.compile(rf"fdo_stats_(\d+)_(\d+)\.{self.ending}")
        for path in self.folder.glob(f"fdo_stats_*.{self.ending}"):
            if match := pattern.fullmatch(path.name):
                process, at = int(match[1]), int(match[2])
                newest[process] = max(newest.get(process, (0, path)), (at, path))
        if not newest:
            raise FileNotFoundError(f"{self.folder}: there are no statistics fdo_stats_*.{self.ending}; publish some")
        self.columns = {}
        for _, path in newest.values():
            for name, rows in read(path).items():
                if not name.endswith(tuple(SUFFIXES.values())):
                    raise ValueError(f"{path}: column {name!r} does not end in one of {', '.join(SUFFIXES.values())}")
                self._put(name, np.atleast_2d(np.asarray(rows, np.int64)).max(0, keepdims=True))
        return self.result()

    def result(self) -> SparseDenseMatmulInputStats:
        """Returns the largest numbers by stack."""
        fields: dict[str, dict] = {field: {} for field in SUFFIXES}
        # "_max_unique_ids" before "_max_ids": a name that ends in one may end in the other.
        for name, rows in self.columns.items():
            field = max((f for f, suffix in SUFFIXES.items() if name.endswith(suffix)), key=lambda f: len(SUFFIXES[f]))
            fields[field][name.removesuffix(SUFFIXES[field])] = rows.max(0)
        return SparseDenseMatmulInputStats(**fields)


def _as_wide(rows: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns rows filled up with zeros to the width of others: another number of devices has another width."""
    return np.pad(rows, ((0, 0), (0, max(0, other.shape[1] - rows.shape[1]))))
