"""What an optimizer of table rows is.

An optimizer sees rows, never a table: the kernels gather the touched rows and their slot variables,
call ``step_rows`` once, and write the results back. A row that no id touched is not shown to it, so it
cannot move.

The protocol, in the order in which a step uses it:

1. ``slots()``: a NamedTuple of ``Slot``, what is stored beside every row;
2. ``hyperparameters(step)``: a NamedTuple of float32 scalars, computed once per step (rates, bias
   corrections); kernels read nothing else, so that a schedule never recompiles anything;
3. ``update_rows(rows, gradients, slots, hyper)``: the formula, on ``[n, embedding_dim]`` float32 arrays;
4. ``kernel``: the name of the C++ struct with the same formula, or None.
"""

import abc
import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax.rounding import step_seed

LearningRate = float | Callable[[], Any] | Callable[[Any], Any]

# What a kernel's struct stands for: a subclass that changes one of these has no kernel, unless it names one.
_FORMULA = ("slots", "hyperparameters", "update_rows", "step_rows", "modifiers")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One slot variable: what an optimizer stores beside each row, starting at ``initial_value``.

    ``row_wise`` slots hold one number per row (shape ``[vocabulary_size, 1]``), the others one per element.
    """

    initial_value: float
    row_wise: bool = False
    dtype: str = "float32"

    def shape(self, table_shape: tuple[int, int]) -> tuple[int, int]:
        """Returns the shape of this slot beside a table of ``table_shape``."""
        return (table_shape[0], 1 if self.row_wise else table_shape[1])

    def full(self, table_shape: tuple[int, int]) -> jax.Array:
        """Returns the slot of a fresh table of ``table_shape``."""
        return jnp.full(self.shape(table_shape), self.initial_value, self.dtype)


class Modifiers(NamedTuple):
    """The hyperparameters that every optimizer has, in front of its own.

    ``rounding_seed`` is uint32, or None where rows are rounded to nearest.
    """

    row_clip_norm: jax.Array
    l2_weight_decay: jax.Array
    decay: jax.Array
    rounding_seed: Any


@dataclasses.dataclass(frozen=True)
class Optimizer(abc.ABC):
    """Base of the optimizers: a learning rate, and three changes that any formula may be wrapped in.

    Args:
      learning_rate: a number, a callable of no argument, or a callable of the step.
      row_clip_norm: the summed gradient of a row is scaled down to at most this L2 norm (None: not).
      l2_weight_decay: this times the row is added to its gradient, after clipping.
      decoupled_weight_decay: the row shrinks by ``learning_rate`` times this times itself, beside the step.
      stochastic_rounding: a seed: rows of 16-bit tables are rounded up with the probability of what is cut off, by
        random bits that depend on the seed, the step (pass one to ``update``) and the place alone. None: to nearest.

    The first three act on touched rows only, at the moment they are touched. Optimizers are data: equal when of
    one class with equal fields (callables by identity), hashable, never changed.
    """

    kernel: ClassVar[str | None] = None
    learning_rate: LearningRate = 0.001
    row_clip_norm: float | None = dataclasses.field(default=None, kw_only=True)
    l2_weight_decay: float = dataclasses.field(default=0.0, kw_only=True)
    decoupled_weight_decay: float = dataclasses.field(default=0.0, kw_only=True)
    stochastic_rounding: int | None = dataclasses.field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "kernel" not in own and any(name in own for name in _FORMULA):
            cls.kernel = None  # another formula than that of the kernel it would inherit

    def __post_init__(self):
        if isinstance(self.learning_rate, (np.ndarray, np.generic, jax.Array)) and self.learning_rate.ndim == 0:
            object.__setattr__(self, "learning_rate", float(self.learning_rate))
        _check_learning_rate(type(self).__name__, self.learning_rate)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float:
                self._require(field.name, _is_finite(value), "must be a finite number")
            elif field.type is bool:
                self._require(field.name, isinstance(value, (bool, np.bool_)), "must be True or False")
        if self.row_clip_norm is not None:
            positive = _is_finite(self.row_clip_norm) and self.row_clip_norm > 0
            self._require("row_clip_norm", positive, "must be greater than 0, or None for no clipping")
        for name in ("l2_weight_decay", "decoupled_weight_decay"):
            self._require(name, getattr(self, name) >= 0, "must not be negative")
        seed = self.stochastic_rounding
        whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
        self._require("stochastic_rounding", seed is None or whole, "must be an integer, the seed, or None")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} {rule}")

    @abc.abstractmethod
    def slots(self) -> Any:
        """Returns a NamedTuple of ``Slot``: the slot variables, by name."""

    @abc.abstractmethod
    def hyperparameters(self, step) -> Any:
        """Returns the NamedTuple of float32 scalars that ``update_rows`` reads at this step.

        Args:
          step: int or int32 scalar counted from 0; None stands for 0 in the formulas.
        """

    @abc.abstractmethod
    def update_rows(self, rows: jax.Array, gradients: jax.Array, slots: Any, hyper: Any) -> tuple[jax.Array, Any]:
        """Returns the rows and slots after one step.

        Args:
          rows: float32 ``[n, embedding_dim]``, touched rows.
          gradients: float32 ``[n, embedding_dim]``, summed over every occurrence of the row.
          slots: NamedTuple of float32 ``[n, embedding_dim]`` or ``[n, 1]``.
          hyper: what ``hyperparameters`` gave.
        """

    def modifiers(self, step) -> Modifiers:
        """Returns the scalars of clipping and weight decay at this step."""
        clip = math.inf if self.row_clip_norm is None else self.row_clip_norm
        decay = self.decoupled_weight_decay and self.get_learning_rate(step) * self.decoupled_weight_decay
        seed = self.stochastic_rounding
        seed = None if seed is None else step_seed(int(seed), 0 if step is None else step)
        return Modifiers(scalar(clip), scalar(self.l2_weight_decay), scalar(decay), seed)

    def kernel_name(self) -> str | None:
        """Returns the name of the C++ struct with this formula and these settings, or None."""
        return self.kernel

    def element_wise(self) -> bool:
        """Returns whether it is known that each number of a row moves by its own gradient and slots alone."""
        known = self.kernel_name() is not None and self.row_clip_norm is None
        return known and not any(slot.row_wise for slot in self.slots())

    def step_rows(self, rows: jax.Array, gradients: jax.Array, slots: Any, hyper: tuple) -> tuple[jax.Array, Any]:
        """Returns rows and slots after clipping, L2 decay, ``update_rows`` and decoupled decay, in this order.

        Args as ``update_rows``; ``hyper`` is ``(modifiers(step), hyperparameters(step))``.
        """
        modifiers, own = hyper
        if self.row_clip_norm is not None:
            norm = jnp.sqrt(jnp.sum(gradients * gradients, axis=-1, keepdims=True))
            gradients = gradients * jnp.where(norm > modifiers.row_clip_norm, modifiers.row_clip_norm / norm, 1.0)
        if self.l2_weight_decay:
            gradients = gradients + modifiers.l2_weight_decay * rows
        stepped, slots = self.update_rows(rows, gradients, slots, own)
        if self.decoupled_weight_decay:
            stepped = stepped - modifiers.decay * rows
        return stepped, slots

    def get_learning_rate(self, step=None) -> Any:
        """Returns the learning rate at ``step``.

        Raises:
          ValueError: the rate is a callable of the step and ``step`` is None.
        """
        if not callable(self.learning_rate):
            return self.learning_rate
        rate: Callable[..., Any] = self.learning_rate
        if _positional_count(rate) == 0:
            return rate()
        if step is None:
            raise ValueError(
                f"{type(self).__name__}: learning_rate is a callable of the step, and step is None; pass step= to "
                "update"
            )
        return rate(step)

    def get_hyperparameters(self, step=None) -> tuple:
        """Returns ``hyperparameters(step)`` as a plain tuple of float32 scalars."""
        return tuple(self.hyperparameters(step))

    def slot_variables_count(self) -> int:
        """Returns how many slot variables a row has."""
        return len(self.slots())

    def slot_variables_initializers(self) -> Any:
        """Returns the slot variables' initializers ``(key, shape, dtype) -> array``, by name."""
        return map_slots(lambda slot: jax.nn.initializers.constant(slot.initial_value), self.slots())

    def short_name(self) -> str:
        """Returns the optimizer's name in lower case, that of its kernel where it has one."""
        return self.kernel or type(self).__name__.lower()

    def get_float_params(self) -> dict[str, float]:
        """Returns the float settings by name, without the learning rate; clipping and decay only where set."""
        return {f.name: getattr(self, f.name) for f in self._settings(float) if f.name != "learning_rate"}

    def get_bool_params(self) -> dict[str, bool]:
        """Returns the boolean settings by name."""
        return {f.name: getattr(self, f.name) for f in self._settings(bool)}

    @classmethod
    def from_float_and_bool_params(
        cls, float_params: dict[str, float], bool_params: dict[str, bool], learning_rate: LearningRate
    ) -> "Optimizer":
        """Returns the optimizer with these settings; names it does not have are ignored, the others keep defaults."""
        known = {f.name for f in dataclasses.fields(cls)} - {"learning_rate"}
        given = {name: value for name, value in {**float_params, **bool_params}.items() if name in known}
        return cls(learning_rate=learning_rate, **given)

    def _settings(self, kind: type) -> list[dataclasses.Field]:
        common = {f.name for f in dataclasses.fields(Optimizer)}
        return [
            f
            for f in dataclasses.fields(self)
            if f.type is kind and (f.name not in common or getattr(self, f.name) != f.default)
        ]


@dataclasses.dataclass(frozen=True)
class CallablePlaceholder:
    """Stands for a callable learning rate that was stored as data: only its name is left.

    Raises:
      RuntimeError: when called; the caller of a load supplies the callable again.
    """

    tag: str

    def __call__(self, *args):
        raise RuntimeError(
            f"the learning rate {self.tag!r} was a callable when it was stored, and callables are not data; set "
            "learning_rate to the callable again"
        )


def map_slots(function: Callable, slots: Any, *others: Any) -> Any:
    """Returns a slots container like ``slots`` holding ``function`` of each slot (and its peers in ``others``)."""
    values = [function(*parts) for parts in zip(slots, *others, strict=True)]
    return slots._make(values) if hasattr(slots, "_make") else tuple(values)


def slot_names(optimizer: Optimizer) -> tuple[str, ...]:
    """Returns the names of the optimizer's slot variables; unnamed ones are slot_0, slot_1, ..."""
    slots = optimizer.slots()
    return tuple(getattr(slots, "_fields", (f"slot_{i}" for i in range(len(slots)))))


def scalar(value) -> jax.Array:
    """Returns ``value`` as a float32 scalar."""
    return jnp.asarray(value, jnp.float32)


def one_minus_power(base: float, exponent) -> jax.Array:
    """Returns 1 - base ** exponent in float32, without the cancellation of computing it so.

    With base 0.999 and exponent 1 the plain formula is off by 6e-5 in float32; this one by 1e-7.
    """
    exponent = scalar(exponent)
    if base == 0:
        return jnp.where(exponent > 0, 1.0, 0.0)
    return -jnp.expm1(exponent * scalar(math.log(base)))


def step_or_zero(step) -> jax.Array:
    """Returns the step as a float32 scalar, 0 for None."""
    return scalar(0 if step is None else step)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _positional_count(function: Callable) -> int:
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(required)


def _check_learning_rate(owner: str, rate: Any) -> None:
    if callable(rate):
        if _positional_count(rate) > 1:
            raise ValueError(
                f"{owner}: learning_rate takes {_positional_count(rate)} arguments; it must be a number, "
                "a callable of no argument, or a callable of the step"
            )
    elif not _is_finite(rate):
        raise ValueError(f"{owner}: learning_rate={rate!r} must be a finite number or a callable")
