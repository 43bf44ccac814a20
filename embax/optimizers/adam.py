"""The Adam family: first and second moments of the gradient.

Both are lazy here, as every sparse Adam is: a row's moments decay only when the row is touched, and the
bias correction counts steps, not touches. Dense Adam would move every row at every step, for its momentum
goes on; that is the whole table's traffic, which embax exists to avoid. Rows touched at every step take
exactly the steps of dense Adam.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax.optimizers.base import Optimizer, Slot, one_minus_power, scalar, step_or_zero


class AdamSlotVariables(NamedTuple):
    """First and second moments."""

    momentum: object
    velocity: object


class AdamHyperparameters(NamedTuple):
    """The scalars of one Adam step, bias correction folded in."""

    alpha: jax.Array
    one_minus_beta_1: jax.Array
    one_minus_beta_2: jax.Array
    epsilon: jax.Array


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    """Lazy Adam: bias correction in the rate, epsilon scaled with it.

    t = step + 1; alpha = lr sqrt(1 - b2^t) / (1 - b1^t); e = epsilon sqrt(1 - b2^t);
    m += (1 - b1)(g - m); v += (1 - b2)(g^2 - v); w -= alpha m / (sqrt(v) + e).

    Kingma, Ba 2014; the scaled epsilon makes this equal to the form with corrected moments.

    >>> Adam(0.001).slots()._fields
    ('momentum', 'velocity')
    """

    kernel: ClassVar[str | None] = "adam"
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        self._require("beta_1", 0 <= self.beta_1 < 1, "must be in [0, 1)")
        self._require("beta_2", 0 <= self.beta_2 < 1, "must be in [0, 1)")
        self._require("epsilon", self.epsilon > 0, "must be greater than 0, for a gradient of 0 divides by it")

    def slots(self) -> AdamSlotVariables:
        return AdamSlotVariables(Slot(0.0), Slot(0.0))

    def hyperparameters(self, step) -> AdamHyperparameters:
        t = step_or_zero(step) + 1
        root = jnp.sqrt(one_minus_power(self.beta_2, t))
        alpha = scalar(self.get_learning_rate(step)) * root / one_minus_power(self.beta_1, t)
        return AdamHyperparameters(alpha, scalar(1 - self.beta_1), scalar(1 - self.beta_2), root * scalar(self.epsilon))

    def update_rows(self, rows, gradients, slots, hyper):
        momentum = slots.momentum + hyper.one_minus_beta_1 * (gradients - slots.momentum)
        velocity = slots.velocity + hyper.one_minus_beta_2 * (gradients * gradients - slots.velocity)
        rows = rows - hyper.alpha * momentum / (jnp.sqrt(velocity) + hyper.epsilon)
        return rows, AdamSlotVariables(momentum, velocity)


class LaPropSlotVariables(NamedTuple):
    """The running mean of normalised gradients, and of their squares before."""

    mu: object
    nu: object


class LaPropHyperparameters(NamedTuple):
    """The scalars of one LaProp step."""

    learning_rate: jax.Array
    b1: jax.Array
    fresh_weight: jax.Array
    decay: jax.Array
    one_minus_decay: jax.Array
    eps: jax.Array


@dataclasses.dataclass(frozen=True)
class LaProp(Optimizer):
    """Lazy LaProp: normalise the gradient first, then take its running mean.

    d = b2 if step is None else b2 (1 - b2^step) / (1 - b2^(step + 1)); nu = d nu + (1 - d)(g^2 + eps);
    mu = b1 mu + sqrt(1 - b1^2) g / sqrt(nu); w -= lr mu.

    Ziyin, Wang, Ueda 2020. ``rms_clip_threshold`` is part of the specification's signature, and refused.

    >>> LaProp(0.001).slots()._fields
    ('mu', 'nu')
    """

    kernel: ClassVar[str | None] = "laprop"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-30
    rms_clip_threshold: float | None = None
    initial_slot_value: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self._require("rms_clip_threshold", self.rms_clip_threshold is None, "is not supported; use row_clip_norm=")
        self._require("b1", 0 <= self.b1 <= 1, "must be in [0, 1]")
        self._require("b2", 0 <= self.b2 < 1, "must be in [0, 1)")

    def slots(self) -> LaPropSlotVariables:
        return LaPropSlotVariables(Slot(self.initial_slot_value), Slot(self.initial_slot_value))

    def hyperparameters(self, step) -> LaPropHyperparameters:
        if step is None:
            decay, rest = scalar(self.b2), scalar(1 - self.b2)
        else:
            # 1 - d = (1 - b2) / (1 - b2^(step + 1)), written so that neither side cancels.
            whole = one_minus_power(self.b2, step_or_zero(step) + 1)
            decay = scalar(self.b2) * one_minus_power(self.b2, step) / whole
            rest = scalar(1 - self.b2) / whole
        fresh = scalar((1 - self.b1**2) ** 0.5)
        return LaPropHyperparameters(
            scalar(self.get_learning_rate(step)), scalar(self.b1), fresh, decay, rest, scalar(self.eps)
        )

    def update_rows(self, rows, gradients, slots, hyper):
        nu = hyper.decay * slots.nu + hyper.one_minus_decay * (gradients * gradients + hyper.eps)
        # A squared gradient below the smallest float32 leaves nu at 0: its direction is then 0, not NaN.
        direction = jnp.where(nu > 0, gradients / jnp.sqrt(jnp.where(nu > 0, nu, 1.0)), 0.0)
        mu = hyper.b1 * slots.mu + hyper.fresh_weight * direction
        return rows - hyper.learning_rate * mu, LaPropSlotVariables(mu, nu)
