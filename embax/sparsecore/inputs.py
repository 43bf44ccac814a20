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
from embax.id_forms import CooIds, RaggedIds, is_flat
from embax.kernels import host
from embax.preprocess import preprocess
from embax.sparsecore.layout import MOST_ROWS
from embax.sparsecore.lib.nn.table_stacking import feature_leaves
from embax.sparsecore.statistics import SparseDenseMatmulInputStats, Statistics
from embax.sparsecore.translation import Stack, check_cores, input_plan, stacks_of
from embax.sparsecore.utils import utils
from embax.specs import FeatureSpec

LIMITS = ("ignore", "warn", "error")


class SparseDenseMatmulInput(NamedTuple):
    """The arrays of every stack, by its name; see the module."""

    lhs_row_pointers: Mapping[str, Any]
    lhs_embedding_ids: Mapping[str, Any]
    lhs_sample_ids: Mapping[str, Any]
    lhs_gains: Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
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

    @classmethod
    def of(cls, local_device_count: Any, global_device_count: Any, num_sc_per_device: Any) -> "Cores":
        """Returns the SparseCores that a caller speaks of; ValueError unless there are some."""
        local = utils.counted("local_device_count", local_device_count)
        return cls(local, utils.counted("global_device_count", global_device_count), utils.checked(num_sc_per_device))

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
    check_cores(stacks, cores.global_devices, cores.per_device)
    parts = _parts(features, leaves, cores)
    if weights is not None:
        weights = [_beside(*given) for given in zip(features, leaves, weights, strict=True)]
    read = []
    for part in parts:
        own = None if weights is None else [_cut(leaf, *where) for leaf, where in zip(weights, part, strict=True)]
        ids = [_cut(leaf, *where) for leaf, where in zip(leaves, part, strict=True)]
        try:
            read.append(preprocess(plan, ids, own))
        except (ValueError, TypeError) as error:
            raise ValueError(_of_batch(plan, leaves, weights, error)) from None
    counts = np.empty((len(stacks), len(parts), 2, cores.all), np.int32)
    arrays = {
        name: _side_by_side(stack, [batch.stacks[name] for batch in read], cores, own)
        for (name, stack), own in zip(stacks.items(), counts, strict=True)
    }
    if not options["has_leading_dimension"]:
        arrays = {name: [array.reshape(-1) for array in own] for name, own in arrays.items()}
    statistics = Statistics([stack.spec for stack in stacks.values()], counts, cores)
    statistics.check(options["limits"])
    by_kind = ({name: own[kind] for name, own in arrays.items()} for kind in range(4))
    minibatches = np.full(
        cores.local_devices, statistics.minibatches() if options["enable_minibatching"] else 1, np.int32
    )
    if options["has_leading_dimension"]:
        minibatches = minibatches[:, None]
    return PreprocessedInput(SparseDenseMatmulInput(*by_kind), minibatches), statistics.result()


def _parts(features: list[FeatureSpec], leaves: list[Any], cores: Cores) -> list[list[tuple[int, int]]]:
    """Returns, for every SparseCore of this process, which samples of each feature are its own."""
    count = cores.local_devices * cores.per_device
    sizes = []
    for feature, leaf in zip(features, leaves, strict=True):
        samples = _count(feature, leaf, "ids")
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
    count = len(leaf.splits) - 1 if isinstance(leaf, RaggedIds) else len(leaf)
    if first == 0 and last == count:
        return leaf
    if isinstance(leaf, RaggedIds):
        splits = np.asarray(leaf.splits)
        return RaggedIds(_cut(leaf.values, splits[first], splits[last]), splits[first : last + 1] - splits[first])
    return leaf[first:last]


def _count(feature: FeatureSpec, leaf: Any, what: str) -> int:
    """Returns how many samples a feature is given; ValueError for what has none."""
    if isinstance(leaf, RaggedIds):
        return len(leaf.splits) - 1
    if isinstance(leaf, CooIds):
        raise ValueError(
            f'feature "{feature.name}": {what} are CooIds; give coordinates to '
            "preprocess_sparse_dense_matmul_input_from_sparse_tensor"
        )
    known = isinstance(leaf, (list, tuple)) or (hasattr(leaf, "__len__") and hasattr(leaf, "__array__"))
    if not known or not getattr(leaf, "shape", (1,)):
        raise ValueError(
            f'feature "{feature.name}": {what} are a {type(leaf).__name__}; give an array, or a list with the '
            f"{what} of each sample"
        )
    return len(leaf)


def _beside(feature: FeatureSpec, ids: Any, weights: Any) -> Any:
    """Returns weights in a form that can be cut as their ids are."""
    if weights is None:
        return None
    if isinstance(ids, RaggedIds) and not isinstance(ids.values, RaggedIds) and is_flat(weights):
        return RaggedIds(weights, ids.splits)
    _count(feature, weights, "weights")
    return weights


def _of_batch(plan: Any, leaves: list[Any], weights: list[Any] | None, error: Exception) -> str:
    """Returns what is wrong with a batch, by the samples of the whole of it."""
    try:
        preprocess(plan, leaves, weights)
    except (ValueError, TypeError) as whole:
        error = whole
    return str(error)


def _side_by_side(stack: Stack, parts: list[StackIds], cores: Cores, counts: np.ndarray) -> list[np.ndarray]:
    """Returns row pointers, rows, samples and gains of all devices; writes what each SparseCore needs of each."""
    absent, per_device, devices = stack.spec.stack_vocab_size, cores.per_device, cores.local_devices
    samples = parts[0].offsets.size - 1
    sizes = [int(part.offsets[0, -1]) for part in parts]
    if len(parts) == 1:
        return _in_place(stack, parts[0], sizes[0], counts[0])
    room = max(sum(sizes[d * per_device : (d + 1) * per_device]) for d in range(devices))
    if None in parts[0].valencies:
        room = bucket(room)
    pointers, ids = np.empty((devices, per_device * samples + 1), np.int32), np.empty((devices, room), np.int32)
    pointers[:, 0] = 0
    gained = any(part.gains is not None for part in parts)
    gains = np.zeros((devices, room if gained else 0), np.float32)
    for number in range(devices):
        at = 0
        for core in range(per_device):
            own = number * per_device + core
            part, end, sample = parts[own], at + sizes[own], core * samples + 1
            ends = pointers[number, sample : sample + samples]
            _lay(stack, part, cores.all, host.Laid(ids[number, at:end], ends, at, *counts[own]))
            if gained:
                gains[number, at:end] = 1.0 if part.gains is None else part.gains[0, : sizes[own]]
            at = end
        ids[number, at:] = absent
    return [pointers, ids, np.empty((devices, 0), np.int32), gains]


def _in_place(stack: Stack, part: StackIds, size: int, counts: np.ndarray) -> list[np.ndarray]:
    """Returns the arrays of the only SparseCore: those that hold its ids, made rows where they are."""
    ids, pointers = part.ids, part.offsets
    _lay(stack, part, 1, host.Laid(ids[0, :size], pointers[0, 1:], 0, *counts))
    ids[0, size:] = stack.spec.stack_vocab_size
    gains = np.empty((1, 0), np.float32) if part.gains is None else part.gains
    return [pointers, ids, np.empty((1, 0), np.int32), gains]


def _lay(stack: Stack, part: StackIds, num_sc: int, out: host.Laid) -> None:
    """Writes a SparseCore's rows of the stack's array, where its samples end, and what it needs of the others."""
    values, offsets, rows = part.ids[0, : out.rows.size], part.offsets[0], stack.spec.stack_vocab_size
    if host.lay(values, offsets, stack.layout(part.samples), rows // num_sc, MOST_ROWS, out):
        return
    ends, absent = np.cumsum(part.samples), values >= MOST_ROWS
    for (_, feature), last, samples in zip(stack.features, ends, part.samples, strict=True):
        begin, end = offsets[last - samples], offsets[last]
        out.rows[begin:end] = stack.physical(feature, values[begin:end], num_sc)
    out.rows[absent] = rows
    out.ends[:] = offsets[1:] + out.first
    out.ids_of[:], out.distinct_of[:] = host.partitions(out.rows, offsets, rows // num_sc, num_sc)


def from_coordinates(feature: FeatureSpec, indices: Any, values: Any, dense_shape: Any) -> RaggedIds:
    """Returns the ids of a sparse tensor, sample after sample, in the order of their coordinates' appearance."""
    indices, values, shape = np.asarray(indices), np.asarray(values), np.asarray(dense_shape).reshape(-1)
    what = f'feature "{feature.name}"'
    if indices.ndim != 2 or indices.shape[1] != 2 or values.shape != indices.shape[:1] or shape.shape != (2,):
        raise ValueError(
            f"{what}: indices {list(indices.shape)}, values {list(values.shape)} and dense_shape {list(shape.shape)} "
            "must be [n, 2], [n] and [2]"
        )
    for name, array in (("indices", indices), ("dense_shape", shape)):
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{what}: {name} are {array.dtype}; they must be integers")
    samples = indices[:, 0].astype(np.int64)
    if samples.size and (samples.min() < 0 or samples.max() >= shape[0]):
        wrong = int(np.argmax((samples < 0) | (samples >= shape[0])))
        raise ValueError(f"{what}: index {wrong} is of sample {samples[wrong]}, and dense_shape has {shape[0]} samples")
    counts = np.bincount(samples, minlength=int(shape[0]))
    order = np.argsort(samples, kind="stable")
    return RaggedIds(values[order], np.concatenate([[0], np.cumsum(counts)]))
