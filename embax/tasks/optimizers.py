"""Table optimizers by name, as command lines and files of settings say them."""

from collections.abc import Callable
from typing import Any

import embax

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": embax.SGD,
    # An accumulator of 0 makes the first step of every weight one of the whole rate, however rare its value is.
    "adagrad": lambda rate: embax.Adagrad(rate, initial_accumulator_value=0.0),
    "rowwise_adagrad": lambda rate: embax.RowwiseAdagrad(rate, initial_accumulator_value=0.0),
    "adagrad_momentum": embax.AdagradMomentum,
    "adam": embax.Adam,
    "laprop": embax.LaProp,
    "ftrl": embax.FTRL,
    "f2a": embax.F2A,
}
NAMES = tuple(OPTIMIZERS)


def optimizer_of(name: str, rate: Any) -> Any:
    """Returns the optimizer of a name, with a learning rate or a schedule of it."""
    return OPTIMIZERS[name](rate)
