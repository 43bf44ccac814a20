"""The training loop: embax for the tables, optax for the dense part, one jitted step for both.

The host prepares the ids of the next batch while the device works on this one: dispatch is asynchronous, and
nothing in the loop waits for a result but the progress bar, now and then.
"""

import dataclasses
import functools
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import log_loss, roc_auc_score
from tqdm import tqdm

import embax
from embax.tasks.click import Model
from embax.tasks.completejourney import Transactions

EVALUATION_BATCH = 16_384
REPORT_EVERY = 50


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
      epochs: passes over the training rows.
      batch_size: samples of a step.
      dense_rate: Adam's rate for the dense parameters.
      label_smoothing: see ``Model.loss``.
      falling: whether all rates fall linearly to 0 or stay as they are.
    """

    epochs: int = 2
    batch_size: int = 2048
    dense_rate: float = 3e-3
    label_smoothing: float = 0.05
    falling: bool = True


class State(NamedTuple):
    """Everything that a step changes."""

    tables: Any
    params: Any
    dense: Any
    step: Any


class Score(NamedTuple):
    """How a trained model did on rows it has not seen, and how long training took, compilation included."""

    auc: float
    logloss: float
    seconds: float
    samples_per_second: float


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A model and its recipe, made ready: hashable, so static under jit; one trainer serves every seed."""

    model: Model
    recipe: Recipe
    plan: embax.Plan
    dense: optax.GradientTransformation
    steps: int

    @classmethod
    def create(cls, model: Model, recipe: Recipe, train_rows: int) -> "Trainer":
        """Returns the trainer for that many rows.

        Raises:
          ValueError: there are fewer rows than a batch has.
        """
        steps = train_rows // recipe.batch_size * recipe.epochs
        if not steps:
            raise ValueError(
                f"batch_size {recipe.batch_size} is more than the {train_rows} training rows; choose a smaller one"
            )
        schedule = optax.linear_schedule(1.0, 0.0 if recipe.falling else 1.0, steps)
        dense = optax.adam(lambda step: recipe.dense_rate * schedule(step))
        return cls(model, recipe, embax.plan(model.features(schedule)), dense, steps)

    def init(self, seed: int) -> State:
        """Returns fresh tables and parameters."""
        tables_key, params_key = jax.random.split(jax.random.key(seed))
        params = self.model.init(params_key)
        return State(embax.init(self.plan, tables_key), params, self.dense.init(params), jnp.int32(0))

    def batch(self, data: Transactions, rows: np.ndarray) -> embax.IdBatch:
        """Returns the ids of those rows, preprocessed."""
        columns = {name: values[rows] for name, values in data.fields.items()}
        return embax.preprocess(self.plan, self.model.ids(columns))

    def fit(self, data: Transactions, rows: np.ndarray, seed: int, title: str) -> tuple[State, float]:
        """Returns the state after training on ``rows`` and the seconds it took; shows a progress bar.

        Every epoch goes through the rows in a new order, in whole batches.
        """
        state, size, shown = self.init(seed), self.recipe.batch_size, None
        shuffle, key = np.random.default_rng(seed), jax.random.key(seed)
        labels = data.label.astype(np.float32)
        start = time.perf_counter()
        every = 0.1 if sys.stderr.isatty() else 10.0  # seconds: a log keeps every line that a terminal overwrites
        with tqdm(total=self.steps * size, desc=title, unit=" samples", unit_scale=True, mininterval=every) as bar:
            for step in range(self.steps):
                first = step % (self.steps // self.recipe.epochs) * size
                if not first:
                    order = shuffle.permutation(rows)
                taken = order[first : first + size]
                state, loss = train_step(self, state, self.batch(data, taken), labels[taken], key)
                if step % REPORT_EVERY == 0:
                    if shown is not None:
                        bar.set_postfix(loss=f"{float(shown):.4f}", refresh=False)
                    shown = loss
                bar.update(size)
            jax.block_until_ready(state)
        return state, time.perf_counter() - start

    def predict(self, state: State, data: Transactions, rows: np.ndarray) -> np.ndarray:
        """Returns the probability of label 1 for each of ``rows``."""
        whole = np.resize(rows, -(-len(rows) // EVALUATION_BATCH) * EVALUATION_BATCH)
        parts = [
            predict_step(self, state.tables, state.params, self.batch(data, part))
            for part in whole.reshape(-1, EVALUATION_BATCH)
        ]
        return np.concatenate(parts)[: len(rows)].astype(np.float64)

    def run(
        self, data: Transactions, train: np.ndarray, test: np.ndarray, seed: int, title: str
    ) -> tuple[State, Score]:
        """Returns the trained state and its score on the rows ``test``."""
        state, seconds = self.fit(data, train, seed, title)
        predicted = self.predict(state, data, test)
        auc, logloss = roc_auc_score(data.label[test], predicted), log_loss(data.label[test], predicted)
        samples = self.steps * self.recipe.batch_size
        return state, Score(float(auc), float(logloss), seconds, samples / seconds)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(trainer: Trainer, state: State, batch: embax.IdBatch, labels: jax.Array, key: jax.Array):
    """Returns the state after one step, its buffers reused, and the loss before it."""
    activations, residuals = embax.lookup(trainer.plan, state.tables, batch)
    dropout_key = jax.random.fold_in(key, state.step)

    def loss_of(params, activations):
        return trainer.model.loss(params, activations, labels, dropout_key, trainer.recipe.label_smoothing)

    loss, (dense_grads, act_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(state.params, activations)
    tables = embax.update(trainer.plan, state.tables, residuals, act_grads, state.step)
    updates, dense = trainer.dense.update(dense_grads, state.dense, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(tables, params, dense, state.step + 1), loss


@functools.partial(jax.jit, static_argnums=0)
def predict_step(trainer: Trainer, tables: Any, params: Any, batch: embax.IdBatch) -> jax.Array:
    """Returns the probability of label 1 for every sample of the batch."""
    activations, _ = embax.lookup(trainer.plan, tables, batch)
    return jax.nn.sigmoid(trainer.model.logits(params, activations, None))
