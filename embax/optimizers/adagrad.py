"""The Adagrad family: rates that fall with the squared gradients a row has seen."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax.optimizers.base import Optimizer, Slot, scalar


class AdagradSlotVariables(NamedTuple):
    """The sum of squared gradients of every element."""

    accumulator: object


class AdagradHyperparameters(NamedTuple):
    """The scalars of one Adagrad step."""

    learning_rate: jax.Array


@dataclasses.dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad without epsilon: a += g^2; w -= lr g / sqrt(a).

    Duchi, Hazan, Singer 2011. The accumulator starts at ``initial_accumulator_value``, which must be
    positive, for it is all that keeps the first division finite.

    >>> Adagrad(0.1).slots().accumulator.initial_value
    0.1
    """

    kernel: ClassVar[str | None] = "adagrad"
    initial_accumulator_value: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self._require("initial_accumulator_value", self.initial_accumulator_value >= 0, "must not be negative")

    def slots(self) -> AdagradSlotVariables:
        return AdagradSlotVariables(Slot(self.initial_accumulator_value))

    def hyperparameters(self, step) -> AdagradHyperparameters:
        return AdagradHyperparameters(scalar(self.get_learning_rate(step)))

    def update_rows(self, rows, gradients, slots, hyper):
        accumulator = slots.accumulator + gradients * gradients
        return rows - hyper.learning_rate * _over_root(gradients, accumulator), AdagradSlotVariables(accumulator)


@dataclasses.dataclass(frozen=True)
class RowwiseAdagrad(Optimizer):
    """Adagrad with one accumulator per row: a += mean(g^2); w -= lr g / sqrt(a).

    The slot of a table of V rows holds V numbers, whatever its embedding_dim. Same formula as the
    "exact row-wise Adagrad" of FBGEMM, with ``initial_accumulator_value`` in place of its epsilon.

    >>> RowwiseAdagrad(0.1).slots().accumulator.row_wise
    True
    """

    kernel: ClassVar[str | None] = "rowwise_adagrad"
    initial_accumulator_value: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self._require("initial_accumulator_value", self.initial_accumulator_value >= 0, "must not be negative")

    def slots(self) -> AdagradSlotVariables:
        return AdagradSlotVariables(Slot(self.initial_accumulator_value, row_wise=True))

    def hyperparameters(self, step) -> AdagradHyperparameters:
        return AdagradHyperparameters(scalar(self.get_learning_rate(step)))

    def update_rows(self, rows, gradients, slots, hyper):
        accumulator = slots.accumulator + jnp.mean(gradients * gradients, axis=-1, keepdims=True)
        return rows - _over_root(hyper.learning_rate, accumulator) * gradients, AdagradSlotVariables(accumulator)


class AdagradMomentumSlotVariables(NamedTuple):
    """Squared gradients and the running sum of scaled steps."""

    accumulator: object
    momentum: object


class AdagradMomentumHyperparameters(NamedTuple):
    """The scalars of one Adagrad step with momentum."""

    learning_rate: jax.Array
    momentum: jax.Array
    beta2: jax.Array
    fresh_weight: jax.Array
    epsilon: jax.Array
    inverse_exponent: jax.Array


@dataclasses.dataclass(frozen=True)
class AdagradMomentum(Optimizer):
    """Adagrad with momentum on the scaled gradient.

    a += g^2 if beta2 == 1, else a = beta2 a + (1 - beta2) g^2; s = g (a + epsilon)^(-1/exponent);
    m = momentum m + s; w -= lr (momentum m + s if use_nesterov else m).

    >>> AdagradMomentum(0.1).slots()._fields
    ('accumulator', 'momentum')
    """

    kernel: ClassVar[str | None] = "adagrad_momentum"
    momentum: float = 0.9
    beta2: float = 1.0
    epsilon: float = 1e-10
    exponent: float = 2.0
    use_nesterov: bool = False
    initial_accumulator_value: float = 0.1
    initial_momentum_value: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self._require("beta2", 0 < self.beta2 <= 1, "must be in (0, 1]; 1 adds squared gradients up")
        positive = self.epsilon >= 0 and self.epsilon + self.initial_accumulator_value > 0
        self._require("epsilon", positive, "must be positive where initial_accumulator_value is 0")
        self._require("exponent", self.exponent > 0, "must be greater than 0")
        self._require("initial_accumulator_value", self.initial_accumulator_value >= 0, "must not be negative")

    def kernel_name(self) -> str | None:
        return "adagrad_nesterov" if self.kernel and self.use_nesterov else self.kernel

    def slots(self) -> AdagradMomentumSlotVariables:
        return AdagradMomentumSlotVariables(Slot(self.initial_accumulator_value), Slot(self.initial_momentum_value))

    def hyperparameters(self, step) -> AdagradMomentumHyperparameters:
        # With beta2 == 1 the accumulator is a plain sum: the new square enters with weight 1, not 0.
        fresh = 1.0 if self.beta2 == 1 else 1.0 - self.beta2
        parts = (
            self.get_learning_rate(step),
            self.momentum,
            self.beta2,
            fresh,
            self.epsilon,
            1.0 / self.exponent,
        )
        return AdagradMomentumHyperparameters(*map(scalar, parts))

    def update_rows(self, rows, gradients, slots, hyper):
        accumulator = hyper.beta2 * slots.accumulator + hyper.fresh_weight * gradients * gradients
        scaled = gradients * (accumulator + hyper.epsilon) ** -hyper.inverse_exponent
        momentum = hyper.momentum * slots.momentum + scaled
        direction = hyper.momentum * momentum + scaled if self.use_nesterov else momentum
        return rows - hyper.learning_rate * direction, AdagradMomentumSlotVariables(accumulator, momentum)


def _over_root(values, accumulator):
    # 0 / sqrt(0) is a step of 0: an accumulator of 0 has only ever seen gradients of 0.
    return jnp.where(accumulator > 0, values / jnp.sqrt(jnp.where(accumulator > 0, accumulator, 1.0)), 0.0)
