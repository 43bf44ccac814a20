"""The click task: a model of a label, a baseline trained beside it on the same batches, and their test."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import log_loss, roc_auc_score

import embax
from embax.data.blocks import Rows, padded
from embax.data.files import DataError
from embax.tasks.click import Dcn, Dlrm, Fields, LogisticRegression, Model, Schedule
from embax.tasks.training import DIVERGED, State, Task, Trainer

EVALUATION_BATCH = 16_384
DEEP = {"dlrm": Dlrm, "dcn": Dcn}


@dataclasses.dataclass(frozen=True)
class ClickTask(Task):
    """A click model, and a baseline beside it that shares nothing with it but the batches.

    Attributes:
      model: the click model.
      baseline: a model too, or None.
      smoothing: of the labels.
    """

    model: Model
    baseline: Model | None = None
    smoothing: float = 0.0

    @property
    def models(self) -> dict[str, Model]:
        """By the name that their features and parameters have."""
        return {"model": self.model} | ({} if self.baseline is None else {"baseline": self.baseline})

    def features(self, schedule: Schedule) -> Any:
        return {name: model.features(schedule) for name, model in self.models.items()}

    def ids(self, rows: Rows) -> tuple[Any, Any]:
        return {name: model.ids(rows.ids) for name, model in self.models.items()}, (rows.numbers, rows.labels)

    def init(self, key: jax.Array) -> Any:
        return {name: model.init(key) for name, model in self.models.items()}

    def losses(
        self, params: Any, activations: Any, rows: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = {
            name: model.loss(params[name], activations[name], rows, key, self.smoothing)
            for name, model in self.models.items()
        }
        shown = {"loss": found["model"]} | ({"baseline_loss": found["baseline"]} if "baseline" in found else {})
        return sum(found.values(), jnp.float32(0)), shown


def click_task(settings: Any, fields: Fields) -> ClickTask:
    """Returns the task that ``Settings.of_task`` asks for."""
    shared = {"optimizer": settings.optimizer, "l2": settings.l2}
    # A logistic regression by itself wants a larger rate than one beside a network.
    alone = LogisticRegression(fields, "baseline", weight_rate=1.5 * settings.weight_rate, **shared)
    if settings.model == "logistic":
        model: Model = dataclasses.replace(alone, name="weight", weight_rate=settings.weight_rate)
    else:
        model = DEEP[settings.model](
            fields,
            weight_rate=settings.weight_rate,
            embedding_rate=settings.learning_rate,
            embedding_dim=settings.embedding_dim,
            hidden=settings.hidden,
            dropout=settings.dropout,
            **shared,
        )
    baseline = alone if settings.baseline == "logistic" and settings.model != "logistic" else None
    return ClickTask(model, baseline, settings.label_smoothing)


@functools.partial(jax.jit, static_argnums=0)
def predict_step(trainer: Trainer, tables: Any, params: Any, batch: Any) -> dict[str, jax.Array]:
    """Returns the probability of label 1 for every sample of the batch, by the name of the model."""
    activations, _ = embax.lookup(trainer.plan, tables, batch.ids)
    numbers, _ = batch.rows
    return {
        name: jax.nn.sigmoid(model.logits(params[name], activations[name], numbers, None))
        for name, model in trainer.task.models.items()
    }


def predicted(trainer: Trainer, state: State, rows: Rows) -> dict[str, np.ndarray]:
    """Returns the probability of label 1 for each row, float64, by the name of the model."""
    found = predict_step(trainer, state.tables, state.params, trainer.batch(padded(rows, EVALUATION_BATCH)))
    return {name: np.asarray(part)[: len(rows)].astype(np.float64) for name, part in found.items()}


def evaluated(trainer: Trainer, state: State, batches: Iterable[Rows], base_rate: float) -> dict[str, Any]:
    """Returns AUC and logloss of the model and of what it is compared with.

    Args:
      trainer: of a ClickTask.
      state: trained.
      batches: of EVALUATION_BATCH rows or fewer.
      base_rate: share of label 1 in training: the baseline where none is trained.

    Raises:
      DataError: scores that are no numbers.
    """
    parts = [(predicted(trainer, state, rows), rows.labels) for rows in batches]
    labels = np.concatenate([labels for _, labels in parts])
    scores = {name: np.concatenate([part[name] for part, _ in parts]) for name in parts[0][0]}
    for name, own in scores.items():
        if not np.isfinite(own).all():
            raise DataError(f"the scores of the {name} are no numbers: {DIVERGED}")
    found: dict[str, Any] = measures(labels, scores["model"])
    named = "logistic regression" if "baseline" in scores else "rate of label 1 in training"
    base = measures(labels, scores.get("baseline", np.full(len(labels), base_rate)))
    return found | {"baseline": named} | {f"baseline_{name}": value for name, value in base.items()}


def measures(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Returns AUC (NaN where all labels are alike) and logloss in nats."""
    alike = labels.min() == labels.max()
    auc = float("nan") if alike else float(roc_auc_score(labels, scores))
    return {"auc": auc, "logloss": float(log_loss(labels, scores, labels=[0.0, 1.0]))}
