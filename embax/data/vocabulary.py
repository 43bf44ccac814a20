"""Values of a column and the rows of its table: counted in one pass, kept with the model.

Row 0 is the row of what training has not seen, or seen less than ``min_count`` times, and of what is missing. The
others have their rows by how often they came, ties by their order, so that the same data make the same vocabulary::

    values   b a b c b a null     min_count 2
    row      1 2 1 0 1 2 0
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

UNSEEN = 0


class Counter:
    """Counts the values of a column, batch after batch, in memory for its distinct values alone."""

    def __init__(self):
        self._parts: list[Any] = []
        self._waiting = 0
        self.rows, self.missing, self.distinct = 0, 0, False

    def add(self, column: Any) -> None:
        """Adds an Arrow column: of values, or of lists of them."""
        import pyarrow as pa

        from embax.data._arrow import compute as pc

        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        self.rows += len(column)
        column = flat(column)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        self.missing += column.null_count
        counts = pc.value_counts(column.drop_null())
        self._parts.append(pa.table({"value": counts.field(0), "count": counts.field(1)}))
        self._waiting += len(counts)
        self.distinct |= len(counts) > 0
        if self._waiting > 1 << 20:
            self._merge()

    def _merge(self) -> Any:
        import pyarrow as pa

        whole = pa.concat_tables(self._parts).group_by("value").aggregate([("count", "sum")])
        whole = whole.rename_columns({"count_sum": "count"}).select(["value", "count"])
        # As long as few are known, merging is cheap; later it waits until as many again have come.
        self._parts, self._waiting = [whole], -len(whole)
        return whole

    def vocabulary(self, min_count: int = 1) -> "Vocabulary":
        """Returns the values that came at least ``min_count`` times."""
        from embax.data._arrow import compute as pc

        whole = self._merge()
        whole = whole.filter(pc.greater_equal(whole["count"], min_count))
        whole = whole.sort_by([("count", "descending"), ("value", "ascending")]).combine_chunks()
        return Vocabulary(whole["value"], whole["count"])


class Vocabulary:
    """The values of a column, value i in row i + 1.

    Args:
      values: an Arrow array, each value once.
      counts: how often each came.
    """

    def __init__(self, values: Any, counts: Any):
        import pyarrow as pa

        self.values, self.counts = (
            a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in (values, counts)
        )

    @property
    def rows(self) -> int:
        """Rows of the table: one for each value, and one for all that have none."""
        return len(self.values) + 1

    def encode(self, column: Any) -> np.ndarray:
        """Returns the row of each value, int32; row 0 for what is not known or missing."""
        import pyarrow as pa

        from embax.data._arrow import compute as pc

        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        values = self.values
        if pa.types.is_integer(column.type) and pa.types.is_integer(values.type):
            column, values = column.cast(pa.int64(), safe=False), values.cast(pa.int64(), safe=False)
        elif column.type != values.type:
            column = column.cast(values.type)
        if len(values) > len(column):
            return _looked_for(column, values)
        found = pc.index_in(column, values)
        return pc.add(pc.fill_null(found, -1), 1).to_numpy(zero_copy_only=False).astype(np.int32, copy=False)

    def value(self, row: int) -> Any:
        """Returns the value of a row; None for row 0."""
        return None if row == UNSEEN else self.values[row - 1].as_py()

    def row(self, value: Any) -> int:
        """Returns the row of a value; KeyError if it has none."""
        import pyarrow as pa

        found = int(self.encode(pa.array([value]).cast(self.values.type))[0])
        if found == UNSEEN:
            raise KeyError(value)
        return found

    def save(self, path: Any) -> None:
        """Writes the values and counts as Parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"value": self.values, "count": self.counts}), path)

    @classmethod
    def load(cls, path: Any) -> "Vocabulary":
        """Reads what ``save`` wrote."""
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        return cls(table["value"], table["count"])


def _looked_for(column: Any, values: Any) -> np.ndarray:
    """Returns the row of each value where values are fewer than rows: the table made for the search is of the few."""
    from embax.data._arrow import compute as pc

    encoded = column.dictionary_encode()
    found = pc.index_in(values, encoded.dictionary)
    rows = np.zeros(len(encoded.dictionary) + 1, np.int32)  # the last one is for what is missing
    rows[found.drop_null().to_numpy()] = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False)) + 1
    return rows[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()]


def flat(column: Any) -> Any:
    """Returns the values of a column of lists one after another; of a plain one the column."""
    import pyarrow as pa

    return column.flatten() if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else column


def save_all(folder: Any, vocabularies: Mapping[str, Vocabulary]) -> None:
    """Writes a vocabulary for each column, ``<number>.parquet``, and ``columns.json`` with their names."""
    import json

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, vocabulary in enumerate(vocabularies.values()):
        vocabulary.save(folder / f"{number}.parquet")
    (folder / "columns.json").write_text(json.dumps(list(vocabularies), ensure_ascii=False), "utf-8")


def load_all(folder: Any) -> dict[str, Vocabulary]:
    """Reads what ``save_all`` wrote."""
    import json

    folder = Path(folder)
    names = json.loads((folder / "columns.json").read_text("utf-8"))
    return {name: Vocabulary.load(folder / f"{number}.parquet") for number, name in enumerate(names)}
