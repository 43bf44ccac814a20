"""One table of a checkpoint as a file that others read: safetensors, Parquet or npy, piece by piece."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from embax.checkpoint.deltas import source_of
from embax.checkpoint.document import read_document
from embax.checkpoint.errors import CheckpointError
from embax.checkpoint.handlers import DOCUMENT, TABLES
from embax.checkpoint.tables import Source

SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32", "uint32": "U32"}


def export_table(step: Any, table: str, path: Any, values: Any = None) -> None:
    """Writes one table of a checkpoint to ``path``, whose suffix says how; the memory of a piece is needed.

    ``.safetensors`` has the table and each slot variable by its name, in the dtype that was saved. ``.parquet`` has the
    rows: ``id`` (int64) and ``embedding`` (a list of float32), in the order of ids; it needs pyarrow. ``.npy`` has the
    rows, float32, as ``numpy.load`` reads them.

    Args:
      step: the folder of a step, such as ``checkpoints.directory / "100"``.
      table: its name.
      path: of the file; one that is there is replaced when the new one is whole.
      values: an Arrow array of what each row stands for, which Parquet gets as a column ``value``; None for none.

    Raises:
      CheckpointError: no such table, or a damaged checkpoint.
      ValueError: another suffix, or values that are not as many as rows.

    >>> import tempfile, jax, embax, embax.checkpoint
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.Adagrad(0.5))
    >>> plan = embax.plan(embax.FeatureSpec(name="x", table_spec=table, input_shape=(None,), output_shape=(None, 2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with embax.checkpoint.Checkpoints(folder) as checkpoints:
    ...         tables = checkpoints.save(7, plan, embax.init(plan, jax.random.key(0)))
    ...     embax.checkpoint.export_table(f"{folder}/7", "item", f"{folder}/item.safetensors")
    """
    folder, path = Path(step), Path(path)
    body = read_document(folder / DOCUMENT, folder)
    if table not in body["tables"]:
        raise CheckpointError(f'{folder}: there is no table "{table}"; there are {", ".join(sorted(body["tables"]))}')
    writers = {".safetensors": _write_safetensors, ".parquet": _write_parquet, ".npy": _write_npy}
    if path.suffix not in writers:
        raise ValueError(f"export_table: {path.name!r} must end in one of {', '.join(writers)}")
    parts = {part: source_of(folder / TABLES, body, table, part) for part in body["tables"][table]["parts"]}
    rows = parts["table"].shape[0]
    if values is not None and len(values) != rows:
        raise ValueError(f'export_table: {len(values)} values are given, and table "{table}" has {rows} rows')
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        writers[path.suffix](unfinished, parts, values)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_npy(path: Path, parts: dict[str, Source], values: Any) -> None:
    source = parts["table"]
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(source.shape)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, rows in source.pieces():
            file.write(np.ascontiguousarray(rows, "<f4").tobytes())


def _write_safetensors(path: Path, parts: dict[str, Source], values: Any) -> None:
    """Writes 8 bytes with the length of a JSON header, the header, and the arrays one after another, little-endian.

    By hand, for the library's own writer wants whole arrays in memory. https://github.com/huggingface/safetensors
    """
    header, at = {}, 0
    for name, source in parts.items():
        shape, dtype = source.shape, source.known["dtype"]
        end = at + shape[0] * shape[1] * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in parts.values():
            for _, rows in source.pieces():
                file.write(np.ascontiguousarray(rows).tobytes())


def _write_parquet(path: Path, parts: dict[str, Source], values: Any) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("export_table: .parquet needs pyarrow; pip install pyarrow, or write .safetensors") from error
    source = parts["table"]
    width = source.shape[1]
    kind = pyarrow.list_(pyarrow.float32(), width)
    named = [] if values is None else [("value", values.type)]
    schema = pyarrow.schema([("id", pyarrow.int64()), *named, ("embedding", kind)])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for first, rows in source.pieces():
            ids = pyarrow.array(np.arange(first, first + len(rows)))
            numbers = pyarrow.array(rows.astype(np.float32).reshape(-1))
            own = [] if values is None else [values.slice(first, len(rows))]
            columns = [ids, *own, pyarrow.FixedSizeListArray.from_arrays(numbers, width)]
            writer.write_table(pyarrow.table(columns, schema=schema))
