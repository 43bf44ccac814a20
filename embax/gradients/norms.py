"""Norms over dense gradients and row gradients together."""

from typing import Any

import jax
import jax.numpy as jnp

from embax.row_gradients import RowGradients


def is_row_gradients(leaf: Any) -> bool:
    """Returns whether ``leaf`` is a table's gradient: a leaf of a tree of gradients, not a part of it."""
    return isinstance(leaf, RowGradients)


def global_norm(gradients: Any) -> jax.Array:
    """Returns the L2 norm of all ``gradients``, RowGradients counted by their values: a float32 scalar.

    What ``optax.global_norm`` gives for dense gradients; given RowGradients, that one would count row numbers too.

    >>> import jax.numpy as jnp, embax
    >>> rows = embax.RowGradients(jnp.array([7, 9]), jnp.array([[2.0], [0.0]]), 9)
    >>> global_norm({"table": rows, "bias": jnp.array([1.0, 2.0])}).tolist()
    3.0
    """
    leaves = jax.tree.leaves(gradients, is_leaf=is_row_gradients)
    arrays = [leaf.values if is_row_gradients(leaf) else leaf for leaf in leaves]
    squares = [jnp.sum(jnp.square(jnp.abs(array).astype(jnp.float32))) for array in arrays]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def scale(gradients: Any, factor: Any) -> Any:
    """Returns ``gradients`` times ``factor``, row numbers left alone."""
    return jax.tree.map(
        lambda g: g.scale(factor) if is_row_gradients(g) else g * jnp.asarray(factor, g.dtype),
        gradients,
        is_leaf=is_row_gradients,
    )


def clip_by_global_norm(gradients: Any, max_norm: Any) -> Any:
    """Returns ``gradients`` scaled down to a global norm of at most ``max_norm``, as ``optax.clip_by_global_norm``.

    >>> import jax.numpy as jnp, embax
    >>> rows = embax.RowGradients(jnp.array([7, 9]), jnp.array([[2.0], [0.0]]), 9)
    >>> clipped = clip_by_global_norm({"table": rows, "bias": jnp.array([1.0, 2.0])}, 1.5)
    >>> clipped["table"].values[0].tolist(), clipped["bias"].tolist()
    ([1.0], [0.5, 1.0])
    """
    norm = global_norm(gradients)

    def clipped(array):
        return jnp.where(
            norm < max_norm, array, (array / norm.astype(array.dtype)) * jnp.asarray(max_norm, array.dtype)
        )

    def change(gradient):
        if is_row_gradients(gradient):
            return RowGradients(gradient.rows, clipped(gradient.values), gradient.vocabulary_size)
        return clipped(gradient)

    return jax.tree.map(change, gradients, is_leaf=is_row_gradients)
