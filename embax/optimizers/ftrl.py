"""Follow the regularised leader."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax.optimizers.base import Optimizer, Slot, scalar


class FTRLSlotVariables(NamedTuple):
    """The sum of squared gradients, and the linear term of the leader's problem."""

    accumulator: object
    linear: object


class FTRLHyperparameters(NamedTuple):
    """The scalars of one FTRL step."""

    learning_rate: jax.Array
    power: jax.Array
    l1: jax.Array
    l2: jax.Array
    beta: jax.Array


@dataclasses.dataclass(frozen=True)
class FTRL(Optimizer):
    """FTRL-proximal with L1 and L2 regularisation; the row is a function of its slots.

    n' = n + g^2; p = n'^-power, p0 = n^-power; z += g - (p - p0)/lr w;
    num = -z if l1 == 0 else clip(z, -l1, l1) - z; w = num / ((p + beta)/lr + 2 l2).
    With ``multiply_linear_by_learning_rate``: z += lr g - (p - p0) w; l1 becomes l1 lr; the denominator
    is p + 2 lr l2 + beta.

    McMahan et al. 2013.

    >>> FTRL().learning_rate
    0.01
    """

    kernel: ClassVar[str | None] = "ftrl"
    learning_rate: object = 0.01
    learning_rate_power: float = -0.5
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    beta: float = 0.0
    initial_accumulator_value: float = 0.1
    initial_linear_value: float = 0.0
    multiply_linear_by_learning_rate: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._require("learning_rate_power", self.learning_rate_power <= 0, "must not be positive")
        for name in ("l1_regularization_strength", "l2_regularization_strength", "beta"):
            self._require(name, getattr(self, name) >= 0, "must not be negative")
        self._require("initial_accumulator_value", self.initial_accumulator_value >= 0, "must not be negative")

    def kernel_name(self) -> str | None:
        return "ftrl_multiplied" if self.kernel and self.multiply_linear_by_learning_rate else self.kernel

    def slots(self) -> FTRLSlotVariables:
        return FTRLSlotVariables(Slot(self.initial_accumulator_value), Slot(self.initial_linear_value))

    def hyperparameters(self, step) -> FTRLHyperparameters:
        rate = scalar(self.get_learning_rate(step))
        l1, l2, beta = map(scalar, (self.l1_regularization_strength, self.l2_regularization_strength, self.beta))
        return FTRLHyperparameters(rate, scalar(-self.learning_rate_power), l1, l2, beta)

    def update_rows(self, rows, gradients, slots, hyper):
        # A rate of 0 (a warm-up begins so) leaves the row where it is; the formula divides by the rate.
        still = hyper.learning_rate == 0
        rate = jnp.where(still, 1.0, hyper.learning_rate)
        accumulator = slots.accumulator + gradients * gradients
        power = accumulator**hyper.power
        moved = (power - slots.accumulator**hyper.power) * rows
        if self.multiply_linear_by_learning_rate:
            linear = slots.linear + rate * gradients - moved
            l1, denominator = hyper.l1 * rate, power + 2 * rate * hyper.l2 + hyper.beta
        else:
            linear = slots.linear + gradients - moved / rate
            l1, denominator = hyper.l1, (power + hyper.beta) / rate + 2 * hyper.l2
        # With l1 == 0 the clip gives 0, which leaves -linear.
        numerator = jnp.clip(linear, -l1, l1) - linear
        # A denominator of 0 has seen gradients of 0 only.
        keep = still | (denominator == 0)
        stepped = numerator / jnp.where(keep, 1.0, denominator)
        return jnp.where(keep, rows, stepped), FTRLSlotVariables(accumulator, jnp.where(still, slots.linear, linear))
