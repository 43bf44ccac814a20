"""The batch of a mesh: a batch of one shard, cut into one shard for each group of devices.

Samples keep their order; five samples on 2 devices, so that one sample is filled up::

    samples 0 1 2 | 3 4 -        - has no ids, and its activation is cut off again

Each process cuts what it was given into the shards of its own devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from embax.id_batch import IdBatch, StackIds, Statistics, bucket
from embax.planning import Plan, StackPlan


def split(plan: Plan, batch: IdBatch, xp: Any = np) -> IdBatch:
    """Returns ``batch``, of one shard, as the shards of the plan's mesh; as it is where there is none.

    Args:
      plan: what ``embax.plan`` gave.
      batch: of the samples that this process was given.
      xp: numpy, or jax.numpy inside of jit, where all features must be rectangles.
    """
    devices = plan.devices
    if devices is None or devices.inside():
        return batch
    shards = _shards_here(plan)
    cut = {stack.name: _cut(plan, stack, batch.stacks[stack.name], shards, xp) for stack in plan.stacks}
    batch = IdBatch(cut, _spread(batch.statistics, cut, xp))
    return batch if xp is not np or jax.process_count() == 1 else _of_all_processes(plan, batch)


def _shards_here(plan: Plan) -> int:
    """Returns how many shards of the batch the devices of this process hold."""
    assert plan.devices is not None
    devices = plan.devices
    held = devices.sharding(devices.batch_spec()).addressable_devices_indices_map((devices.batch_shards,))
    return len({(index[0].start, index[0].stop) for index in held.values()})  # type: ignore[index]


def _cut(plan: Plan, stack: StackPlan, ids: StackIds, shards: int, xp: Any) -> StackIds:
    widths = [plan.features[i].samples_per_row for i in stack.features]
    samples = tuple(-(-n // (shards * width)) * width for n, width in zip(ids.samples, widths, strict=True))
    totals = tuple(ids.samples)
    filled = any(shards * own != total for own, total in zip(samples, totals, strict=True))
    if all(valency is not None for valency in ids.valencies):
        made = _rectangles(stack, ids, shards, samples, xp)
    elif xp is np:
        made = _ragged(plan, stack, ids, shards, samples)
    else:
        raise ValueError(
            f'stack "{stack.name}": ragged ids cannot be cut into {shards} shards inside of jit; use embax.preprocess '
            "on the host, or preprocess each device's ids inside of jax.shard_map"
        )
    processes = jax.process_count() if xp is np else 1
    if filled and processes > 1:
        raise ValueError(
            f'stack "{stack.name}": this process brings {totals} samples for {shards} devices; with several processes '
            "each must bring a multiple of its devices: fill the batch up with empty samples"
        )
    rows, offsets, gains = made
    return StackIds(rows, offsets, gains, samples, ids.valencies, totals if filled else None)


def _rectangles(stack: StackPlan, ids: StackIds, shards: int, samples: Sequence[int], xp: Any) -> tuple[Any, Any, Any]:
    """Returns ids, offsets and gains of features with one number of ids a sample each: reshaped."""
    rows, gains, at = [], [], 0
    for total, own, valency in zip(ids.samples, samples, ids.valencies, strict=True):
        assert valency is not None
        count, wanted = total * valency, shards * own * valency
        rows.append(_padded(ids.ids[0, at : at + count], wanted, stack.rows, xp).reshape(shards, -1))
        if ids.gains is not None:
            gains.append(_padded(ids.gains[0, at : at + count], wanted, 0.0, xp).reshape(shards, -1))
        at += count
    lengths = np.repeat(np.asarray(ids.valencies, np.int32), samples)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    offsets = xp.asarray(np.broadcast_to(offsets, (shards, offsets.size)))
    return xp.concatenate(rows, 1), offsets, xp.concatenate(gains, 1) if gains else None


def _padded(values: Any, size: int, fill: Any, xp: Any) -> Any:
    return values if values.shape[0] == size else xp.pad(values, (0, size - values.shape[0]), constant_values=fill)


def _ragged(
    plan: Plan, stack: StackPlan, ids: StackIds, shards: int, samples: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns ids, offsets and gains where lengths differ: cut at the samples' offsets."""
    offsets, firsts = ids.offsets[0], np.cumsum([0, *ids.samples])
    pieces: list[list[tuple[int, int, np.ndarray]]] = [[] for _ in range(shards)]
    for feature, own in enumerate(samples):
        for shard, piece in enumerate(pieces):
            first, last = (firsts[feature] + min(own * (shard + more), ids.samples[feature]) for more in (0, 1))
            lengths = np.diff(offsets[first : last + 1])
            valency = ids.valencies[feature] or 0
            piece.append(
                (offsets[first], offsets[last], np.pad(lengths, (0, own - lengths.size), constant_values=valency))
            )
    capacity = _capacity(plan, stack, ids, [[int(p[2].sum()) for p in piece] for piece in pieces])
    rows = np.full((shards, capacity), stack.rows, np.int32)
    gains = None if ids.gains is None else np.zeros((shards, capacity), np.float32)
    ends = np.zeros((shards, sum(samples) + 1), np.int32)
    for shard, piece in enumerate(pieces):
        at = 0
        for first, last, lengths in piece:
            rows[shard, at : at + last - first] = ids.ids[0, first:last]
            if gains is not None and ids.gains is not None:
                gains[shard, at : at + last - first] = ids.gains[0, first:last]
            at += int(lengths.sum())
        ends[shard, 1:] = np.cumsum(np.concatenate([lengths for _, _, lengths in piece]))
    return rows, ends, gains


def _capacity(plan: Plan, stack: StackPlan, ids: StackIds, counts: list[list[int]]) -> int:
    """Returns the ids that one shard has room for: rectangles and declared features exactly, the rest in a bucket."""
    fixed = free = 0
    for place, index in enumerate(stack.features):
        feature, most = plan.features[index], max(count[place] for count in counts)
        if ids.valencies[place] is not None:
            fixed += most
        elif feature.capacity is None:
            free += most
        else:
            assert plan.devices is not None
            declared = -(-feature.capacity // plan.devices.batch_shards)
            if most > declared:
                raise ValueError(
                    f'feature "{feature.name}": {most} ids on one device, and plan(capacity=...) declares '
                    f"{feature.capacity} for {plan.devices.batch_shards} devices, {declared} each; declare more"
                )
            fixed += declared
    free = _most_of_all_processes(free)
    return fixed + (bucket(free) if free else 0)


def _most_of_all_processes(count: int) -> int:
    """Returns the largest of the processes' counts: what they send to one program must have one shape."""
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(count))))


def _spread(statistics: Statistics, cut: dict[str, StackIds], xp: Any) -> Statistics:
    """Returns the counts by shard: all on the first one, for they were made over the whole batch."""
    shards = next(iter(cut.values())).ids.shape[0]
    spread = [xp.concatenate([part, xp.zeros((shards - 1, part.shape[1]), part.dtype)]) for part in statistics]
    return Statistics(*spread)


def _of_all_processes(plan: Plan, batch: IdBatch) -> IdBatch:
    """Returns the batch of the whole job, of which this process has its shards."""
    assert plan.devices is not None
    sharding = plan.devices.sharding(plan.devices.batch_spec())
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)
