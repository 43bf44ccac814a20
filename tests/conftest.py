"""Every test runs on 8 fake CPU devices, with strict dtype promotion and rank promotion refused."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# `make nightly` asks for more.
EXAMPLES = int(os.environ.get("EMBAX_EXAMPLES", "25"))
settings.register_profile(
    "embax",
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("embax")


# What a newer jax is least likely to change, and takes long: on the oldest only, nightly on both.
ONCE = (
    ("test_transforms.py", ("-prefetched]", "-plain]", "-eager]")),
    ("test_battery.py", ("[reference-sgd-", "[reference-rowwise_adagrad-", "[reference-adam_modified-")),
    ("test_laws.py", ("test_same_inputs_same_bits[reference", "test_capacity_does_not_matter[reference")),
    ("test_native.py", ("test_neither_threads",)),
    (
        "test_mesh.py",
        ("test_training_is", "[reference-", "test_initial_values_are", "test_the_same_run", "test_gradients"),
    ),
    ("test_mesh_laws.py", ("test_a_step",)),
)


def pytest_collection_modifyitems(items):
    for item in items:
        if any(file in item.nodeid and any(part in item.name for part in parts) for file, parts in ONCE):
            item.add_marker(pytest.mark.once)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend that can run here; the reference always, the native one where it is built."""
    from embax import kernels

    why_not = kernels.get(request.param).unavailable()
    if why_not:
        pytest.skip(f"backend {request.param}: {why_not}")
    return request.param
