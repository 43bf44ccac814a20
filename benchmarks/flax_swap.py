"""A recommender in flax.nnx, trained with flax's Embed + optax and with embax's Embed: three lines differ.

    python -m benchmarks.flax_swap [--vocabulary 1e4 1e6 1e7] [--steps 15] [--optimizer adagrad] [--json FILE]

V items and V / 10 users with 64 numbers each, an MLP on top, 16,384 uniform ids a step (1,024 samples of a user, an
item and the 14 items before), click loss, one donated ``nnx.jit`` step. Both contenders are trained in one process for
each V and take turns of four steps; the first of a turn is not counted, for it finds the caches full of another's
tables. Times are medians. Peak memory is the largest resident size of a process that trains one contender alone for
four steps; that of the same process without a model is beside it. Tables start constant: while flax draws random values
a table takes four times its size, in both contenders, and that would be the peak.
"""

import argparse
import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import embax
import embax.nnx

BATCH, HISTORY, DIM, TURN = 1024, 14, 64, 4
OPTIMIZERS = {
    "sgd": (embax.SGD(0.1), optax.sgd(0.1)),
    "adagrad": (embax.Adagrad(0.1), optax.adagrad(0.1)),
    "adam": (embax.Adam(0.001), optax.adam(0.001)),
}
DENSE, SPARSE, NOTHING = "flax + optax", "embax", "no model"
INITIALIZER = nnx.initializers.constant(0.05)


class Recommender(nnx.Module):
    """A click's logit from a user, an item and the items before."""

    def __init__(self, embed: Callable, items: int, rngs: nnx.Rngs):
        self.item = embed(items, DIM, embedding_init=INITIALIZER, rngs=rngs)
        self.user = embed(max(items // 10, 1), DIM, embedding_init=INITIALIZER, rngs=rngs)
        self.hidden = nnx.Linear(3 * DIM, DIM, rngs=rngs)
        self.out = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, batch):
        user, item, history = self.user(batch["user"]), self.item(batch["item"]), self.item(batch["history"]).mean(1)
        hidden = nnx.relu(self.hidden(jnp.concatenate([user, item, history], 1)))
        return self.out(hidden)[:, 0] + (user * item).sum(1)


def contender(name: str, items: int, optimizer: str) -> Callable[[dict[str, np.ndarray]], float]:
    """Returns a function of a batch that takes one step, waits for its end, and returns the loss."""
    ours, theirs = OPTIMIZERS[optimizer]
    if name == DENSE:
        model = Recommender(nnx.Embed, items, nnx.Rngs(0))
        optimizers, value_and_grad = nnx.Optimizer(model, theirs, wrt=nnx.Param), nnx.value_and_grad
    else:
        model = Recommender(functools.partial(embax.nnx.Embed, optimizer=ours), items, nnx.Rngs(0))
        optimizers, value_and_grad = embax.nnx.Optimizer(model, theirs, wrt=nnx.Param), embax.nnx.value_and_grad

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, batch):
        def loss_fn(model):
            return optax.sigmoid_binary_cross_entropy(model(batch), batch["label"]).mean()

        loss, gradients = value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    def run(batch):
        loss = step(model, optimizers, batch)
        jax.block_until_ready((nnx.state(model), nnx.state(optimizers)))
        return float(loss)

    return run


def batches(items: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields random batches, the same ones at every call."""
    rng = np.random.default_rng(items)
    while True:
        yield {
            "user": rng.integers(0, max(items // 10, 1), BATCH, np.int32),
            "item": rng.integers(0, items, BATCH, np.int32),
            "history": rng.integers(0, items, (BATCH, HISTORY), np.int32),
            "label": rng.integers(0, 2, BATCH).astype(np.float32),
        }


def measure_times(items: int, optimizer: str, steps: int) -> dict[str, float]:
    """Returns the median milliseconds of one step of both contenders, measured in turns."""
    contenders = {name: contender(name, items, optimizer) for name in (DENSE, SPARSE)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    source, turn = batches(items), 0
    while len(times[SPARSE]) < steps:
        turn_batches, losses = [next(source) for _ in range(TURN)], []
        for name, run in contenders.items():
            for index, batch in enumerate(turn_batches):
                start = time.perf_counter()
                losses.append(run(batch))
                if turn and index:  # the first turn compiles and touches the memory
                    times[name].append(1e3 * (time.perf_counter() - start))
        if optimizer != "adam" and not np.allclose(losses[:TURN], losses[TURN:], rtol=1e-3):
            raise RuntimeError(f"the contenders' losses differ: {losses}")
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(name: str, items: int, optimizer: str) -> float:
    """Returns the largest resident size of this process in MB, after a few steps of one contender."""
    if name != NOTHING:
        run, source = contender(name, items, optimizer), batches(items)
        for _ in range(TURN):
            run(next(source))
    else:
        jax.block_until_ready(jnp.zeros(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kilobytes here


def in_a_process(*arguments: str) -> dict:
    """Returns what this module prints when it is run with ``arguments`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.flax_swap", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(items: int, optimizer: str, steps: int) -> dict:
    """Returns times and peak memory at one vocabulary, every measurement in a fresh process."""
    common = ["--vocabulary", str(items), "--optimizer", optimizer, "--steps", str(steps)]
    times = in_a_process("--only", "times", *common)
    return {"ms": times, "MB": {name: in_a_process("--only", name, *common) for name in (DENSE, SPARSE)}}


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", nargs="+", type=float, default=[1e4, 1e6, 1e7])
    parser.add_argument("--steps", type=int, default=15, help="steps of each contender to take the median of")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adagrad")
    parser.add_argument("--json")
    parser.add_argument("--only", choices=["times", DENSE, SPARSE, NOTHING], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes, optimizer = [int(v) for v in arguments.vocabulary], arguments.optimizer
    if arguments.only:
        times = arguments.only == "times"
        found = measure_times(sizes[0], optimizer, arguments.steps) if times else None
        print(json.dumps(found if times else measure_memory(arguments.only, sizes[0], optimizer)))
        return
    print(
        f"{platform.machine()}, jax {jax.__version__}, {optimizer}, D = {DIM}, {BATCH * (HISTORY + 2):,} ids a step; "
        f"a process without a model: {in_a_process('--only', NOTHING):,.0f} MB\n"
    )
    print(f"| V | {DENSE}, ms | {SPARSE}, ms | dense / embax | {DENSE}, MB | {SPARSE}, MB | dense / embax |")
    print("|" + "---|" * 7)
    results = {}
    for size in sizes:
        results[size] = measure(size, optimizer, arguments.steps)
        ms, megabytes = results[size]["ms"], results[size]["MB"]
        cells = [f"{ms[DENSE]:.1f}", f"{ms[SPARSE]:.1f}", f"{ms[DENSE] / ms[SPARSE]:.1f}"]
        cells += [
            f"{megabytes[DENSE]:,.0f}",
            f"{megabytes[SPARSE]:,.0f}",
            f"{megabytes[DENSE] / megabytes[SPARSE]:.1f}",
        ]
        print(f"| {size:,} | " + " | ".join(cells) + " |", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"optimizer": optimizer, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
