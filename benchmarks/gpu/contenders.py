"""The contenders in JAX: each backend of embax, and a dense gradient under optax. All train one state.

A contender has ``programs()``, the calls to be compiled, ``compiled``, to be filled, and ``run(what, index)``, which
starts a pass over the batches of that index and does not wait. Gradients are given arrays: what a loss costs is the
same for everybody, and left out. Activations are kept until the next call, so no lookup is dead code.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

import embax
from benchmarks.gpu import cases, machine
from benchmarks.gpu.cases import Job

RATE, ACCUMULATOR = 0.01, 0.1
OPTIMIZERS = {
    "sgd": embax.SGD(RATE),
    "rowwise": embax.RowwiseAdagrad(RATE, initial_accumulator_value=ACCUMULATOR),
    "adagrad": embax.Adagrad(RATE, initial_accumulator_value=ACCUMULATOR),
    "adam": embax.Adam(RATE),
}
L2_BYTES = 64 << 20  # where the card does not say
MOST_GRADIENT_BYTES = 4 << 30


class Skip(Exception):
    """A contender that cannot take part, and why."""


def features_of(job: Job) -> list[embax.FeatureSpec]:
    """Returns one feature for every table of a job."""
    features = []
    for index, rows in enumerate(job.tables):
        table = embax.TableSpec(
            name=f"t{index:02d}",
            vocabulary_size=rows,
            embedding_dim=job.dim,
            initializer=_INITIALIZER,
            optimizer=OPTIMIZERS[job.optimizer],
            combiner="sum",
            dtype=job.dtype,
        )
        shapes = {"input_shape": (job.batch, job.valency), "output_shape": (job.batch, job.dim)}
        features.append(embax.FeatureSpec(name=f"f{index:02d}", table_spec=table, **shapes))
    return features


_INITIALIZER = jax.nn.initializers.normal(0.01)  # one object: zeros draw less power, and run faster than numbers do


class Shared:
    """What the contenders of a job have in common: the tables with their slots, batches and gradients on the device."""

    def __init__(self, job: Job, backend: str):
        self.job = job
        self.plan = embax.plan(features_of(job), backend=backend)
        self.raw, self.distinct = cases.draw(job)
        self.batches = [jax.device_put(embax.preprocess(self.plan, ids)) for ids in self.raw]
        self.gradients = _gradients(job)
        self.step = jnp.int32(0)
        self.tables: dict[str, Any] = {}
        self.remake()

    def remake(self) -> None:
        """Makes the tables anew: a donated call that failed may have taken them along."""
        self.tables = {}
        self.tables = jax.block_until_ready(embax.init(self.plan, jax.random.key(0)))

    def lost(self) -> bool:
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self.tables)) or not self.tables

    def group(self, index: int) -> tuple[list, list, list[int]]:
        """Returns the batches and gradients of one call, and which batches those are."""
        places = [(index * self.job.unroll + i) % len(self.batches) for i in range(self.job.unroll)]
        gradients = [self.gradients[place % len(self.gradients)] for place in places]
        return [self.batches[place] for place in places], gradients, places


def _gradients(job: Job) -> list[list[jax.Array]]:
    """Returns sets of gradients, so many that they do not fit into the cache together, and two at least."""
    wanted = math.ceil(2 * (machine.l2_bytes() or L2_BYTES) / job.activation_bytes)
    room = max(1, MOST_GRADIENT_BYTES // job.activation_bytes)
    make = jax.jit(lambda key: jax.random.normal(key, (job.batch, job.dim), job.dtype))
    keys = jax.random.split(jax.random.key(1), (min(max(wanted, 2), room, cases.BATCHES), len(job.tables)))
    return [[make(key) for key in row] for row in keys]


class Embax:
    """``embax.lookup`` and ``embax.update`` under one backend."""

    def __init__(self, shared: Shared, backend: str):
        self.shared, self.compiled, self.kept = shared, {}, None
        self.plan = plan = embax.plan(features_of(shared.job), backend=backend)

        def one(tables, batch, gradients, step):
            activations, residuals = embax.lookup(plan, tables, batch)
            return embax.update(plan, tables, residuals, gradients, step), activations

        def steps(tables, batches, gradients, step):
            kept = []
            for batch, gradient in zip(batches, gradients, strict=True):
                tables, activations = one(tables, batch, gradient, step)
                kept.append(activations)
            return tables, kept

        def updates(tables, residuals, gradients, step):
            for residual, gradient in zip(residuals, gradients, strict=True):
                tables = embax.update(plan, tables, residual, gradient, step)
            return tables

        self._steps = jax.jit(steps, donate_argnums=0)
        self._updates = jax.jit(updates, donate_argnums=0)
        self._forward = jax.jit(lambda tables, batches: [embax.lookup(plan, tables, batch)[0] for batch in batches])
        self._one = jax.jit(one, donate_argnums=0)
        self._residuals = self._without_lookup()

    def _without_lookup(self) -> list[Any]:
        """Returns what the lookups of all batches leave for the update, with a token that needs no lookup."""
        shared = self.shared
        shapes = jax.eval_shape(lambda t, b: embax.lookup(self.plan, t, b)[1], shared.tables, shared.batches[0])
        tokens = jax.tree.map(lambda token: jnp.zeros(token.shape, token.dtype), shapes.tokens)
        return [dataclasses.replace(shapes, batch=batch, tokens=tokens) for batch in shared.batches]

    def programs(self) -> dict[str, tuple]:
        """Returns the functions to be compiled, with their arguments."""
        shared = self.shared
        batches, gradients, places = shared.group(0)
        found = {
            "forward": (self._forward, shared.tables, batches),
            "update": (self._updates, shared.tables, [self._residuals[p] for p in places], gradients, shared.step),
            "step": (self._steps, shared.tables, batches, gradients, shared.step),
        }
        if shared.job.unroll > 1:
            found["one"] = (self._one, shared.tables, batches[0], gradients[0], shared.step)
        return found

    def run(self, what: str, index: int) -> None:
        shared = self.shared
        batches, gradients, places = shared.group(index)
        if what == "forward":
            self.kept = self.compiled[what](shared.tables, batches)
        elif what == "update":
            residuals = [self._residuals[place] for place in places]
            shared.tables = self.compiled[what](shared.tables, residuals, gradients, shared.step)
        else:
            shared.tables, self.kept = self.compiled[what](shared.tables, batches, gradients, shared.step)

    def one_step(self) -> list[jax.Array]:
        """Takes one step with the first batch, and returns its activations."""
        shared = self.shared
        if "one" not in self.compiled:
            self.run("step", 0)
            return self.kept[0]
        arguments = (shared.tables, shared.batches[0], shared.gradients[0], shared.step)
        shared.tables, activations = self.compiled["one"](*arguments)
        return activations

    def wait(self) -> None:
        jax.block_until_ready((self.shared.tables, self.kept))
