"""Tables in files: Parquet as it is, CSV made Parquet once, so that any row group can be read by itself.

Whatever is wrong with a file is said in one line: the file, the column and row where they are known, and what to do.
"""

import glob
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CSV_BLOCK = 8 << 20  # bytes of a CSV that are read at once, and types are told from
GROUP_ROWS = 1 << 17  # rows of a row group of a CSV that was made Parquet


class DataError(ValueError):
    """Something is wrong with the data; the text names file, column, row and remedy."""


class Group(NamedTuple):
    """A row group: what is read at once.

    Attributes:
      path: of the file, as errors name it.
      number: among the row groups of the file.
      rows: in it.
      first_row: the number of its first row in the file, from 0.
      start: the number of its first row among those of all files.
      size: bytes of it, before compression.
      made: the Parquet file that was made of a CSV; empty where the file itself is read.
    """

    path: str
    number: int
    rows: int
    first_row: int
    start: int
    size: int = 0
    made: str = ""


class Files:
    """Parquet files of one schema.

    Args:
      where: a path, a folder, or a pattern with ``*``; of Parquet files, or of CSV files, which end in ``.csv``,
        ``.csv.gz`` or ``.tsv``.
      folder: where Parquet files are made of CSV files; not needed for Parquet.
      types: Arrow types of columns of a CSV, by name; of others they are told by the first rows.

    Raises:
      DataError: no such file, a damaged or an empty one, files whose columns differ, a column that is there twice.
    """

    def __init__(self, where: Any, folder: Any = None, types: Mapping[str, Any] | None = None):
        paths = find(where)
        self.paths = [str(path) for path in paths]
        self.groups: list[Group] = []
        self.schema: Any = None
        for path in paths:
            self._add(str(path), str(_parquet_of(path, folder, types or {})) if is_csv(path) else "")
        if not sum(group.rows for group in self.groups):
            raise DataError(f"{where}: there are columns, and no rows; bring a file with rows")

    def _add(self, path: str, made: str) -> None:
        file = opened(made or path)
        schema = file.schema_arrow
        if not schema.names:
            raise DataError(f"{path}: there are no columns; bring a file with some")
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if twice:
            raise DataError(f'{path}: column "{twice[0]}" is there twice; rename or drop one of them')
        if self.schema is None:
            self.schema = schema.remove_metadata()
        elif not self.schema.equals(schema.remove_metadata()):
            raise DataError(f"{path}: {_difference(self.schema, schema, self.paths[0])}")
        start, first = self.rows, 0
        for number in range(file.metadata.num_row_groups):
            known = file.metadata.row_group(number)
            if known.num_rows:
                size = known.total_byte_size
                self.groups.append(Group(path, number, known.num_rows, first, start + first, size, made))
            first += known.num_rows

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(group.rows for group in self.groups)

    def read(self, group: Group, columns: Sequence[str] | None = None) -> Any:
        """Returns columns of a row group as a ``pyarrow.Table``.

        Raises:
          DataError: the file is damaged, or a string is not UTF-8.
        """
        return read(group, columns)


def find(where: Any) -> list[Path]:
    """Returns the files of a path, folder or pattern, in the order of their names."""
    text = os.path.expanduser(os.fspath(where))
    if any(mark in text for mark in "*?["):
        found = sorted(path for path in map(Path, glob.glob(text, recursive=True)) if path.is_file())
    elif Path(text).is_dir():
        found = sorted(path for path in Path(text).iterdir() if path.suffix == ".parquet" or is_csv(path))
    else:
        found = [Path(text)] if Path(text).exists() else []
    if not found:
        raise DataError(f"{where}: there is no such file; give a Parquet or CSV file, a folder of them, or a pattern")
    kinds = {is_csv(path) for path in found}
    if len(kinds) > 1:
        raise DataError(f"{where}: some files are CSV and some are not; give a pattern of one kind, like *.parquet")
    return found


def is_csv(path: Path) -> bool:
    """Returns whether a file is read as CSV."""
    return path.name.endswith((".csv", ".csv.gz", ".tsv"))


def opened(path: str) -> Any:
    """Returns a ``pyarrow.parquet.ParquetFile``; DataError for one that is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not os.path.getsize(path):
            raise DataError(f"{path}: the file is empty (0 bytes); bring a Parquet or CSV file")
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: it cannot be read as Parquet ({_short(error)}); it may be cut off: write it again"
        ) from None


def read(group: Group, columns: Sequence[str] | None = None) -> Any:
    """Returns columns of a row group as a ``pyarrow.Table``; DataError for a damaged file."""
    import pyarrow as pa

    try:
        table = opened(group.made or group.path).read_row_group(
            group.number, columns=None if columns is None else list(columns)
        )
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        where = f"{group.path}: rows {group.first_row} to {group.first_row + group.rows - 1}"
        what = (
            "a string is not UTF-8; encode it" if "utf8" in str(error).lower() else "it may be damaged: write it again"
        )
        raise DataError(f"{where} cannot be read ({_short(error)}); {what}") from None
    return table


def _parquet_of(path: Path, folder: Any, types: Mapping[str, Any]) -> Path:
    """Returns a Parquet file with the rows of a CSV, made anew if it is older. An empty text is missing."""
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    if folder is None:
        raise DataError(f"{path}: a CSV is made Parquet first; say where (folder=)")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty (0 bytes); bring one with a line of names and rows below it")
    # Files of one name in different folders may have one size and time, too.
    kinds = ",".join(f"{name} {kind}" for name, kind in sorted(types.items()))
    place = zlib.crc32(os.fsencode(path.resolve().parent) + kinds.encode())
    made = Path(folder) / f"{path.name}-{path.stat().st_size}-{path.stat().st_mtime_ns}-{place:08x}.parquet"
    if made.exists():
        return made
    Path(folder).mkdir(parents=True, exist_ok=True)
    unfinished = made.with_name(f".{made.name}.{os.getpid()}")
    options = csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
    first = 2  # the line of the first row
    try:
        read, convert = csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False), csv.ConvertOptions(column_types=types)
        with csv.open_csv(path, read, options, convert) as reader:
            names = reader.schema.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise DataError(f'{path}: column "{twice[0]}" is there twice; rename or drop one of them')
            with pq.ParquetWriter(unfinished, reader.schema) as writer:
                for batch in reader:
                    _check_text(path, batch, first)
                    writer.write_table(_empty_as_missing(batch), row_group_size=GROUP_ROWS)
                    first += batch.num_rows
        os.replace(unfinished, made)
    except UnicodeDecodeError as error:  # of a name: texts are Arrow's, see _check_text
        raise DataError(f"{path}: the line of names is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: {_csv_fault(str(error), first)}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return made


def _empty_as_missing(batch: Any) -> Any:
    """Returns a table of the batch, with null where a text is empty."""
    import pyarrow as pa

    from embax.data._arrow import compute as pc

    table = pa.Table.from_batches([batch])
    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            column = table[field.name]
            filled = pc.if_else(pc.equal(column, ""), pa.scalar(None, field.type), column)
            table = table.set_column(number, field, filled)
    return table


def _check_text(path: Path, batch: Any, first: int) -> None:
    """Raises DataError for a text that is not UTF-8: Arrow takes its column for one of bytes."""
    import pyarrow.types as types

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for row, value in enumerate(column.to_pylist() if types.is_binary(column.type) else ()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f'{path}: column "{name}", line {first + row}: the text is not UTF-8 ({error.reason} at its byte '
                    f"{error.start}); save the file as UTF-8"
                ) from None


def _csv_fault(text: str, line: int) -> str:
    short = text.splitlines()[0]
    if "UTF8" in text or "utf8" in text.lower():
        return f"after line {line} a string is not UTF-8 ({short}); save the file as UTF-8"
    if "ompressed" in text or "inflate" in text:
        return f"after line {line} it cannot be unpacked ({short}); it may be cut off: write it again"
    if "conversion error" in text:
        return (
            f"after line {line} a value is of another type than those before it ({short}); mend it, or write the file "
            "as Parquet with the type that you mean"
        )
    return f"after line {line} it cannot be read as CSV ({short}); mend that line"


def _difference(first: Any, other: Any, path: str) -> str:
    for name in first.names:
        if name not in other.names:
            return f'column "{name}" is missing, which {path} has; bring files of the same columns'
        if first.field(name).type != other.field(name).type:
            return (
                f'column "{name}" is {other.field(name).type}, and {first.field(name).type} in {path}; bring files of '
                "the same types"
            )
    extra = sorted(set(other.names) - set(first.names))
    if extra:
        return f'column "{extra[0]}" is not in {path}; bring files of the same columns'
    return f"its columns are in another order than those of {path}; bring files of the same order"


def _short(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def sample(path: Any, blocks: int = 64, size: int = 1 << 14) -> int:
    """Returns a checksum (crc32) of evenly spaced blocks of a file and of its end, where Parquet has its statistics."""
    length, found = os.path.getsize(path), 0
    with open(path, "rb") as file:
        for place in sorted({*range(0, length, max(size, length // blocks)), max(0, length - 4 * size)}):
            file.seek(place)
            found = zlib.crc32(file.read(size if place < length - 4 * size else 4 * size), found)
    return found
