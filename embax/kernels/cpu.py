"""The CPU backend: the native kernels, and the reference's formulas where an optimizer has no kernel of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from embax.id_batch import StackIds
from embax.kernels import calls, native, reference
from embax.kernels.operands import DTYPES, levels_of, of_one_dtype, state_after
from embax.optimizers.base import Optimizer, map_slots
from embax.planning import StackPlan
from embax.row_gradients import RowGradients
from embax.table_state import TableState

NAME = "cpu"


def unavailable() -> str | None:
    """Returns why this backend cannot be used: another platform, or no native library."""
    if jax.default_backend() != "cpu":
        return f"the default JAX backend is {jax.default_backend()}"
    status = native.load()
    return None if status.available else status.reason


def reason() -> str:
    """Returns what this backend runs on: the vector width of the kernels, versions."""
    return f"{native.vector_width()} kernels; {native.load().reason}"


def gather_pool(stack: StackPlan, table: jax.Array, ids: StackIds) -> tuple[jax.Array, ...]:
    """Returns the activations of each feature of the stack."""
    return calls.gather_pool(table, _occurrences(ids), ids.samples, stack.activation_dtype, levels_of(stack))


def update(
    stack: StackPlan, state: TableState, ids: StackIds, token: jax.Array, gradients: tuple, hyper: Any
) -> TableState:
    """Returns the state after one step on the rows that ``ids`` touch."""
    if not ids.ids.shape[0] or not sum(ids.samples):
        return state
    gradients = of_one_dtype(gradients)
    if not has_kernel(stack.optimizer, state):
        unique, values = calls.row_gradients(_occurrences(ids), token, gradients, stack.rows)
        return apply(stack.optimizer, state, RowGradients(unique, values, stack.rows), hyper)
    return _stepped(stack.optimizer, state, _occurrences(ids), token, gradients, hyper)


def apply(optimizer: Optimizer, state: TableState, gradient: RowGradients, hyper: Any) -> TableState:
    """Returns the state after one step on the rows of ``gradient``."""
    if not gradient.rows.shape[0]:
        return state
    if not has_kernel(optimizer, state):
        return reference.apply(optimizer, state, gradient, hyper, step_rows)
    total = state.table.shape[0]
    # Compared before they are narrowed: a row beyond 32 bits must not come back as another one.
    valid = (gradient.rows >= 0) & (gradient.rows < total)
    rows = jnp.where(valid, gradient.rows, total).astype(jnp.int32)
    values = of_one_dtype((gradient.values,))
    return _stepped(optimizer, state, calls.Occurrences(rows), rows, values, hyper)


def row_gradients(stack: StackPlan, ids: StackIds, token: jax.Array, gradients: tuple) -> RowGradients:
    """Returns the gradient of a stack's table."""
    if not ids.ids.shape[0] or not sum(ids.samples):
        return reference.row_gradients(stack, ids, token, gradients)
    parts = calls.row_gradients(_occurrences(ids), token, of_one_dtype(gradients), stack.rows)
    return RowGradients(*parts, stack.rows)


def sum_rows(rows: jax.Array, values: jax.Array, samples: Any, gains: Any, vocabulary_size: int) -> RowGradients:
    """Returns the sums of ``gains[i] * values[samples[i]]`` over the occurrences i of each row."""
    if not rows.shape[0] or not values.shape[0]:
        return reference.sum_rows(rows, values, samples, gains, vocabulary_size)
    return _summed(rows, values, samples, gains, vocabulary_size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _summed(rows, values, samples, gains, vocabulary_size):
    found = calls.Occurrences(rows, None, samples, gains)
    parts = calls.row_gradients(found, rows, of_one_dtype((values,)), vocabulary_size)
    return RowGradients(*parts, vocabulary_size)


@_summed.defjvp
def _summed_jvp(vocabulary_size, primals, tangents):
    # A derivative of the gradients, in forward mode as the reference has it.
    reference_sum = functools.partial(reference.sum_rows, vocabulary_size=vocabulary_size)
    return _summed(*primals, vocabulary_size), jax.jvp(reference_sum, primals, tangents)[1]


def row_products(stack: StackPlan, table: jax.Array, ids: StackIds, gradients: jax.Array) -> jax.Array:
    """Returns the derivatives of the gains."""
    if not ids.ids.shape[0]:
        return jnp.zeros(0, jnp.float32)
    return _products(stack, (ids.samples, ids.valencies), table, gradients, ids.ids, ids.offsets)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _products(stack, form, table, gradients, ids, offsets):
    return calls.row_products(table, ids, offsets, gradients, levels_of(stack))


@_products.defjvp
def _products_jvp(stack, form, primals, tangents):
    def products(table, gradients, ids, offsets):
        return reference.row_products(stack, table, StackIds(ids, offsets, None, *form), gradients)

    return _products(stack, form, *primals), jax.jvp(products, primals, tangents)[1]


def take(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the rows ``[n]`` of ``table``, NaN where there is none."""
    if table.dtype not in DTYPES:
        return reference.take(table, rows)
    return calls.gather_rows(table, rows)


def distinct_rows(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct rows among ``ids``, and each id's place among them."""
    if not min(ids.shape[0], rows):
        return reference.distinct_rows(ids, rows)
    return calls.distinct_rows(ids, rows)


def step_rows(optimizer: Optimizer, state: TableState, rows: jax.Array, gradients: jax.Array, hyper: Any) -> TableState:
    """Returns the state with ``rows`` stepped by the optimizer's own formula, read and written natively."""
    total = state.table.shape[0]
    nearest = jnp.minimum(rows, total - 1)

    def read(array):
        return take(array, nearest).astype(jnp.float32)

    def write(array, values):
        if array.dtype not in DTYPES:
            return reference.write(array, rows, values)
        return calls.write_rows(array, rows, values)

    stepped, slots = optimizer.step_rows(read(state.table), gradients, map_slots(read, state.slots), hyper)
    stepped = reference.narrowed(stepped, rows, state.table.dtype, hyper)
    slots = map_slots(lambda old, new: write(old, new.astype(old.dtype)), state.slots, slots)
    return TableState(write(state.table, stepped), slots, reference.marked(state.touched, rows))


def has_kernel(optimizer: Optimizer, state: TableState) -> bool:
    """Returns whether the library steps this optimizer's rows, stored as they are."""
    floats = all(slot.dtype == jnp.float32 for slot in state.slots)
    return optimizer.kernel_name() in native.optimizers() and floats and state.table.dtype in DTYPES


def _occurrences(ids: StackIds) -> calls.Occurrences:
    return calls.Occurrences(ids.ids, ids.offsets, None, ids.gains)


def _stepped(optimizer, state, found, token, gradients, hyper) -> TableState:
    kernel = optimizer.kernel_name()
    return state_after(lambda parts: calls.update(kernel, parts, found, token, gradients, hyper), state)
