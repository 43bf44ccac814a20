"""A click model beside a logistic regression: same rows, same recipe, same test.

What was chosen (rates, dropout, L2, smoothing, epochs) was chosen for each model by training on weeks 1 to 35 and
looking at weeks 36 to 44. The test weeks chose nothing.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from embax import kernels
from embax.tasks import report
from embax.tasks.click import Dlrm, LogisticRegression
from embax.tasks.completejourney import Transactions
from embax.tasks.training import Recipe, Trainer

LAST_TRAIN_WEEK = 44


def split(data: Transactions) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to train on and, later in time, those to test on."""
    early = data.week <= LAST_TRAIN_WEEK
    return np.flatnonzero(early), np.flatnonzero(~early)


def run(
    data: Transactions, seeds: Sequence[int], output: Path, *, epochs: int, batch_size: int, embedding_dim: int
) -> list[str]:
    """Trains both models once per seed, writes tables and metrics to the folder ``output``, returns what to show.

    The files are ``<model>-seed<seed>.npz`` and ``metrics.json``; older ones of these names are replaced.
    """
    rows, test = split(data)
    recipe, cards = Recipe(epochs=epochs, batch_size=batch_size), tuple(data.cards.items())
    data, pair = data.with_pair("household_id", "product_id")
    click = Dlrm(cards, pairs=((pair, data.cards[pair]),), embedding_dim=embedding_dim)
    models = {"logreg": LogisticRegression(cards), "click": click}
    trainers = {name: Trainer.create(model, recipe, len(rows)) for name, model in models.items()}
    runs = []
    for seed in seeds:
        scores: dict[str, Any] = {"seed": seed}
        for name, trainer in trainers.items():
            state, score = trainer.run(data, rows, test, seed, f"{name}, seed {seed}")
            report.save_arrays(output / f"{name}-seed{seed}.npz", trainer.plan, state.tables, state.params)
            scores[name] = score._asdict()
        runs.append(scores)
    settings = {name: _settings(model) for name, model in models.items()}
    facts = {
        "train_rows": len(rows),
        "test_rows": len(test),
        "backend": kernels.choose().name,
        "jax": jax.__version__,
        "recipe": dataclasses.asdict(recipe),
        "models": settings,
        "runs": runs,
        "mean": report.means(runs, list(models)),
    }
    (output / "metrics.json").write_text(json.dumps(facts, indent=2) + "\n")
    return [*report.table_lines(runs, list(models)), f"tables and metrics.json are in {output}"]


def _settings(model: Any) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(model).items() if name != "cards"}
