"""A click model beside two logistic regressions: the same rows, the same test.

- ``logreg``: one-hot logistic regression as one would begin: Adagrad at rate 0.05, nothing else.
- ``logreg-tuned``: the same weights with a rate chosen for them, and all else of the click model's recipe: L2, label
  smoothing, rates that fall. What the click model is ahead of it is owed to the model, not to the training.
- ``click``: ``Dlrm``, with one more field of weights, the pair of household and product.

What was chosen (rates, dropout, L2, smoothing, epochs) was chosen for each model by training on weeks 1 to 35 and
looking at weeks 36 to 44. Two things were settled after a first look at the test weeks: to show a tuned baseline beside
the plain one, which makes the click model's lead smaller, and to keep one network instead of four, for its cost.
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
    """Trains the models once per seed, writes tables and metrics to the folder ``output``, returns what to show.

    The files are ``<model>-seed<seed>.npz`` and ``metrics.json``; older ones of these names are replaced.

    Raises:
      ValueError: a batch is larger than the training rows.
    """
    rows, test = split(data)
    recipe, cards = Recipe(epochs=epochs, batch_size=batch_size), tuple(data.cards.items())
    data, pair = data.with_pair("household_id", "product_id")
    click = Dlrm(cards, pairs=((pair, data.cards[pair]),), embedding_dim=embedding_dim)
    plain = dataclasses.replace(recipe, label_smoothing=0.0, falling=False)
    trainers = {
        "logreg": Trainer.create(LogisticRegression(cards, weight_rate=0.05, l2=0.0), plain, len(rows)),
        "logreg-tuned": Trainer.create(LogisticRegression(cards, weight_rate=0.3), recipe, len(rows)),
        "click": Trainer.create(click, recipe, len(rows)),
    }
    runs = []
    for seed in seeds:
        scores: dict[str, Any] = {"seed": seed}
        for name, trainer in trainers.items():
            state, score = trainer.run(data, rows, test, seed, f"{name}, seed {seed}")
            report.save_arrays(output / f"{name}-seed{seed}.npz", trainer.plan, state.tables, state.params)
            scores[name] = score._asdict()
        runs.append(scores)
    facts = {"train_rows": len(rows), "test_rows": len(test), "jax": jax.__version__, "backend": kernels.choose().name}
    facts |= {"models": {name: _settings(trainer) for name, trainer in trainers.items()}}
    facts |= {"runs": runs, "mean": report.means(runs, list(trainers))}
    (output / "metrics.json").write_text(json.dumps(facts, indent=2) + "\n")
    return [*report.table_lines(runs, list(trainers)), f"tables and metrics.json are in {output}"]


def _settings(trainer: Trainer) -> dict[str, Any]:
    settings = dataclasses.asdict(trainer.recipe) | dataclasses.asdict(trainer.model)
    return {name: value for name, value in settings.items() if name != "cards"}
