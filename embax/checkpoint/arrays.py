"""Arrays on disk: zarr 3 by TensorStore, rows in pieces, each piece one file with a checksum.

A piece is ``rows x width`` numbers in row order, little-endian, and 4 bytes crc32c behind them; the last one is filled
up.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore

from embax.checkpoint.errors import CheckpointError

PIECE_BYTES = 8 << 20


def piece_rows(rows: int, width: int, dtype: Any) -> int:
    """Returns how many rows a piece has: about 8 MiB of them, fewer if there are fewer.

    >>> piece_rows(1_000_000, 64, "float32"), piece_rows(1000, 64, "float32")
    (32768, 1024)
    """
    most = max(1, PIECE_BYTES // (width * jnp.dtype(dtype).itemsize))
    return min(1 << (most.bit_length() - 1), 1 << (rows - 1).bit_length())


def create(folder: Path, shape: tuple[int, int], dtype: Any) -> Any:
    """Returns a new array on disk; several processes may create the same one."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    grid = {"chunk_shape": [piece_rows(*shape, dtype), shape[1]]}
    metadata = {
        "shape": list(shape),
        "data_type": jnp.dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "codecs": codecs,
    }
    # Zeros are written too: a file that is missing is then always a loss.
    spec = {**_spec(folder), "metadata": metadata, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec, create=True, open=True).result()


def open_array(folder: Path, shape: tuple[int | None, int], dtype: Any, kept: int = 0) -> Any:
    """Returns the array on disk, to be read.

    Args:
      folder: of it.
      shape: that it must have; None for any number of rows.
      dtype: that it must have.
      kept: bytes of pieces that are kept, for rows that are asked for again and again.

    Raises:
      CheckpointError: it is not there, damaged, or not of that shape and dtype.
    """
    try:
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": kept}})
        array = tensorstore.open(
            _spec(folder), open=True, read=True, context=context, recheck_cached_data="open"
        ).result()
    except ValueError as error:
        raise damaged(folder / "zarr.json", error) from error
    rows = array.shape[0] if shape[0] is None else shape[0]
    if array.shape != (rows, shape[1]) or array.dtype.name != jnp.dtype(dtype).name:
        raise CheckpointError(
            f"{folder / 'zarr.json'}: the array is {array.dtype.name}{list(array.shape)}, and the document of the "
            f"checkpoint says {jnp.dtype(dtype).name}{[rows, shape[1]]}: not of one checkpoint; load another step"
        )
    return array


def arrived(future: Any, folder: Path) -> np.ndarray:
    """Returns what was read of the array in ``folder``; CheckpointError if it is damaged."""
    try:
        return future.result()
    except ValueError as error:
        raise damaged(folder, error) from error


def damaged(path: Any, error: Any) -> CheckpointError:
    """Returns the error for a file that cannot be read."""
    reason = str(error).split("[tensorstore_spec")[0].strip()
    return CheckpointError(f"{path}: damaged or missing ({reason}); load another step, or restore the file")


def _spec(folder: Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
