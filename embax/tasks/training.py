"""A task made ready to train: embax for the tables, optax for the dense part, one jitted step for both."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import embax

Schedule = Callable[[Any], Any]
AXIS = "devices"
DIVERGED = "training has diverged; choose smaller rates (--learning-rate, --weight-rate, --dense-rate)"


class State(NamedTuple):
    """Everything that a step changes."""

    tables: Any
    params: Any
    dense: Any
    step: Any


class Batch(NamedTuple):
    """What a step is given.

    Attributes:
      ids: an ``embax.IdBatch``.
      rows: arrays that the task's loss wants besides.
    """

    ids: Any
    rows: Any


class Task(abc.ABC):
    """What is trained. Hashable, so that it can be static under jit; it owns no arrays."""

    @abc.abstractmethod
    def features(self, schedule: Schedule) -> Any:
        """Returns the FeatureSpecs; rates are multiplied by ``schedule`` of the step."""

    @abc.abstractmethod
    def ids(self, rows: Any) -> tuple[Any, Any]:
        """Returns ids in the structure of ``features``, and the arrays besides, of the same first dimension."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Any:
        """Returns fresh dense parameters."""

    @abc.abstractmethod
    def losses(
        self, params: Any, activations: Any, rows: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns what is minimised, and what of it is shown, by name."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A task with its plan and the optimizer of its dense part: hashable, so static under jit.

    Attributes:
      task: what is trained, a Task.
      plan: of its tables.
      dense: of the dense parameters.
      devices: that share each batch.
    """

    task: Any
    plan: embax.Plan
    dense: optax.GradientTransformation
    devices: int = 1

    @classmethod
    def create(cls, task: Task, steps: int, dense_rate: float, falling: bool = True, devices: int = 1) -> "Trainer":
        """Returns the trainer for that many steps; rates fall linearly to 0 over them, or stay."""
        schedule = optax.linear_schedule(1.0, 0.0 if falling else 1.0, max(steps, 1))
        dense = optax.adam(lambda step: dense_rate * schedule(step))
        mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,)) if devices > 1 else None
        return cls(task, embax.plan(task.features(schedule), mesh=mesh), dense, devices)

    @property
    def mesh(self) -> Mesh | None:
        """The devices, where there are several."""
        return Mesh(np.array(jax.devices()[: self.devices]), (AXIS,)) if self.devices > 1 else None

    def init(self, seed: int) -> State:
        """Returns fresh tables and parameters."""
        tables_key, _ = jax.random.split(jax.random.key(seed))
        return self.init_dense(seed)._replace(tables=embax.init(self.plan, tables_key))

    def init_dense(self, seed: int) -> State:
        """Returns what ``init`` does, without tables."""
        _, params_key = jax.random.split(jax.random.key(seed))
        params = self.task.init(params_key)
        return State(None, *self._everywhere((params, self.dense.init(params), jnp.int32(0))))

    def batch(self, rows: Any) -> Batch:
        """Returns rows as a step takes them: ids preprocessed, all of it on its devices."""
        ids, besides = self.task.ids(rows)
        batch = embax.preprocess(self.plan, ids)  # on a mesh it is on its devices already
        return Batch(batch if self.mesh is not None else jax.device_put(batch), self._shared(besides))

    def _everywhere(self, tree: Any) -> Any:
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _shared(self, tree: Any) -> Any:
        return jax.device_put(tree, None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(AXIS)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(trainer: Trainer, state: State, batch: Batch, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Returns the state after one step, its buffers reused, and the losses before it."""
    activations, residuals = embax.lookup(trainer.plan, state.tables, batch.ids)
    step_key = jax.random.fold_in(key, state.step)

    def loss_of(params, activations):
        return trainer.task.losses(params, activations, batch.rows, step_key)

    gradients, shown = jax.grad(loss_of, argnums=(0, 1), has_aux=True)(state.params, activations)
    tables = embax.update(trainer.plan, state.tables, residuals, gradients[1], state.step)
    updates, dense = trainer.dense.update(gradients[0], state.dense, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(tables, params, dense, state.step + 1), shown
