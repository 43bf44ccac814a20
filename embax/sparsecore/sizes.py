"""How much room a TPU needs for a batch, and the shapes of embax's own arrays.

The first three functions are arithmetic on limits: nothing in embax is as long as they say. The shapes are those that
``preprocess_sparse_dense_matmul_input`` has for a batch of zeros.
"""

from typing import Any

import jax
import numpy as np

from embax.id_forms import RaggedIds
from embax.sparsecore.inputs import Cores, PreprocessedInput, preprocessed
from embax.sparsecore.layout import MULTIPLE, round_up
from embax.sparsecore.lib.nn.table_stacking import feature_leaves
from embax.sparsecore.translation import stacks_of
from embax.sparsecore.utils import utils
from embax.specs import FeatureSpec

MINIBATCHES = 64  # into which a TPU cuts a batch at most
MOST = 2**31 - 1


def compute_row_pointers_size_per_device(
    *, global_device_count: int, num_sc_per_device: int | None = None, enable_minibatching: bool = False
) -> int:
    """Returns how many row pointers a TPU has on a device, for each stack.

    Args:
      global_device_count: devices of all processes.
      num_sc_per_device: SparseCores of each; None for those of this machine.
      enable_minibatching: whether there is room for 64 minibatches.

    >>> compute_row_pointers_size_per_device(global_device_count=2, num_sc_per_device=4)
    32
    """
    num_sc = utils.checked(num_sc_per_device)
    return max(utils.all_cores(global_device_count, num_sc), MULTIPLE) * _parts(enable_minibatching) * num_sc


def compute_theoretical_max_coo_buffer_size(
    max_ids_per_partition: int,
    global_device_count: int,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
) -> int:
    """Returns how many ids a device of a TPU brings at most: to every SparseCore as many as the limit lets through.

    Args:
      max_ids_per_partition: the limit of a stack.
      global_device_count: devices of all processes.
      num_sc_per_device: SparseCores of each; None for those of this machine.
      enable_minibatching: whether there is room for 64 minibatches.

    >>> compute_theoretical_max_coo_buffer_size(20, global_device_count=2, num_sc_per_device=4)
    768
    """
    num_sc = utils.checked(num_sc_per_device)
    ids = round_up(max_ids_per_partition, MULTIPLE)
    return ids * num_sc * utils.all_cores(global_device_count, num_sc) * _parts(enable_minibatching)


def compute_coo_buffer_size_per_device(
    feature_specs: Any,
    global_device_count: int,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
) -> dict[str, int]:
    """Returns for how many ids a device of a TPU has room, by stack: as many as suggested, or the most possible.

    Args:
      feature_specs: prepared FeatureSpecs.
      global_device_count: devices of all processes.
      num_sc_per_device: SparseCores of each; None for those of this machine.
      enable_minibatching: whether there is room for 64 minibatches.

    Raises:
      ValueError: more are suggested than the limits let through, or more than a TPU can count.
    """
    num_sc, sizes = utils.checked(num_sc_per_device), {}
    for name, stack in stacks_of(feature_specs).items():
        spec = stack.spec
        most = compute_theoretical_max_coo_buffer_size(
            spec.max_ids_per_partition, global_device_count, num_sc, enable_minibatching
        )
        suggested = spec.suggested_coo_buffer_size_per_device
        size = most if suggested is None else round_up(suggested, MULTIPLE * num_sc)
        if size > most:
            raise ValueError(
                f'stack "{name}": suggested_coo_buffer_size_per_device={suggested} is {size} ids in whole buffers, and '
                f"max_ids_per_partition={spec.max_ids_per_partition} lets {most} through; suggest less, or raise the "
                "limit"
            )
        if size >= MOST:
            raise ValueError(
                f'stack "{name}": a buffer of {size} ids is more than the {MOST - 1} that a TPU can count; lower '
                "max_ids_per_partition, or set suggested_coo_buffer_size_per_device"
            )
        sizes[name] = size
    return sizes


def eval_preprocess_sparse_dense_matmul_input_shape(
    feature_specs: Any,
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int | None = None,
    has_leading_dimension: bool = False,
    enable_minibatching: bool = False,
    weighted: bool = False,
) -> PreprocessedInput:
    """Returns shapes and dtypes of ``preprocess_sparse_dense_matmul_input``'s arrays, for ``jax.eval_shape`` and such.

    They are those of every batch of rectangles: features of input_shape ``[batch, n]`` (or sequences) that are given as
    arrays. A feature without an n brings as many ids as a TPU would have room for
    (``compute_coo_buffer_size_per_device``, less the ids of its stack's rectangles). A ragged batch's own arrays of ids
    and gains are as long as its ids are many: they may be shorter, or longer. A step that was compiled for the shapes
    fits rectangles only; one that is compiled when it is called fits every batch.

    Args:
      feature_specs: prepared FeatureSpecs.
      local_device_count: devices of this process.
      global_device_count: of all.
      num_sc_per_device: SparseCores of each; None for those of this machine.
      has_leading_dimension: whether arrays lead with the device, for ``jax.pmap``.
      enable_minibatching: whether a TPU's buffers have room for 64 minibatches.
      weighted: whether ids come with weights; without them, sums have no gains.

    Raises:
      ValueError: features that are not prepared, or not for these SparseCores; a batch that they do not divide.

    >>> import jax, embax
    >>> from embax.sparsecore.lib.nn import embedding
    >>> table = embax.TableSpec(name="a", vocabulary_size=100, embedding_dim=8, combiner="sum",
    ...     initializer=jax.nn.initializers.zeros, optimizer=embax.SGD())
    >>> feature = embax.FeatureSpec(name="x", table_spec=table, input_shape=(16, 5), output_shape=(16, 8))
    >>> embedding.prepare_feature_specs_for_training(feature, 4, 1)
    >>> eval_preprocess_sparse_dense_matmul_input_shape(feature, 4, 4, num_sc_per_device=1).lhs_embedding_ids["a"]
    ShapeDtypeStruct(shape=(80,), dtype=int32)
    """
    cores = Cores.of(local_device_count, global_device_count, num_sc_per_device)
    specs, stacks = feature_leaves(feature_specs), stacks_of(feature_specs)
    room = compute_coo_buffer_size_per_device(feature_specs, global_device_count, cores.per_device, enable_minibatching)
    ids: list[Any] = [np.zeros(_shape(spec, cores), np.int32) if _is_rectangle(spec) else None for spec in specs]
    for name, stack in stacks.items():
        rectangles = sum(array.size for number, _ in stack.features if (array := ids[number]) is not None)
        left = max(room[name] - rectangles // cores.local_devices, 0)
        for number, spec in stack.features:
            if ids[number] is None:
                ids[number] = _ragged(spec, cores, left)
                left = 0  # the first has them all: what is asked for is the sum
    weights = None
    if weighted:
        weights = [
            RaggedIds(np.ones(one.values.shape, np.float32), one.splits)
            if isinstance(one, RaggedIds)
            else np.ones(one.shape, np.float32)
            for one in ids
        ]
    options = {"has_leading_dimension": has_leading_dimension, "enable_minibatching": False, "limits": "ignore"}
    made, _ = preprocessed(ids, weights, feature_specs, cores, options)
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), made)


def _parts(enable_minibatching: bool) -> int:
    return MINIBATCHES if enable_minibatching else 1


def _is_rectangle(spec: FeatureSpec) -> bool:
    """Returns whether the specification says how many ids a sample has: n, or one at each position."""
    return len(spec.input_shape) == len(spec.output_shape) or len(spec.output_shape) > 2


def _shape(spec: FeatureSpec, cores: Cores) -> tuple[int, ...]:
    batch, *rest = spec.input_shape
    assert batch is not None  # stacking has checked it
    if batch * cores.local_devices % cores.global_devices:
        raise ValueError(
            f'feature "{spec.name}": a batch of {batch} cannot be shared by {cores.global_devices} devices; make it a '
            f"multiple of {cores.all}"
        )
    return (batch * cores.local_devices // cores.global_devices, *(size for size in rest if size is not None))


def _ragged(spec: FeatureSpec, cores: Cores, count: int) -> RaggedIds:
    """Returns a part of a batch in which the first sample of every device has ``count`` ids."""
    samples = _shape(spec, cores)[0]
    own = 1 if spec.padding_id == 0 else 0  # of an id that is not padding, if the table has one
    count = count if own < spec.table_spec.vocabulary_size else 0
    lengths = np.zeros(samples, np.int64)
    lengths[:: max(samples // cores.local_devices, 1)] = count
    return RaggedIds.from_lengths(np.full(int(lengths.sum()), own, np.int32), lengths)
