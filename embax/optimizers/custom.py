"""An optimizer from a function of one row."""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from embax.optimizers.base import Optimizer, Slot, scalar
from embax.optimizers.stablehlo import call_program


class CustomHyperparameters(NamedTuple):
    """What a custom function receives behind its slots: the learning rate."""

    learning_rate: jax.Array


@dataclasses.dataclass(frozen=True)
class Custom(Optimizer):
    """An optimizer whose formula is the caller's.

    Args:
      learning_rate: a number or a callable, as for every optimizer.
      custom_computation_fn: ``fn(gradient, row, *slots, learning_rate)`` on arrays ``[1, embedding_dim]``;
        it returns ``(row, *slots)``, or the row alone where there are no slots.
      stablehlo: the same function as the text of a StableHLO module (``lower_to_stablehlo``), used where there is no
        function; it has a fixed embedding_dim, and rows go through it one by one, which is slow.
      slot_variable_initializers_tuple: the initial value of each slot: a number, or an initializer of one value.
      short_name_str: the name that ``short_name`` gives.

    Raises:
      ValueError: neither a function nor a program is given, or the slots it returns are not those it has.

    Sign descent in one line:

    >>> import jax.numpy as jnp
    >>> sign = Custom(0.1, lambda gradient, row, learning_rate: row - learning_rate * jnp.sign(gradient))
    >>> sign.update_rows(jnp.ones((2, 1)), jnp.array([[3.0], [-3.0]]), (), sign.hyperparameters(0))[0].tolist()
    [[0.8999999761581421], [1.100000023841858]]
    """

    custom_computation_fn: Callable | None = None
    stablehlo: Any = None
    slot_variable_initializers_tuple: tuple = ()
    short_name_str: str = "custom"

    def __post_init__(self):
        super().__post_init__()
        if self.custom_computation_fn is None and self.stablehlo is None:
            raise ValueError("Custom: neither custom_computation_fn nor stablehlo is given; pass the function")
        object.__setattr__(self, "slot_variable_initializers_tuple", tuple(self.slot_variable_initializers_tuple))
        self.slots()

    def slots(self) -> tuple[Slot, ...]:
        return tuple(Slot(_initial_value(value)) for value in self.slot_variable_initializers_tuple)

    def slot_variables_initializers(self) -> tuple:
        return self.slot_variable_initializers_tuple

    def hyperparameters(self, step) -> CustomHyperparameters:
        return CustomHyperparameters(scalar(self.get_learning_rate(step)))

    def update_rows(self, rows, gradients, slots, hyper):
        function = self.custom_computation_fn or functools.partial(call_program, self.stablehlo)

        def one_row(row, gradient, slots):
            result = function(gradient[None], row[None], *(s[None] for s in slots), *hyper)
            row, *slots = result if isinstance(result, (tuple, list)) else (result,)
            return row[0], tuple(s[0] for s in slots)

        if self.custom_computation_fn is None:
            rows, new_slots = jax.lax.map(lambda parts: one_row(*parts), (rows, gradients, tuple(slots)))
        else:
            rows, new_slots = jax.vmap(one_row)(rows, gradients, tuple(slots))
        if len(new_slots) != len(slots):
            raise ValueError(
                f"Custom {self.short_name_str!r}: the function returned {len(new_slots)} slots for {len(slots)}; "
                "return (row, *slots)"
            )
        return rows, new_slots

    def short_name(self) -> str:
        return self.short_name_str

    @classmethod
    def lower_to_stablehlo(
        cls,
        custom_computation_fn: Callable,
        embedding_dim: int = 1,
        num_slot_variables: int = 0,
        num_hyperparameters: int = 1,
        min_value: float | None = None,
        max_value: float | None = None,
    ) -> str:
        """Returns the function as the text of a StableHLO module; rows are clipped to the limits, if there are any.

        >>> "stablehlo.subtract" in Custom.lower_to_stablehlo(lambda gradient, row, rate: row - rate * gradient, 4)
        True
        """

        def limited(*arguments):
            result = custom_computation_fn(*arguments)
            row, *slots = result if isinstance(result, (tuple, list)) else (result,)
            if min_value is not None or max_value is not None:
                row = jax.numpy.clip(row, min_value, max_value)
            return (row, *slots)

        row = jax.ShapeDtypeStruct((1, embedding_dim), np.float32)
        number = jax.ShapeDtypeStruct((), np.float32)
        arguments = [row] * (2 + num_slot_variables) + [number] * num_hyperparameters
        return jax.jit(limited).lower(*arguments).as_text()

    @classmethod
    def wrap_stablehlo_with_limits(
        cls,
        stablehlo: str,
        embedding_dim: int,
        num_slot_variables: int,
        num_hyperparameters: int,
        min_value: float | None = None,
        max_value: float | None = None,
    ) -> str:
        """Returns a program like ``stablehlo`` whose rows are clipped to the limits; the same text without limits."""
        if min_value is None and max_value is None:
            return stablehlo
        program = functools.partial(call_program, stablehlo)
        sizes = (embedding_dim, num_slot_variables, num_hyperparameters)
        return cls.lower_to_stablehlo(program, *sizes, min_value=min_value, max_value=max_value)


def _initial_value(value: Any) -> float:
    """Returns the number that a slot starts from; ``value`` is that number or an initializer that gives it "
    "everywhere.
    """
    if callable(value):
        with jax.ensure_compile_time_eval():
            made = np.asarray(value(jax.random.key(0), (2, 3), np.float32))
        if made.shape != (2, 3) or np.ptp(made) != 0:
            raise ValueError("Custom: a slot initializer does not give one value everywhere; pass a number")
        return float(made[0, 0])
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.ndarray, jax.Array)):
        raise ValueError(f"Custom: slot initial value {value!r} must be a number or an initializer of one value")
    return float(value)
