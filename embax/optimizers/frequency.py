"""Frequency-aware Adagrad: rows that are seen seldom take larger steps."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax.optimizers.base import Optimizer, Slot, scalar, step_or_zero


class F2ASlotVariables(NamedTuple):
    """The sum of squared gradients, and how many steps have touched the row."""

    accumulator: object
    local_step: object


class F2AHyperparameters(NamedTuple):
    """The scalars of one F2A step."""

    learning_rate: jax.Array
    step: jax.Array
    rho: jax.Array
    l1: jax.Array
    l2: jax.Array
    max_lr_multiplier: jax.Array


@dataclasses.dataclass(frozen=True)
class F2A(Optimizer):
    """Adagrad scaled by how seldom a row is touched.

    s += 1; f = min((max(step, 1) / s)^rho, max_lr_multiplier); a += g^2;
    w -= lr (f g / sqrt(a) + l1 sign(w) + l2 w). ``local_step`` is one number per row.

    >>> F2A().slots().local_step.row_wise
    True
    """

    kernel: ClassVar[str | None] = "f2a"
    learning_rate: object = 0.01
    rho: float = 0.5
    initial_accumulator_value: float = 0.1
    initial_local_step_value: float = 0.0
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    max_lr_multiplier: float = 1e6

    def __post_init__(self):
        super().__post_init__()
        self._require("initial_accumulator_value", self.initial_accumulator_value > 0, "must be greater than 0")
        self._require("initial_local_step_value", self.initial_local_step_value >= 0, "must not be negative")

    def slots(self) -> F2ASlotVariables:
        return F2ASlotVariables(
            Slot(self.initial_accumulator_value), Slot(self.initial_local_step_value, row_wise=True)
        )

    def hyperparameters(self, step) -> F2AHyperparameters:
        l1, l2 = self.l1_regularization_strength, self.l2_regularization_strength
        parts = (self.get_learning_rate(step), step_or_zero(step), self.rho, l1, l2, self.max_lr_multiplier)
        return F2AHyperparameters(*map(scalar, parts))

    def update_rows(self, rows, gradients, slots, hyper):
        local_step = slots.local_step + 1
        factor = jnp.minimum((jnp.maximum(hyper.step, 1.0) / local_step) ** hyper.rho, hyper.max_lr_multiplier)
        accumulator = slots.accumulator + gradients * gradients
        direction = factor * gradients / jnp.sqrt(accumulator) + hyper.l1 * jnp.sign(rows) + hyper.l2 * rows
        return rows - hyper.learning_rate * direction, F2ASlotVariables(accumulator, local_step)
