"""The primitives of the SparseCore API, on any backend: prepare, preprocess, look up, update, initialize.

What has to do with TPU hardware is accepted and has no effect on the numbers; no id is ever lost.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from embax.sparsecore.all_reduce import get_all_reduce_interface as get_all_reduce_interface
from embax.sparsecore.inputs import LIMITS, Cores, from_coordinates, preprocessed
from embax.sparsecore.inputs import PreprocessedInput as PreprocessedInput
from embax.sparsecore.inputs import SparseDenseMatmulInput as SparseDenseMatmulInput
from embax.sparsecore.lib.nn import table_stacking
from embax.sparsecore.lib.nn.embedding_proto_utils import (
    create_proto_from_feature_specs as create_proto_from_feature_specs,
)
from embax.sparsecore.lib.nn.embedding_proto_utils import optimizer_spec_to_proto as optimizer_spec_to_proto
from embax.sparsecore.lib.nn.embedding_proto_utils import proto_to_optimizer_spec as proto_to_optimizer_spec
from embax.sparsecore.lib.nn.table_stacking import LimitsCallable as LimitsCallable
from embax.sparsecore.lib.nn.table_stacking import get_default_limits as get_default_limits
from embax.sparsecore.lib.nn.table_stacking import stack_tables as stack_tables
from embax.sparsecore.matmul import EmbeddingVariables as EmbeddingVariables
from embax.sparsecore.matmul import arrays_of, check_stacks, limits_by_stack, looked_up, stacked, stepped, unstacked
from embax.sparsecore.sizes import compute_coo_buffer_size_per_device as compute_coo_buffer_size_per_device
from embax.sparsecore.sizes import compute_row_pointers_size_per_device as compute_row_pointers_size_per_device
from embax.sparsecore.sizes import compute_theoretical_max_coo_buffer_size as compute_theoretical_max_coo_buffer_size
from embax.sparsecore.sizes import (
    eval_preprocess_sparse_dense_matmul_input_shape as eval_preprocess_sparse_dense_matmul_input_shape,
)
from embax.sparsecore.statistics import SparseDenseMatmulInputStats as SparseDenseMatmulInputStats
from embax.sparsecore.structure import is_feature, leaves_beside
from embax.sparsecore.translation import check_cores, check_names, stacks_of
from embax.sparsecore.utils import utils
from embax.sparsecore.variables import all_variables, check_axes, check_order
from embax.specs import StackedTableSpec, TableSpec


class EmbeddingVariablesInitializer(NamedTuple):
    """Initializers of rows and slots, ``(key, shape, dtype) -> array``."""

    table: Any
    slot: tuple


def get_table_specs(feature_specs: Any) -> dict[str, TableSpec]:
    """Returns the tables of features by name; ValueError for a name that two of them have."""
    leaves, tables = table_stacking.feature_leaves(feature_specs), {}
    check_names(leaves)
    for feature in leaves:
        known = tables.setdefault(feature.table_spec.name, feature.table_spec)
        if known != feature.table_spec:
            raise ValueError(
                f'table "{known.name}" is defined twice, with other settings; share one TableSpec, or rename one'
            )
    return tables


def get_stacked_table_specs(feature_specs: Any) -> dict[str, StackedTableSpec]:
    """Returns the stacks of prepared features by name; ValueError for a table that is in none."""
    return {name: stack.spec for name, stack in stacks_of(feature_specs).items()}


def prepare_feature_specs_for_training(
    feature_specs: Any, global_device_count: int, num_sc_per_device: int | None = None
) -> None:
    """Gives every table that is in no stack its own stack, in place; features of one table in order of their names.

    Args:
      feature_specs: any pytree of FeatureSpecs.
      global_device_count: devices of all processes.
      num_sc_per_device: SparseCores of each; None for those of this machine.

    >>> import jax, embax
    >>> table = embax.TableSpec(name="a", vocabulary_size=100, embedding_dim=8, combiner="sum",
    ...     initializer=jax.nn.initializers.zeros, optimizer=embax.SGD())
    >>> feature = embax.FeatureSpec(name="x", table_spec=table, input_shape=(16, 1), output_shape=(16, 8))
    >>> prepare_feature_specs_for_training(feature, 1, 4)
    >>> get_stacked_table_specs(feature)["a"].stack_vocab_size
    128
    """
    num_sc = utils.checked(num_sc_per_device)
    leaves = table_stacking.feature_leaves(feature_specs)
    for name, table in get_table_specs(feature_specs).items():
        if not table.is_stacked():
            own = sorted((f for f in leaves if f.table_spec.name == name), key=lambda feature: feature.name)
            table_stacking.stack_tables(own, [name], global_device_count, num_sc, stack_name=name)


def auto_stack_tables(
    feature_specs: Any,
    global_device_count: int,
    num_sc_per_device: int | None = None,
    stack_to_max_ids_per_partition: LimitsCallable = get_default_limits,
    stack_to_max_unique_ids_per_partition: LimitsCallable = get_default_limits,
    use_short_stack_names: bool = True,
) -> None:
    """Stacks all tables that can be, in place; see ``table_stacking.auto_stack_tables``."""
    table_stacking.auto_stack_tables(
        feature_specs,
        global_device_count,
        utils.checked(num_sc_per_device),
        stack_to_max_ids_per_partition=stack_to_max_ids_per_partition,
        stack_to_max_unique_ids_per_partition=stack_to_max_unique_ids_per_partition,
        use_short_stack_names=use_short_stack_names,
    )


def preprocess_sparse_dense_matmul_input(
    features: Any,
    features_weights: Any,
    feature_specs: Any,
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int | None = None,
    sharding_strategy: str = "MOD",
    has_leading_dimension: bool = False,
    allow_id_dropping: bool = False,
    batch_number: int = 0,
    enable_minibatching: bool = False,
    all_reduce_interface: Any = None,
    limits: str = "ignore",
) -> tuple[PreprocessedInput, SparseDenseMatmulInputStats]:
    """Returns a process's part of a batch for ``tpu_sparse_dense_matmul``, and statistics as a TPU would count them.

    Args:
      features: in the structure of ``feature_specs``: integer arrays ``[batch, valency]``, or lists or object arrays of
        integer arrays; whatever ``embax.preprocess`` takes.
      features_weights: in that structure and form, or None.
      feature_specs: prepared FeatureSpecs.
      local_device_count: devices of this process.
      global_device_count: of all.
      num_sc_per_device: SparseCores of each; None for those of this machine.
      sharding_strategy: "MOD".
      has_leading_dimension: whether arrays lead with the device, for ``jax.pmap``.
      allow_id_dropping: without effect: nothing is dropped.
      batch_number: without effect.
      enable_minibatching: whether ``num_minibatches`` says how a TPU would cut the batch.
      all_reduce_interface: without effect.
      limits: "ignore", "warn" or "error": what to do where a TPU would have to drop ids.

    Raises:
      ValueError: another structure; ids, weights or samples that do not fit; a limit, if that was asked for.
    """
    del allow_id_dropping, batch_number, all_reduce_interface
    utils.check_strategy(sharding_strategy)
    if limits not in LIMITS:
        raise ValueError(f"limits={limits!r} must be one of {', '.join(LIMITS)}")
    cores = Cores.of(local_device_count, global_device_count, num_sc_per_device)
    leaves = leaves_beside(features, feature_specs, "features")
    weights = None if features_weights is None else leaves_beside(features_weights, feature_specs, "features_weights")
    options = {
        "has_leading_dimension": has_leading_dimension,
        "enable_minibatching": enable_minibatching,
        "limits": limits,
    }
    return preprocessed(leaves, weights, feature_specs, cores, options)


def preprocess_sparse_dense_matmul_input_from_sparse_tensor(
    indices: Any,
    values: Any,
    dense_shapes: Any,
    feature_specs: Any,
    local_device_count: int,
    global_device_count: int,
    **options: Any,
) -> tuple[PreprocessedInput, SparseDenseMatmulInputStats]:
    """Returns what ``preprocess_sparse_dense_matmul_input`` does, of sparse tensors.

    Args:
      indices: int ``[n, 2]`` of each feature: sample, and any second number.
      values: the ids, ``[n]``.
      dense_shapes: of each feature, ``[samples, any]``.
      feature_specs: prepared FeatureSpecs.
      local_device_count: devices of this process.
      global_device_count: of all.
      options: as for ``preprocess_sparse_dense_matmul_input``.
    """
    given = [
        leaves_beside(tree, feature_specs, name)
        for name, tree in (("indices", indices), ("values", values), ("dense_shapes", dense_shapes))
    ]
    specs = table_stacking.feature_leaves(feature_specs)
    ragged = [from_coordinates(feature, *parts) for feature, *parts in zip(specs, *given, strict=True)]
    structure = jax.tree.structure(feature_specs, is_leaf=is_feature)
    features = jax.tree.unflatten(structure, ragged)
    return preprocess_sparse_dense_matmul_input(
        features, None, feature_specs, local_device_count, global_device_count, **options
    )


def tpu_sparse_dense_matmul(
    preprocessed_inputs: Any,
    embedding_variables: Mapping[str, Any],
    feature_specs: Any,
    *,
    global_device_count: int,
    sharding_strategy: str = "MOD",
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
    perform_unstacking: bool = True,
    use_activation_unstack_primitive: bool = False,
) -> Any:
    """Returns the activations of a device's samples, in the structure of the features.

    Inside of ``jax.shard_map`` or ``jax.pmap`` over all devices; of one device outside of them, too.

    Args:
      preprocessed_inputs: from ``preprocess_sparse_dense_matmul_input``.
      embedding_variables: rows and slots of every stack by its name.
      feature_specs: prepared FeatureSpecs.
      global_device_count: devices of all processes.
      sharding_strategy: "MOD".
      num_sc_per_device: SparseCores of each; None for those of this machine.
      enable_minibatching: without effect.
      perform_unstacking: False for the activations of the stacks, ``{stack: [samples, stack_embedding_dim]}``.
      use_activation_unstack_primitive: without effect.

    Raises:
      ValueError: variables or inputs of other features, or a call that is not on all devices.
    """
    del enable_minibatching, use_activation_unstack_primitive
    utils.check_strategy(sharding_strategy)
    stacks, arrays = stacks_of(feature_specs), arrays_of(preprocessed_inputs)
    check_stacks(stacks, arrays, embedding_variables)
    num_sc = utils.checked(num_sc_per_device)
    check_cores(stacks, utils.counted("global_device_count", global_device_count), num_sc)
    activations = {
        name: looked_up(stack, name, arrays, embedding_variables[name], global_device_count)
        for name, stack in stacks.items()
    }
    if not perform_unstacking:
        return activations
    return unstack_embedding_activations(activations, feature_specs, global_device_count, num_sc)


def unstack_embedding_activations(
    activations: Mapping[str, jax.Array],
    feature_specs: Any,
    global_device_count: int,
    num_sc_per_device: int,
    use_activation_unstack_primitive: bool = False,
) -> Any:
    """Returns each feature's activations, of those of the stacks; see ``tpu_sparse_dense_matmul``."""
    del use_activation_unstack_primitive
    stacks = stacks_of(feature_specs)
    leaves, structure = jax.tree.flatten(feature_specs, is_leaf=is_feature)
    found = unstacked(activations, stacks, global_device_count, num_sc_per_device, len(leaves))
    return jax.tree.unflatten(structure, found)


def stack_embedding_gradients(
    activation_gradients: Any,
    feature_specs: Any,
    num_sc_per_device: int,
    global_device_count: int | None = None,
    use_gradient_stacking_primitive: bool = False,
) -> dict[str, jax.Array]:
    """Returns the gradients of the stacks' activations, of those of the features."""
    del global_device_count, use_gradient_stacking_primitive
    leaves = leaves_beside(activation_gradients, feature_specs, "activation_gradients")
    return stacked(leaves, stacks_of(feature_specs), num_sc_per_device)


def tpu_sparse_dense_matmul_grad(
    activation_gradients: Any,
    preprocessed_inputs: Any,
    embedding_variables: Mapping[str, Any],
    feature_specs: Any,
    *,
    global_device_count: int | None = None,
    sharding_strategy: str = "MOD",
    label: str = "",
    step: Any = None,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
    perform_stacking: bool = True,
    use_gradient_stacking_primitive: bool = False,
    embedding_var_limits: Any = None,
) -> dict[str, EmbeddingVariables]:
    """Returns the variables after one optimizer step on every row that the global batch touched.

    Args:
      activation_gradients: in the structure of the features; of the stacks without ``perform_stacking``.
      preprocessed_inputs: those of the lookup.
      embedding_variables: rows and slots of every stack by its name.
      feature_specs: prepared FeatureSpecs.
      global_device_count: devices of all processes; None for what the variables say.
      sharding_strategy: "MOD".
      label: without effect.
      step: counted from 0, for schedules and bias corrections.
      num_sc_per_device: SparseCores of each device; None for those of this machine.
      enable_minibatching: without effect.
      perform_stacking: whether gradients are those of the features.
      use_gradient_stacking_primitive: without effect.
      embedding_var_limits: ``(low, high)`` to which touched rows are clipped after the step, for all stacks or by name;
        either may be None.

    Raises:
      ValueError: variables, inputs or gradients of other features, or a call that is not on all devices.
    """
    del label, enable_minibatching, use_gradient_stacking_primitive
    utils.check_strategy(sharding_strategy)
    stacks, arrays = stacks_of(feature_specs), arrays_of(preprocessed_inputs)
    check_stacks(stacks, arrays, embedding_variables)
    num_sc, limits = utils.checked(num_sc_per_device), limits_by_stack(embedding_var_limits, stacks)
    counts = {name: global_device_count or _devices(stack, embedding_variables[name]) for name, stack in stacks.items()}
    for name, stack in stacks.items():
        check_cores({name: stack}, counts[name], num_sc)
    gradients = activation_gradients
    if perform_stacking:
        gradients = stack_embedding_gradients(activation_gradients, feature_specs, num_sc)
    elif set(gradients) != set(stacks):
        raise ValueError(f"gradients are of stacks {sorted(gradients)}, and the features have {sorted(stacks)}")
    return {
        name: stepped(stack, arrays, embedding_variables[name], gradients[name], counts[name], step, limits[name])
        for name, stack in stacks.items()
    }


def _devices(stack: Any, variable: Any) -> int:
    """Returns how many devices share a stack of which one has so many rows."""
    return stack.spec.stack_vocab_size * stack.spec.stack_embedding_dim // variable[0].size


def init_embedding_variables(
    rng: jax.Array,
    table_specs: Any,
    global_sharding: Any,
    num_sparsecore_per_device: int | None = None,
    bypass_mesh_check: bool = False,
) -> dict[str, EmbeddingVariables]:
    """Returns fresh rows and slots of every stack by its name; the values do not depend on devices or stacks.

    Args:
      rng: from ``jax.random.key``.
      table_specs: any pytree of stacked TableSpecs, as ``get_table_specs`` has them.
      global_sharding: a NamedSharding of ``P(axis, None)``; ``P(axis, None, None)`` for arrays that lead with the
        device, for ``jax.pmap``.
      num_sparsecore_per_device: None for those of this machine.
      bypass_mesh_check: whether the mesh may have its devices in another order than ``jax.devices()``.

    Raises:
      ValueError: another sharding, tables in no stack or one of other SparseCores, devices or axes in another order.
    """
    if not bypass_mesh_check:
        check_order(global_sharding.mesh)
    check_axes(global_sharding)
    return all_variables(rng, table_specs, global_sharding, utils.checked(num_sparsecore_per_device))


def update_preprocessing_parameters(
    feature_specs: Any, updated_params: SparseDenseMatmulInputStats, num_sc_per_device: int | None = None
) -> None:
    """Writes the limits that statistics call for into the stacks of features, in place; others keep what they have."""
    num_sc, stacks, changed = utils.checked(num_sc_per_device), stacks_of(feature_specs), {}
    for name, stack in stacks.items():
        changes: dict[str, Any] = {
            field: max(1, int(np.max(values[name])))
            for field in ("max_ids_per_partition", "max_unique_ids_per_partition")
            if name in (values := getattr(updated_params, field)) and np.size(values[name])
        }
        buffer = updated_params.get_required_buffer_size_per_device(name, num_sc)
        if buffer is not None:
            changes["suggested_coo_buffer_size_per_device"] = buffer
        changed[name] = dataclasses.replace(stack.spec, **changes)
    for name, spec in changed.items():  # all of them, or none
        for _, feature in stacks[name].features:
            feature.table_spec._stacked_table_spec = spec
