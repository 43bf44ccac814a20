"""ids -> IdBatch on the host: everything about the input is checked here, and here it can be said.

Nothing is changed before everything is checked. Inside jit, where nothing can be raised, use ``preprocess_traced``.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from embax.batch_shards import split
from embax.combiners import gains_from_weights
from embax.id_batch import IdBatch, StackIds, Statistics, bucket
from embax.id_inputs import Flat, RaggedIds, flatten
from embax.kernels import host
from embax.planning import FeaturePlan, Plan, StackPlan


class Column(NamedTuple):
    """The ids of one feature, ready for its stack.

    ``values`` are ids of the feature's table, except where ``absent`` (None: none is). ``lengths`` are the ids of each
    sample, one number for all in a rectangle; ``counts`` the feature's ``Statistics``.
    """

    values: np.ndarray
    absent: np.ndarray | None
    samples: int
    lengths: np.ndarray | int
    gains: np.ndarray | None
    counts: tuple[int, int, int, int, int]


def preprocess(plan: Plan, ids: Any, weights: Any = None) -> IdBatch:
    """Returns the batch that ``lookup`` and ``update`` read, as NumPy arrays.

    Args:
      plan: what ``embax.plan`` gave.
      ids: one entry per feature, in the structure of the features: an integer array of the feature's
        input_shape, lists of integer sequences, ``RaggedIds``, ``CooIds`` or an Arrow column. Any integer
        width; 64-bit ids are seen whole here, and only here, unless jax_enable_x64 is set. A pooled feature
        ``(B, n)`` takes ragged samples of any length; only rectangles must be n wide.
      weights: numbers in the form of the ids, finite in float32, or None for all or for single features. The
        weight of an id that is absent is not looked at.

    Raises:
      ValueError: a structure or shape that does not fit, an id outside of the vocabulary, a weight that is
        not finite; the text names feature, sample and fix.
      TypeError: ids that are not integers, weights that are not numbers.

    >>> import jax, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="mean",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.SGD(0.5))
    >>> history = embax.FeatureSpec(name="history", table_spec=table, input_shape=(None,), output_shape=(None, 2))
    >>> batch = embax.preprocess(embax.plan(history), [[5, 3], [], [0]])
    >>> batch.stacks["item"].offsets.tolist()
    [[0, 2, 2, 3]]
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"preprocess: a {type(plan).__name__} is not a Plan; call preprocess(plan, ids, weights)")
    leaves = plan.flatten(ids, "ids")
    batch = _at_once(plan, leaves) if weights is None else None
    if batch is not None:
        return split(plan, batch)
    weight_leaves = [None] * len(leaves) if weights is None else plan.flatten(weights, "weights")
    columns = [
        _column(feature, flatten(feature, leaf, weight))
        for feature, leaf, weight in zip(plan.features, leaves, weight_leaves, strict=True)
    ]
    stacks = {stack.name: _stack_ids(plan, stack, [columns[i] for i in stack.features]) for stack in plan.stacks}
    counts = np.array([c.counts for c in columns], np.int32)
    return split(plan, IdBatch(stacks, Statistics(*counts.T[:, None, :])))


# ---- at once: NumPy arrays without weights, and nothing wrong with them --------------------------------------


class Guide(NamedTuple):
    """What the plan says about the arrays of one feature: computed once for a plan, read for every batch."""

    feature: FeaturePlan
    index: int
    rule: host.Rule
    tail: tuple[int, ...]  # of the shape of a rectangle
    valency: int
    any_width: bool
    ragged: bool
    samples_per_row: int
    gained: bool


def _at_once(plan: Plan, leaves: list[Any]) -> IdBatch | None:
    """Returns the batch; None if a feature has another form, or ids that must be refused in words."""
    guides = plan.__dict__.get("_guides")
    if guides is None:
        guides = tuple((stack, tuple(_guide(plan, stack, i) for i in stack.features)) for stack in plan.stacks)
        object.__setattr__(plan, "_guides", guides)
    work = []
    for stack, own in guides:
        jobs = []
        for guide in own:
            source = None if guide is None else _source(guide, leaves[guide.index])
            if source is None:
                return None
            jobs.append((guide, source))
        work.append((stack, jobs))
    counts, stacks = np.zeros((5, 1, len(leaves)), np.int32), {}
    for stack, jobs in work:
        ids = _filled(stack, jobs, counts)
        if ids is None:
            return None
        stacks[stack.name] = ids
    return IdBatch(stacks, Statistics(*counts))


def _guide(plan: Plan, stack: StackPlan, index: int) -> Guide | None:
    """Returns the guide of a feature; None if 64 bits do not hold its padding id."""
    feature = plan.features[index]
    table, padding = feature.table, feature.padding_id
    if padding is not None and not -(2**63) <= padding < 2**63:
        return None
    combiner = table.combiner if feature.pooled else "sum"
    tail = feature.input_shape(0)[1:]
    return Guide(
        feature=feature,
        index=index,
        rule=host.Rule(
            table.vocabulary_size, table.row_offset, stack.rows, padding, feature.out_of_range == "drop", combiner
        ),
        tail=tail,
        valency=tail[-1] if feature.pooled and len(tail) > len(feature.positions) else 1,
        any_width=feature.pooled and not feature.positions and feature.valency is None,
        ragged=feature.pooled and not feature.positions,
        samples_per_row=feature.samples_per_row,
        gained=combiner != "sum",
    )


def _source(guide: Guide, leaf: Any) -> host.Source | None:
    """Returns the ids of a feature if they are a NumPy rectangle, or RaggedIds of NumPy arrays, that fits."""
    if guide.ragged and type(leaf) is RaggedIds:
        ids, splits = leaf.values, leaf.splits
        if not (host.readable(ids) and host.readable(splits, host.SPLITS_TYPES) and ids.ndim == splits.ndim == 1):
            return None
        batch = samples = splits.size - 1
        ids, splits, valency = host.packed(ids), host.packed(splits), None
    elif host.readable(leaf) and leaf.ndim:
        shape, ids, splits = leaf.shape, host.packed(leaf), None
        batch = shape[0]
        if shape[1:] == guide.tail:
            samples, valency = batch * guide.samples_per_row, guide.valency
        elif guide.any_width and len(shape) == 2:
            samples, valency = shape
        else:
            return None
    else:
        return None
    if guide.feature.batch_size is not None and batch != guide.feature.batch_size:
        return None
    return host.Source(ids, samples, valency, splits)


def _filled(stack: StackPlan, jobs: list[tuple[Guide, host.Source]], counts: np.ndarray) -> StackIds | None:
    """Returns the CSR of a stack, its features one after another; None if ids must be refused."""
    brought, samples, valencies, gains = [], [], [], False
    for guide, (ids, own_samples, valency, _) in jobs:
        brought.append((guide.feature, ids.size, valency is not None))
        samples.append(own_samples)
        valencies.append(valency)
        gains |= guide.gained and valency != 1
    # Room for all ids, present or not; once it is known which are, the arrays are cut down to their capacity.
    room = _capacity(brought)
    if room >= 2**31 or sum(samples) >= 2**31:
        return None
    out = host.Arrays(room, sum(samples), gains, counts)
    for guide, source in jobs:
        if not host.fill(guide.rule, source, out, guide.index):
            return None
    if out.at < room:
        present = [
            (feature, size if rectangle else int(counts[0, 0, guide.index]), rectangle)
            for (guide, _), (feature, size, rectangle) in zip(jobs, brought, strict=True)
        ]
        if any(_over(*entry) for entry in present):
            return None
        out.cut(_capacity(present), stack.rows)
    return StackIds(out.ids, out.offsets, out.gains, tuple(samples), tuple(valencies))


# ---- any form, feature by feature ---------------------------------------------------------------------------


def _column(feature: FeaturePlan, flat: Flat) -> Column:
    absent, (present, padding, outside) = _absent(feature, flat)
    counts = (present, padding, outside, flat.truncated, 0)
    values, weights, lengths = flat.values, flat.weights, flat.lengths
    if weights is not None:
        weights = _checked_weights(feature, flat, absent)
    if absent is not None and values.dtype == object:  # what fits no 64 bits is absent
        values = np.where(absent, 0, values).astype(np.int64)
    if absent is not None and not isinstance(lengths, int):
        values, weights = values[~absent], None if weights is None else weights[~absent]
        lengths, absent = _counts(lengths, ~absent), None
    gains = _gains(feature, flat, lengths, weights, absent)
    if feature.pooled or isinstance(lengths, int):
        return Column(values, absent, flat.samples, lengths, gains, counts)
    return _one_per_position(values, lengths, gains, counts)


def _counts(lengths: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns how many values of each sample are in ``mask``."""
    totals = np.concatenate([[0], np.cumsum(mask)])
    ends = np.cumsum(lengths)
    return totals[ends] - totals[ends - lengths]


def _absent(feature: FeaturePlan, flat: Flat) -> tuple[np.ndarray | None, tuple[int, int, int]]:
    """Returns which values are absent (None: none) and the counts of present, padding and out of range."""
    values, table, size = flat.values, feature.table, flat.values.size
    if not size:
        return None, (0, 0, 0)
    inside = 0 <= values.min() and values.max() < table.vocabulary_size
    if inside and feature.padding_id is None:
        return None, (size, 0, 0)
    padding = np.zeros(values.shape, bool) if feature.padding_id is None else values == feature.padding_id
    outside = ((values < 0) | (values >= table.vocabulary_size)) & ~padding
    n_padding, n_outside = int(padding.sum()), int(outside.sum())
    if n_outside and feature.out_of_range == "error":
        raise ValueError(_out_of_range_text(feature, flat, int(np.argmax(outside))))
    absent = padding | outside if n_padding + n_outside else None
    return absent, (size - n_padding - n_outside, n_padding, n_outside)


def _where(feature: FeaturePlan, flat: Flat, index: int) -> str:
    """Returns the words that say where value ``index`` stands."""
    sample, position = divmod(flat.sample_of(index), feature.samples_per_row)
    at = f", position {position}" if feature.positions else ""
    return f'feature "{feature.name}", sample {sample}{at}'


def _out_of_range_text(feature: FeaturePlan, flat: Flat, index: int) -> str:
    table, value = feature.table, int(flat.values[index])
    if value < 0:
        rule = f"id {value} is negative"
        fix = f'set padding_id={value} if it means "no id", or out_of_range="drop"'
    else:
        rule = f"id {value} >= vocabulary_size {table.vocabulary_size}"
        fix = 'raise vocabulary_size or set out_of_range="drop"'
    return f'table "{table.name}": {rule} ({_where(feature, flat, index)}); {fix}'


def _checked_weights(feature: FeaturePlan, flat: Flat, absent: np.ndarray | None) -> np.ndarray:
    """Returns the weights, 0 for ids that are absent; ValueError unless float32 holds them all."""
    weights = flat.weights
    assert weights is not None
    if absent is not None:
        weights = np.where(absent, weights.dtype.type(0), weights)
    limit = np.finfo(np.float32).max
    if weights.size and not (weights.min() >= -limit and weights.max() <= limit):
        index = int(np.argmax(~(np.abs(weights) <= limit)))
        raise ValueError(
            f"{_where(feature, flat, index)}: weight {weights[index]} of id {flat.values[index]} is not a finite "
            "float32; mend it, or leave the id out"
        )
    return weights


def _gains(
    feature: FeaturePlan,
    flat: Flat,
    lengths: np.ndarray | int,
    weights: np.ndarray | None,
    absent: np.ndarray | None,
) -> np.ndarray | None:
    """Returns the gain of every value, or None where all are 1.

    Which of the two is decided by the plan and the form of the input, never by the data: it is static under jit.
    """
    combiner = feature.table.combiner
    if weights is None:
        if combiner == "sum" or not feature.pooled or (isinstance(lengths, int) and lengths == 1):
            return None
        present = np.full(flat.samples, lengths)
        if absent is not None and isinstance(lengths, int):
            present -= absent.reshape(flat.samples, lengths).sum(axis=1)
        # All ids of a sample have one gain: that of an id of weight 1 in a sample whose weights add up to their number.
        gains = gains_from_weights(combiner, np.ones(flat.samples), lambda _: present, lambda x: x, np)
        return np.repeat(gains.astype(np.float32), lengths)

    def sums(w):
        return w.reshape(flat.samples, lengths).sum(axis=1) if isinstance(lengths, int) else _ragged_sums(w, lengths)

    def spread(x):
        return np.repeat(x, lengths)

    gains = gains_from_weights(combiner, weights.astype(np.float64), sums, spread, np)
    with np.errstate(over="ignore"):
        gains = gains.astype(np.float32)
    if not np.isfinite(gains).all():
        slot = spread(np.arange(flat.samples))[np.argmax(~np.isfinite(gains))]
        raise ValueError(
            f'table "{feature.table.name}": combiner "{combiner}" divides by weights that add up to almost zero, and '
            f'float32 cannot hold the result (feature "{feature.name}", sample {slot // feature.samples_per_row}); '
            'mend the weights, or use combiner "sum"'
        )
    return gains


def _ragged_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    sums, full = np.zeros(len(lengths)), lengths > 0
    if values.size:
        sums[full] = np.add.reduceat(values, (np.cumsum(lengths) - lengths)[full])
    return sums


def _one_per_position(values: np.ndarray, lengths: np.ndarray, gains: np.ndarray | None, counts: tuple) -> Column:
    """Returns an unpooled sequence as a rectangle of width 1: empty positions are absent."""
    taken = lengths > 0
    ids = np.zeros(len(lengths), values.dtype)
    ids[taken] = values
    if gains is not None:
        spread = np.zeros(len(lengths), np.float32)
        spread[taken] = gains
        gains = spread
    return Column(ids, ~taken, len(lengths), 1, gains, counts)


def _stack_ids(plan: Plan, stack: StackPlan, columns: list[Column]) -> StackIds:
    """Returns the CSR of a stack, its features one after another."""
    total, samples = sum(len(c.values) for c in columns), sum(c.samples for c in columns)
    brought = [
        (plan.features[i], len(c.values), isinstance(c.lengths, int))
        for i, c in zip(stack.features, columns, strict=True)
    ]
    for feature, count, rectangle in brought:
        if _over(feature, count, rectangle):
            raise ValueError(
                f'feature "{feature.name}": {count} ids in one batch, and plan(capacity=...) declares '
                f"{feature.capacity}; declare more, or split the batch"
            )
    capacity = _capacity(brought)
    if capacity >= 2**31:
        raise ValueError(
            f'stack "{stack.name}": {total} ids in a batch (capacity {capacity}), and at most 2**31 - 1 are possible; '
            "split the batch"
        )
    ids, offsets = host.empty(capacity, np.int32), host.empty(samples + 1, np.int32)
    offsets[0, 0] = 0
    gains = host.empty(capacity, np.float32) if any(c.gains is not None for c in columns) else None
    if gains is not None:
        gains[...] = 1
    at = sample = 0
    for index, column in zip(stack.features, columns, strict=True):
        end, last = at + len(column.values), sample + column.samples
        rows = ids[0, at:end]
        rows[...] = column.values
        rows += plan.features[index].table.row_offset
        if column.absent is not None:
            rows[column.absent] = stack.rows
        if gains is not None and column.gains is not None:
            gains[0, at:end] = column.gains
        offsets[0, sample + 1 : last + 1] = _ends(column) + at
        at, sample = end, last
    ids[0, at:] = stack.rows
    if gains is not None:
        gains[0, at:] = 0.0
    return StackIds(
        ids=ids,
        offsets=offsets,
        gains=gains,
        samples=tuple(c.samples for c in columns),
        valencies=tuple(c.lengths if isinstance(c.lengths, int) else None for c in columns),
    )


def _ends(column: Column) -> np.ndarray:
    if isinstance(column.lengths, int):
        return np.arange(1, column.samples + 1) * column.lengths
    return np.cumsum(column.lengths)


def _over(feature: FeaturePlan, count: int, rectangle: bool) -> bool:
    """Returns whether the plan declares fewer ids than the feature brings."""
    return not rectangle and feature.capacity is not None and count > feature.capacity


def _capacity(brought: Iterable[tuple[FeaturePlan, int, bool]]) -> int:
    """Returns the ids that a stack's arrays hold: dense and declared exactly, the rest in one bucket.

    ``brought`` says for each feature how many ids it brings, and whether they are a rectangle.
    """
    fixed, free = 0, None
    for feature, count, rectangle in brought:
        if rectangle:
            fixed += count
        elif feature.capacity is None:
            free = (free or 0) + count
        else:
            fixed += max(feature.capacity, count)
    return fixed + (0 if free is None else bucket(free))
