"""ids -> PreprocessedInput: the core reads every SparseCore's part of the batch; here parts are put side by side.

The arrays of a stack are a CSR for each device. Two devices with two SparseCores each, features x and y in the stack::

    samples of device 0    x of SparseCore 0, y of SparseCore 0, x of SparseCore 1, y of SparseCore 1
    lhs_row_pointers       where each of them begins, and the end; device after device
    lhs_embedding_ids      rows of the stack's array, filled up with one past its end
    lhs_gains              what each is multiplied by; without a number where all are 1
    lhs_sample_ids         without a number: the row pointers say it

All zeros are a batch without ids.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from embax.id_batch import StackIds, bucket
from embax.id_forms import RaggedIds
from embax.preprocess import preprocess
from embax.sparsecore.lib.nn.table_stacking import feature_leaves
from embax.sparsecore.statistics import SparseDenseMatmulInputStats, Statistics
from embax.sparsecore.translation import MOST_ROWS, Stack, check_cores, input_plan, stacks_of
from embax.specs import FeatureSpec

LIMITS = ("ignore", "warn", "error")


class SparseDenseMatmulInput(NamedTuple):
    """The arrays of every stack, by its name; see the module."""

    lhs_row_pointers: Mapping[str, Any]
    lhs_embedding_ids: Mapping[str, Any]
    lhs_sample_ids: Mapping[str, Any]
    lhs_gains: Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreprocessedInput:
    """A batch, ready for ``tpu_sparse_dense_matmul`` and its gradient. A pytree, changed by ``replace``.

    Attributes:
      sparse_dense_matmul_input: the arrays.
      num_minibatches: int ``[devices]``: into how many parts a TPU would cut the batch; here it is never cut.
    """

    sparse_dense_matmul_input: SparseDenseMatmulInput
    num_minibatches: Any = dataclasses.field(default_factory=lambda: np.ones(1, np.int32))

    @property
    def lhs_row_pointers(self) -> Mapping[str, Any]:
        """Where every sample's ids begin."""
        return self.sparse_dense_matmul_input.lhs_row_pointers

    @property
    def lhs_embedding_ids(self) -> Mapping[str, Any]:
        """Rows."""
        return self.sparse_dense_matmul_input.lhs_embedding_ids

    @property
    def lhs_sample_ids(self) -> Mapping[str, Any]:
        """Nothing: the row pointers say it."""
        return self.sparse_dense_matmul_input.lhs_sample_ids

    @property
    def lhs_gains(self) -> Mapping[str, Any]:
        """Gains of the rows."""
        return self.sparse_dense_matmul_input.lhs_gains

    def replace(self, **changes: Any) -> "PreprocessedInput":
        """Returns the input with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sparse_dense_matmul_input)


class Cores(NamedTuple):
    """The SparseCores: local and global devices, SparseCores of each."""

    local_devices: int
    global_devices: int
    per_device: int

    @property
    def all(self) -> int:
        """SparseCores of all devices."""
        return self.global_devices * self.per_device


def preprocessed(
    leaves: list[Any], weights: list[Any] | None, feature_specs: Any, cores: Cores, options: Mapping[str, Any]
) -> tuple[PreprocessedInput, SparseDenseMatmulInputStats]:
    """Returns the arrays of a process's part of a batch, and its statistics.

    Args:
      leaves: ids of each feature, in the order of the features.
      weights: likewise, or None.
      feature_specs: prepared FeatureSpecs.
      cores: the SparseCores.
      options: ``has_leading_dimension``, ``enable_minibatching``, ``limits``.

    Raises:
      ValueError: samples that the SparseCores do not divide; ids or weights that ``embax.preprocess`` refuses.
    """
    features = feature_leaves(feature_specs)
    stacks, plan = stacks_of(feature_specs), input_plan(features)
    check_cores(stacks, cores.all)
    parts = _parts(features, leaves, cores)
    read = []
    for part in parts:
        own = None if weights is None else [_cut(leaf, *where) for leaf, where in zip(weights, part, strict=True)]
        ids = [_cut(leaf, *where) for leaf, where in zip(leaves, part, strict=True)]
        try:
            read.append(preprocess(plan, ids, own))
        except ValueError:
            preprocess(plan, leaves, weights)  # says which sample of the whole batch it is
            raise
    statistics = Statistics(cores, options["limits"])
    arrays: dict[str, list[np.ndarray]] = {}
    for name, stack in stacks.items():
        rows = [_rows(stack, batch.stacks[name].shard(0), cores) for batch in read]
        statistics.add(stack, rows)
        arrays[name] = _side_by_side(stack, rows, cores, options["has_leading_dimension"])
    by_kind = ({name: own[kind] for name, own in arrays.items()} for kind in range(4))
    minibatches = np.full(cores.local_devices, statistics.minibatches(options["enable_minibatching"]), np.int32)
    if options["has_leading_dimension"]:
        minibatches = minibatches[:, None]
    return PreprocessedInput(SparseDenseMatmulInput(*by_kind), minibatches), statistics.result()


def _parts(features: list[FeatureSpec], leaves: list[Any], cores: Cores) -> list[list[tuple[int, int]]]:
    """Returns, for every SparseCore of this process, which samples of each feature are its own."""
    count = cores.local_devices * cores.per_device
    sizes = []
    for feature, leaf in zip(features, leaves, strict=True):
        samples = len(leaf.splits) - 1 if isinstance(leaf, RaggedIds) else len(leaf)
        if samples % count:
            raise ValueError(
                f'feature "{feature.name}": {samples} samples cannot be shared by {cores.local_devices} local devices '
                f"with {cores.per_device} SparseCores each; bring a multiple of {count}"
            )
        wanted = feature.output_shape[0]
        if wanted is not None and samples * cores.global_devices != wanted * cores.local_devices:
            raise ValueError(
                f'feature "{feature.name}": {samples} samples on {cores.local_devices} of {cores.global_devices} '
                f"devices do not make the batch of {wanted} that output_shape {feature.output_shape} says"
            )
        sizes.append(samples // count)
    return [[(part * size, (part + 1) * size) for size in sizes] for part in range(count)]


def _cut(leaf: Any, first: int, last: int) -> Any:
    if leaf is None:
        return None
    if isinstance(leaf, RaggedIds):
        splits = np.asarray(leaf.splits)
        return RaggedIds(leaf.values[splits[first] : splits[last]], splits[first : last + 1] - splits[first])
    return leaf if first == 0 and last == len(leaf) else leaf[first:last]


class Rows(NamedTuple):
    """One SparseCore's ids of a stack: rows of its array where they stand, one past the end for absent ones."""

    rows: np.ndarray
    offsets: np.ndarray
    gains: np.ndarray | None


def _rows(stack: Stack, ids: StackIds, cores: Cores) -> Rows:
    values, offsets = np.asarray(ids.ids)[: ids.offsets[-1]], np.asarray(ids.offsets)
    rows, ends = np.empty(len(values), np.int32), np.cumsum(ids.samples)
    for (_, feature), last, samples in zip(stack.features, ends, ids.samples, strict=True):
        begin, end = offsets[last - samples], offsets[last]
        rows[begin:end] = stack.physical(feature, values[begin:end], cores.all)
    absent = values >= MOST_ROWS
    if absent.any():
        rows[absent] = stack.spec.stack_vocab_size
    return Rows(rows, offsets, None if ids.gains is None else np.asarray(ids.gains)[: len(values)])


def _side_by_side(stack: Stack, rows: list[Rows], cores: Cores, leading: bool) -> list[np.ndarray]:
    """Returns row pointers, rows, samples and gains of all devices."""
    devices = [rows[d * cores.per_device : (d + 1) * cores.per_device] for d in range(cores.local_devices)]
    room = bucket(max(sum(len(one.rows) for one in own) for own in devices))
    samples = sum(len(one.offsets) - 1 for one in devices[0])
    pointers = np.zeros((cores.local_devices, samples + 1), np.int32)
    ids = np.full((cores.local_devices, room), stack.spec.stack_vocab_size, np.int32)
    gained = any(one.gains is not None for one in rows)
    gains = np.zeros((cores.local_devices, room if gained else 0), np.float32)
    for number, own in enumerate(devices):
        at, sample = 0, 0
        for one in own:
            count, last = len(one.rows), sample + len(one.offsets) - 1
            ids[number, at : at + count] = one.rows
            pointers[number, sample + 1 : last + 1] = one.offsets[1:] + at
            if gained:
                gains[number, at : at + count] = 1.0 if one.gains is None else one.gains
            at, sample = at + count, last
    nothing = np.zeros((cores.local_devices, 0), np.int32)
    return [part if leading else part.reshape(-1) for part in (pointers, ids, nothing, gains)]


def from_coordinates(feature: FeatureSpec, indices: Any, values: Any, dense_shape: Any) -> RaggedIds:
    """Returns the ids of a sparse tensor, sample after sample, in the order of their coordinates' appearance."""
    indices, values, shape = np.asarray(indices), np.asarray(values), np.asarray(dense_shape).reshape(-1)
    what = f'feature "{feature.name}"'
    if indices.ndim != 2 or indices.shape[1] != 2 or values.shape != indices.shape[:1] or shape.shape != (2,):
        raise ValueError(
            f"{what}: indices {list(indices.shape)}, values {list(values.shape)} and dense_shape {list(shape.shape)} "
            "must be [n, 2], [n] and [2]"
        )
    samples = indices[:, 0]
    if samples.size and (samples.min() < 0 or samples.max() >= shape[0]):
        wrong = int(np.argmax((samples < 0) | (samples >= shape[0])))
        raise ValueError(f"{what}: index {wrong} is of sample {samples[wrong]}, and dense_shape has {shape[0]} samples")
    counts = np.bincount(samples, minlength=int(shape[0]))
    order = np.argsort(samples, kind="stable")
    return RaggedIds(values[order], np.concatenate([[0], np.cumsum(counts)]))
