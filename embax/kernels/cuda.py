"""The CUDA backend: ids are sorted by XLA, the rest is kernels, or the reference where there is none.

Every function asks for its kernels before it is traced. Where one cannot be had (a compiler that does not know the
card, say), a line on stderr says so and the reference's form is traced instead. A program may be lowered for another
platform than that of the kernels (a step on CPU arrays, where a GPU is there too): it gets the reference's form as
well.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax.id_batch import StackIds
from embax.kernels import cuda_calls, cuda_library, cuda_trial, reference
from embax.kernels.calls import Occurrences
from embax.kernels.operands import DTYPES, levels_of, of_one_dtype, state_after
from embax.optimizers.base import Optimizer
from embax.planning import StackPlan
from embax.row_gradients import RowGradients
from embax.table_state import TableState

NAME = "cuda"


def unavailable() -> str | None:
    """Returns why this backend cannot be used: another platform, no driver, nothing to compile with, a failed trial."""
    platform = jax.default_backend()
    # A library that was named may be for another platform; AMD's cards are "gpu" too.
    others = platform not in ("gpu", "cuda") or "rocm" in jax.local_devices()[0].client.platform_version.lower()
    if others and not cuda_library.is_named():
        return f"the default JAX backend is {platform}"
    return cuda_trial.tried(cuda_library.file())


def reason() -> str:
    """Returns what the backend runs on: cards, compiler, versions."""
    return cuda_library.load().reason


def gather_pool(stack: StackPlan, table: jax.Array, ids: StackIds) -> tuple[jax.Array, ...]:
    """Returns the activations of each feature of the stack."""
    dtype, levels = stack.activation_dtype, levels_of(stack)
    one = ids.gains is None and all(valency == 1 for valency in ids.valencies)
    one = one and len(ids.samples) <= cuda_calls.most_blocks()

    def kernel(table, ids):
        found = Occurrences(ids.ids, ids.offsets, None, ids.gains)
        return cuda_calls.gather_pool(table, found, ids.samples, dtype, levels, one=one)

    gained = ids.gains is not None
    if not _ready("lookups", lambda: cuda_calls.gather_programs(table, dtype, one, gained, bool(levels))):
        return reference.gather_pool(stack, table, ids)
    return _on_card(kernel, functools.partial(reference.gather_pool, stack), table, ids)


def update(
    stack: StackPlan, state: TableState, ids: StackIds, token: jax.Array, gradients: tuple, hyper: Any
) -> TableState:
    """Returns the state after one step on the rows that ``ids`` touch."""
    if not ids.ids.shape[0] or not sum(ids.samples):
        return state
    optimizer, gained = stack.optimizer, ids.gains is not None
    gradients = _blocks(gradients)
    if not has_kernel(optimizer, state):
        return apply(optimizer, state, row_gradients(stack, ids, token, gradients), hyper)

    def programs():
        parts = str(optimizer.kernel_name()), state.table, gradients, ids.ids.shape[0], gained, False
        return cuda_calls.update_programs(*parts) + _samples_programs(ids)

    def kernel(state, ids, token, gradients, hyper):
        return _stepped(optimizer, state, _entries(stack, ids), token, gradients, hyper)

    otherwise = functools.partial(reference.update, stack)
    if not _ready("updates", programs):
        return otherwise(state, ids, token, gradients, hyper)
    return _on_card(kernel, otherwise, state, ids, token, gradients, hyper)


def apply(optimizer: Optimizer, state: TableState, gradient: RowGradients, hyper: Any) -> TableState:
    """Returns the state after one step on the rows of ``gradient``."""
    count, total = gradient.rows.shape[0], state.table.shape[0]
    otherwise = functools.partial(reference.apply, optimizer)
    if not count:
        return state
    if not has_kernel(optimizer, state):
        return otherwise(state, gradient, hyper)
    values = of_one_dtype((gradient.values,))

    def kernel(state, gradient, hyper):
        # Compared before they are narrowed: a row beyond 32 bits must not come back as another one.
        valid = (gradient.rows >= 0) & (gradient.rows < total)
        rows = jnp.where(valid, gradient.rows, total).astype(jnp.int32)
        values = of_one_dtype((gradient.values,))
        return _stepped(optimizer, state, cuda_calls.Entries(rows), rows, values, hyper, apart=True)

    parts = str(optimizer.kernel_name()), state.table, values, count, False, True
    if not _ready("updates", lambda: cuda_calls.update_programs(*parts)):
        return otherwise(state, gradient, hyper)
    return _on_card(kernel, otherwise, state, gradient, hyper)


def row_gradients(stack: StackPlan, ids: StackIds, token: jax.Array, gradients: tuple) -> RowGradients:
    """Returns the gradient of a stack's table."""
    otherwise = functools.partial(reference.row_gradients, stack)
    if not ids.ids.shape[0] or not sum(ids.samples):
        return otherwise(ids, token, gradients)
    gradients = _blocks(gradients)

    def programs():
        parts = gradients, ids.ids.shape[0], ids.gains is not None
        return cuda_calls.row_gradient_programs(*parts) + _samples_programs(ids)

    def kernel(ids, token, gradients):
        parts = cuda_calls.row_gradients(_entries(stack, ids), token, gradients, stack.rows)
        return RowGradients(*parts, stack.rows)

    if not _ready("row gradients", programs):
        return otherwise(ids, token, gradients)
    return _on_card(kernel, otherwise, ids, token, gradients)


def sum_rows(rows: jax.Array, values: jax.Array, samples: Any, gains: Any, vocabulary_size: int) -> RowGradients:
    """Returns the sums of ``gains[i] * values[samples[i]]`` over the occurrences i of each row."""
    otherwise = functools.partial(reference.sum_rows, rows, values, samples, gains, vocabulary_size)
    if not (rows.shape[0] and values.size and vocabulary_size):
        return otherwise()
    parts = of_one_dtype((values,)), rows.shape[0], gains is not None
    if not _ready("row gradients", lambda: cuda_calls.row_gradient_programs(*parts)):
        return otherwise()
    return _summed(rows, values, samples, gains, vocabulary_size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _summed(rows, values, samples, gains, vocabulary_size):
    def kernel(rows, values, samples, gains):
        present = jnp.where((rows >= 0) & (rows < vocabulary_size), rows, vocabulary_size).astype(jnp.int32)
        entries = sorted_entries(present, samples, gains)
        parts = cuda_calls.row_gradients(entries, rows, of_one_dtype((values,)), vocabulary_size)
        return RowGradients(*parts, vocabulary_size)

    otherwise = functools.partial(reference.sum_rows, vocabulary_size=vocabulary_size)
    return _on_card(kernel, otherwise, rows, values, samples, gains)


@_summed.defjvp
def _summed_jvp(vocabulary_size, primals, tangents):
    # A derivative of the gradients, in forward mode as the reference has it.
    reference_sum = functools.partial(reference.sum_rows, vocabulary_size=vocabulary_size)
    return _summed(*primals, vocabulary_size), jax.jvp(reference_sum, primals, tangents)[1]


def row_products(stack: StackPlan, table: jax.Array, ids: StackIds, gradients: jax.Array) -> jax.Array:
    """Returns the derivatives of the gains."""
    if not ids.ids.shape[0] or not gradients.shape[0]:
        return jnp.zeros(ids.ids.shape[0], jnp.float32)
    levelled = bool(levels_of(stack))
    if not _ready("derivatives of gains", lambda: cuda_calls.product_programs(table, gradients, levelled)):
        return reference.row_products(stack, table, ids, gradients)
    return _products(stack, (ids.samples, ids.valencies), table, gradients, ids.ids, ids.offsets)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _products(stack, form, table, gradients, ids, offsets):
    def kernel(table, gradients, ids, offsets):
        return cuda_calls.row_products(table, ids, offsets, gradients, levels_of(stack))

    otherwise = functools.partial(_reference_products, stack, form)
    return _on_card(kernel, otherwise, table, gradients, ids, offsets)


@_products.defjvp
def _products_jvp(stack, form, primals, tangents):
    otherwise = functools.partial(_reference_products, stack, form)
    return _products(stack, form, *primals), jax.jvp(otherwise, primals, tangents)[1]


def _reference_products(stack, form, table, gradients, ids, offsets):
    return reference.row_products(stack, table, StackIds(ids, offsets, None, *form), gradients)


def take(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the rows ``[n]`` of ``table``, NaN where there is none."""
    if table.dtype not in DTYPES or not _ready(
        "rows one by one", lambda: cuda_calls.gather_programs(table, table.dtype, True, False, False)
    ):
        return reference.take(table, rows)
    return _on_card(cuda_calls.gather_rows, reference.take, table, rows)


def distinct_rows(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct rows among ``ids``, and each id's place among them."""
    otherwise = functools.partial(reference.distinct_rows, rows=rows)
    if not min(ids.shape[0], rows) or not _ready("distinct rows", cuda_calls.runs_programs):
        return otherwise(ids)

    def kernel(ids):
        present = jnp.where((ids >= 0) & (ids < rows), ids, rows).astype(jnp.int32)
        entries = sorted_entries(present, None, None)
        return cuda_calls.distinct_rows(entries.keys, entries.samples, rows)

    return _on_card(kernel, otherwise, ids)


def has_kernel(optimizer: Optimizer, state: TableState) -> bool:
    """Returns whether there is a kernel that steps this optimizer's rows, stored as they are."""
    floats = all(slot.dtype == jnp.float32 for slot in state.slots)
    return optimizer.kernel_name() in cuda_calls.optimizers() and floats and state.table.dtype in DTYPES


def sorted_entries(rows: jax.Array, samples: Any, gains: Any) -> cuda_calls.Entries:
    """Returns occurrences sorted by row, those of one row in order of place.

    XLA sorts a 32-bit key with one 32-bit operand by radix on a GPU, so that is what goes along: the sample, or the
    place where gains are to be found too.

    Args:
      rows: int32 ``[n]``, the number of rows for absent ones.
      samples: int32 ``[n]``, or None: place i is sample i.
      gains: float32 ``[n]``, or None.

    >>> entries = sorted_entries(jnp.array([5, 3, 6, 7, 3, 0]), None, None)
    >>> entries.keys.tolist(), entries.samples.tolist()
    ([0, 3, 3, 5, 6, 7], [5, 1, 4, 0, 2, 3])
    """
    places = jnp.arange(rows.shape[0], dtype=jnp.int32)
    if gains is None:
        keys, samples = jax.lax.sort((rows, places if samples is None else samples), num_keys=1, is_stable=True)
        return cuda_calls.Entries(keys, samples)
    keys, order = jax.lax.sort((rows, places), num_keys=1, is_stable=True)
    return cuda_calls.Entries(keys, order if samples is None else samples[order], gains[order])


def _entries(stack: StackPlan, ids: StackIds) -> cuda_calls.Entries:
    rows = reference.present_rows(stack, ids)
    if all(valency == 1 for valency in ids.valencies):
        samples = None
    elif None in ids.valencies:
        samples = cuda_calls.samples_of(ids.offsets, ids.ids.shape[0])
    else:
        samples = reference.sample_of_ids(ids)
    return sorted_entries(rows, samples, ids.gains)


def _samples_programs(ids: StackIds) -> str:
    return cuda_calls.samples_programs() if None in ids.valencies else ""


def _stepped(optimizer, state, entries, token, gradients, hyper, apart=False) -> TableState:
    kernel = str(optimizer.kernel_name())
    return state_after(
        lambda parts: cuda_calls.update(kernel, parts, entries, token, gradients, hyper, apart=apart), state
    )


def _blocks(gradients: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns the gradients in one dtype that kernels read, and in no more blocks than one call takes."""
    blocks, most = list(of_one_dtype(gradients)), cuda_calls.most_blocks()
    if len(blocks) <= most:
        return tuple(blocks)
    size = -(-len(blocks) // most)
    return tuple(jnp.concatenate(blocks[i : i + size]) for i in range(0, len(blocks), size))


# ---- whether and where -----------------------------------------------------------------------------------------------


def _ready(what: str, programs: Callable[[], str]) -> bool:
    """Returns whether the kernels of a call are compiled; says, once, why not."""
    why_not = cuda_library.prepare(programs())
    if why_not:
        cuda_library.fall_back(what, why_not)
    return not why_not


def _on_card(kernel: Callable, otherwise: Callable, *operands: Any) -> Any:
    """Returns what ``kernel`` makes where a program is lowered for its platform, elsewhere what the reference does."""
    here = cuda_library.load().platform.lower()
    return jax.lax.platform_dependent(*operands, default=otherwise, **{here: kernel})
