"""The ids and weights of one feature, in whatever form, brought to one: flat values and their samples.

Accepted for each feature: an integer array of the feature's input_shape (NumPy, JAX, or whatever NumPy can read);
lists, tuples or object arrays of integer sequences, where None is an empty sample; ``RaggedIds``; ``CooIds``; an Arrow
array or list column. Sequence features take one more level of nesting. Weights come in the form of their ids, or as
one flat array beside ``RaggedIds`` and ``CooIds``.
"""

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

import numpy as np

from embax.id_forms import CooIds as CooIds
from embax.id_forms import Nested, Subject, column, is_flat, read
from embax.id_forms import RaggedIds as RaggedIds
from embax.planning import FeaturePlan


class Flat(NamedTuple):
    """Values of a feature, sample after sample.

    ``values`` are integers of any width, or Python integers where 64 bits hold not all; ``weights`` are numbers, one
    for each, or None. ``lengths`` says how many values each sample has: one number for all where the input is a
    rectangle. ``truncated`` counts the values cut off sequences that were too long.
    """

    values: np.ndarray
    weights: np.ndarray | None
    samples: int
    lengths: np.ndarray | int
    truncated: int

    def sample_of(self, index: int) -> int:
        """Returns the sample of value ``index``."""
        if isinstance(self.lengths, int):
            return index // max(self.lengths, 1)
        return int(np.searchsorted(np.cumsum(self.lengths), index, side="right"))


def flatten(feature: FeaturePlan, ids: Any, weights: Any = None) -> Flat:
    """Returns ids, and weights if there are any, in the one form.

    Raises:
      ValueError, TypeError: naming the feature, what does not fit, and what would.
    """
    if isinstance(ids, CooIds):
        return _flatten_coo(feature, ids, weights)
    given = _nested(feature, ids, "ids")
    if weights is None:
        return _placed(feature, given, None)
    beside = _nested(feature, _in_form_of(ids, weights), "weights")
    _check_one_each(feature, given, beside)
    return _placed(feature, given, beside.values)


def check_shape(feature: FeaturePlan, shape: tuple[int, ...], owner: Any) -> None:
    """Raises ValueError unless a rectangle of this shape fits the feature."""
    # A ragged feature, (B,) -> (B, D), takes any rectangle; otherwise the shape is the specification's.
    free = feature.pooled and not feature.positions and feature.valency is None and len(shape) == 2
    if not free and (not shape or shape != feature.input_shape(shape[0])):
        raise ValueError(
            f"{owner} have shape {shape}; the feature's input_shape is {_shown_shape(feature)}; "
            "reshape them, or change the FeatureSpec"
        )
    check_batch(feature, shape[0], owner)


def check_batch(feature: FeaturePlan, batch: int, owner: Any) -> None:
    """Raises ValueError unless the feature takes that many samples."""
    if feature.batch_size is not None and batch != feature.batch_size:
        raise ValueError(
            f"{owner} have {batch} samples, and input_shape says {feature.batch_size}; give that many (an empty list "
            "is an empty sample), or a FeatureSpec whose batch is None"
        )


def check_num_samples(feature: FeaturePlan, coo: CooIds) -> int:
    """Returns the number of samples of ``coo``; ValueError unless the feature takes that form, and so many."""
    owner, count = f'feature "{feature.name}"', coo.num_samples
    if feature.positions or not feature.pooled:
        raise ValueError(
            f"{owner}: CooIds fit pooled features only; give a sequence feature nested lists or RaggedIds, or "
            "inside jit a dense array"
        )
    if not isinstance(count, numbers.Integral) or isinstance(count, bool) or not 0 <= count < 2**31:
        raise ValueError(f"{owner}: CooIds.num_samples is {count!r}; it must be the number of samples, static in jit")
    check_batch(feature, int(count), f"{owner}: ids")
    return int(count)


def _shown_shape(feature: FeaturePlan) -> str:
    dims = [str(d) for d in (feature.batch_size or "batch", *feature.input_shape(0)[1:])]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def _nested(feature: FeaturePlan, leaf: Any, what: str) -> Nested:
    subject = Subject(feature.name, what, len(feature.positions))
    nested = read(leaf, len(feature.positions) + feature.pooled, subject)
    if nested.shape is None:
        check_batch(feature, len(nested.levels[0]), subject)
    else:
        check_shape(feature, nested.shape, subject)
    return nested


def _in_form_of(ids: Any, weights: Any) -> Any:
    """Returns weights that are one flat array beside RaggedIds as RaggedIds of the same splits."""
    empty = isinstance(weights, (list, tuple)) and not weights
    if not isinstance(ids, RaggedIds) or not (empty or is_flat(weights)):
        return weights
    return dataclasses.replace(ids, values=_in_form_of(ids.values, weights))


def _check_one_each(feature: FeaturePlan, ids: Nested, weights: Nested) -> None:
    """Raises ValueError naming the first sample in which ids and weights differ in number."""
    if ids.shape is not None and ids.shape == weights.shape:
        return
    subject = Subject(feature.name, "weights", len(feature.positions))
    above: list[np.ndarray] = []
    for mine, theirs in zip(_levels(feature, ids), _levels(feature, weights), strict=True):
        if len(mine) != len(theirs):
            raise ValueError(
                f"{subject} have {len(theirs)} samples, and ids have {len(mine)}; give every id one weight"
            )
        if not np.array_equal(mine, theirs):
            worst = int(np.argmax(mine != theirs))
            raise ValueError(
                f"{subject.at(above, worst)} are {theirs[worst]} in number, and ids are {mine[worst]}; give every id "
                "one weight"
            )
        above.append(mine)


def _levels(feature: FeaturePlan, nested: Nested) -> list[np.ndarray]:
    if nested.shape is None:
        return nested.levels
    shape = (*nested.shape, 1)[: 1 + len(feature.positions) + feature.pooled]
    return [np.full(math.prod(shape[:d]), shape[d]) for d in range(1, len(shape))]


def _placed(feature: FeaturePlan, nested: Nested, weights: np.ndarray | None) -> Flat:
    """Returns nested values as one list of samples: sample (b, t) of T positions is number b * T + t."""
    values = nested.values
    if nested.shape is not None:
        valency = nested.shape[-1] if feature.pooled and len(nested.shape) > 1 + len(feature.positions) else 1
        return Flat(values, weights, nested.shape[0] * feature.samples_per_row, valency, 0)
    levels = list(nested.levels)
    if not feature.positions:
        return Flat(values, weights, len(levels[0]), levels[0], 0)
    sample = np.arange(len(levels[0]))
    for depth, limit in enumerate(feature.positions):
        position = _positions(feature, levels[depth], sample, depth)
        keep = (position >= 0) & (position < limit)
        sample = (np.repeat(sample, levels[depth]) * limit + position)[keep]
        for below in range(depth + 1, len(levels)):
            levels[below], keep = levels[below][keep], np.repeat(keep, levels[below])
        values, weights = values[keep], None if weights is None else weights[keep]
    samples = len(levels[0]) * feature.samples_per_row
    lengths = np.zeros(samples, np.int64)
    lengths[sample] = levels[-1] if feature.pooled else 1
    return Flat(values, weights, samples, lengths, len(nested.values) - len(values))


def _positions(feature: FeaturePlan, lengths: np.ndarray, sample: np.ndarray, depth: int) -> np.ndarray:
    """Returns the position of every entry of one level; those outside of ``[0, limit)`` are to be cut off."""
    limit = feature.positions[depth]
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    over = lengths > limit
    if over.any() and feature.truncate == "error":
        worst = int(np.argmax(over))
        where = sample[worst] // math.prod(feature.positions[:depth])
        raise ValueError(
            f'feature "{feature.name}": ids of sample {where} have {lengths[worst]} positions, and the maximum '
            f'is {limit}; raise it in input_shape and output_shape, or set truncate="keep_first" or "keep_last"'
        )
    if feature.truncate == "keep_last":
        position -= np.repeat(np.maximum(lengths - limit, 0), lengths)
    return position


def _flatten_coo(feature: FeaturePlan, coo: CooIds, weights: Any) -> Flat:
    owner, count = f'feature "{feature.name}"', check_num_samples(feature, coo)
    values = column(coo.values, Subject(feature.name, "ids"))
    samples = column(coo.samples, Subject(feature.name, "CooIds.samples"))
    if samples.shape != values.shape:
        raise ValueError(
            f"{owner}: there are {samples.size} CooIds.samples for {values.size} ids; give every id its sample"
        )
    outside = (samples < 0) | (samples >= count)
    if outside.any():
        worst = int(np.argmax(outside))
        raise ValueError(
            f"{owner}: CooIds.samples[{worst}] is {samples[worst]} (id {values[worst]}), outside of num_samples "
            f"{count}; correct it, raise num_samples, or leave the id out"
        )
    samples = samples.astype(np.int64)
    if weights is not None:
        weights = _coo_weights(feature, samples, weights)
    if (samples[1:] < samples[:-1]).any():
        order = _stable_order(samples)
        values, weights = values[order], None if weights is None else weights[order]
    return Flat(values, weights, count, np.bincount(samples, minlength=count), 0)


def _stable_order(samples: np.ndarray) -> np.ndarray:
    # NumPy sorts 16-bit integers by radix, many times faster than others; two such digits make a sample.
    order = np.argsort(samples.astype(np.uint16), kind="stable")
    high = (samples >> 16).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")] if high.any() else order


def _coo_weights(feature: FeaturePlan, samples: np.ndarray, weights: Any) -> np.ndarray:
    owner = f'feature "{feature.name}"'
    if isinstance(weights, CooIds):
        if not np.array_equal(column(weights.samples, Subject(feature.name, "CooIds.samples of weights")), samples):
            raise ValueError(
                f"{owner}: CooIds.samples of weights differ from those of ids; give the same, in the same order"
            )
        weights = weights.values
    weights = column(weights, Subject(feature.name, "weights"))
    if weights.shape != samples.shape:
        raise ValueError(f"{owner}: there are {weights.size} weights for {samples.size} ids; give every id one weight")
    return weights
