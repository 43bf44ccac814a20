"""Rows as arrays: categories as rows of their tables, bags as ragged ids, numbers scaled, labels.

Three rows of a table with columns city, words, price and label::

    city     lyon  paris  null         ids["city"]      2 1 0
    words    [a b] []     [c]          ids["words"]     RaggedIds(1 2 0, splits 0 2 2 3)   c was never seen
    price    2.0   4.0    null         numbers          -1 1 0
    label    1     0      1            labels           1 0 1
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from embax.data.columns import Columns
from embax.data.files import DataError
from embax.data.scan import Scanned, labels_of, numbers_of
from embax.data.vocabulary import Vocabulary, flat
from embax.id_forms import RaggedIds


class _Fields(NamedTuple):
    ids: dict[str, Any]
    numbers: np.ndarray
    labels: np.ndarray


class Rows(_Fields):
    """Some rows of the data.

    Attributes:
      ids: of each category, int32 ``[rows]``, or RaggedIds of a bag.
      numbers: float32 ``[rows, numeric columns]``, of mean 0 and deviation 1 over all data; 0 where missing.
      labels: float32 ``[rows]``; 1 everywhere where there are none.
    """

    __slots__ = ()

    def _replace(self, **changed: Any) -> "Rows":  # a named tuple's own wants to be as long as it has fields
        return Rows(**self._asdict() | changed)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, first: int, last: int) -> "Rows":
        """Returns the rows from ``first`` to ``last``."""
        return Rows(
            {name: _part(ids, first, last) for name, ids in self.ids.items()},
            self.numbers[first:last],
            self.labels[first:last],
        )

    def taken(self, order: np.ndarray) -> "Rows":
        """Returns the rows of these numbers, in this order."""
        return Rows(
            {name: _taken(ids, order) for name, ids in self.ids.items()}, self.numbers[order], self.labels[order]
        )


def joined(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    ids = {name: _joined([part.ids[name] for part in parts]) for name in parts[0].ids}
    return Rows(ids, np.concatenate([part.numbers for part in parts]), np.concatenate([part.labels for part in parts]))


def padded(rows: Rows, size: int) -> Rows:
    """Returns as many rows as asked for: those given, and the first of them again; so that one program serves all."""
    return rows if len(rows) >= size else rows.taken(np.arange(size) % len(rows))


def encoded(table: Any, columns: Columns, scanned: Scanned, group: Any) -> Rows:
    """Returns the rows of an Arrow table.

    Args:
      table: with the columns.
      columns: what they are for.
      scanned: their vocabularies and scales.
      group: where the table is from, for errors.

    Raises:
      DataError: a label that is none, a number that is infinite, a column of a type that training did not have.
    """
    ids: dict[str, Any] = {
        name: codes_of(scanned.vocabularies[name], table[name], name, group) for name in columns.categorical
    }
    for name in columns.bags:
        column = table[name].combine_chunks()
        lengths = np.nan_to_num(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
        ids[name] = RaggedIds.from_lengths(codes_of(scanned.vocabularies[name], flat(column), name, group), lengths)
    numbers = np.zeros((len(table), len(columns.numeric)), np.float32)
    for number, name in enumerate(columns.numeric):
        mean, deviation = scanned.scales[name]
        numbers[:, number] = np.nan_to_num((numbers_of(table[name], name, group) - mean) / deviation)
    if columns.label is None or columns.label not in table.column_names:
        return Rows(ids, numbers, np.ones(len(table), np.float32))
    return Rows(ids, numbers, labels_of(table[columns.label], columns.label, group))


def codes_of(vocabulary: Vocabulary, column: Any, name: str, group: Any) -> np.ndarray:
    """Returns the rows of values; DataError for values that cannot be of the type that training had."""
    import pyarrow as pa

    try:
        return vocabulary.encode(column)
    except pa.ArrowException as error:
        raise DataError(
            f'{group.path}: column "{name}" is {column.type}, and training had {vocabulary.values.type} '
            f"({str(error).splitlines()[0]}); write it with that type"
        ) from None


def _part(ids: Any, first: int, last: int) -> Any:
    if not isinstance(ids, RaggedIds):
        return ids[first:last]
    splits = ids.splits[first : last + 1]
    return RaggedIds(ids.values[splits[0] : splits[-1]], splits - splits[0])


def _taken(ids: Any, order: np.ndarray) -> Any:
    if not isinstance(ids, RaggedIds):
        return ids[order]
    lengths = np.diff(ids.splits)[order]
    ends = np.cumsum(lengths)
    # The place of every value: its bag's begin, and its number in the bag.
    places = np.repeat(ids.splits[:-1][order] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
    return RaggedIds(ids.values[places], np.concatenate([[0], ends]))


def _joined(parts: Sequence[Any]) -> Any:
    if not isinstance(parts[0], RaggedIds):
        return np.concatenate(parts)
    lengths = np.concatenate([np.diff(part.splits) for part in parts])
    return RaggedIds.from_lengths(np.concatenate([part.values for part in parts]), lengths)
