"""Lookup in a bare array: ids of any shape, no plan, no spec."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax import kernels
from embax.row_gradients import RowGradients


def take(table: Any, ids: Any) -> jax.Array:
    """Returns the rows of ``table`` at ``ids``: ``jnp.take(table, ids, axis=0)``, for ids of any shape.

    Args:
      table: ``[V, D]`` (or ``[V, ...]``); an ``embax.Table`` or ``embax.Prefetched`` too.
      ids: integers of any shape, 0-d and empty included; those in ``[-V, -1]`` count from the end. Outside of
        ``[-V, V)`` the rows are NaN (the least value of the dtype for integer tables, as ``jnp.take`` has it) and the
        gradient is dropped.

    Returns:
      ``ids.shape + (D,)``. Differentiable with respect to the table: that gradient is dense; ``take_gradient``
      gives it as rows. Works under vmap over ids, over tables, nested.

    Raises:
      ValueError: ids that are not integers.

    >>> import jax.numpy as jnp
    >>> take(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[0, 2], [-1, 1]])).squeeze(-1).tolist()
    [[1.0, 3.0], [3.0, 2.0]]
    """
    if hasattr(table, "lookup_rows"):
        return table.lookup_rows(ids)
    table = jnp.asarray(table)
    return jnp.take(table, rows_of(ids, table.shape[0]), axis=0, mode="fill")


def take_gradient(ids: Any, cotangents: Any, *, vocabulary_size: int) -> RowGradients:
    """Returns the gradient of ``take`` with respect to its table, as rows: the cost of the ids, not of the table.

    Args:
      ids: as given to ``take``.
      cotangents: ``ids.shape + (D,)``, the gradient with respect to the result.
      vocabulary_size: V, the rows of the table.

    Returns:
      RowGradients of capacity ``ids.size`` (V, if that is less); ids outside of ``[-V, V)`` are dropped, as in the
      dense gradient.

    Raises:
      ValueError: ids that are not integers, or cotangents of another shape.

    >>> import jax.numpy as jnp
    >>> take_gradient(jnp.array([2, 0, -1]), jnp.ones((3, 1)), vocabulary_size=3).values.ravel().tolist()
    [1.0, 2.0, 0.0]
    """
    ids, cotangents = _integers(ids), jnp.asarray(cotangents)
    if cotangents.shape[:-1] != ids.shape or cotangents.ndim != ids.ndim + 1:
        raise ValueError(
            f"take_gradient: cotangents have shape {cotangents.shape} for ids of shape {ids.shape}; they must be "
            "ids.shape + (embedding_dim,)"
        )
    rows = rows_of(ids, vocabulary_size).reshape(-1)
    values = cotangents.reshape(rows.shape[0], cotangents.shape[-1])
    return _sum_rows(kernels.choose().name, rows, values, vocabulary_size)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _sum_rows(backend, rows, values, vocabulary_size):
    summed = kernels.get(backend).sum_rows(rows, values, None, None, vocabulary_size)
    return dataclasses.replace(summed, values=summed.values.astype(values.dtype))


def rows_of(ids: Any, vocabulary_size: int) -> jax.Array:
    """Returns int32 rows, with one past the end for ids outside of ``[-V, V)``.

    Compared before any narrowing: an id beyond 32 bits must not come back as another one.
    """
    ids = _integers(ids)
    if jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        fits = ids < vocabulary_size if vocabulary_size <= jnp.iinfo(ids.dtype).max else jnp.ones(ids.shape, bool)
        return jnp.where(fits, ids, 0).astype(jnp.int32) + jnp.where(fits, 0, vocabulary_size)
    limits = jnp.iinfo(ids.dtype)
    low, high = max(-vocabulary_size, limits.min), min(vocabulary_size - 1, limits.max)
    fits = (ids >= low) & (ids <= high)
    rows = jnp.where(fits, ids, 0).astype(jnp.int32)
    return jnp.where(fits, jnp.where(rows < 0, rows + vocabulary_size, rows), vocabulary_size)


def _integers(ids: Any) -> jax.Array:
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" and ids.dtype.itemsize == 8:
        # Without jax_enable_x64 JAX would cut these to 32 bits and make other ids of them; the ends are outside.
        limits = np.iinfo(np.int32)
        ids = np.clip(ids, limits.min, limits.max).astype(np.int32)
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"Input type must be an integer or unsigned integer; ids are {ids.dtype}.")
    return ids
