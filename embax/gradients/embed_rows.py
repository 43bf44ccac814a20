"""What both Embed layers compute: where the rows live, which ids to look up, inner products, masks."""

from typing import Any

import jax
import jax.numpy as jnp

from embax.exchange.one_stack import Home
from embax.exchange.ordered import ordered_home
from embax.gradients.table import check_optimizer


def embed_home(shape: tuple[int, int], dtype: Any, optimizer: Any, mesh: Any, placement: str) -> Home | None:
    """Returns where the rows of an Embed live; None for one device.

    Raises:
      ValueError: a mesh without an optimizer, or a placement that does not fit.
    """
    if mesh is None and placement == "block":
        return None
    if optimizer is None:
        raise ValueError(
            "Embed: mesh= and placement= need optimizer=; without it the table is an ordinary parameter, split as "
            "Flax splits parameters (embedding_metadata, nn.with_partitioning)"
        )
    dtype = jnp.float32 if dtype is None else dtype
    check_optimizer("Embed", optimizer, dtype)
    return ordered_home("embedding", shape, dtype, optimizer, mesh, placement)


def attend_to(query: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the inner products of queries ``[..., D]`` with ``rows``.

    ``rows`` are ``[K, D]``, the same for all queries, or ``[..., K, D]``, those of each query; the result is
    ``[..., K]``.

    >>> import jax.numpy as jnp
    >>> attend_to(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[[1.0, 1.0]], [[5.0, 7.0]]])).tolist()
    [[3.0], [7.0]]
    """
    if rows.ndim == 2:
        return jnp.dot(query, rows.T)
    if rows.ndim < 2 or rows.shape[:-2] != query.shape[:-1]:
        raise ValueError(
            f"attend: query has shape {query.shape} and candidates {rows.shape[:-1]}; candidates must be [K], the same "
            f"for all queries, or {[*query.shape[:-1], 'K']}, those of each query"
        )
    return jnp.einsum("...d,...kd->...k", query, rows)


def attend_to_all(query: jax.Array, rows: jax.Array, home: Home | None) -> jax.Array:
    """Returns the inner products of queries ``[..., D]`` with all rows of a table, which ``home`` has stored."""
    return attend_to(query, rows) if home is None else home.inner_products(query, rows)


def mask_of(ids: jax.Array) -> jax.Array:
    """Returns where ``ids`` are not 0, as Keras' ``Embedding(mask_zero=True)``."""
    return jnp.not_equal(ids, jnp.zeros((), ids.dtype))


def embed_ids(ids: jax.Array, num_embeddings: int) -> jax.Array:
    """Returns the ids that flax's Embed looks up: with one row, that row for every id.

    Raises:
      ValueError: ids that are not integers.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError("Input type must be an integer or unsigned integer.")
    return jnp.zeros_like(ids) if num_embeddings == 1 else ids


def low_rank(rows: jax.Array, factors: jax.Array, basis: jax.Array, scale: float) -> jax.Array:
    """Returns ``rows`` ``[..., D]`` plus ``scale`` times their ``factors`` ``[..., r]`` by ``basis`` ``[r, D]``.

    From "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021), of a table read by row.

    >>> import jax.numpy as jnp
    >>> low_rank(jnp.ones((1, 2)), jnp.array([[3.0]]), jnp.array([[1.0, 10.0]]), 2.0).tolist()
    [[7.0, 61.0]]
    """
    return rows + jnp.dot(factors, basis) * jnp.asarray(scale, rows.dtype)
