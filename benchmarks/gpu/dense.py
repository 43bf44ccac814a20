"""The contender that has a gradient as large as the table: ``jnp.take`` under optax, or under its formulas."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.gpu.contenders import ACCUMULATOR, RATE, Shared, Skip
from benchmarks.gpu.machine import memory_limit

SLOTS = {"sgd": 0, "adagrad": 1, "adam": 2}
SETS = 2  # of gradients
SPARE = 2  # arrays as large as the table beside table and slots: the gradient, and room for what XLA keeps of it


class _Transformation(NamedTuple):
    init: Callable
    update: Callable


def transformation(optimizer: str) -> tuple[Any, str]:
    """Returns an optax transformation and "optax", or its formulas and "its formulas" where it is not installed."""
    try:
        import optax
    except ImportError:
        return _Transformation(*_formulas(optimizer)), "its formulas, for optax is not installed"
    made = {
        "sgd": lambda: optax.sgd(RATE),
        "adagrad": lambda: optax.adagrad(RATE, initial_accumulator_value=ACCUMULATOR),
        "adam": lambda: optax.adam(RATE),
    }
    return made[optimizer](), "optax"


def _formulas(optimizer: str) -> tuple[Callable, Callable]:
    def sgd(gradient, state, params):
        return -RATE * gradient, state

    def adagrad(gradient, state, params):
        total = state + gradient * gradient
        return -RATE * gradient * jax.lax.rsqrt(total + 1e-7), total

    def adam(gradient, state, params):
        count, first, second = state
        count = count + 1
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient * gradient
        scaled = first / (1 - 0.9**count) / (jnp.sqrt(second / (1 - 0.999**count)) + 1e-8)
        return -RATE * scaled, (count, first, second)

    inits = {
        "sgd": lambda params: (),
        "adagrad": lambda params: jnp.full_like(params, ACCUMULATOR),
        "adam": lambda params: (jnp.float32(0), jnp.zeros_like(params), jnp.zeros_like(params)),
    }
    return inits[optimizer], {"sgd": sgd, "adagrad": adagrad, "adam": adam}[optimizer]


class Dense:
    """All tables one behind another as one array, a dense gradient, a dense step."""

    def __init__(self, shared: Shared):
        job, self.shared, self.compiled, self.kept = shared.job, shared, {}, None
        if job.optimizer not in SLOTS:
            raise Skip("optax has no row-wise Adagrad")
        if job.dtype != "float32":
            raise Skip("float32 only: optax would keep its moments in the table's dtype")
        if len(shared.plan.stacks) > 1:
            raise Skip("its rows are more than one array can number")
        need = job.rows * job.row_bytes * (1 + SLOTS[job.optimizer] + SPARE) + 4 * job.activation_bytes
        if need > memory_limit():
            raise Skip(f"needs {need / 1e9:.0f} GB for a dense gradient, and there are {memory_limit() / 1e9:.0f}")
        self.change, self.note = transformation(job.optimizer)
        self.stack = shared.plan.stacks[0].name
        self.wide = (job.rows, job.dim)
        self.state = jax.eval_shape(self.change.init, jax.ShapeDtypeStruct(self.wide, jnp.float32))
        small = [leaf for leaf in jax.tree.leaves(self.state) if leaf.shape != self.wide]
        self.small = [jnp.ones(leaf.shape, leaf.dtype) for leaf in small]  # counts: of a run that is under way
        offsets = [table.row_offset for table in shared.plan.stacks[0].tables]
        raw = [jnp.stack([jnp.asarray(ids + o) for ids, o in zip(one, offsets, strict=True)]) for one in shared.raw]
        self.ids = raw
        self.gradients = [jnp.stack(one) for one in shared.gradients[:SETS]]  # a model has them as one array too
        self._define(job.unroll)

    def _define(self, unroll: int) -> None:
        def look_up(params, ids):
            return jnp.take(params, ids, axis=0).sum(2) if ids.shape[2] > 1 else jnp.take(params, ids[:, :, 0], axis=0)

        def one(params, state, ids, gradients):
            found, pull_back = jax.vjp(lambda p: look_up(p, ids), params)
            (gradient,) = pull_back(gradients)
            changes, state = self.change.update(gradient, state, params)
            return params + changes, state, found

        def steps(params, state, ids, gradients):
            kept = []
            for index in range(unroll):
                params, state, found = one(params, state, ids[index], gradients[index])
                kept.append(found)
            return params, state, kept

        def updates(params, state, ids, gradients):
            return steps(params, state, ids, gradients)[:2]

        self._steps, self._updates = (jax.jit(call, donate_argnums=(0, 1)) for call in (steps, updates))
        self._forward = jax.jit(lambda params, ids: [look_up(params, one) for one in ids])

    def programs(self) -> dict[str, tuple]:
        """Returns the functions to be compiled, with their arguments."""
        params, state, ids, gradients = self._arguments(0)
        return {
            "forward": (self._forward, params, ids),
            "update": (self._updates, params, state, ids, gradients),
            "step": (self._steps, params, state, ids, gradients),
        }

    def _arguments(self, index: int) -> tuple:
        _, _, places = self.shared.group(index)
        gradients = [self.gradients[place % len(self.gradients)] for place in places]
        held = self.shared.tables[self.stack]
        slots, small = iter(jax.tree.leaves(held.slots)), iter(self.small)
        state = jax.tree.map(lambda leaf: next(slots if leaf.shape == self.wide else small), self.state)
        return held.table, state, [self.ids[place] for place in places], gradients

    def run(self, what: str, index: int) -> None:
        params, state, ids, gradients = self._arguments(index)
        if what == "forward":
            self.kept = self.compiled[what](params, ids)
            return
        done = self.compiled[what](params, state, ids, gradients)
        self.kept = done[2] if what == "step" else None
        leaves = jax.tree.leaves(done[1])
        self.small = [leaf for leaf in leaves if leaf.shape != self.wide]
        held = self.shared.tables[self.stack]
        wide = [leaf for leaf in leaves if leaf.shape == self.wide]
        slots = jax.tree.unflatten(jax.tree.structure(held.slots), wide)
        self.shared.tables = {self.stack: held._replace(table=done[0], slots=slots)}

    def wait(self) -> None:
        jax.block_until_ready((self.shared.tables, self.kept))
