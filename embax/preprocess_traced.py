"""ids -> IdBatch inside jit: the same meaning as ``preprocess``, counted where that would raise.

A traced program cannot raise because of a value. What ``preprocess`` refuses is therefore absent here: a bad id
(outside of the vocabulary, whatever the feature's ``out_of_range`` says, or of no sample) or an id of a bad weight
(NaN, infinite) adds nothing, trains nothing, is not counted by the mean, and is counted in ``batch.statistics``.
Shapes and dtypes are static, so those raise as on the host.

Arrays of a static size may be longer than their ids: what stands behind the last split of ``RaggedIds``, or belongs to
sample ``num_samples`` of ``CooIds``, is room to spare and counted nowhere.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax.batch_shards import split
from embax.combiners import gains_from_weights
from embax.id_batch import IdBatch, StackIds, Statistics
from embax.id_inputs import CooIds, RaggedIds, check_batch, check_num_samples, check_shape
from embax.planning import FeaturePlan, Plan, StackPlan


class TracedColumn(NamedTuple):
    """The ids of one feature, ready for its stack; ``counts`` are the feature's ``Statistics``."""

    rows: jax.Array
    lengths: jax.Array
    valency: int | None
    gains: jax.Array | None
    counts: tuple[jax.Array, ...]


class TracedFlat(NamedTuple):
    """Values of a feature, sample after sample.

    ``sample`` says whose each value is, in rising order, and the number of samples for room to spare; ``stray``
    which values belong to a sample that is not there (None: none do); ``lengths`` how many values each sample has.
    ``order`` is where each value stood in the input, None for the same order.
    """

    values: jax.Array
    sample: jax.Array
    stray: jax.Array | None
    lengths: jax.Array
    valency: int | None
    order: jax.Array | None


def preprocess_traced(plan: Plan, ids: Any, weights: Any = None) -> IdBatch:
    """Returns the batch that ``lookup`` and ``update`` read, from traced ids.

    Activations are differentiable with respect to ``weights``, through the gains.

    Args:
      plan: what ``embax.plan`` gave.
      ids: one entry per feature: an integer array of the feature's input_shape, or, for pooled features
        without positions, ``RaggedIds`` or ``CooIds``. 64-bit ids are cut to 32 bits by JAX before they
        come here, unless jax_enable_x64 is set or they are still NumPy arrays. Values behind the last
        split, or of sample ``num_samples``, are room to spare. Splits that fall are raised to those before.
      weights: float arrays, one weight per id: of the shape of dense ids, flat beside the others, or in the form
        of the ids; or None. Where the splits or samples of weights are not those of the ids, the weights are bad.

    Raises:
      ValueError, TypeError: shapes, structures and dtypes that do not fit.

    >>> import jax, jax.numpy as jnp, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.SGD(0.5))
    >>> history = embax.FeatureSpec(name="history", table_spec=table, input_shape=(None, 3), output_shape=(None, 2))
    >>> plan = embax.plan(history)
    >>> batch = jax.jit(lambda ids: embax.preprocess_traced(plan, ids))(jnp.array([[5, 3, 6], [0, 0, 0]]))
    >>> batch.statistics.out_of_range.tolist()
    [[1]]
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"preprocess_traced: a {type(plan).__name__} is not a Plan; call preprocess_traced(plan, ids, weights)"
        )
    leaves = plan.flatten(ids, "ids")
    weight_leaves = [None] * len(leaves) if weights is None else plan.flatten(weights, "weights")
    columns = [
        _column(feature, plan.stack(feature.stack), leaf, weight)
        for feature, leaf, weight in zip(plan.features, leaves, weight_leaves, strict=True)
    ]
    stacks = {stack.name: _stack_ids([columns[i] for i in stack.features]) for stack in plan.stacks}
    counts = zip(*(c.counts for c in columns), strict=True)
    return split(plan, IdBatch(stacks, Statistics(*(jnp.stack(count)[None] for count in counts))), jnp)


def _column(feature: FeaturePlan, stack: StackPlan, leaf: Any, weights: Any) -> TracedColumn:
    flat = _flatten(feature, leaf)
    table, values = feature.table, flat.values
    none = jnp.zeros(values.shape, bool)
    stray = none if flat.stray is None else flat.stray
    owned = (flat.sample < flat.lengths.shape[0]) & ~stray
    padding = owned & _equals(values, feature.padding_id)
    outside = owned & ~padding & ((values < 0) | (values >= table.vocabulary_size))
    present, bad, gains = owned & ~padding & ~outside, none, None
    if weights is not None:
        weights, matched = _weights(feature, leaf, weights)
        if flat.order is not None:
            weights, matched = weights[flat.order], matched[flat.order]
        bad = present & ~(jnp.isfinite(weights) & matched)
        present = present & ~bad
        gains = _gains(table.combiner, flat, jnp.where(present, weights, 0.0), True)
    elif table.combiner != "sum" and feature.pooled and flat.valency != 1:
        gains = _gains(table.combiner, flat, present.astype(jnp.float32), False)
    rows = jnp.where(present, values.astype(jnp.int32) + table.row_offset, stack.rows)
    counts = tuple(jnp.sum(mask, dtype=jnp.int32) for mask in (present, padding, outside | stray, none, bad))
    return TracedColumn(rows, flat.lengths, flat.valency, gains, counts)


def _equals(values: jax.Array, padding_id: int | None) -> jax.Array:
    limits = jnp.iinfo(values.dtype)
    if padding_id is None or not limits.min <= padding_id <= limits.max:
        return jnp.zeros(values.shape, bool)
    return values == padding_id


def _gains(combiner: str, flat: TracedFlat, weights: jax.Array, scaled: bool) -> jax.Array:
    """Returns the gains; ``scaled`` weights of any size are first brought near 1, for float32 squares soon overflow."""
    samples, valency = flat.lengths.shape[0], flat.valency

    def per_sample(reduce, segments, values):
        if valency is not None:
            return reduce(values.reshape(samples, valency), axis=1, initial=0.0)
        return segments(values, flat.sample, num_segments=samples + 1, indices_are_sorted=True)

    def spread(values):
        if valency is None:
            return values[flat.sample]
        return jnp.broadcast_to(values[:, None], (samples, valency)).reshape(-1)

    if scaled and combiner != "sum":
        # A power of two, which changes no digit; gains do not depend on the scale of their sample's weights.
        largest = per_sample(jnp.max, jax.ops.segment_max, jax.lax.stop_gradient(jnp.abs(weights)))
        exponent = jnp.clip(jnp.frexp(jnp.maximum(largest, 0.0))[1], -126, 126)
        weights = weights * spread(jnp.ldexp(jnp.ones_like(largest), -exponent))
    sums = functools.partial(per_sample, jnp.sum, jax.ops.segment_sum)
    return gains_from_weights(combiner, weights, sums, spread, jnp)


def _flatten(feature: FeaturePlan, leaf: Any) -> TracedFlat:
    owner = f'feature "{feature.name}": ids'
    if isinstance(leaf, CooIds):
        return _flatten_coo(feature, leaf)
    if isinstance(leaf, RaggedIds):
        return _flatten_ragged(feature, leaf)
    array = _integers(owner, leaf)
    check_shape(feature, array.shape, owner)
    samples = array.shape[0] * feature.samples_per_row
    rectangle = feature.pooled and array.ndim > 1 + len(feature.positions)
    valency = array.shape[-1] if rectangle else 1
    sample = jnp.repeat(jnp.arange(samples, dtype=jnp.int32), valency)
    return TracedFlat(array.reshape(-1), sample, None, jnp.full(samples, valency, jnp.int32), valency, None)


def _flatten_coo(feature: FeaturePlan, coo: CooIds) -> TracedFlat:
    owner, count = f'feature "{feature.name}": CooIds.samples', check_num_samples(feature, coo)
    values = _integers(f'feature "{feature.name}": ids', coo.values, dimensions=1)
    samples = _integers(owner, coo.samples, dimensions=1)
    if samples.shape != values.shape:
        raise ValueError(f"{owner} are {samples.size} for {values.size} ids; give every id its sample")
    # Ids of no sample sort behind all others.
    stray = (samples < 0) | (samples > count)
    samples = jnp.where(stray, count, samples.astype(jnp.int32))
    order = jnp.argsort(samples, stable=True)
    lengths = jnp.zeros(count + 1, jnp.int32).at[samples].add(1)[:-1]
    return TracedFlat(values[order], samples[order], stray[order], lengths, None, order)


def _flatten_ragged(feature: FeaturePlan, ragged: RaggedIds) -> TracedFlat:
    owner = f'feature "{feature.name}": splits'
    if feature.positions or not feature.pooled:
        raise ValueError(
            f'feature "{feature.name}": inside jit a sequence feature takes a dense array; or preprocess ragged ids '
            "on the host"
        )
    values = _integers(f'feature "{feature.name}": ids', ragged.values, dimensions=1)
    splits = _integers(owner, ragged.splits, dimensions=1).astype(jnp.int32)
    if not splits.shape[0]:
        raise ValueError(f"{owner} are empty; they must be integers [samples + 1]")
    check_batch(feature, splits.shape[0] - 1, f'feature "{feature.name}": ids')
    # Splits that fall or overshoot are brought back into order: nothing is read that is not there. What stands before
    # the first split is of no sample, and fills the first.
    splits = jax.lax.cummax(jnp.clip(splits, 0, values.shape[0]))
    index = jnp.arange(values.shape[0], dtype=jnp.int32)
    stray, splits = index < splits[0], splits.at[0].set(0)
    sample = jnp.searchsorted(splits, index, side="right").astype(jnp.int32) - 1
    return TracedFlat(values, sample, stray, jnp.diff(splits), None, None)


def _integers(owner: str, leaf: Any, dimensions: int | None = None) -> jax.Array:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(f"{owner} are of type {type(leaf).__name__}; inside jit they must be an integer array")
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        raise TypeError(f"{owner} are {leaf.dtype}; they must be integers (use .astype(jnp.int32) if they are whole)")
    if dimensions is not None and len(leaf.shape) != dimensions:
        raise ValueError(f"{owner} have shape {leaf.shape}; they must have one dimension")
    if isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        # JAX would cut these to 32 bits and make other ids of them; the largest int32 is outside of every vocabulary.
        limits = np.iinfo(np.int32)
        leaf = np.where((leaf >= limits.min) & (leaf <= limits.max), leaf, limits.max).astype(np.int32)
    array = jnp.asarray(leaf)
    # A comparison with a number that 8 or 16 bits do not hold would wrap it.
    return array.astype(jnp.int32) if array.dtype.itemsize < 4 else array


def _weights(feature: FeaturePlan, ids: Any, weights: Any) -> tuple[jax.Array, jax.Array]:
    """Returns one float32 per id in the order of the input, and which of them stand beside their id."""
    owner, inner, matched = f'feature "{feature.name}": weights', ids, None
    if isinstance(ids, (RaggedIds, CooIds)):
        inner = ids.values
        if isinstance(weights, (RaggedIds, CooIds)):
            matched = _matched(owner, ids, weights)
            weights = weights.values
    if isinstance(weights, (RaggedIds, CooIds)) or not hasattr(weights, "dtype"):
        raise TypeError(f"{owner} are of type {type(weights).__name__}; inside jit they must be a float array")
    if weights.shape != inner.shape or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"{owner} are {weights.dtype}{weights.shape}; they must be floats, one per id: {inner.shape}")
    flat = jnp.asarray(weights).astype(jnp.float32).reshape(-1)
    return flat, jnp.ones(flat.shape, bool) if matched is None else jnp.broadcast_to(matched, flat.shape)


def _matched(owner: str, ids: Any, weights: Any) -> jax.Array | None:
    """Returns which weights stand beside their id: all or none for RaggedIds; None for certainly all."""
    mine, theirs = (x.splits if isinstance(x, RaggedIds) else x.samples for x in (ids, weights))
    if type(ids) is not type(weights) or np.shape(mine) != np.shape(theirs):
        raise ValueError(
            f"{owner} are {type(weights).__name__} of other splits or samples than the ids; give those of the ids"
        )
    if mine is theirs:
        return None
    equal = jnp.asarray(mine).astype(jnp.int32) == jnp.asarray(theirs).astype(jnp.int32)
    return jnp.all(equal) if isinstance(ids, RaggedIds) else equal


def _stack_ids(columns: list[TracedColumn]) -> StackIds:
    """Returns the CSR of a stack.

    A ragged feature's values fill its array only up to its last split. What lies behind must not stand between two
    features: where another feature follows, the last sample owns that tail of absent ids.
    """
    lengths = []
    for column in columns:
        if column.valency is None and column is not columns[-1] and column.lengths.shape[0]:
            slack = column.rows.shape[0] - jnp.sum(column.lengths, dtype=jnp.int32)
            lengths.append(column.lengths.at[-1].add(slack))
        else:
            lengths.append(column.lengths)
    counts = jnp.concatenate(lengths)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    gains = None
    if any(c.gains is not None for c in columns):
        parts = [jnp.ones(c.rows.shape, jnp.float32) if c.gains is None else c.gains for c in columns]
        gains = jnp.concatenate(parts)[None]
    return StackIds(
        ids=jnp.concatenate([c.rows for c in columns])[None],
        offsets=offsets[None],
        gains=gains,
        samples=tuple(c.lengths.shape[0] for c in columns),
        valencies=tuple(c.valency for c in columns),
    )
