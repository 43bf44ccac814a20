"""A sparse gradient: the rows that a batch touched, and one gradient for each.

Six occurrences of four rows of a table of 7 rows::

    occurrences  row 5: a   row 3: b   row 6: c   row 6: d   row 3: e   row 0: f
    rows         0  3      5  6      7  7         unique, rising; 7 = one past the end = no row
    values       f  b + e  a  c + d  0  0
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from embax.sorted_rows import walk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGradients:
    """The gradient of a ``[vocabulary_size, embedding_dim]`` table whose other rows are zero.

    Attributes:
      rows: int32 ``[capacity]``: unique and rising, filled up with ``vocabulary_size``. (What an update makes of rows
        that are not unique depends on the backend: ``merge_row_gradients`` makes them so.)
      values: float ``[capacity, embedding_dim]``: zero where there is no row.
      vocabulary_size: rows of the table (static).
    """

    rows: Any
    values: Any
    vocabulary_size: int = dataclasses.field(metadata={"static": True})

    def count(self) -> jax.Array:
        """Returns how many rows there are, int32."""
        return jnp.sum(self.rows < self.vocabulary_size, dtype=jnp.int32)

    def scale(self, factor: Any) -> "RowGradients":
        """Returns the gradient times ``factor``."""
        return dataclasses.replace(self, values=self.values * jnp.asarray(factor, self.values.dtype))

    def norm(self) -> jax.Array:
        """Returns the L2 norm, that of the dense gradient."""
        return jnp.sqrt(jnp.sum(jnp.square(self.values.astype(jnp.float32))))

    def clip(self, max_norm: Any) -> "RowGradients":
        """Returns the gradient scaled down to an L2 norm of at most ``max_norm``."""
        norm = self.norm()
        return self.scale(jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, 1.0), 1.0))

    def absent(self) -> "RowGradients":
        """Returns a gradient of the same capacity without rows."""
        rows = jnp.full_like(self.rows, self.vocabulary_size)
        return dataclasses.replace(self, rows=rows, values=jnp.zeros_like(self.values))

    def to_dense(self) -> jax.Array:
        """Returns the ``[vocabulary_size, embedding_dim]`` gradient: table-sized, for tests and small tables."""
        dense = jnp.zeros((self.vocabulary_size, self.values.shape[-1]), self.values.dtype)
        return dense.at[self.rows].set(self.values, mode="drop", unique_indices=True, indices_are_sorted=True)

    def __add__(self, other: "RowGradients") -> "RowGradients":
        return merge_row_gradients(self, other)


def merge_row_gradients(*gradients: RowGradients) -> RowGradients:
    """Returns the sum of gradients of one table, each row once; leading axes are summed too.

    The capacity of the result is that of all parts together, so nothing is lost; a scan over micro-batches may
    return its row gradients stacked and have them merged here.

    >>> import jax.numpy as jnp, embax
    >>> one = embax.RowGradients(jnp.array([3, 5]), jnp.array([[1.0], [2.0]]), 7)
    >>> two = embax.RowGradients(jnp.array([5, 7]), jnp.array([[10.0], [0.0]]), 7)
    >>> (one + two).rows.tolist(), (one + two).values.ravel().tolist()
    ([3, 5, 7, 7], [1.0, 12.0, 0.0, 0.0])
    """
    for gradient in gradients:
        check_rows(gradient, "merge_row_gradients")
    sizes = {g.vocabulary_size for g in gradients}
    if len(sizes) != 1:
        given = f"gradients of tables of {sorted(sizes)} rows cannot be added" if sizes else "no gradients are given"
        raise ValueError(f"merge_row_gradients: {given}; pass gradients of one table")
    rows = jnp.concatenate([g.rows.reshape(-1) for g in gradients])
    values = jnp.concatenate([g.values.reshape(-1, g.values.shape[-1]) for g in gradients])
    return sum_rows(rows, values, sizes.pop())


@functools.partial(jax.jit, static_argnums=2)
def sum_rows(rows: jax.Array, values: jax.Array, vocabulary_size: int) -> RowGradients:
    """Returns the row gradients of occurrences: int ``[n]`` rows in any order, ``[n, D]`` values.

    A row outside of ``[0, vocabulary_size)`` is no row. Values of a row are added in their order. The capacity of the
    result is ``n``, or ``vocabulary_size`` where that is less.
    """
    like = jax.ShapeDtypeStruct(values.shape[1:], values.dtype)
    return sum_occurrences(rows, lambda places: values[places].astype(jnp.float32), like, vocabulary_size)


def sum_occurrences(rows: jax.Array, values_at: Callable, like: Any, vocabulary_size: int) -> RowGradients:
    """Returns ``sum_rows`` of values that are not stored one by one.

    Args:
      rows: int ``[n]``, in any order; what is outside of ``[0, vocabulary_size)`` is no row.
      values_at: maps int32 ``[m]`` places in ``rows`` to their float32 values ``[m, D]``.
      like: shape ``(D,)`` and dtype of a row's gradient.
      vocabulary_size: rows of the table.
    """
    (width,), count = like.shape, rows.shape[0]
    capacity = min(count, vocabulary_size)
    valid = (rows >= 0) & (rows < vocabulary_size)
    keys = jnp.where(valid, rows, vocabulary_size).astype(jnp.int32)
    empty = jnp.full(capacity, vocabulary_size, jnp.int32), jnp.zeros((capacity, width), like.dtype)
    if not count:
        return RowGradients(*empty, vocabulary_size)

    def write(state, rows, sums, ranks):
        place = jnp.where(rows < vocabulary_size, ranks, capacity)
        return tuple(
            array.at[place].set(new.astype(array.dtype), mode="drop", unique_indices=True)
            for array, new in zip(state, (rows, sums), strict=True)
        )

    unique, summed = walk(keys, vocabulary_size, width, values_at, write, empty)
    return RowGradients(unique, summed, vocabulary_size)


def check_rows(gradient: Any, owner: str) -> None:
    """Raises unless ``gradient`` is a RowGradients whose rows are integers."""
    if not isinstance(gradient, RowGradients):
        raise TypeError(f"{owner}: {type(gradient).__name__} is not an embax.RowGradients")
    if not jnp.issubdtype(gradient.rows.dtype, jnp.integer):
        raise TypeError(
            f"{owner}: the rows of a RowGradients are {gradient.rows.dtype}; they must be integers. A tree.map "
            "over the "
            "gradients changes rows as well as values: use .scale, .clip, or map over .values"
        )
