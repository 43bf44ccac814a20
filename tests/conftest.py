"""Every test runs on 8 fake CPU devices, with strict dtype promotion and rank promotion refused."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what is to run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Most of the time of these tests goes into compiling. `make test` asks for programs that are not optimized, which takes
# half as long, on the oldest jax; on the newest, at night and without the variable they are as users have them.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
if os.environ.get("EMBAX_QUICK_COMPILE"):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# `make nightly` asks for more.
EXAMPLES = int(os.environ.get("EMBAX_EXAMPLES", "6"))
settings.register_profile(
    "embax",
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("embax")


MOST_MAPS = 30_000  # of 65,530 that Linux grants a process

# Long sweeps beside which a shorter one of the same kind stays in `make test`.
NIGHTLY = (
    ("test_battery.py", tuple(f"[reference-{name}-" for name in ("ftrl", "f2a", "laprop", "adagrad_momentum", "sgd"))),
    ("test_incremental.py", ("[column-True]", "[table-False]", "[replicated-False]")),
    ("test_docs.py", ("[flax.md]", "[specification.md]")),
    ("test_route.py", ("test_a_batch_without_ids", "test_gains_have")),
    ("test_mesh_mistakes.py", ("[uint8]", "test_weights_behind")),
    ("test_sparsecore_meshes.py", ("[linen-", "[nnx-shape0", "[nnx-shape2", "[nnx-shape3")),
    ("test_joint_optimizer.py", ("ragged]", "[shapes]")),
    ("test_lookup_update.py", ("test_stacks_do_not_change_results[reference", "test_activation_dtype[reference")),
    ("test_checkpoint.py", ("test_other_devices[row-eight-two]",)),
    ("test_mesh_embed.py", ("prefetched[block", "table[block")),
    ("test_mesh_layers.py", ("test_weights_that",)),
    ("test_sparsecore_layers.py", ("test_linen[4]",)),
    ("test_transforms.py", ("test_as_expected[linen-", "test_the_truth_is_no_trivial_one", "eager]")),
    ("test_preprocess.py", ("[reference-",)),
    ("test_native.py", ("test_neither_threads",)),
    ("test_laws.py", ("test_capacity_does_not_matter[reference",)),
    ("test_transforms.py", ("-plain-eager]", "-prefetched-eager]", "-plain]")),
    (
        "test_mesh.py",
        ("test_initial_values_are_those_of_one_device[2]", "test_initial_values_are_those_of_one_device[4]"),
    ),
    ("test_mesh_shapes.py", ("[reference]",)),
    ("test_mesh_layers.py", ("-_square-", "[column]", "[replicated]")),
    # CUDA's kernels run on the host thread by thread: what other backends are asked, they are asked at night.
    (
        "test_battery.py",
        ("[cuda-sgd-bfloat16]", "[cuda-sgd-float16]", "[cuda-adam_modified-b", "[cuda-rowwise_adagrad-float16"),
    ),
    ("test_laws.py", ("test_capacity_does_not_matter[cuda", "test_16_bit_tables_in_place[cuda", "twice_at_most[cuda")),
    ("test_touched.py", ("[cuda",)),
    ("test_quantized.py", ("[cuda",)),
    ("test_preprocess.py", ("[cuda",)),
    ("test_mesh_shapes.py", ("[cuda",)),
    ("test_mesh.py", ("[cuda",)),
    ("test_route.py", ("[cuda",)),
    ("test_battery.py", ("[cuda-sgd_schedule", "[cuda-adagrad_callable", "[cuda-custom")),
    ("test_lookup_update.py", ("test_quantized_rows[cuda", "test_activation_dtype[cuda", "inside_jit[cuda")),
    ("test_calls.py", ("derivative_of_weights[cuda",)),
    ("test_gpu_bench.py", ("test_what_is_written", "test_bags_programs")),
    ("test_sparsecore_layers.py", ("test_nnx[4]",)),
    ("test_sparsecore_meshes.py", ("[nnx-shape1",)),
    ("test_mesh_layers.py", ("[_square-",)),
    ("test_touched.py", ("test_mesh[cpu-column", "test_mesh[cpu-row-_step_by")),
    ("test_feature_embed.py", ("[LinenModel-weighted",)),
    ("test_battery.py", ("[cuda-adagrad_momentum_nesterov", "[cuda-ftrl_multiplied", "[cuda-adagrad_momentum-")),
    ("test_cuda.py", ("every_length[2]", "every_length[200]", "every_length[516]", "[one field]", "[one piece]")),
    ("test_incremental.py", ("test_any_plan_to_any_plan",)),
    ("test_checkpoint_death.py", ("[asynchronous-incremental-2]",)),
    ("test_sparsecore_pipelines.py", ("test_nnx[4]",)),
    ("test_sparsecore_meshes.py", ("[nnx-shape4",)),
    ("test_sparsecore.py", ("test_a_step_is_the_oracles_on_other_devices", "test_initial_values_are")),
    ("test_html_report.py", ("test_a_long_run_of_many",)),
    ("test_feature_embed.py", ("test_prefetching_a_batch[NNXModel]",)),
    ("test_mesh_embed.py", ("test_rows_and_products[block-eight]",)),
    ("test_mesh_quantized.py", ("[table-explicit-reference",)),
    ("test_laws.py", ("test_capacity_does_not_matter[cpu",)),
    ("test_docs.py", ("[mesh.md]",)),
    ("test_pieces.py", ("-one]", "-three]", "[column-square]", "[table-square]", "[replicated-square]", "-alone]")),
    ("test_mesh_quantized.py", ("-reference-route-", "-reference-gather-4]")),
    ("test_checkpoint.py", ("test_damage_is_named[_cut]", "test_damage_is_named[_empty]", "[table-", "[replicated-")),
    ("test_checkpoint.py", ("test_other_devices[column-four", "test_other_devices[column-square")),
    ("test_checkpoint_models.py", ("[where1]",)),
    ("test_incremental.py", ("[row-False]", "[column-False]", "[table-True]", "[replicated-True]")),
    ("test_touched.py", ("test_one_device[reference-optax", "test_one_device[reference-custom", "-route-_step_by")),
    ("test_touched.py", ("[reference-column", "[reference-table", "[reference-replicated", "[reference-route")),
    ("test_touched.py", ("-column-_step_by", "-table-_step_by", "-replicated-_step_by")),
    (
        "test_battery.py",
        ("[reference-sgd-float16", "[reference-rowwise_adagrad-float16", "[reference-adam_modified-float16"),
    ),
    ("test_battery.py", ("[reference-rowwise_adagrad-bfloat16",)),
    (
        "test_quantized.py",
        tuple(
            f"{test}[reference-{dim}"
            for test in ("test_lookup_against_the_oracle", "test_take")
            for dim in ("1-", "2-", "3-", "16-", "100-", "64-float16")
        ),
    ),
    ("test_touched.py", ("reference-row-_step_by", "cpu-route", "cpu-table", "bfloat16")),
    ("test_checkpoint.py", ("test_other_devices[row-four", "test_other_devices[row-square", "[column-eight-two]")),
    ("test_checkpoint_models.py", ("[where2]",)),
    ("test_transforms.py", ("-prefetched]",)),
    ("test_mesh_layers.py", ("test_linen[_line", "test_nnx[value_and_grad-_line-row]")),
    ("test_processes.py", ("test_no_process_outlives_another[1]",)),
    ("test_route.py", ("test_as_one_device[reference-four",)),
    (
        "test_mesh_embed.py",
        (
            "test_initial_values_to_the_bit[float32",
            "test_nnx[block-four",
            "test_rows_and_products[block-four",
            "test_rows_and_products[column-four",
            "test_nnx[column-e",
            "test_nnx[replicated-e",
            "test_rows_and_products[replicated-",
        ),
    ),
    ("test_mesh_mistakes.py", ("[int8]", "[int16]", "[row-column]", "[row-replicated]")),
    (
        "test_sparsecore_pipelines.py",
        ("[2-", "[4-True", "[1-", "[4-checkpoint", "[4-jit", "test_nnx[1]", "[4-shard_maps"),
    ),
    ("test_sparsecore_layers.py", ("test_linen[1]", "test_nnx[1]", "test_a_mesh_of_two")),
    (
        "test_sparsecore_malformed.py",
        ("of_ids[int8", "of_ids[int16", "of_ids[int32", "of_ids[uint8", "of_ids[uint1", "of_ids[uint32"),
    ),
    ("test_sparsecore_lowering.py", ("[1-limits", "[4-limits1", "[4-limits2")),
    ("test_sparsecore_surface.py", ("test_a_linen_layer_over",)),
    ("test_processes.py", ("test_checkpoints_of_two",)),
    (
        "test_laws.py",
        ("test_same_inputs_same_bits[reference", "test_linear_loss_in_place[reference-", "[reference-float16"),
    ),
    ("test_mesh_layers.py", ("test_nnx[prefetch-_line",)),
    (
        "test_route.py",
        ("test_a_donated_step_copies_no_table[reference", "derivative[reference", "one_device[reference-two"),
    ),
    (
        "test_quantized.py",
        ("oracle[reference-5", "oracle[reference-64-bfloat16", "-16-", "[cpu-2-", "[cpu-3-", "[cpu-100-"),
    ),
    (
        "test_mesh_embed.py",
        ("test_nnx[column-four", "test_nnx[replicated-four", "prefetched[column", "table[column", "linen[column"),
    ),
    ("test_mesh_embed.py", ("products_stay_split[batch_axes1",)),
    ("test_flax_training.py", ("[nnx-words-", "[linen-words-")),
    ("test_touched.py", ("[reference-row-_step", "[cpu-replicated-_step", "[reference-sgd_modified")),
    (
        "test_battery.py",
        tuple(
            f"[reference-{name}-"
            for name in (
                "ftrl_multiplied",
                "custom",
                "optax",
                "adagrad_callable",
                "sgd_schedule",
                "adagrad_momentum_nesterov",
                "sgd_modified",
                "adam_modified",
                "sgd-bfloat16",
            )
        ),
    ),
    ("test_checkpoint.py", ("dtype[bfloat16-float32", "dtype[float32-float16", "test_other_devices[row-none-eight")),
    (
        "test_mesh.py",
        ("-batch_on_both-adagrad-reference", "-tables_on_both-rowwise-reference", "-explicit-rowwise-reference"),
    ),
    ("test_lookup_update.py", ("test_quantized_rows[reference-False", "x64[True]")),
    ("test_examples.py", ("test_the_next_word[by_linen]", "test_the_next_word[by_primitives]")),
    ("test_export.py", ("[False-optimizer1]", "[False-optimizer2]", "[True-optimizer1]", "[True-optimizer2]")),
)

# What a newer jax is least likely to change, and takes long: on the oldest only, nightly on both.
ONCE = (
    ("test_transforms.py", ("-prefetched]", "-plain]", "-eager]")),
    ("test_battery.py", ("[reference-sgd-", "[reference-rowwise_adagrad-", "[reference-adam_modified-", "-float16")),
    ("test_laws.py", ("test_same_inputs_same_bits[reference",)),
    ("test_checkpoint_models.py", ("where2", "where1", "another_model", "test_layers", "test_two", "test_linen_plans")),
    ("test_checkpoint.py", ("test_other", "test_any", "test_several", "test_another", "test_names", "test_exported")),
    (
        "test_checkpoint.py",
        ("test_damage", "test_documents", "test_slots", "test_callables", "test_pieces", "test_a_v"),
    ),
    ("test_checkpoint_death.py", ("test_",)),
    ("test_incremental.py", ("test_",)),
    ("test_sparsecore.py", ("test_a_step", "test_initial", "test_one_device")),
    ("test_examples.py", ("test_the_next",)),
    ("test_sparsecore_layers.py", ("test_linen", "test_a_mesh")),
    ("test_sparsecore_pipelines.py", ("[4-", "test_static", "test_a_frozen", "test_zeros")),
    ("test_sparsecore_meshes.py", ("[linen-", "test_other")),
    ("test_sparsecore_malformed.py", ("test_every_width", "test_ids_that", "test_limits")),
    ("test_sparsecore_lowering.py", ("test_a_program",)),
    ("test_sparsecore_layout.py", ("test_tables_are",)),
    ("test_sparsecore_checkpoints.py", ("test_any_devices",)),
    ("test_row_gradients.py", ("test_micro", "test_sums")),
    ("test_laws.py", ("test_capacity", "[reference-")),
    ("test_joint_optimizer.py", ("test_every_k", "test_max_norm")),
    ("test_flax_training.py", ("test_two_hundred", "test_flax_models")),
    ("test_quantized.py", ("test_",)),
    ("test_transforms.py", ("[nnx-",)),
    ("test_flax_embed.py", ("float16", "[embax.linen", "candidates")),
    ("test_preprocess.py", ("test_rectangles", "test_capacity", "test_batches", "under_vmap")),
    ("test_lora_embed.py", ("test_dtypes", "test_it_starts")),
    ("test_lookup_update.py", ("test_quantized", "[reference-")),
    ("test_click.py", ("test_",)),
    ("test_bench.py", ("test_",)),
    ("test_train.py", ("test_",)),
    ("test_run_verbs.py", ("test_",)),
    ("test_retrieval.py", ("test_",)),
    ("test_nvrtc.py", ("test_",)),
    ("test_transforms.py", ("[linen-", "[nnx-")),
    ("test_sparsecore_malformed.py", ("test_",)),
    ("test_sparsecore_checkpoints.py", ("test_",)),
    ("test_sparsecore.py", ("test_",)),
    ("test_checkpoint.py", ("test_",)),
    ("test_distinct_rows.py", ("[cuda",)),
    ("test_sparsecore_meshes.py", ("test_",)),
    ("test_sparsecore_pipelines.py", ("test_",)),
    ("test_touched.py", ("test_",)),
    ("test_route.py", ("test_",)),
    ("test_gpu_lowering.py", ("test_",)),
    ("test_cuda.py", ("test_",)),
    ("test_cuda_programs.py", ("test_",)),
    ("test_emulated.py", ("test_",)),
    ("test_gpu_bench.py", ("test_",)),
    ("test_battery.py", ("[cuda",)),
    ("test_laws.py", ("[cuda",)),
    ("test_calls.py", ("[cuda",)),
    ("test_lookup_update.py", ("[cuda",)),
    ("test_html_report.py", ("test_",)),
    ("test_sparsecore_layout.py", ("test_",)),
    ("test_sparsecore_surface.py", ("test_a_linen", "test_an_nnx", "test_what_is_for")),
    ("test_touched.py", ("test_mesh", "test_nnx", "[reference-", "bfloat16")),
    ("test_pieces.py", ("test_",)),
    ("test_mesh_quantized.py", ("test_",)),
    ("test_mesh_embed.py", ("test_",)),
    ("test_mesh_shapes.py", ("test_",)),
    ("test_block_bits.py", ("test_numbers", "test_tables")),
    ("test_costs.py", ("test_bytes",)),
    ("test_docs.py", ("[flax.md]", "[specification.md]")),
    ("test_export.py", ("[",)),
    ("test_quantized.py", ("[reference-",)),
    ("test_processes.py", ("test_",)),
    ("test_mesh_mistakes.py", ("test_",)),
    ("test_route.py", ("test_as_one_device[reference", "test_rows_and_gradients")),
    ("test_mesh_layers.py", ("test_linen", "test_nnx", "test_weights")),
    ("test_native.py", ("test_neither_threads",)),
    (
        "test_mesh.py",
        ("test_training_is", "[reference-", "test_initial_", "test_the_same_run", "test_gradients", "test_row_grad"),
    ),
    ("test_mesh_laws.py", ("test_a_step",)),
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marker
def pytest_collection_modifyitems(items):
    for item in items:
        if _is_among(item, NIGHTLY):
            item.add_marker(pytest.mark.nightly)
        if _on_card(item):
            item.add_marker(pytest.mark.gpu)
        # `make nightly` leaves out what ran `once` on the oldest: a nightly test did not.
        if _is_among(item, ONCE) and not item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.once)


def _on_card(item):
    """Whether a test of every backend runs CUDA's on a card: `pytest -m gpu` asks these too."""
    named = "[cuda" in item.name or "-cuda" in item.name or "test_cuda.py" in item.nodeid
    return named and os.environ["JAX_PLATFORMS"] != "cpu" and jax.default_backend() == "gpu"


def _is_among(item, tests):
    return any(file in item.nodeid and any(part in item.name for part in parts) for file, parts in tests)


@pytest.fixture(scope="module")
def eight_devices():
    """Skips where there are fewer; clears JAX's caches where many memory maps are in use at the end."""
    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 CPU devices, and there are {len(jax.devices())}")
    yield
    if _memory_maps() > MOST_MAPS:
        jax.clear_caches()


def _memory_maps():
    """Returns how many memory maps this process has; the most there can be where nobody can say."""
    try:
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return MOST_MAPS + 1


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request, monkeypatch):
    """Each backend that can run here; CUDA's on the host where there is no card and a C++ compiler."""
    import emulated

    from embax import kernels

    if request.param == "cuda" and jax.default_backend() == "cpu" and emulated.why_not() is None:
        emulated.install(monkeypatch)
    why_not = kernels.get(request.param).unavailable()
    if why_not:
        pytest.skip(f"backend {request.param}: {why_not}")
    return request.param
