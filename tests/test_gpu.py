"""What needs a card: run `JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu`, which asks the battery and the laws too."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, table_spec

import embax
from embax.kernels import cuda

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu"
    ),
]


def test_the_backend_is_there_and_chosen():
    assert cuda.unavailable() is None
    assert embax.kernels.choose().name == "cuda"


def _training(rows, dim, optimizer, batch=4096, backend="cuda"):
    table = table_spec(rows=rows, dim=dim, optimizer=optimizer, initializer=jax.nn.initializers.ones)
    plan = embax.plan(feature(table, inputs=(batch, 3)), backend=backend)
    rng = np.random.default_rng(0)
    batches = [embax.preprocess(plan, rng.zipf(1.1, (batch, 3)) % rows) for _ in range(4)]
    gradient = jnp.asarray(rng.normal(size=(batch, dim)), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(tables, ids, number):
        activations, residuals = embax.lookup(plan, tables, ids)
        return embax.update(plan, tables, residuals, activations * 0.1 + gradient, number)

    return plan, step, batches


@pytest.mark.parametrize("optimizer", [embax.SGD(0.1), embax.RowwiseAdagrad(0.1), embax.Adam(0.1)])
def test_a_hundred_steps_give_the_same_bits_twice(optimizer):
    plan, step, batches = _training(5000, 64, optimizer)
    digests = []
    for _ in range(2):
        tables = embax.init(plan, jax.random.key(0))
        for number in range(100):
            tables = step(tables, batches[number % 4], number)
        digests.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tables)])
    assert digests[0] == digests[1]


def test_a_scan_over_steps_is_a_loop_of_steps():
    """XLA may capture the steps of a scan into a graph; a loop launches each by itself."""
    plan, step, batches = _training(5000, 32, embax.Adam(0.1))
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

    @functools.partial(jax.jit, donate_argnums=0)
    def scanned(tables, together):
        def body(tables, ids_and_number):
            return step(tables, *ids_and_number), None

        return jax.lax.scan(body, tables, (together, jnp.arange(4)))[0]

    looped = embax.init(plan, jax.random.key(0))
    for number, ids in enumerate(batches):
        looped = step(looped, ids, jnp.int32(number))
    found = scanned(embax.init(plan, jax.random.key(0)), together)
    for one, two in zip(jax.tree.leaves(looped), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, two)


def test_tables_beyond_two_to_the_31_numbers():
    rows, dim = 20_000_000, 128
    stats = jax.local_devices()[0].memory_stats() or {}
    if stats.get("bytes_limit", 0) < 1.2 * rows * dim * 4:
        pytest.skip("the card has too little memory for 10 GB")
    plan, step, _ = _training(rows, dim, embax.SGD(1.0), batch=4)
    ids = np.array([[0, 1, rows - 1], [rows - 1, 5, 6], [rows // 2] * 3, [2**24 + 1, 7, 8]])
    tables = embax.init(plan, jax.random.key(0))
    before = jax.local_devices()[0].memory_stats()["bytes_in_use"]
    tables = jax.block_until_ready(step(tables, embax.preprocess(plan, ids), 0))
    after = jax.local_devices()[0].memory_stats()
    assert after["peak_bytes_in_use"] - before < rows * dim, "a step took a quarter of the table's memory beside it"
    (state,) = tables.values()
    touched = np.unique(ids)
    assert (np.asarray(state.table[touched]) != 1).any(axis=1).all()
    sample = np.setdiff1d(np.arange(0, rows, 4999), touched)
    assert (np.asarray(state.table[sample]) == 1).all()


def _program(code, **variables):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cuda,cpu", **variables)
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


LOOKUP = """
import json, jax, jax.numpy as jnp, embax
from embax.kernels import cuda_library
table = embax.take(jnp.ones((9, 4)), jnp.array([1, 3]))
print(json.dumps([embax.kernels.choose().name, float(table.sum())]))
"""


def test_the_reference_can_be_forced():
    assert json.loads(_program(LOOKUP, EMBAX_BACKEND="reference").stdout) == ["reference", 8.0]


def test_kernels_are_found_by_the_next_process(tmp_path):
    for _ in range(2):
        assert json.loads(_program(LOOKUP, EMBAX_CACHE_DIR=str(tmp_path)).stdout) == ["cuda", 8.0]
        kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        assert kept
    _program(LOOKUP, EMBAX_CACHE_DIR=str(tmp_path))
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == kept


SMALL_STEPS = """
import sys
sys.path.insert(0, "tests")
import test_battery
CASES = ("sgd", "float32"), ("rowwise_adagrad", "bfloat16"), ("adam_modified", "float16"), ("f2a", "float32")
for name, dtype in CASES:
    test_battery.test_against_oracle(name, dtype, "cuda")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    checker = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [checker, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_name=embax_kernel"]
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", JAX_PLATFORMS="cuda,cpu")
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    done = subprocess.run(
        [*command, sys.executable, "-c", SMALL_STEPS],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-4000:]
