"""Custom optimizers as the text of a StableHLO module: doors to ``CustomOptimizerSpec``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from embax.optimizers.custom import Custom


def apply_clipping(val: jax.Array, min_value: float | None = None, max_value: float | None = None) -> jax.Array:
    """Returns ``val`` clipped to the limits that are given.

    >>> apply_clipping(jnp.array([-2.0, 0.5, 3.0]), max_value=1.0).tolist()
    [-2.0, 0.5, 1.0]
    """
    return jnp.clip(val, min_value, max_value)


def lower_to_stablehlo(
    custom_computation_fn: Callable[..., Any],
    embedding_dim: int = 1,
    num_slot_variables: int = 0,
    num_hyperparameters: int = 1,
    min_value: float | None = None,
    max_value: float | None = None,
) -> str:
    """Returns an optimizer's function as the text of a StableHLO module.

    Args:
      custom_computation_fn: ``fn(gradient, row, *slots, *hyperparameters)`` of arrays ``[1, embedding_dim]`` and
        float32 scalars; it returns ``(row, *slots)``, or the row alone.
      embedding_dim: of the stack, a multiple of 8 (``stack_embedding_dim``).
      num_slot_variables: of a row.
      num_hyperparameters: 1 for the learning rate.
      min_value: what rows are clipped to after the step, or None.
      max_value: likewise.
    """
    sizes = embedding_dim, num_slot_variables, num_hyperparameters
    return Custom.lower_to_stablehlo(custom_computation_fn, *sizes, min_value, max_value)


def wrap_stablehlo_with_limits(
    stablehlo: str | bytes,
    embedding_dim: int,
    num_slot_variables: int,
    num_hyperparameters: int,
    min_value: float | None = None,
    max_value: float | None = None,
) -> str:
    """Returns a program like ``stablehlo`` whose rows are clipped to the limits; the same text without limits.

    Args:
      stablehlo: from ``lower_to_stablehlo``; a text, or its UTF-8 bytes.
      embedding_dim: as there.
      num_slot_variables: as there.
      num_hyperparameters: as there.
      min_value: what rows are clipped to after the step, or None.
      max_value: likewise.

    Raises:
      ValueError: a text that is no such program, or one for other sizes.
    """
    text = stablehlo.decode() if isinstance(stablehlo, bytes) else stablehlo
    sizes = embedding_dim, num_slot_variables, num_hyperparameters
    return Custom.wrap_stablehlo_with_limits(text, *sizes, min_value, max_value)
