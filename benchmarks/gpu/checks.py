"""Small steps of every backend, optimizer, dtype and width against the float64 oracle, and twice for the same bits."""

import concurrent.futures
import dataclasses
import itertools
import os
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import embax
from benchmarks.gpu import oracles
from benchmarks.gpu.contenders import OPTIMIZERS
from benchmarks.gpu.oracles import EPSILON, NAMES, Wrong, close

DIMS = (4, 16, 64, 128, 7)
BATCH, VALENCY, PADDING, HOT = 400, 5, -1, 7
TABLES = {"bags": (301, "mean"), "ones": (97, "sum")}  # rows and combiner
STEP = 3


@dataclasses.dataclass(frozen=True)
class Combination:
    """One check."""

    backend: str
    optimizer: str
    dtype: str
    dim: int

    def __str__(self) -> str:
        return f"{self.backend} {self.optimizer} {self.dtype} {self.dim}"


def combinations(backends: list[str], dims: tuple[int, ...] = DIMS) -> list[Combination]:
    """Returns what is to be checked, the first backend first."""
    return [Combination(*parts) for parts in itertools.product(backends, NAMES, EPSILON, dims)]


def run(todo: list[Combination], deadline: float) -> Iterator[tuple[str, Combination, str]]:
    """Yields ("begin", combination, ""), then ("right" or "wrong" or "left out", combination, why).

    Programs are compiled by several threads, for that is what takes the time, and run one after another.
    """
    threads = max(1, min(16, os.cpu_count() or 1))
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        prepared = {one: pool.submit(_prepare, one) for one in todo}
        for one, future in prepared.items():
            yield "begin", one, ""
            try:
                compiled, tables, batch, gradients = future.result(max(0.0, deadline - time.monotonic()))
                _check(one, compiled, tables, batch, gradients)
                yield "right", one, ""
            except concurrent.futures.TimeoutError:
                yield "left out", one, "no time"
            except Exception as error:  # whatever a backend raises, it did not compute the step
                yield "wrong", one, f"{type(error).__name__}: {first_line(error)}"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _features(one: Combination) -> dict[str, embax.FeatureSpec]:
    found = {}
    for name, (rows, combiner) in TABLES.items():
        table = embax.TableSpec(
            name=name,
            vocabulary_size=rows,
            embedding_dim=one.dim,
            initializer=jax.nn.initializers.zeros,
            optimizer=OPTIMIZERS[one.optimizer],
            combiner=combiner,
            dtype=one.dtype,
        )
        shapes = {"input_shape": (BATCH, VALENCY if name == "bags" else 1), "output_shape": (BATCH, one.dim)}
        found[name] = embax.FeatureSpec(name=name, table_spec=table, padding_id=PADDING, **shapes)
    return found


def _ids(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns ids with one hot row and some padding."""
    found = {}
    for name, (rows, _) in TABLES.items():
        ids = rng.integers(0, rows, (BATCH, VALENCY if name == "bags" else 1), np.int32)
        ids[rng.random(ids.shape) < 0.3] = HOT
        ids[rng.random(ids.shape) < 0.1] = PADDING
        found[name] = ids
    return found


def _start(one: Combination, plan: embax.Plan) -> dict[str, dict[str, np.ndarray]]:
    """Returns rows and slots of a run that is under way."""
    rng = np.random.default_rng(one.dim)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    names = plan.stacks[0].optimizer.slots()._fields if one.optimizer != "sgd" else ()
    slots = dict(zip(names, plan.stacks[0].optimizer.slots(), strict=True))
    for name, (rows, _) in TABLES.items():
        wide = (rows, one.dim)
        arrays[name] = {"table": np.asarray(rng.normal(size=wide), jnp.dtype(one.dtype))}
        for slot, facts in slots.items():
            arrays[name][slot] = rng.uniform(0.1, 1.0, facts.shape(wide)).astype(np.float32)
    return arrays


def _prepare(one: Combination) -> tuple:
    """Returns the compiled step, a maker of its tables, its ids and its gradients."""
    plan = embax.plan(_features(one), backend=one.backend)
    rng = np.random.default_rng(0)
    ids = _ids(rng)
    batch = jax.device_put(embax.preprocess(plan, ids))
    shape = (BATCH, one.dim)
    gradients = {name: jnp.asarray(rng.normal(size=shape), one.dtype) for name in TABLES}

    def step(tables, batch, gradients, step):
        activations, residuals = embax.lookup(plan, tables, batch)
        return activations, embax.update(plan, tables, residuals, gradients, step)

    def tables():
        return jax.device_put(embax.from_arrays(plan, _start(one, plan)))

    arguments = (tables(), batch, gradients, jnp.int32(STEP))
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()

    def run():
        activations, state = compiled(tables(), batch, gradients, jnp.int32(STEP))
        arrays = {f"activations of {name}": np.asarray(part) for name, part in activations.items()}
        for stack in plan.stacks:
            for table in stack.tables:
                part = slice(table.row_offset, table.row_offset + table.vocabulary_size)
                leaves = jax.tree.leaves((state[stack.name].table, state[stack.name].slots))
                arrays |= {f"{table.name} {i}": np.asarray(leaf)[part] for i, leaf in enumerate(leaves)}
        return arrays

    return run, _start(one, plan), ids, {name: np.asarray(g, np.float64) for name, g in gradients.items()}


def _check(one: Combination, run, start: dict, ids: dict, gradients: dict) -> None:
    oracle, found, again = oracles.load(), run(), run()
    for name, array in found.items():
        if array.tobytes() != again[name].tobytes():
            raise Wrong(f"{name}: other bits when the step was taken again")
    for name, (_, combiner) in TABLES.items():
        samples, weights = oracle.dense_samples(ids[name], PADDING)
        before = np.asarray(start[name]["table"], np.float64)
        wanted = oracle.pool(before, samples, weights, combiner)
        close(found[f"activations of {name}"], wanted, one.dtype, np.abs(before).max(), f"activations of {name}")
        slots = {slot: np.asarray(a, np.float64) for slot, a in start[name].items() if slot != "table"}
        hyper = {"learning_rate": OPTIMIZERS[one.optimizer].learning_rate}
        arguments = (before, slots, samples, weights, combiner, gradients[name], NAMES[one.optimizer])
        table, slots = oracle.update(*arguments, step=STEP, hyper=hyper)
        close(found[f"{name} 0"], table, one.dtype, np.abs(before).max(), f"rows of {name}")
        for index, (slot, array) in enumerate(slots.items(), 1):
            close(found[f"{name} {index}"], array, "float32", np.abs(array).max(), f"{slot} of {name}")
        _check_untouched(one, found[f"{name} 0"], start[name]["table"], samples, name)


def _check_untouched(one: Combination, after: np.ndarray, before: np.ndarray, samples: list, name: str) -> None:
    rest = np.setdiff1d(np.arange(len(before)), [i for sample in samples for i in sample])
    if np.asarray(after)[rest].tobytes() != before[rest].tobytes():
        raise Wrong(f"rows of {name} that no id names have other bits")
