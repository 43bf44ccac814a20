"""Which rows are for training, for validation and for the test: by chance, or by time.

By chance a row's part hangs on the seed and the row's number alone, so it is the same in every pass, whatever else is
read. By time the last rows are the test, those before them validation; rows of one time are never parted.
"""

from typing import Any, NamedTuple

import numpy as np

from embax.data.files import DataError, Files, Group

TRAIN, VALIDATION, TEST, LEFT_OUT = range(4)
PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
MOST_TIMES = 1 << 22  # of which the quantiles of a time column are told


class Split(NamedTuple):
    """The part of every row.

    Attributes:
      seed: of chance.
      validation: share of the rows, where chance decides.
      test: likewise.
      column: of time; None where chance decides.
      first_validation: the first time that is for validation, None for none.
      first_test: the first time that is for the test, None for none.
      kept: rows that are taken, evenly spaced among all, or None for all of them.
      rows: of all files; needed with ``kept``.
    """

    seed: int = 0
    validation: float = 0.0
    test: float = 0.0
    column: str | None = None
    first_validation: Any = None
    first_test: Any = None
    kept: int | None = None
    rows: int = 0

    @property
    def columns(self) -> list[str]:
        """What must be read to tell the parts."""
        return [] if self.column is None else [self.column]

    def parts(self, table: Any, group: Group) -> np.ndarray:
        """Returns TRAIN, VALIDATION, TEST or LEFT_OUT for every row of a row group, uint8.

        Raises:
          DataError: a time that is missing.
        """
        numbers = np.arange(group.start, group.start + len(table), dtype=np.uint64)
        found = np.full(len(table), TRAIN, np.uint8)
        if self.column is None:
            chance = uniform(self.seed, numbers)
            found[chance < self.test + self.validation] = VALIDATION
            found[chance < self.test] = TEST
        else:
            times = _times(table[self.column], self.column, group)
            for first, part in ((self.first_validation, VALIDATION), (self.first_test, TEST)):
                if first is not None:
                    found[_from(times, first)] = part
        if self.kept is not None and self.kept < self.rows:
            rank = numbers * np.uint64(self.kept)
            found[(rank + np.uint64(self.kept)) // np.uint64(self.rows) == rank // np.uint64(self.rows)] = LEFT_OUT
        return found


def uniform(seed: int, numbers: np.ndarray) -> np.ndarray:
    """Returns a number from 0 to 1 for each uint64, which hangs on it and the seed alone (SplitMix64, Steele 2014)."""
    with np.errstate(over="ignore"):
        mixed = numbers + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def by_time(
    files: Files, column: str, validation: float, test: float, test_from: str | None = None, kept: int | None = None
) -> Split:
    """Returns a split by the times in a column, which is read once for it.

    Args:
      files: the data.
      column: numbers, dates, time stamps, or texts whose order is that of time.
      validation: share of the rows that come before the test.
      test: share of the rows that come last.
      test_from: the first time of the test instead of its share, as text.
      kept: see ``Split``.

    Raises:
      DataError: no such column, one of a type without order, a time that is missing, all rows of one time.
    """
    if column not in files.schema.names:
        raise DataError(
            f'{files.paths[0]}: there is no column "{column}" (--time); there are {", ".join(files.schema.names)}'
        )
    kind = files.schema.field(column).type
    if not _has_order(kind):
        raise DataError(
            f'{files.paths[0]}: column "{column}" (--time) is {kind}, and must be numbers, dates, time stamps or '
            "texts; name another"
        )
    times = _sampled(files, column)
    ends = f"{_plain(times[0])} to {_plain(times[-1])}"
    first_test = _quantile(times, 1 - test) if test else None
    if test_from is not None:
        first_test = _as(test_from, times.type, column)
        share = float(np.mean(_from(times, first_test)))
        if share in (0.0, 1.0):
            raise DataError(
                f'{files.paths[0]}: {"no" if share == 0 else "every"} row has "{column}" of {test_from} (--test-from) '
                f"or later; they go from {ends}: choose one between"
            )
        test = share
    first_validation = _quantile(times, 1 - test - validation) if validation else None
    first = first_validation if first_validation is not None else first_test
    if first is not None and _from(times[:1], first)[0]:
        raise DataError(
            f'{files.paths[0]}: by column "{column}" (--time) no row is left to train on, for times go from {ends}; '
            "choose smaller shares, or another column"
        )
    return Split(0, validation, test, column, first_validation, first_test, kept, files.rows)


def _sampled(files: Files, column: str) -> Any:
    """Returns times in their order, of all rows or of evenly spaced ones."""
    import pyarrow as pa

    from embax.data._arrow import compute as pc

    every = -(-files.rows // MOST_TIMES)
    parts = []
    for group in files.groups:
        table = files.read(group, [column])
        parts.append(_times(table[column], column, group)[-group.start % every :: every])
    whole = pa.concat_arrays(parts)
    return whole.take(pc.sort_indices(whole))


def _times(column: Any, name: str, group: Group) -> Any:
    import pyarrow.types as types

    times = column.combine_chunks()
    if types.is_dictionary(times.type):
        times = times.cast(times.type.value_type)
    missing = times.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    if missing.any():
        row = int(np.argmax(missing))
        raise DataError(
            f'{group.path}: column "{name}", row {group.first_row + row}: the time is missing; fill it in, or drop the '
            "row"
        )
    return times


def _quantile(times: Any, share: float) -> Any:
    return _plain(times[min(int(share * len(times)), len(times) - 1)])


def _plain(time: Any) -> Any:
    """Returns a time as JSON has it: numbers as they are, others as the text that ``_from`` takes."""
    import pyarrow as pa
    import pyarrow.types as types

    number = types.is_integer(time.type) or types.is_floating(time.type)
    return time.as_py() if number else time.cast(pa.string()).as_py()


def _has_order(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _has_order(kind.value_type)
    number = types.is_integer(kind) or types.is_float32(kind) or types.is_float64(kind) or types.is_decimal(kind)
    text = types.is_string(kind) or types.is_large_string(kind)
    return number or text or types.is_date(kind) or types.is_timestamp(kind)


def _from(times: Any, first: Any) -> np.ndarray:
    import pyarrow as pa

    from embax.data._arrow import compute as pc

    first = pa.scalar(first).cast(times.type) if isinstance(first, str) else pa.scalar(first, times.type)
    return pc.greater_equal(times, first).to_numpy(zero_copy_only=False)


def _as(text: str, kind: Any, column: str) -> Any:
    import pyarrow as pa

    try:
        return _plain(pa.scalar(text).cast(kind))
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f'--test-from {text!r} is no value of column "{column}", which is {kind} ({str(error).splitlines()[0]}); '
            "give one"
        ) from None
