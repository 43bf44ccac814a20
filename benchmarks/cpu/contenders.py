"""The contenders in JAX: embax, embax's reference backend, and flax + optax with dense gradients.

A contender has ``prepare(batches)``, ``forward(index)``, ``step(index)`` and ``rebind()``; ``outputs(index)`` gives the
activations for the check that all of them compute the same. A step gives the activations, and changes the rows by a
given gradient of them: what a loss costs is the same for everybody, and left out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import embax
from benchmarks.cpu.memory import Memory, make_features
from benchmarks.cpu.workloads import Batch, Skip, Workload

RATE, ACCUMULATOR = 0.01, 0.1
OPTIMIZERS = {
    "sgd": embax.SGD(RATE),
    "rowwise": embax.RowwiseAdagrad(RATE, initial_accumulator_value=ACCUMULATOR),
    "adagrad": embax.Adagrad(RATE, initial_accumulator_value=ACCUMULATOR),
    "adam": embax.Adam(RATE),
}
DENSE_OPTIMIZERS = {
    "sgd": optax.sgd(RATE),
    "adagrad": optax.adagrad(RATE, initial_accumulator_value=ACCUMULATOR),
    "adam": optax.adam(RATE),
}


def make_targets(workload: Workload) -> list[np.ndarray]:
    """Returns the gradient of every feature's activations."""
    rng = np.random.default_rng(1)
    shape = (workload.batch, workload.dim) if workload.pooled else (workload.batch, workload.valency, workload.dim)
    return [rng.standard_normal(shape, np.float32) for _ in workload.features]


class Embax:
    """One donated jitted step on a preprocessed batch."""

    def __init__(self, workload: Workload, optimizer: str, memory: Memory, backend: str | None = None):
        self.memory = memory
        self.plan = plan = embax.plan(make_features(workload, OPTIMIZERS[optimizer]), backend=backend)
        self.targets = [jnp.asarray(target) for target in make_targets(workload)]

        @functools.partial(jax.jit, donate_argnums=0)
        def step(tables, batch, gradients):
            activations, residuals = embax.lookup(plan, tables, batch)
            return embax.update(plan, tables, residuals, gradients, 0), activations

        self._step = step
        self._forward = jax.jit(lambda tables, batch: embax.lookup(plan, tables, batch)[0])

    def prepare(self, batches: list[Batch]) -> None:
        self.raw = batches
        self.batches = [jax.block_until_ready(embax.preprocess(self.plan, batch)) for batch in batches]

    def preprocess(self, index: int) -> None:
        jax.block_until_ready(embax.preprocess(self.plan, self.raw[index]))

    def outputs(self, index: int) -> list[np.ndarray]:
        return [np.asarray(a) for a in self._forward(self.memory.state, self.batches[index])]

    def forward(self, index: int) -> None:
        jax.block_until_ready(self._forward(self.memory.state, self.batches[index]))

    def step(self, index: int) -> None:
        memory = self.memory
        memory.state, _ = jax.block_until_ready(self._step(memory.state, self.batches[index], self.targets))

    def rebind(self) -> None:
        """Nothing to do: the state is asked for at every call."""


class Dense:
    """``flax.linen.Embed`` under optax: one donated jitted step, the tables one behind another as one."""

    def __init__(self, workload: Workload, optimizer: str, memory: Memory):
        if optimizer not in DENSE_OPTIMIZERS:
            raise Skip("optax has no row-wise Adagrad")
        try:
            import flax.linen as nn
        except ImportError as error:
            raise Skip(f"flax is not installed ({error})") from error
        if not memory.shared:
            raise Skip("embax keeps rows in a form of its own")
        self.workload, self.memory = workload, memory
        model, change = nn.Embed(workload.rows, workload.dim), DENSE_OPTIMIZERS[optimizer]
        self.targets = jnp.stack([jnp.asarray(target) for target in make_targets(workload)])
        self.wide = (workload.rows, workload.dim)
        shapes = {"params": {"embedding": jax.ShapeDtypeStruct(self.wide, jnp.float32)}}
        self.optimizer_state = jax.eval_shape(change.init, shapes)  # arrays are filled in at each step

        def activations(params, ids):
            rows = model.apply(params, ids)
            return rows.sum(2) if workload.pooled else rows

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, ids, targets):
            found, pull_back = jax.vjp(lambda p: activations(p, ids), params)
            changes, state = change.update(*pull_back(targets), state, params)
            return optax.apply_updates(params, changes), state, found

        self._step, self._forward = step, jax.jit(activations)

    def prepare(self, batches: list[Batch]) -> None:
        offsets = [self.workload.offsets[table] for table in self.workload.features]
        shifted = [[ids + offset for ids, offset in zip(batch, offsets, strict=True)] for batch in batches]
        self.batches = [jnp.asarray(np.stack(batch), jnp.int32) for batch in shifted]

    def outputs(self, index: int) -> list[np.ndarray]:
        return list(np.asarray(self._forward(self._params(), self.batches[index])))

    def forward(self, index: int) -> None:
        jax.block_until_ready(self._forward(self._params(), self.batches[index]))

    def step(self, index: int) -> None:
        state = self.memory.state[self.memory.name]
        slots = iter(jax.tree.leaves(state.slots))
        filled = jax.tree.map(
            lambda leaf: next(slots) if leaf.shape == self.wide else jnp.zeros(leaf.shape, leaf.dtype),
            self.optimizer_state,
        )
        done = self._step(self._params(), filled, self.batches[index], self.targets)
        params, filled, _ = jax.block_until_ready(done)
        wide = [leaf for leaf in jax.tree.leaves(filled) if leaf.shape == self.wide]
        slots = jax.tree.unflatten(jax.tree.structure(state.slots), wide)
        self.memory.state = {self.memory.name: state._replace(table=params["params"]["embedding"], slots=slots)}

    def _params(self) -> dict:
        return {"params": {"embedding": self.memory.state[self.memory.name].table}}

    def rebind(self) -> None:
        """Nothing to do: the state is asked for at every call."""


def available_bytes() -> int:
    """Returns the memory that is free for use, or a terabyte where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return 1 << 40
