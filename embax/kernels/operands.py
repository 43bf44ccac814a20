"""What the calls of all native kernels share: dtypes, scalars as vectors, a state as arrays, one call of the FFI."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax.optimizers.base import map_slots
from embax.planning import StackPlan
from embax.sorted_rows import varying_axes, varying_with
from embax.table_state import TableState

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
"""The dtypes of tables and gradients that kernels read, in the order of Dtype in csrc/kernels.h."""

_HYPER = 8  # kHyper in csrc/kernels.h


def of_one_dtype(gradients: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns the blocks as they are if the kernels can read them so, else as float32."""
    dtypes = {jnp.dtype(block.dtype) for block in gradients}
    if len(dtypes) == 1 and dtypes.pop() in DTYPES:
        return tuple(gradients)
    return tuple(block.astype(jnp.float32) for block in gradients)


def levels_of(stack: StackPlan) -> tuple[float, ...]:
    """Returns low, high and width of the levels that rows are rounded to; nothing where they are not."""
    if stack.quantization is None:
        return ()
    low, high, levels = stack.quantization.as_tuple()
    return low, high, (high - low) / (levels - 1)


def hyper_vectors(hyper: Any) -> tuple[jax.Array, jax.Array, jax.Array, bool]:
    """Returns a step's hyperparameters and modifiers as kernels take them.

    Args:
      hyper: ``(Modifiers, hyperparameters)`` of this step.

    Returns:
      float32 ``[8]``; float32 ``[3]``: clip norm, L2, decay; the step's uint32 seed; whether rounding is at random.
    """
    modifiers, own = hyper
    numbers = [jnp.asarray(x, jnp.float32) for x in own]
    numbers = jnp.stack(numbers + [jnp.float32(0)] * (_HYPER - len(numbers)))
    common = jnp.stack([modifiers.row_clip_norm, modifiers.l2_weight_decay, modifiers.decay])
    stochastic = modifiers.rounding_seed is not None
    return numbers, common, modifiers.rounding_seed if stochastic else jnp.uint32(0), stochastic


def state_after(step: Callable[[tuple[jax.Array, ...]], Sequence[jax.Array]], state: TableState) -> TableState:
    """Returns the state whose arrays ``step`` makes of those of ``state``: table, slots, marks of touched rows."""
    parts, touched = (state.table, *state.slots), state.touched
    if touched is not None:
        parts = (*parts, touched.rows)
    table, *rest = step(parts)
    remaining = iter(rest)
    slots = map_slots(lambda _: next(remaining), state.slots)
    return TableState(table, slots, None if touched is None else touched._replace(rows=next(remaining)))


def call_ffi(
    target: str, operands: Sequence[jax.Array], shapes: Sequence[Any], in_place: dict | None = None, **attributes: Any
) -> list[jax.Array]:
    """Returns the results of a kernel, arrays of the ``(shape, dtype)`` of ``shapes``.

    Args:
      target: the name it is registered by.
      operands: arrays.
      shapes: of the results.
      in_place: results by the operands whose memory they take: ``{operand: result}``.
      **attributes: static values.
    """
    operands = varying_with(tuple(operands))
    results: Any = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    if varying_axes(operands[0]):
        # Inside of a shard_map results vary along the mesh axes along which operands do.
        likes = results
        results = jax.eval_shape(lambda: [varying_with(jnp.zeros(x.shape, x.dtype), operands) for x in likes])
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential", input_output_aliases=in_place)
    return list(call(*operands, **attributes))
