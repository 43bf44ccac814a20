"""The forms in which ids and weights may be given, read into numbers and the lengths of every level of nesting.

Nothing here knows features or shapes: ``id_inputs`` does. Whatever cannot be read raises ValueError or TypeError in
words that begin with whose values they are.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

FORMS = {
    "ids": "an integer array, a list of sequences, embax.RaggedIds, embax.CooIds (a whole feature) or an Arrow array",
    "weights": "numbers in the form of the ids, or one flat array beside RaggedIds and CooIds",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedIds:
    """Ids of samples of any length: ``values[splits[s]:splits[s + 1]]`` belong to sample s.

    Args:
      values: integers ``[total]``, or another RaggedIds for one more level of nesting.
      splits: integers ``[samples + 1]``, rising from 0 to ``total``.

    >>> RaggedIds.from_lengths([5, 3, 6, 6], lengths=[2, 0, 2]).splits.tolist()
    [0, 2, 2, 4]
    """

    values: Any
    splits: Any

    @classmethod
    def from_lengths(cls, values: Any, lengths: Any) -> "RaggedIds":
        """Returns the ids whose sample s has ``lengths[s]`` of them."""
        if isinstance(lengths, Tracer):
            if lengths.ndim != 1 or not jax.numpy.issubdtype(lengths.dtype, np.integer):
                raise ValueError(
                    f"RaggedIds: lengths are {lengths.dtype}{lengths.shape}; they must be integers [samples]"
                )
            ends = jax.numpy.cumsum(lengths, dtype=np.int32)
            return cls(values, jax.numpy.concatenate([jax.numpy.zeros(1, np.int32), ends]))
        lengths = column(lengths, Subject("", "lengths"))
        if lengths.size and lengths.min() < 0:
            raise ValueError(f"RaggedIds: lengths[{lengths.argmin()}] is {lengths.min()}; a length is 0 or more")
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CooIds:
    """Ids in coordinate form: ``values[i]`` belongs to sample ``samples[i]``; any order.

    Args:
      samples: integers ``[total]`` in ``[0, num_samples)``.
      values: integers ``[total]``.
      num_samples: samples in the batch (static).
    """

    samples: Any
    values: Any
    num_samples: int = dataclasses.field(metadata={"static": True})


class Subject(NamedTuple):
    """Whose values are read: the words that open an error."""

    feature: str
    what: str
    positions: int = 0

    def __str__(self):
        return f'feature "{self.feature}": {self.what}' if self.feature else f"RaggedIds: {self.what}"

    def at(self, levels: Sequence[np.ndarray], index: int) -> str:
        """Returns the words for entry ``index`` below ``levels`` (lengths, outermost first)."""
        path = []
        for lengths in reversed(levels):
            ends = np.cumsum(lengths)
            slot = int(np.searchsorted(ends, index, side="right"))
            if slot == len(lengths):
                return str(self)
            path.append(index - int(ends[slot] - lengths[slot]))
            index = slot
        positions = path[::-1][: self.positions]
        at = f", position {', '.join(map(str, positions))}" if positions else ""
        return f'feature "{self.feature}", sample {index}{at}: {self.what}'


class Nested(NamedTuple):
    """Values as they were given: a rectangle of a ``shape``, or the lengths of every level, outermost first."""

    values: np.ndarray
    shape: tuple[int, ...] | None
    levels: list[np.ndarray]


Place = Callable[[int], str]
Words = Callable[[], str]


def read(leaf: Any, depth: int, subject: Subject) -> Nested:
    """Returns the values of ``leaf``, which is a rectangle or a sequence of ``depth`` levels of sequences.

    >>> read([[5, 3], [], (6,)], 1, Subject("history", "ids")).levels[0].tolist()
    [2, 0, 1]
    """
    words = functools.partial(str, subject)
    leaf = _plain(leaf, subject.what, words)
    if isinstance(leaf, np.ndarray):
        return Nested(_numbers(leaf.reshape(-1), subject.what, words), leaf.shape, [])
    levels: list[np.ndarray] = []
    place = functools.partial(subject.at, levels)
    if is_flat(leaf):
        return Nested(_values(leaf, subject.what, place, words), (len(leaf),), [])
    for level in range(depth):
        if isinstance(leaf, RaggedIds):
            lengths, leaf = _split_lengths(leaf.splits, subject), leaf.values
        else:
            lengths, leaf = _peel(leaf, subject.what, place, words)
        if level:
            _check_end(levels[-1], len(lengths), f"{subject}", "lists within; the last split must be their number")
        levels.append(lengths)
        leaf = _plain(leaf, subject.what, words)
    values = _values(leaf, subject.what, place, words)
    fix = "give every id one weight" if subject.what == "weights" else "the last split must be the number of values"
    _check_end(levels[-1], len(values), f"{subject}", f"values; {fix}")
    return Nested(values, None, levels)


def column(leaf: Any, subject: Subject) -> np.ndarray:
    """Returns the numbers of ``leaf``, which has one dimension."""
    words = functools.partial(str, subject)
    return _values(_plain(leaf, subject.what, words), subject.what, lambda _: words(), words)


def is_flat(leaf: Any) -> bool:
    """Returns whether the entries of ``leaf``, an array or sequence of any form, are numbers."""
    if isinstance(leaf, (list, tuple)):
        first = next((entry for entry in leaf if entry is not None), None)
        return first is not None and not _is_sequence(first)
    if _is_arrow(leaf):
        return not _is_arrow_list(leaf)
    kind = getattr(getattr(leaf, "dtype", None), "kind", "")
    return not isinstance(leaf, (RaggedIds, CooIds)) and np.ndim(leaf) == 1 and kind != "O"


def _check_end(lengths: np.ndarray, count: int, owner: str, rule: str) -> None:
    if lengths.sum() != count:
        raise ValueError(f"{owner}: splits end at {lengths.sum()}, and there are {count} {rule}")


# ---- forms -------------------------------------------------------------------------------------------------


def _plain(leaf: Any, what: str, words: Words) -> Any:
    """Returns ``leaf`` as a list or tuple, RaggedIds, an Arrow array or a NumPy array without objects; else raises."""
    if isinstance(leaf, (list, tuple, RaggedIds)) or (type(leaf) is np.ndarray and leaf.dtype.kind != "O"):
        return leaf
    if isinstance(leaf, Tracer):
        raise TypeError(f"{words()} are traced values; inside jit use embax.preprocess_traced")
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise ValueError(f"{words()} are a masked array; fill it, masked ids with the feature's padding_id")
    if _is_arrow(leaf):
        return _contiguous(leaf)
    if not hasattr(leaf, "__array__"):
        shown = "missing (None)" if leaf is None else f"of type {type(leaf).__name__}"
        raise TypeError(f"{words()} are {shown}; give {FORMS.get(what, 'a flat array of integers')}")
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{words()} are of type {type(leaf).__name__}, which NumPy cannot read: {error}") from None
    return array.tolist() if array.dtype == object and array.ndim else array


def _is_sequence(entry: Any) -> bool:
    return isinstance(entry, (list, tuple, range, RaggedIds, CooIds)) or _is_arrow(entry) or np.ndim(entry) > 0


def _peel(leaf: Any, what: str, place: Place, words: Words) -> tuple[np.ndarray, Any]:
    """Takes off the outermost level of nesting: returns its lengths, and its entries one after another."""
    if isinstance(leaf, (list, tuple)):
        return _peel_rows(leaf, what, place)
    if isinstance(leaf, np.ndarray) and leaf.ndim > 1:
        return np.full(leaf.shape[0], leaf.shape[1]), leaf.reshape(-1, *leaf.shape[2:])
    if _is_arrow(leaf) and _is_arrow_list(leaf):
        return _peel_arrow(leaf)
    if not len(leaf):
        return np.zeros(0, np.int64), leaf
    shown = f"{leaf.dtype}{leaf.shape}" if isinstance(leaf, np.ndarray) else f"a column of type {leaf.type}"
    raise ValueError(f"{words()} hold {shown} where the feature's shapes ask for one more level of nesting; add one")


def _peel_rows(rows: Sequence[Any], what: str, place: Place) -> tuple[np.ndarray, Any]:
    kinds = set(map(type, rows))
    if kinds == {np.ndarray} and (joined := _joined(rows)) is not None:
        return np.fromiter(map(len, rows), np.int64, len(rows)), joined
    if not kinds <= {list, tuple}:
        rows = [row if _is_vector(row) else _row(row, index, what, place) for index, row in enumerate(rows)]
        arrays = [row for row in rows if isinstance(row, np.ndarray) and row.size]
        # Vectors of one kind of numbers are joined as they are; any mixture is judged number by number.
        if len({(a.dtype.kind, a.ndim) for a in arrays}) == 1 and sum(map(len, rows)) == sum(map(len, arrays)):
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            return lengths, np.concatenate(arrays) if arrays[0].ndim == 1 else list(itertools.chain(*arrays))
        rows = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return lengths, list(itertools.chain.from_iterable(rows))


def _joined(rows: Sequence[np.ndarray]) -> np.ndarray | None:
    """Returns vectors of one dtype one after another; None if they are something else."""
    if rows[0].ndim != 1 or rows[0].dtype.kind == "O":
        return None
    try:
        # NumPy asks each for its dimensions and dtype in less time than a loop here would.
        return np.concatenate(tuple(rows), dtype=rows[0].dtype, casting="equiv")
    except (TypeError, ValueError):
        return None


def _is_vector(row: Any) -> bool:
    return type(row) is np.ndarray and row.ndim == 1 and row.dtype.kind != "O"


def _row(row: Any, index: int, what: str, place: Place) -> Any:
    """Returns one row as a list, a tuple or a NumPy array of at least one dimension; None is an empty row."""
    if row is None:
        return ()
    if isinstance(row, range):
        return list(row)
    if not _is_sequence(row):
        raise ValueError(
            f"{place(index)} are {_shown(row)}, and a sequence of numbers is expected there (None if empty)"
        )
    row = _plain(row, what, lambda: place(index))
    if isinstance(row, RaggedIds):
        raise TypeError(f"{place(index)} are RaggedIds in a list; make one RaggedIds of the whole list")
    return row.to_pylist() if _is_arrow(row) else row


def _split_lengths(splits: Any, subject: Subject) -> np.ndarray:
    subject = subject._replace(what="splits")
    splits = column(splits, subject)
    if not splits.size:
        raise ValueError(f"{subject} are empty; they must be integers [samples + 1] that begin with 0")
    if splits[0] != 0 or (splits[1:] < splits[:-1]).any():
        at = int(np.argmax(splits[1:] < splits[:-1])) if splits[0] == 0 else 0
        raise ValueError(
            f"{subject} must begin with 0 and never fall; splits[{at}:] begin {splits[at : at + 4].tolist()}. Use "
            "RaggedIds.from_lengths if these are lengths"
        )
    return np.diff(splits.astype(np.int64))


# ---- numbers -----------------------------------------------------------------------------------------------


def _values(leaf: Any, what: str, place: Place, words: Words) -> np.ndarray:
    """Returns the numbers of ``leaf``, which ``_plain`` gave, as an array of one dimension."""
    if isinstance(leaf, (list, tuple)):
        return _listed(leaf, what, place)
    if _is_arrow(leaf) and not (_is_arrow_list(leaf) and len(leaf) > leaf.null_count):
        return _arrow_values(leaf, what, place, words)
    if isinstance(leaf, np.ndarray) and leaf.ndim == 1:
        return _numbers(leaf, what, words)
    if isinstance(leaf, np.ndarray) and leaf.ndim == 0:
        raise ValueError(f"{words()} are the single number {leaf}; give one dimension")
    raise _too_deep(words(), leaf)


def _listed(values: Sequence[Any], what: str, place: Place) -> np.ndarray:
    odd = _odd_types(values, what)
    if odd and not any(issubclass(kind, Tracer) for kind in odd):
        # Arrays of no dimension and scalars of other libraries count as the Python number they hold.
        values = [v.item() if type(v) in odd and hasattr(v, "item") and np.ndim(v) == 0 else v for v in values]
        odd = _odd_types(values, what)
    if odd:
        index, value = next((i, v) for i, v in enumerate(values) if type(v) in odd)
        if isinstance(value, Tracer):
            raise TypeError(f"{place(index)} hold a traced value; inside jit use embax.preprocess_traced")
        if _is_sequence(value):
            raise _too_deep(place(index), value)
        raise TypeError(f"{place(index)} hold {_shown(value)}, a {type(value).__name__}; {_rule(what, type(value))}")
    if not values:
        return np.zeros(0, np.int64)
    try:
        array = np.asarray(values, float if what == "weights" else None)
    except OverflowError:
        raise ValueError(f"{place(0)} hold integers beyond 64-bit floats; scale them down") from None
    # Integers that no 64 bits hold are kept whole, so that an error can name them.
    return array if what == "weights" or array.dtype.kind in "iu" else np.asarray(values, object)


def _odd_types(values: Sequence[Any], what: str) -> set[type]:
    good = (int, np.integer, float, np.floating) if what == "weights" else (int, np.integer)
    return {kind for kind in set(map(type, values)) if kind is bool or not issubclass(kind, good)}


def _numbers(array: np.ndarray, what: str, words: Words) -> np.ndarray:
    """Returns ``array`` after a check of its dtype; an array without values has none worth checking."""
    if not array.size:
        return np.zeros(array.shape, np.int64)
    if array.dtype.kind in ("iuf" if what == "weights" else "iu"):
        return array
    if jax.numpy.issubdtype(array.dtype, np.integer):
        return array.astype(np.int64)  # int4 and its like
    if what == "weights" and jax.numpy.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32)  # bfloat16 and its like
    raise TypeError(f"{words()} are {array.dtype}; {_rule(what, array.dtype)}")


def _rule(what: str, kind: Any) -> str:
    """Returns what values must be, and what to do about ``kind``, a type or dtype that is something else."""
    if kind is type(None):
        return "drop it (None stands for a whole sample that is empty)"
    if what == "weights":
        return "they must be floating point or integers"
    rule = "they must be integers, and nothing is rounded or cast silently"
    numeric = kind in (bool, float) or getattr(kind, "kind", "") in tuple("bf")
    return (
        f"{rule}; use .astype(numpy.int32) if they are whole numbers"
        if numeric
        else f"{rule}; map them to integers first"
    )


def _shown(value: Any) -> str:
    text = f"a column of type {value.type}" if _is_arrow(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _too_deep(owner: str, entry: Any) -> ValueError:
    shown = _shown(entry.tolist() if isinstance(entry, np.ndarray) else entry)
    return ValueError(f"{owner} hold {shown}, nested more deeply than the feature's shapes say; take out a level")


# ---- Arrow -------------------------------------------------------------------------------------------------


def _is_arrow(leaf: Any) -> bool:
    # Told by name, so that embax needs no Arrow; whoever has a column has it imported.
    return type(leaf).__module__.partition(".")[0] == "pyarrow" and hasattr(leaf, "null_count")


def _contiguous(column: Any) -> Any:
    return column.combine_chunks() if hasattr(column, "num_chunks") else column


def _is_arrow_list(leaf: Any) -> bool:
    kind = str(leaf.type).partition("<")[0]
    return "list" in kind or kind == "null"


def _peel_arrow(array: Any) -> tuple[np.ndarray, Any]:
    if str(array.type) == "null":
        return np.zeros(len(array), np.int64), []
    # A null list is an empty sample; flatten leaves its values out.
    lengths = array.value_lengths().fill_null(0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64), array.flatten()


def _arrow_values(array: Any, what: str, place: Place, words: Words) -> np.ndarray:
    if array.null_count:
        index = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(
            f"{place(index)} hold a null ({array.null_count} in all); drop the nulls, or fill them (fill_null)"
        )
    numbers = str(array.type).lstrip("u").startswith(("int", "float", "halffloat", "double", "bool", "null"))
    if not numbers:
        rule = _rule(what, array.type)
        raise TypeError(f"{words()} are of Arrow type {array.type}; {rule} (decode or cast the column)")
    return _numbers(array.to_numpy(zero_copy_only=False), what, words)
