"""Every public name of the SparseCore API, and the test that exercises it.

``python tests/sparsecore_names.py`` prints a line for each, and exits with 1 where a name cannot be imported, a
parameter is not there, or the test does not exist or does not mention it (itself, or by what it calls in its file).
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

TESTS = pathlib.Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A name: a class, function, constant, method or property of a module, or a parameter of one of them."""

    module: str
    name: str
    parameter: str | None
    test: str

    @property
    def id(self) -> str:
        """The name as one reads it."""
        return f"{self.module}.{self.name}" + (f"({self.parameter})" if self.parameter else "")


# Names by module and test. "f(a, b)" is f and its parameters; "C.m" a method, property or field of C.
_LAYOUT, _SURFACE, _CORE = "test_sparsecore_layout.py::", "test_sparsecore_surface.py::", "test_sparsecore.py::"
_LAYERS, _PIPELINES = "test_sparsecore_layers.py::", "test_sparsecore_pipelines.py::"
_LOWERING, _PROTO = "test_sparsecore_lowering.py::", "test_sparsecore_proto.py::"
_CHECKPOINTS = "test_sparsecore_checkpoints.py::"
NAMES = {
    "lib.nn.embedding_spec": {
        _SURFACE + "test_tables": """
            TableSpec(name, vocabulary_size, embedding_dim, initializer, optimizer, combiner, max_ids_per_partition,
              max_unique_ids_per_partition, suggested_coo_buffer_size_per_device, quantization_config)
            TableSpec(_stacked_table_spec, _setting_in_stack)
            TableSpec.setting_in_stack TableSpec.stacked_table_spec TableSpec.is_stacked""",
        _SURFACE + "test_features_settings_and_stacks": """
            FeatureSpec(name, table_spec, input_shape, output_shape, _id_transformation) FeatureSpec.id_transformation
            FeatureIdTransformation(row_offset, col_offset, col_shift)
            TableSettingInStack(stack_name, padded_vocab_size, padded_embedding_dim, row_offset_in_shard,
              shard_rotation)
            StackedTableSpec(stack_name, stack_vocab_size, stack_embedding_dim, optimizer, combiner,
              total_sample_count, max_ids_per_partition, max_unique_ids_per_partition, activation_mem_bytes_limit,
              suggested_coo_buffer_size_per_device, quantization_config)
            StackedTableSpec.replace""",
        _SURFACE + "test_quantized_rows": """
            QuantizationConfig(min_value, max_value, num_buckets) QuantizationConfig.as_tuple""",
        _SURFACE + "test_defaults_of_the_optimizers": """
            OptimizerSpec SGDOptimizerSpec(learning_rate)
            AdagradOptimizerSpec(learning_rate, initial_accumulator_value)
            AdagradMomentumOptimizerSpec(learning_rate, momentum, beta2, epsilon, exponent, use_nesterov,
              initial_accumulator_value, initial_momentum_value)
            AdamOptimizerSpec(learning_rate, beta_1, beta_2, epsilon)
            LaPropOptimizerSpec(learning_rate, b1, b2, eps, rms_clip_threshold, initial_slot_value)
            FTRLOptimizerSpec(learning_rate, learning_rate_power, l1_regularization_strength,
              l2_regularization_strength, beta, initial_accumulator_value, initial_linear_value,
              multiply_linear_by_learning_rate)
            F2AOptimizerSpec(learning_rate, rho, initial_accumulator_value, initial_local_step_value,
              l1_regularization_strength, l2_regularization_strength, max_lr_multiplier)""",
        _SURFACE + "test_the_formulas_of_the_optimizers": """
            CustomOptimizerSpec(learning_rate, custom_computation_fn, stablehlo, slot_variable_initializers_tuple,
              short_name_str)
            SGDSlotVariables AdagradSlotVariables(accumulator) AdagradMomentumSlotVariables(accumulator, momentum)
            AdamSlotVariables(momentum, velocity) LaPropSlotVariables(mu, nu) FTRLSlotVariables(accumulator, linear)
            F2ASlotVariables(accumulator, local_step) OptimizerSpec.slot_variables_count""",
        _SURFACE + "test_what_an_optimizer_says_of_itself": """
            OptimizerSpec.get_learning_rate OptimizerSpec.get_hyperparameters
            OptimizerSpec.slot_variables_initializers OptimizerSpec.short_name OptimizerSpec.get_float_params
            OptimizerSpec.get_bool_params OptimizerSpec.from_float_and_bool_params CallablePlaceholder(tag)""",
        _LOWERING + "test_texts": """
            CustomOptimizerSpec.lower_to_stablehlo CustomOptimizerSpec.wrap_stablehlo_with_limits""",
    },
    "lib.nn.table_stacking": {
        _SURFACE + "test_names_of_stacks": "auto_stack_tables(features, global_device_count, num_sc_per_device)",
        _SURFACE + "test_tables_are_stacked_by_what_they_share": "auto_stack_tables(activation_mem_bytes_limit)",
        _SURFACE + "test_limits_offsets_and_rotation": """
            stack_tables(features, table_names, global_device_count, num_sc_per_device, rotation,
              stack_to_max_ids_per_partition, stack_to_max_unique_ids_per_partition, stack_name)""",
        _CORE + "test_stacking_twice_and_padding": "stack_tables(fail_on_excess_padding)",
        _LAYOUT + "test_tables_are_laid_out_and_come_back": """
            stack_and_shard_tables(pad_value) unshard_and_unstack_tables""",
        _LAYOUT + "test_what_is_given_away": """
            unstack_and_unshard_stacked_tables(donate) stack_and_shard_feature_tables(delete_input)""",
        _LAYOUT + "test_rows_of_ids": """
            compute_physical_row_ids get_row_ids_in_stacked_table get_row_ids_in_stacked_tables""",
        _LAYOUT + "test_settings_and_stacks": """
            compute_table_to_setting_in_stack get_table_stacks round_up_dim_and_vocab_size get_default_limits""",
    },
    "lib.nn.embedding": {
        _SURFACE + "test_names_of_stacks": "auto_stack_tables(use_short_stack_names)",
        _CORE + "test_a_step_is_the_oracles": """
            prepare_feature_specs_for_training preprocess_sparse_dense_matmul_input tpu_sparse_dense_matmul
            tpu_sparse_dense_matmul_grad init_embedding_variables""",
        _SURFACE + "test_tables_are_stacked_by_what_they_share": "get_table_specs get_stacked_table_specs",
        _SURFACE + "test_what_is_for_hardware_changes_nothing": """
            EmbeddingVariables(table, slot)
            preprocess_sparse_dense_matmul_input(features, features_weights, feature_specs, local_device_count,
              global_device_count, num_sc_per_device, sharding_strategy, allow_id_dropping, batch_number,
              enable_minibatching, all_reduce_interface)
            tpu_sparse_dense_matmul(preprocessed_inputs, embedding_variables, feature_specs, global_device_count,
              sharding_strategy, num_sc_per_device, enable_minibatching, perform_unstacking,
              use_activation_unstack_primitive)
            tpu_sparse_dense_matmul_grad(activation_gradients, preprocessed_inputs, embedding_variables,
              feature_specs, global_device_count, sharding_strategy, label, step, num_sc_per_device,
              enable_minibatching, perform_stacking, use_gradient_stacking_primitive)
            unstack_embedding_activations(use_activation_unstack_primitive)
            stack_embedding_gradients(num_sc_per_device, global_device_count, use_gradient_stacking_primitive)
            init_embedding_variables(rng, table_specs, global_sharding, num_sparsecore_per_device)""",
        _SURFACE + "test_limits_of_the_variables": "tpu_sparse_dense_matmul_grad(embedding_var_limits)",
        _SURFACE + "test_initial_variables_for_pmap": "init_embedding_variables(bypass_mesh_check)",
        _SURFACE + "test_a_batch_and_its_parts": """
            preprocess_sparse_dense_matmul_input(has_leading_dimension) EmbeddingVariablesInitializer(table, slot)
            PreprocessedInput(sparse_dense_matmul_input, num_minibatches) PreprocessedInput.replace
            PreprocessedInput.lhs_row_pointers PreprocessedInput.lhs_embedding_ids PreprocessedInput.lhs_sample_ids
            PreprocessedInput.lhs_gains SparseDenseMatmulInput""",
        _SURFACE + "test_stacks_of_gradients_are_those_of_activations": """
            unstack_embedding_activations stack_embedding_gradients""",
        _CORE + "test_sparse_tensors": "preprocess_sparse_dense_matmul_input_from_sparse_tensor",
        _CORE + "test_limits_can_be_rehearsed": "preprocess_sparse_dense_matmul_input(limits)",
        _SURFACE + "test_buffers_in_the_statistics": """
            SparseDenseMatmulInputStats(required_buffer_size_per_sc)
            SparseDenseMatmulInputStats.get_required_buffer_size_per_device
            SparseDenseMatmulInputStats.set_required_buffer_size_per_device
            update_preprocessing_parameters(updated_params, num_sc_per_device)""",
        _CORE + "test_statistics_are_those_of_a_tpu": """
            SparseDenseMatmulInputStats(max_ids_per_partition, max_unique_ids_per_partition, id_drop_counters,
              would_drop)""",
        _SURFACE + "test_sizes_of_buffers": """
            compute_row_pointers_size_per_device(global_device_count, num_sc_per_device, enable_minibatching)
            compute_theoretical_max_coo_buffer_size(max_ids_per_partition, global_device_count, num_sc_per_device,
              enable_minibatching)
            compute_coo_buffer_size_per_device(feature_specs, global_device_count, num_sc_per_device,
              enable_minibatching)""",
        _SURFACE + "test_shapes_of_a_batch": """
            eval_preprocess_sparse_dense_matmul_input_shape(num_sc_per_device, has_leading_dimension,
              enable_minibatching, weighted)""",
        _PIPELINES + "test_an_all_reduce_interface_changes_nothing": "get_all_reduce_interface",
        _PROTO + "test_features_on_the_wire": "create_proto_from_feature_specs",
    },
    "lib.nn.embedding_proto_utils": {
        _PROTO + "test_features_on_the_wire": "create_proto_from_feature_specs",
        _PROTO + "test_optimizers_come_back": "optimizer_spec_to_proto proto_to_optimizer_spec",
    },
    "lib.nn.custom_optimizer_lowering": {
        _LOWERING + "test_texts": "lower_to_stablehlo wrap_stablehlo_with_limits",
    },
    "lib.flax.linen.embed": {
        _SURFACE + "test_a_linen_layer_over_two_axes": """
            SparseCoreEmbed(feature_specs, sharding_axis, mesh, table_sharding_strategy, enable_minibatching)
            SparseCoreEmbed.preprocess_inputs SparseCoreEmbed.preprocess_inputs(all_reduce_interface)""",
        _LAYERS + "test_linen": "EMBEDDING_PARAM_NAME SparseCoreEmbed.apply_gradient",
    },
    "lib.flax.linen.embed_optimizer": {
        _LAYERS + "test_linen": "create_optimizer_for_sc_model apply_updates_for_sc_model",
    },
    "lib.flax.nnx.embed": {
        _LAYERS + "test_nnx": """
            SparseCoreEmbed get_named_sharding PartitionedOptimizer PartitionedOptimizer.update embedding_lookup_bwd""",
        _SURFACE + "test_an_nnx_layer": """
            SparseCoreEmbed(feature_specs, sharding_axis, mesh, rngs, enable_minibatching, table_sharding_strategy)
            EmbeddingVariablesParam is_embedding_variables is_non_embedding_variables embedding_lookup""",
    },
    "lib.flax.nnx.checkpoint_utils": {
        _CHECKPOINTS + "test_the_same_devices": "create_checkpoint_manager save_checkpoint restore_checkpoint",
        _CHECKPOINTS + "test_any_devices_and_stacks": "restore_cross_topology_checkpoint",
        _CHECKPOINTS + "test_conversion": "convert_cross_topology_checkpoint TargetTopology",
        _CHECKPOINTS + "test_archives_and_the_command": "decompress_checkpoint",
    },
    "lib.flax.nnx.offline_converter": {_CHECKPOINTS + "test_archives_and_the_command": "main"},
    "lib.nn.embedding_pipelining_utils": {
        _PIPELINES + "test_a_pipeline_is_two_steps_late": """
            step(sc_fwd_function, tc_function, sc_bwd_function, fake_tc_step) get_initial_state
            get_pipeline_state_sharding get_pipeline_train_steps is_output_valid get_default_sc_fwd_function
            get_default_sc_bwd_function CurrentStepInput PipelineState""",
        _SURFACE + "test_the_state_of_a_pipeline": """
            LastStepInput(sparse_inputs, embedding_activations, dense_inputs, sc_fwd_aux)
            StepBeforeLastStepInput(sparse_inputs, embedding_gradients, tc_aux)
            CurrentStepInput(sparse_inputs, dense_inputs) PipelineState.replace""",
    },
    "lib.auto_pipelining.auto_pipelining": {_PIPELINES + "test_two_pipelines_of_one_function": "auto_pipelining"},
    "lib.fdo.fdo_client": {
        _SURFACE + "test_a_client_of_ones_own": """
            FDOClient FDOClient.record FDOClient.publish FDOClient.load"""
    },
    "lib.fdo.file_fdo_client": {_LAYERS + "test_statistics_come_back": "NPZFileFDOClient"},
    "lib.fdo.csv_file_fdo_client": {_LAYERS + "test_one_record_and_the_largest": "CSVFileFDOClient(retain_history)"},
    "utils.utils": {
        _LAYOUT + "test_cores_of_a_chip": "num_sparsecores_per_device NUM_SC_PER_DEVICE_MAP",
        _LAYOUT + "test_one_table": """
            shard_emb_table(num_devices, num_sc_per_device) unshard_emb_table(num_sc_per_device)""",
        _LAYOUT + "test_one_table_that_does_not_divide": "shard_emb_table(sharding_strategy)",
        _LAYOUT + "test_where_a_table_lies": "embedding_table_format embedding_table_format_with_sharding",
    },
}


def _entries() -> list[Entry]:
    found = {}
    for module, tests in NAMES.items():
        for test, names in tests.items():
            for name, parameters in re.findall(r"([\w.]+)(?:\(([^)]*)\))?", names):
                for parameter in (None, *re.findall(r"\w+", parameters)):
                    entry = Entry(module, name, parameter, test)
                    found.setdefault(entry.id, entry)
    return list(found.values())


ENTRIES = _entries()


def fault(entry: Entry) -> str | None:
    """Returns what is wrong with an entry: that it is not there, or not exercised; None where all is well."""
    try:
        thing = importlib.import_module(f"embax.sparsecore.{entry.module}")
    except ImportError as error:
        return f"{entry.module}: {type(error).__name__}"
    for part in entry.name.split("."):
        known = thing.__dataclass_fields__ if hasattr(thing, "__dataclass_fields__") else ()
        if not hasattr(thing, part) and part not in known:
            return f"{entry.id}: there is no such name"
        thing = getattr(thing, part, None)
    if entry.parameter and entry.parameter not in _parameters(thing):
        return f"{entry.id}: it has no parameter {entry.parameter}"
    file, test = entry.test.split("::")
    if not (TESTS / file).exists():
        return f"{entry.id}: there is no {file}"
    words = _mentioned(file, test)
    if words is None:
        return f"{entry.id}: there is no {test} in {file}"
    wanted = entry.parameter or entry.name.split(".")[-1]
    return None if wanted in words else f"{entry.id}: {entry.test} does not mention {wanted}"


def _parameters(thing: Any) -> set[str]:
    found = set(inspect.signature(thing).parameters)
    return found | set(inspect.signature(thing.__init__).parameters) if isinstance(thing, type) else found


@functools.cache
def _statements(file: str) -> dict[str, list[ast.stmt]]:
    """Returns the statements of a file that define each of its names."""
    found: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse((TESTS / file).read_text()).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(statement.name, []).append(statement)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        found.setdefault(node.id, []).append(statement)
    return found


@functools.cache
def _mentioned(file: str, test: str) -> frozenset[str] | None:
    """Returns the words of a test, and of what it uses of its file; None where there is no such test."""
    known = _statements(file)
    if not isinstance(known.get(test, [None])[0], ast.FunctionDef):
        return None
    words, waiting, seen = set(), [test], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for statement in known.get(name, ()):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    words.add(node.id)
                    waiting.append(node.id)
                elif isinstance(node, ast.Attribute):
                    words.add(node.attr)
                elif isinstance(node, ast.keyword) and node.arg:
                    words.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    words.add(node.value)
    return frozenset(words)


def main(entries: Sequence[Entry] = tuple(ENTRIES)) -> int:
    """Prints a line for each entry; returns 1 where one is missing or not exercised, else 0."""
    faults = {entry: fault(entry) for entry in entries}
    for entry, wrong in faults.items():
        print(f"MISSING {wrong}" if wrong else f"{entry.id}: {entry.test}")
    missing = sum(wrong is not None for wrong in faults.values())
    print(f"{len(faults)} names, {missing} missing or not exercised")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
