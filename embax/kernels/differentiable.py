"""Pooling with derivatives, whatever backend pools.

Training takes the derivative with respect to the activations and hands it to ``update``; nothing here runs. A plain
``jax.grad`` through ``lookup`` is right too: with respect to gains (hence weights) it costs what the batch costs,
with respect to a table it is dense.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from embax import kernels
from embax.id_batch import StackIds
from embax.planning import StackPlan


def pool(backend: str, stack: StackPlan, table: Any, ids: StackIds) -> tuple[jax.Array, ...]:
    """Returns the activations of each feature; rows that are no plain array (quantized ones) pool themselves."""
    if hasattr(table, "lookup_pooled"):
        return table.lookup_pooled(stack, backend, ids)
    return gather_pool(backend, stack, table, ids)


def gather_pool(backend: str, stack: StackPlan, table: jax.Array, ids: StackIds) -> tuple[jax.Array, ...]:
    """Returns the activations of each feature, differentiable with respect to ``table`` and ``ids.gains``."""
    return _pool(backend, stack, (ids.samples, ids.valencies), table, ids.gains, ids.ids, ids.offsets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _pool(backend, stack, form, table, gains, ids, offsets):
    return kernels.get(backend).gather_pool(stack, table, StackIds(ids, offsets, gains, *form))


def _forward(backend, stack, form, table, gains, ids, offsets):
    # With symbolic zeros each argument says whether its derivative is wanted: no table-sized cotangent otherwise.
    wants_table, wants_gains = table.perturbed, gains is not None and gains.perturbed
    table, ids, offsets = table.value, ids.value, offsets.value
    gains = None if gains is None else gains.value
    shape = jnp.zeros((0, *table.shape[1:]), table.dtype)
    kept = (table if wants_gains else None, shape if wants_table else None, gains, ids, offsets)
    return _pool(backend, stack, form, table, gains, ids, offsets), kept


def _backward(backend, stack, form, kept, cotangents):
    table, wanted_table, gains, ids, offsets = kept
    zeros = [isinstance(part, jax.custom_derivatives.SymbolicZero) for part in cotangents]
    if all(zeros):
        return None, None, None, None
    stack_ids, kernel = StackIds(ids, offsets, gains, *form), kernels.get(backend)
    cotangents = tuple(
        jnp.zeros(part.shape, jnp.float32) if zero else part.astype(jnp.float32)
        for part, zero in zip(cotangents, zeros, strict=True)
    )
    table_cotangent = gains_cotangent = None
    if wanted_table is not None:
        sparse = kernel.row_gradients(stack, stack_ids, jnp.zeros(0), cotangents)
        table_cotangent = sparse.to_dense().astype(wanted_table.dtype)
    if table is not None:
        # d activation / d gain is the row that was looked up.
        unweighted = dataclasses.replace(stack_ids, gains=None)
        gains_cotangent = kernel.row_products(stack, table, unweighted, jnp.concatenate(cotangents))
    return table_cotangent, gains_cotangent, None, None


_pool.defvjp(_forward, _backward, symbolic_zeros=True)
