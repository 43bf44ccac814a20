"""One pass before training: vocabularies of the categories, means of the numbers, a look at the labels."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from embax.data.columns import Columns
from embax.data.files import DataError, Files
from embax.data.split import PARTS, TRAIN, Split
from embax.data.vocabulary import Counter, Vocabulary

ALL = Split()  # every row is for training


class Scale(NamedTuple):
    """Mean and standard deviation of a numeric column; a number that is missing counts as the mean."""

    mean: float
    deviation: float


class Scanned(NamedTuple):
    """What a pass has seen.

    Attributes:
      vocabularies: of the columns with categories, bags too.
      scales: of the numeric ones.
      rows: of each part: training, validation, test.
      positive: of the training rows with label 1.
    """

    vocabularies: Mapping[str, Vocabulary]
    scales: Mapping[str, Scale]
    rows: Mapping[str, int]
    positive: int

    def card(self, column: str) -> int:
        """Rows of a column's table."""
        return self.vocabularies[column].rows


def scan(files: Files, columns: Columns, split: Split = ALL, min_count: int = 1, progress: Any = None) -> Scanned:
    """Returns what one pass over all row groups sees; in memory are one of them and the distinct values.

    Vocabularies and means are of the training rows, so that a test meets the unseen as later use will. Labels of all
    rows are looked at.

    Args:
      files: the data.
      columns: what its columns are for.
      split: which rows are for training.
      min_count: how often a value must come to have a row of its own.
      progress: called with the rows of each row group, or None.

    Raises:
      DataError: a label that is missing or neither 0 nor 1, a column without any value; labels that are all alike; a
        part without rows.
    """
    counters = {name: Counter() for name in columns.categorical + columns.bags}
    moments = {name: _Moments() for name in columns.numeric}
    positive, counts = 0, np.zeros(4, np.int64)
    for group in files.groups:
        table = files.read(group, sorted({*columns.all, *split.columns}))
        parts = split.parts(table, group)
        counts += np.bincount(parts, minlength=4)
        train = parts == TRAIN
        if columns.label is not None:
            positive += int(labels_of(table[columns.label], columns.label, group)[train].sum())
        for name, moment in moments.items():
            moment.add(numbers_of(table[name], name, group)[train])
        table = chosen(table, train)
        for name, counter in counters.items():
            counter.add(table[name])
        if progress is not None:
            progress(group.rows)
    rows = {part: int(counts[number]) for part, number in PARTS.items()}
    _check(files, columns, split, rows, positive)
    empty = [name for name, counter in counters.items() if not counter.distinct]
    empty += [name for name, moment in moments.items() if not moment.count]
    if empty:
        raise DataError(
            f'{files.paths[0]}: column "{empty[0]}" has no value in any training row; --ignore {empty[0]} leaves it out'
        )
    vocabularies = {name: counter.vocabulary(min_count) for name, counter in counters.items()}
    return Scanned(vocabularies, {name: moment.scale() for name, moment in moments.items()}, rows, positive)


def chosen(table: Any, mask: np.ndarray) -> Any:
    """Returns the rows of an Arrow table where the mask is true."""
    import pyarrow as pa

    return table if mask.all() else table.filter(pa.array(mask))


def _check(files: Files, columns: Columns, split: Split, rows: Mapping[str, int], positive: int) -> None:
    """Raises DataError for parts without rows, and for labels that are all alike."""
    for part, share in (("train", 1.0), ("validation", split.validation), ("test", split.test)):
        if share and not rows[part]:
            raise DataError(
                f"{files.paths[0]}: of {files.rows} rows none is for {part}; bring more rows, or change "
                "--test-fraction and --validation-fraction"
            )
    if columns.label is not None and positive in (0, rows["train"]):
        raise DataError(
            f'{files.paths[0]}: all {rows["train"]} labels to train on in column "{columns.label}" are '
            f"{int(positive > 0)}; there is nothing to tell apart"
        )


def labels_of(column: Any, name: str, group: Any) -> np.ndarray:
    """Returns labels as float32; DataError naming the row of one that is missing or neither 0 nor 1."""
    values = _floats(column, name, group)
    wrong = ~((values == 0) | (values == 1))
    if wrong.any():
        row = int(np.argmax(wrong))
        shown = "missing" if np.isnan(values[row]) else f"{values[row]:g}"
        raise DataError(
            f'{group.path}: column "{name}", row {group.first_row + row}: the label is {shown}, and must be 0 or 1; '
            "mend it, or drop the row"
        )
    return values.astype(np.float32)


def numbers_of(column: Any, name: str, group: Any) -> np.ndarray:
    """Returns numbers as float64, NaN where one is missing; DataError naming the row of an infinite one."""
    values = _floats(column, name, group)
    if np.isinf(values).any():
        row = int(np.argmax(np.isinf(values)))
        raise DataError(
            f'{group.path}: column "{name}", row {group.first_row + row}: the number is {values[row]}; mend it, or '
            "make it missing"
        )
    return values


def _floats(column: Any, name: str, group: Any) -> np.ndarray:
    """Returns a column as float64, NaN where a value is missing; DataError for one that is not of numbers."""
    import pyarrow as pa

    try:
        return column.combine_chunks().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DataError(
            f'{group.path}: column "{name}" is {column.type}, and must be numbers ({str(error).splitlines()[0]}); '
            "write it as numbers"
        ) from None


class _Moments:
    """Mean and variance of numbers that come in parts (Chan, Golub and LeVeque 1979)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        values = values[~np.isnan(values)]
        if not values.size:
            return
        mean, count = float(values.mean()), self.count + values.size
        apart = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + apart**2 * self.count * values.size / count
        self.mean += apart * values.size / count
        self.count = count

    def scale(self) -> Scale:
        deviation = (self.squares / self.count) ** 0.5 if self.count else 0.0
        constant = deviation <= 1e-7 * abs(self.mean)  # what is left of rounding
        return Scale(self.mean, 1.0 if constant else deviation)
