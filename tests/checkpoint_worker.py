"""Trains and saves every step until it is killed: ``python checkpoint_worker.py FOLDER MODE STEPS``.

MODE has the words asynchronous, synchronous and incremental, joined by "-".
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from helpers import feature, table_spec

import embax
from embax.checkpoint import Checkpoints

ROWS = 20_000  # so that a save takes a while
NORMAL = jax.nn.initializers.normal(0.1)


def plan():
    """Returns the plan that worker and test share."""
    tables = [table_spec(name, ROWS, 16, embax.Adam(0.1), initializer=NORMAL) for name in "ab"]
    return embax.plan([feature(table, table.name) for table in tables])


def begin(plan):
    """Returns the state before the first step."""
    return embax.init(plan, jax.random.key(0)), {"w": jnp.zeros(16)}


def stepper(plan):
    """Returns the training step: a function of the state and the number of the step."""

    @jax.jit
    def step(tables, dense, batch, number):
        activations, residuals = embax.lookup(plan, tables, batch)
        gradients = [jnp.cos(part) + dense["w"][None] for part in activations]
        dense = {"w": dense["w"] + 0.1 * sum(part.mean(0) for part in activations)}
        return embax.update(plan, tables, residuals, gradients, step=number), dense

    def run(tables, dense, number):
        ids = np.random.default_rng(number).integers(0, ROWS, (2, 64, 3)).astype(np.int32)
        return step(tables, dense, embax.preprocess(plan, list(ids)), jnp.int32(number))

    return run


def main(folder, mode, steps):
    """Goes on from the newest step there is."""
    shared = plan()
    tables, dense = begin(shared)
    step, incremental = stepper(shared), "incremental" in mode
    if incremental:
        tables = embax.track(shared, tables)
    with Checkpoints(folder, keep=2, asynchronous="synchronous" not in mode.split("-"), deltas=5) as checkpoints:
        first = 0
        if checkpoints.steps():
            found = checkpoints.restore(shared, dense=dense, track=incremental)
            tables, dense, first = found.tables, found.dense, found.data["next"]
        for number in range(first, steps):
            tables, dense = step(tables, dense, number)
            tables = checkpoints.save(number, shared, tables, dense=dense, data={"next": number + 1})
            print("saving", number, flush=True)
            if incremental and number % 3 == 2:
                checkpoints.compact()
                print("saving", number, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
