"""One process of several: ``python process_worker.py RANK COUNT PORT OUT ACT``; ``test_processes`` starts them.

Each has 4 CPU devices and makes its own part of every batch; a mesh spans the devices of all. ACT is a function below.
"""

import dataclasses
import faulthandler
import os
import sys
import time

if __name__ == "__main__":  # before jax is imported
    # Whatever else is set stays; of a flag that is there twice XLA takes the last.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from helpers import feature, table_spec
from jax.sharding import Mesh

import embax
from embax import kernels

STEPS, SAMPLES, ROWS, DIM = 3, 32, 101, 8
CASES = {  # between them every placement, exchange and backend, and a row-wise optimizer on columns
    "gather": {"placement": {"user": "replicated"}, "exchange": "gather", "backend": "cpu"},
    "route": {"placement": {"user": "column"}, "exchange": "route", "backend": "cpu"},
    "table": {"placement": {"item": "table"}, "exchange": "gather", "backend": "reference"},
    "across": {"placement": {"item": "column"}, "exchange": "gather", "backend": "cpu"},
}
# How long a process waits for one that is gone; docs/mesh.md says which setting bounds what.
BOUNDS = {"initialization_timeout": 60, "heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 20}
BOUNDS_OF = {"raise_in_one": {"shutdown_timeout_seconds": 5}}


def runnable():
    """Returns the names of the cases whose backend can run here."""
    return [name for name, case in CASES.items() if not kernels.get(case["backend"]).unavailable()]


def features():
    uniform = jax.nn.initializers.uniform(1.0)  # compiles faster than normal
    item = table_spec("item", ROWS, DIM, embax.Adam(0.1), "mean", initializer=uniform)
    user = table_spec("user", 37, DIM, embax.RowwiseAdagrad(0.1), initializer=uniform)
    inputs = {"history": (item, (None,)), "shown": (item, (None, 3)), "user": (user, (None, 1))}
    return {name: feature(table, name, inputs, outputs=(None, DIM)) for name, (table, inputs) in inputs.items()}


def mesh_of(case):
    """Returns a mesh: each process has its own samples; "across", every process has all samples and half of a table."""
    if case != "across":
        return Mesh(np.array(jax.devices()), ("x",))
    return embax.Devices(Mesh(np.array(jax.devices()).reshape(2, 4).T, ("d", "m")), batch_axes="d", table_axes="m")


def plan_of(case):
    settings = dict(CASES[case])
    devices = dataclasses.replace(embax.placement.as_devices(mesh_of(case)), exchange=settings.pop("exchange"))
    return embax.plan(features(), mesh=devices, **settings)


def ids(step, part, parts):
    """Returns part ``part`` of ``parts`` of the batch of a step: the first samples have the most ids, the last none."""
    rng = np.random.default_rng(step)
    history = [rng.integers(0, ROWS, (40 - n) // 4 if n < 30 else 0) for n in range(SAMPLES)]
    whole = {
        "history": history,
        "shown": rng.integers(0, ROWS, (SAMPLES, 3)),
        "user": rng.integers(0, 37, (SAMPLES, 1)),
    }
    own = slice(SAMPLES * part // parts, SAMPLES * (part + 1) // parts)
    return {name: values[own] for name, values in whole.items()}


@jax.jit
def gradients(activations, step):
    """Returns a gradient for every activation that depends on its place in the batch of all; exact in float32."""

    def made(activation):
        samples, dim = activation.shape
        number = jax.lax.iota(jnp.int32, samples)[:, None] * 37 + jax.lax.iota(jnp.int32, dim)[None] * 11 + step * 5
        return (number % 64 - 32).astype(jnp.float32) / 32

    return jax.tree.map(made, activations)


def fresh(plan, case):
    """Returns the first tables of a case: one makes them, which takes long to compile, the others are given them."""
    return embax.init(plan, jax.random.key(0)) if case == "gather" else given(plan)


def given(plan):
    rng = np.random.default_rng(7)
    rows = {"item": rng.normal(size=(ROWS, DIM)), "user": rng.normal(size=(37, DIM))}
    names = [table.name for stack in plan.stacks for table in stack.tables]
    return embax.from_arrays(plan, {name: {"table": rows[name]} for name in names})


def train(plan, tables, part=0, parts=1, after_step=lambda step: None):
    """Returns the tables after some steps, as ``to_arrays`` does, and the activations of this process's samples."""
    seen = {}
    for step in range(STEPS):
        batch = embax.preprocess(plan, ids(step, part, parts))
        activations, residuals = embax.lookup(plan, tables, batch)
        for name, activation in activations.items():
            seen[f"{step} {name}"] = own_samples(activation)
        tables = embax.update(plan, tables, residuals, gradients(activations, jnp.int32(step)), step)
        jax.block_until_ready(tables)
        after_step(step)
    return flat(embax.to_arrays(plan, tables)), seen


def own_samples(activation):
    """Returns the samples that the devices of this process hold, in their order."""
    parts = {shard.index[0].start or 0: shard.data for shard in activation.addressable_shards}
    return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])


def flat(arrays):
    return {f"{table} {part}": np.asarray(a) for table, parts in arrays.items() for part, a in parts.items()}


# ---- what a process may be told to do ------------------------------------------------------------------------------


def train_cases(rank, count, out):
    """Trains every case, prints how long a step takes once it is compiled, and asks for what must be refused."""
    results = {}
    for case in runnable():
        at, ends = time.perf_counter(), []
        plan = plan_of(case)
        tables = fresh(plan, case)
        part = (rank, count) if case != "across" else (0, 1)
        tables, seen = train(plan, tables, *part, lambda _, ends=ends: ends.append(time.perf_counter()))
        print(f"{case}: first step {ends[0] - at:.2f} s, last {1e3 * (ends[-1] - ends[-2]):.1f} ms", flush=True)
        results |= {f"{case} tables {key}": value for key, value in tables.items()}
        results |= {f"{case} activations {key}": value for key, value in seen.items()}
    np.savez(out, **results, **agreements(rank, count))


def agreements(rank, count):
    """Returns what came of batches that are not alike: capacities, and the texts of errors."""
    plan, own, last = plan_of(runnable()[0]), ids(0, rank, count), rank == count - 1
    at = time.perf_counter()
    for _ in range(20):
        batch = embax.preprocess(plan, own)
    print(f"agreeing on a capacity: {1e3 * (time.perf_counter() - at) / 20:.2f} ms a batch")
    found = {"ids": sum(map(len, own["history"])), "capacity": batch.stacks["item"].ids.shape}
    first = {name: values[:14] for name, values in own.items()}
    found["one has fewer"] = refused(plan, first if last else own)
    found["all have an odd number"] = refused(plan, first)
    dense = embax.plan({"shown": features()["shown"]}, mesh=mesh_of("gather"))
    found["rectangles only"] = refused(dense, {"shown": first["shown"]}) if last else ""
    # With a declared capacity, or a mesh of a process's own devices, nothing is agreed on: here only the last one asks.
    declared = embax.plan(features(), mesh=mesh_of("gather"), capacity={"history": 8 * 30})
    found["declared"] = embax.preprocess(declared, own).stacks["item"].ids.shape if last else (8, 30 + 4 * 3)
    alone = embax.plan(features(), mesh=Mesh(np.array(jax.local_devices()), ("x",)))
    found["alone"] = embax.preprocess(alone, first).stacks["item"].totals if last else (14, 14)
    return found | traced(dense, rank, count)


def refused(plan, ids):
    try:
        embax.preprocess(plan, ids)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def traced(plan, rank, count):
    """Returns activations of ids preprocessed inside of jit, where the arrays are those of all processes."""

    @jax.jit
    def run(tables, ids):
        return embax.lookup(plan, tables, embax.preprocess_traced(plan, {"shown": ids}))[0]["shown"]

    samples = plan.devices.sharding(plan.devices.batch_spec())
    every = jax.make_array_from_process_local_data(samples, ids(0, rank, count)["shown"])
    return {"traced": own_samples(run(given(plan), every))}


def train_on(rank, count, out):
    """Trains until something ends it."""
    plan = plan_of("gather")
    tables = given(plan)
    while True:
        train(plan, tables, rank, count, lambda step: print("step", flush=True))


def raise_in_one(rank, count, out):
    """The last process has an id that the table does not have; the others go on to train."""
    plan = plan_of("gather")
    if rank == count - 1:
        embax.preprocess(plan, ids(0, rank, count) | {"shown": np.full((SAMPLES // count, 3), ROWS)})
    train(plan, given(plan), rank, count)


def save_and_load(rank, count, out):
    """Loads the newest step into every case in turn, trains, and saves all, and what changed as the next step."""
    from embax.checkpoint import Checkpoints

    with Checkpoints(os.path.join(os.path.dirname(out), "steps"), keep=None) as checkpoints:
        for number, case in enumerate(runnable()):
            plan = plan_of(case)
            found = checkpoints.restore(plan, dense=dense(plan, 0.0), track=True)
            assert found.step == 2 * number and found.data == {"epoch": number}
            part = (rank, count) if case != "across" else (0, 1)
            batch = embax.preprocess(plan, few_ids(number, *part))
            activations, residuals = embax.lookup(plan, found.tables, batch)
            tables = embax.update(plan, found.tables, residuals, gradients(activations, jnp.int32(number)), number)
            rest = {"dense": found.dense, "data": {"epoch": number + 1}}
            untracked = {name: state._replace(touched=None) for name, state in tables.items()}
            checkpoints.save(2 * number + 1, plan, untracked, **rest)
            checkpoints.save(2 * number + 2, plan, tables, **rest)


def few_ids(step, part, parts):
    """Returns as ``ids`` does a batch that names few rows."""
    own = slice(SAMPLES * part // parts, SAMPLES * (part + 1) // parts)
    numbers = np.arange(SAMPLES)[own]
    return {
        "history": [np.array([n % 5, 11 + step]) for n in numbers],
        "shown": np.zeros((len(numbers), 3), np.int64) + 7,
        "user": (numbers % 3 + step)[:, None],
    }


def dense(plan, value):
    """Returns a dense part that is whole on every device of all processes."""
    made = jax.jit(lambda: {"w": jnp.full((3,), value)}, out_shardings=plan.devices.sharding(jax.P()))
    return made()


def main(rank, count, port, out, act):
    faulthandler.dump_traceback_later(150, exit=True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    at = time.perf_counter()
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(rank), **BOUNDS | BOUNDS_OF.get(act, {}))
    assert (jax.process_count(), jax.device_count()) == (int(count), 4 * int(count))
    print(f"connected in {time.perf_counter() - at:.2f} s", flush=True)
    globals()[act](int(rank), int(count), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
