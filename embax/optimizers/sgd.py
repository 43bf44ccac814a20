"""Stochastic gradient descent: no slot variables."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax

from embax.optimizers.base import Optimizer, scalar


class SGDSlotVariables(NamedTuple):
    """SGD stores nothing beside the rows."""


class SGDHyperparameters(NamedTuple):
    """The scalars of one SGD step."""

    learning_rate: jax.Array


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent: w -= lr g.

    >>> SGD(0.5).slot_variables_count()
    0
    """

    kernel: ClassVar[str | None] = "sgd"

    def slots(self) -> SGDSlotVariables:
        return SGDSlotVariables()

    def hyperparameters(self, step) -> SGDHyperparameters:
        return SGDHyperparameters(scalar(self.get_learning_rate(step)))

    def update_rows(self, rows, gradients, slots, hyper):
        return rows - hyper.learning_rate * gradients, slots
