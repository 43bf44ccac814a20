"""The batch of a mesh: a batch of one shard, cut into one shard for each group of devices.

Samples keep their order; five samples on 2 devices, so that one sample is filled up::

    samples 0 1 2 | 3 4 -        - has no ids, and its activation is cut off again

Each process cuts what it was given into the shards of its own devices. What all give to one program must have one
shape: where ids are ragged they agree, once a batch, on the capacity, and check that all bring as many samples.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from embax.id_batch import IdBatch, StackIds, Statistics, bucket
from embax.placement import Devices
from embax.planning import FeaturePlan, Plan, StackPlan


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
    several = xp is np and devices.mesh.is_multi_process
    shards = _shards_here(plan) if several else devices.batch_shards
    rooms = _rooms(plan, batch, shards) if xp is np else {}
    cut = {s.name: _cut(plan, s, batch.stacks[s.name], shards, rooms.get(s.name), xp) for s in plan.stacks}
    if several:
        _check_full(plan, cut, shards)
    batch = IdBatch(cut, _spread(batch.statistics, cut, xp))
    return _of_all_processes(plan, batch) if several else batch


def _shards_here(plan: Plan) -> int:
    """Returns how many shards of the batch the devices of this process hold."""
    assert plan.devices is not None
    devices = plan.devices
    held = devices.sharding(devices.batch_spec()).addressable_devices_indices_map((devices.batch_shards,))
    return len({(index[0].start, index[0].stop) for index in held.values()})  # type: ignore[index]


def _cut(plan: Plan, stack: StackPlan, ids: StackIds, shards: int, room: int | None, xp: Any) -> StackIds:
    samples, totals = _samples_of_one(plan, stack, ids, shards), tuple(ids.samples)
    if all(valency is not None for valency in ids.valencies):
        rows, offsets, gains = _rectangles(plan, stack, ids, shards, samples, xp)
    elif room is not None:
        rows, offsets, gains = _ragged(stack, ids, shards, samples, room)
    else:
        raise ValueError(
            f'stack "{stack.name}": ragged ids cannot be cut into {shards} shards inside of jit; use embax.preprocess '
            "on the host, or preprocess each device's ids inside of jax.shard_map"
        )
    filled = any(shards * own != total for own, total in zip(samples, totals, strict=True))
    return StackIds(rows, offsets, gains, samples, ids.valencies, totals if filled else None, stack.layout)


def _samples_of_one(plan: Plan, stack: StackPlan, ids: StackIds, shards: int) -> tuple[int, ...]:
    """Returns the samples of each feature on one shard."""
    widths = [plan.features[i].samples_per_row for i in stack.features]
    return tuple(-(-n // (shards * width)) * width for n, width in zip(ids.samples, widths, strict=True))


def _check_full(plan: Plan, cut: dict[str, StackIds], shards: int) -> None:
    """Raises ValueError for a shard that is not full: with several processes it would lie amid the samples of all."""
    for stack in plan.stacks:
        if cut[stack.name].totals is not None:
            raise ValueError(
                f'stack "{stack.name}": this process brings {cut[stack.name].totals} samples for {shards} shards; with '
                "several processes each must bring a multiple of its shards: fill the batch up with empty samples"
            )


def _rectangles(
    plan: Plan, stack: StackPlan, ids: StackIds, shards: int, samples: Sequence[int], xp: Any
) -> tuple[Any, Any, Any]:
    """Returns ids, offsets and gains of features with one number of ids a sample each: reshaped."""
    rows, gains, at = [], [], 0
    for total, own, valency in zip(ids.samples, samples, ids.valencies, strict=True):
        assert valency is not None
        count, wanted = total * valency, shards * own * valency
        rows.append(_padded(plan, ids.ids[0, at : at + count], wanted, stack.rows, xp).reshape(shards, -1))
        if ids.gains is not None:
            gains.append(_padded(plan, ids.gains[0, at : at + count], wanted, 0.0, xp).reshape(shards, -1))
        at += count
    lengths = np.repeat(np.asarray(ids.valencies, np.int32), samples)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    offsets = xp.asarray(np.broadcast_to(offsets, (shards, offsets.size)))
    return xp.concatenate(rows, 1), offsets, xp.concatenate(gains, 1) if gains else None


def _padded(plan: Plan, values: Any, size: int, fill: Any, xp: Any) -> Any:
    if values.shape[0] == size:
        return values
    filled = xp.pad(values, (0, size - values.shape[0]), constant_values=fill)
    # Inside of jit: what comes back through this is cut unevenly, too.
    return filled if xp is np or plan.devices is None else plan.devices.whole(filled)


def _ragged(
    stack: StackPlan, ids: StackIds, shards: int, samples: Sequence[int], capacity: int
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


def _rooms(plan: Plan, batch: IdBatch, shards: int) -> dict[str, int]:
    """Returns the ids that one shard has room for, of every ragged stack.

    Rectangles and declared features have it exactly, the rest in a bucket.
    """
    fixed, free = {}, {}
    for stack in plan.stacks:
        ids = batch.stacks[stack.name]
        if any(valency is None for valency in ids.valencies):
            fixed[stack.name], free[stack.name] = _room(plan, stack, ids, shards)
    undeclared = any(feature.capacity is None for name in free for feature in _ragged_features(plan, batch, name))
    if undeclared and plan.devices.mesh.is_multi_process:  # type: ignore[union-attr]
        free = _agreed(plan, batch, free, shards)
    return {name: fixed[name] + (bucket(most) if most else 0) for name, most in free.items()}


def _ragged_features(plan: Plan, batch: IdBatch, name: str) -> list[FeaturePlan]:
    valencies = batch.stacks[name].valencies
    features = zip(plan.stack(name).features, valencies, strict=True)
    return [plan.features[index] for index, valency in features if valency is None]


def _room(plan: Plan, stack: StackPlan, ids: StackIds, shards: int) -> tuple[int, int]:
    """Returns the ids that one shard has room for whatever comes, and those that the fullest has besides."""
    fixed = free = first = 0
    samples = _samples_of_one(plan, stack, ids, shards)
    for index, valency, total, own in zip(stack.features, ids.valencies, ids.samples, samples, strict=True):
        feature, ends = plan.features[index], first + np.minimum(own * np.arange(shards + 1), total)
        most = int(np.diff(ids.offsets[0][ends]).max())
        first += total
        if valency is not None:
            fixed += own * valency
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
    return fixed, free


def _agreed(plan: Plan, batch: IdBatch, free: dict[str, int], shards: int) -> dict[str, int]:
    """Returns the largest of the processes' counts; ValueError, in all of them, unless all bring as many samples."""
    assert plan.devices is not None
    samples = [n for stack in plan.stacks for n in batch.stacks[stack.name].samples]
    own = np.array([[free.get(stack.name, 0) for stack in plan.stacks] + samples], np.int32)
    sharding = plan.devices.sharding(plan.devices.batch_spec())
    every = jax.make_array_from_process_local_data(sharding, np.repeat(own, shards, 0))
    least, most = (np.asarray(found) for found in _extremes(plan.devices)(every))
    at = len(plan.stacks)
    for index in (index for stack in plan.stacks for index in stack.features):
        if least[at] != most[at]:
            width = plan.features[index].samples_per_row
            raise ValueError(
                f'feature "{plan.features[index].name}": this process brings {own[0, at] // width} samples, and the '
                f"processes from {least[at] // width} to {most[at] // width}; each must bring the same number: fill "
                "the batch up with empty samples"
            )
        at += 1
    return {stack.name: int(n) for stack, n in zip(plan.stacks, most, strict=False) if stack.name in free}


@functools.lru_cache(maxsize=16)
def _extremes(devices: Devices) -> Any:
    whole = devices.sharding(P())
    return jax.jit(lambda every: (every.min(0), every.max(0)), out_shardings=(whole, whole))


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
