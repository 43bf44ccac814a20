"""Host work on ids: one pass of C++ over an array where the native library is at hand, the same in NumPy where not.

``fill`` makes the ids of a feature rows of its stack, for ``preprocess``; ``distinct_rows`` finds the distinct rows of
a batch. Nothing here has words for what is wrong with an input: it is refused, and whoever knows its form says why.

>>> [array.tolist() for array in distinct_rows(np.array([5, 3, -1, 5], np.int32), 7)]
[[3, 5, 7, 7], [1, 0, 2, 1]]
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from embax.kernels import native

TYPES = {np.dtype(name): i for i, name in enumerate("int8 int16 int32 int64 uint8 uint16 uint32 uint64".split())}
"""The dtypes of ids, in the order of csrc/host_ids.cc; no byte order but the machine's."""

SPLITS_TYPES = frozenset({np.dtype(np.int32), np.dtype(np.int64)})
"""The dtypes of splits."""

_COMBINERS = {"sum": 0, "mean": 1, "sqrtn": 2}
_RULE, _JOB, _LAID = struct.Struct("=7q"), struct.Struct("=12q"), struct.Struct("=14q")
_CONTIGUOUS_ALIGNED = 0x101  # of flags.num, which is several times faster to ask than the flags by name


class Rule:
    """What a plan says about the ids of one feature; ``combiner`` is "sum" where every gain is 1.

    Raises:
      struct.error: a padding id that no 64-bit signed integer holds.
    """

    __slots__ = ("absent", "combiner", "drop", "packed", "padding", "row_offset", "vocabulary")

    def __init__(
        self, vocabulary: int, row_offset: int, absent: int, padding: int | None, drop: bool, combiner: str = "sum"
    ):
        self.vocabulary, self.row_offset, self.absent = vocabulary, row_offset, absent
        self.padding, self.drop, self.combiner = padding, drop, combiner
        padded = padding is not None
        self.packed = _RULE.pack(
            vocabulary, row_offset, absent, padding if padded else 0, padded, drop, _COMBINERS[combiner]
        )


class Source(NamedTuple):
    """The ids of a feature in one batch: a rectangle of a ``valency``, or ``splits``.

    Arrays are contiguous and aligned, of ``TYPES`` and ``SPLITS_TYPES``: see ``readable``.
    """

    ids: np.ndarray
    samples: int
    valency: int | None
    splits: np.ndarray | None


# JAX reads an array of the host where it lies if it begins on a line of memory; others it copies at every call.
_LINE, _WORTH_IT = 64, 16 << 10


def empty(count: int, dtype: Any) -> np.ndarray:
    """Returns an array ``[1, count]`` of numbers of 4 bytes, of any content, that JAX need not copy."""
    size = 4 * count
    if size < _WORTH_IT:
        return np.empty((1, count), dtype)
    room = np.empty(size + _LINE, np.uint8)
    start = -room.__array_interface__["data"][0] % _LINE
    return room[start : start + size].view(dtype).reshape(1, count)


class Arrays:
    """The arrays of one stack, filled feature after feature: ``at`` ids and ``sample`` samples are there by now.

    ``counts`` are int32 ``[3 or more, 1, features]``: the ids present, padding and outside, by feature of the plan.
    """

    __slots__ = ("addresses", "at", "counts", "gains", "ids", "offsets", "room", "sample")

    def __init__(self, capacity: int, samples: int, gains: bool, counts: np.ndarray):
        self.counts = counts
        self.ids = empty(capacity, np.int32)
        self.offsets = empty(samples + 1, np.int32)
        self.gains = empty(capacity, np.float32) if gains else None
        self.offsets[0, 0] = 0
        self.room, self.at, self.sample = capacity, 0, 0
        # Where they are: found once for all features, by whom it may concern.
        self.addresses: tuple[int, int, int, int] | None = None

    def cut(self, capacity: int, absent: int) -> None:
        """Cuts the arrays of ids down to ``capacity``, which those that are there fit; the places left are absent."""
        self.ids = self.ids[:, :capacity]
        self.ids[0, self.at :] = absent
        if self.gains is not None:
            self.gains = self.gains[:, :capacity]
            self.gains[0, self.at :] = 0.0


def readable(array: Any, types: Any = TYPES) -> bool:
    """Returns whether ``array`` is an array that ``fill`` reads, but for its layout."""
    return type(array) is np.ndarray and array.dtype in types


def packed(array: np.ndarray) -> np.ndarray:
    """Returns ``array``, or a copy of it if it is not contiguous and aligned."""
    return array if array.flags.num & _CONTIGUOUS_ALIGNED == _CONTIGUOUS_ALIGNED else array.copy()


def fill(rule: Rule, source: Source, out: Arrays, feature: int) -> bool:
    """Writes the rows, offsets and gains of one feature; returns False if its ids are refused.

    Rows that are absent keep their place in a rectangle, and are left out of ragged ids. What was written of ids that
    are refused means nothing.

    Args:
      rule: what the plan says.
      source: the ids; refused if ``out`` has no room for all of them, present or not.
      out: the arrays of the stack, and the counts.
      feature: its number among the counts.
    """
    ids, samples, _, _ = source
    if samples < 0 or out.at + ids.size > out.room or out.sample + samples >= out.offsets.size:
        return False
    call = _functions()
    if call is None:
        filled = _fill_numpy(rule, source, out, feature)
    else:
        filled = call.fill(TYPES[ids.dtype], rule.packed, _job(source, out, feature))
    if filled < 0:
        return False
    out.at += filled
    out.sample += samples
    return True


def distinct_rows(rows: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct rows, rising, filled up with ``bound`` to the length of ``rows``; and where each row is.

    Args:
      rows: int32 ``[n]``; those outside of ``[0, bound)`` are absent, and are where the first ``bound`` is.
      bound: rows of the table, less than 2**31.

    Returns:
      int32 ``[n]`` twice: ``unique[inverse] == where(0 <= rows < bound, rows, bound)``.
    """
    rows = packed(np.asarray(rows, np.int32).reshape(-1))
    call = _functions()
    if call is not None:
        unique, inverse = np.empty(rows.size, np.int32), np.empty(rows.size, np.int32)
        if call.unique(_address(rows), rows.size, bound, _address(unique), _address(inverse)) >= 0:
            return unique, inverse
    found, inverse = np.unique(np.where((rows >= 0) & (rows < bound), rows, bound), return_inverse=True)
    unique = np.full(rows.size, bound, np.int32)
    unique[: found.size] = found
    return unique, inverse.astype(np.int32).reshape(-1)


def partitions(rows: np.ndarray, offsets: np.ndarray, part_rows: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many rows a batch needs of each part of a table, a sample's each once; and how many distinct ones.

    Args:
      rows: int32 ``[n]``; those outside of ``[0, part_rows * parts)`` are absent.
      offsets: int32 ``[samples + 1]``: where the rows of each sample begin, and the end.
      part_rows: rows of a part.
      parts: how many there are.

    Returns:
      int32 ``[parts]`` twice.

    >>> [counts.tolist() for counts in partitions(np.array([5, 5, 1, 5, 0]), np.array([0, 3, 5]), 4, 2)]
    [[2, 2], [2, 1]]
    """
    rows, offsets = (packed(np.asarray(array, np.int32)) for array in (rows, offsets))
    call, found = _functions(), (np.empty(parts, np.int32), np.empty(parts, np.int32))
    if call is not None:
        given = _address(rows), rows.size, _address(offsets), offsets.size - 1, part_rows, parts
        if call.partitions(*given, *map(_address, found)) >= 0:
            return found
    sample = np.repeat(np.arange(offsets.size - 1, dtype=np.int64), np.diff(offsets))
    own = rows[offsets[0] : offsets[-1]]
    inside = (own >= 0) & (own < part_rows * parts)
    once = np.unique(sample[inside] * (part_rows * parts) + own[inside]) % (part_rows * parts)
    counts = (np.bincount(each // part_rows, minlength=parts) for each in (once, np.unique(once)))
    first, second = (count.astype(np.int32) for count in counts)
    return first, second


class Laid(NamedTuple):
    """Where the rows of a part of a batch go, in an array that shards share; see ``lay``.

    ``rows`` int32 ``[count]``; ``ends`` int32 ``[samples]``: the offsets at which samples end, the first of which
    begins at ``first``; ``ids_of`` and ``distinct_of`` int32 ``[shards]``: as ``partitions`` returns them.
    """

    rows: np.ndarray
    ends: np.ndarray
    first: int
    ids_of: np.ndarray
    distinct_of: np.ndarray


def lay(ids: np.ndarray, offsets: np.ndarray, features: np.ndarray, shard_rows: int, absent: int, out: Laid) -> bool:
    """Writes the rows that hold ids in an array that shards share; returns False where only C++ could, and cannot.

    Id i is in shard ``(i mod shards + rotation) mod shards``, at place ``i div shards + row_offset``.

    Args:
      ids: int32 ``[count]``.
      offsets: int32 ``[samples + 1]``, from 0 to ``count``: where the ids of each sample begin, and the end.
      features: int64 ``[features, 3]``: samples, rotation and row_offset of each.
      shard_rows: rows of a shard.
      absent: ids of at least this are absent, and become one past the end of the array.
      out: contiguous arrays; ``rows`` may be ``ids``, and ``ends`` ``offsets[1:]`` with ``first`` 0.
    """
    call = _functions()
    if call is None:
        return False
    ids, offsets, features = packed(ids), packed(offsets), packed(features)
    work = _LAID.pack(
        _address(ids),
        ids.size,
        _address(offsets),
        offsets.size - 1,
        _address(features),
        len(features),
        shard_rows,
        out.ids_of.size,
        absent,
        _address(out.rows),
        _address(out.ends),
        out.first,
        _address(out.ids_of),
        _address(out.distinct_of),
    )
    done = call.lay(work)
    if done == -2:  # rows are written, maybe over the ids: there is no second way from here
        raise MemoryError(f"preprocessing: there is no memory to count {ids.size} rows")
    return done >= 0


# ---- native ------------------------------------------------------------------------------------------------


class _Functions(NamedTuple):
    fill: Callable[..., int]
    unique: Callable[..., int]
    partitions: Callable[..., int]
    lay: Callable[..., int]


@functools.cache
def _functions() -> _Functions | None:
    """Returns the native functions, or None where there is no library, or one without them."""
    library = native.library()
    if library is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        fill, unique = library.embax_host_fill, library.embax_host_unique
        partitions, lay = library.embax_host_partitions, library.embax_host_lay
    except AttributeError:
        return None
    fill.argtypes, fill.restype = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p], ctypes.c_int64
    address = ctypes.c_void_p
    unique.argtypes = [address, ctypes.c_int64, ctypes.c_int32, address, address]
    unique.restype = ctypes.c_int64
    size = ctypes.c_int64
    partitions.argtypes = [address, size, address, size, size, size, address, address]
    partitions.restype = size
    lay.argtypes, lay.restype = [ctypes.c_char_p], size
    return _Functions(fill, unique, partitions, lay)


def _address(array: Any) -> int:
    # array.ctypes.data and __array_interface__ take five times as long, which a batch of 64 ids would feel.
    try:
        return _address_of(_first_byte(array))
    except (TypeError, ValueError):  # arrays that may not be written, or have no first byte
        return array.__array_interface__["data"][0]


_address_of, _first_byte = ctypes.addressof, ctypes.c_char.from_buffer


def _job(source: Source, out: Arrays, feature: int) -> bytes:
    """Returns the struct Job of csrc/host_ids.h."""
    if out.addresses is None:
        gains = 0 if out.gains is None else _address(out.gains)
        out.addresses = _address(out.ids), _address(out.offsets), gains, _address(out.counts)
    rows, offsets, gains, counts = out.addresses
    ids, samples, valency, splits = source
    return _JOB.pack(
        _address(ids),
        ids.size,
        samples,
        valency or 0,
        0 if splits is None else _address(splits),
        0 if splits is None else splits.itemsize,
        rows + 4 * out.at,
        offsets + 4 * (out.sample + 1),
        out.at,
        gains and gains + 4 * out.at,
        counts + 4 * feature,
        out.counts.shape[2],
    )


# ---- NumPy -------------------------------------------------------------------------------------------------


def _fill_numpy(rule: Rule, source: Source, out: Arrays, feature: int) -> int:
    ids, samples, splits = source.ids.reshape(-1), source.samples, source.splits
    padding = np.zeros(ids.shape, bool) if rule.padding is None else ids == rule.padding
    present = (ids >= 0) & (ids < rule.vocabulary) & ~padding
    n_present, n_padding = int(present.sum()), int(padding.sum())
    out.counts[:3, 0, feature] = n_present, n_padding, ids.size - n_present - n_padding
    if not rule.drop and n_present + n_padding < ids.size:
        return -1
    rows = out.ids[0, out.at : out.at + ids.size]
    if splits is None:
        valency = source.valency or 0
        if samples * valency != ids.size:
            return -1
        lengths, of_sample = np.full(samples, valency), present.reshape(samples, valency).sum(axis=1)
        rows[:] = rule.absent
        rows[present] = ids[present].astype(np.int32) + np.int32(rule.row_offset)
    else:
        if splits[0] != 0 or splits[-1] != ids.size or (splits[1:] < splits[:-1]).any():
            return -1
        before = np.concatenate([[0], np.cumsum(present)])
        of_sample = lengths = np.diff(before[splits])
        rows = rows[:n_present]
        rows[:] = ids[present].astype(np.int32) + np.int32(rule.row_offset)
    out.offsets[0, out.sample + 1 : out.sample + samples + 1] = out.at + np.cumsum(lengths)
    if out.gains is not None:
        single = source.valency == 1  # the only id of a sample has gain 1, absent or not
        gains = np.ones(samples) if single or rule.combiner == "sum" else _gains(rule.combiner, of_sample)
        out.gains[0, out.at : out.at + rows.size] = np.repeat(gains.astype(np.float32), lengths)
    return rows.size


def _gains(combiner: str, present: np.ndarray) -> np.ndarray:
    divisor = np.where(present == 0, np.inf, present)
    return 1 / (np.sqrt(divisor) if combiner == "sqrtn" else divisor)
