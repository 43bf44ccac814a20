"""One training step against the size of the vocabulary: embax beside flax + optax, in one run, interleaved.

    python -m benchmarks.one_step [--sizes 1e5 1e6 1e7] [--repeats 5] [--optimizer adagrad] [--json FILE]

Each step looks up 8,192 bags of 20 uniform ids in a [V, 64] float32 table, takes the loss and the gradient of a loss
that is linear in the activations, and updates. Contenders hold their own tables, are donated, and take turns of four
steps, as steps follow each other in training; the first of a turn is not counted, for it finds the caches full of
another's table. Host preprocessing is counted. The figures are medians.
"""

import argparse
import functools
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import embax

BATCH, VALENCY, DIM, TURN = 8192, 20, 64, 4
OPTIMIZERS = {
    "sgd": (embax.SGD(0.1), optax.sgd(0.1)),
    "adagrad": (embax.Adagrad(0.1), optax.adagrad(0.1)),
    "adam": (embax.Adam(0.1), optax.adam(0.1)),
}


def embax_step(rows: int, optimizer: embax.Optimizer, backend: str | None) -> Callable[[np.ndarray], None]:
    """Returns a function of ids that takes one step of embax, waiting for its end."""
    table = embax.TableSpec(
        name="table",
        vocabulary_size=rows,
        embedding_dim=DIM,
        initializer=jax.nn.initializers.zeros,
        optimizer=optimizer,
        combiner="sum",
    )
    feature = embax.FeatureSpec(name="ids", table_spec=table, input_shape=(BATCH, VALENCY), output_shape=(BATCH, DIM))
    plan = embax.plan(feature, backend=backend)
    state = embax.init(plan, jax.random.key(0))
    target = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, DIM)), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(tables, batch):
        activations, residuals = embax.lookup(plan, tables, batch)
        loss, gradients = jax.value_and_grad(lambda a: (a * target).sum())(activations)
        return embax.update(plan, tables, residuals, gradients, 0), loss

    losses: list[float] = []

    def run(ids):
        nonlocal state
        state, loss = jax.block_until_ready(step(state, embax.preprocess(plan, ids)))
        losses.append(float(loss))

    return run


def dense_step(rows: int, optimizer: optax.GradientTransformation) -> Callable[[np.ndarray], None]:
    """Returns a function of ids that takes one step of flax.linen.Embed under optax, waiting for its end."""
    model = nn.Embed(rows, DIM, embedding_init=jax.nn.initializers.zeros)
    params = model.init(jax.random.key(0), jnp.zeros((1,), jnp.int32))
    state = (params, optimizer.init(params))
    target = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, DIM)), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, ids):
        params, optimizer_state = state
        loss, gradients = jax.value_and_grad(lambda p: (model.apply(p, ids).sum(1) * target).sum())(params)
        changes, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, changes), optimizer_state), loss

    losses: list[float] = []

    def run(ids):
        nonlocal state
        state, loss = jax.block_until_ready(step(state, jnp.asarray(ids, jnp.int32)))
        losses.append(float(loss))

    return run


def measure(rows: int, optimizer: str, repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of one step of every contender, measured in turns."""
    ours, theirs = OPTIMIZERS[optimizer]
    contenders = {
        "embax": embax_step(rows, ours, None),
        "embax reference": embax_step(rows, ours, "reference"),
        "flax + optax": dense_step(rows, theirs),
    }
    rng = np.random.default_rng(rows)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        batches = rng.integers(0, rows, (TURN, BATCH, VALENCY), np.int32)
        for name, run in contenders.items():
            for index, ids in enumerate(batches):
                start = time.perf_counter()
                run(ids)
                if turn and index:  # the first turn compiles and touches the memory
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints a Markdown table of the medians, and what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e5, 1e6, 1e7])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adagrad")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results = {}
    print(
        f"{platform.machine()}, jax {jax.__version__}, {arguments.optimizer}, D = {DIM}, {BATCH * VALENCY:,} ids a step"
    )
    for size in map(int, arguments.sizes):
        results[size] = measure(size, arguments.optimizer, arguments.repeats)
        gc.collect()
        if len(results) == 1:
            print("| V | " + " | ".join(f"{name}, ms" for name in results[size]) + " | dense / embax |")
            print("|" + "---|" * (len(results[size]) + 2))
        row = results[size]
        ratio = row["flax + optax"] / row["embax"]
        print(f"| {size:,} | " + " | ".join(f"{v:.1f}" for v in row.values()) + f" | {ratio:.1f} |", flush=True)
    sizes = sorted(results)
    for name in ("embax", "embax reference"):
        growth = results[sizes[-1]][name] / results[sizes[-2]][name] if len(sizes) > 1 else 1.0
        print(f"{name}: {growth:.2f}x from V = {sizes[-2] if len(sizes) > 1 else sizes[-1]:,} to {sizes[-1]:,}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"optimizer": arguments.optimizer, "milliseconds": results}, file, indent=2)


if __name__ == "__main__":
    main()
