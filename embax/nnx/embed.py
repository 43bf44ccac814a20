"""``embax.nnx.Embed``: ``flax.nnx.Embed``, and with ``optimizer=`` the same with row gradients."""

import inspect
from typing import Any

import jax
from flax import nnx

from embax.exchange.ordered import made
from embax.gradients.embed_rows import attend_to, attend_to_all, embed_home, embed_ids, mask_of
from embax.gradients.table import check_optimizer
from embax.nnx.variables import PrefetchedRows, PrefetchedValues, Table, leaf, sentinel

DEFAULT_INIT = inspect.signature(nnx.Embed.__init__).parameters["embedding_init"].default


class Embed(nnx.Embed):
    """``flax.nnx.Embed`` whose table can have an optimizer of its own, at the cost of the ids of a batch.

    Without ``optimizer=`` it is ``flax.nnx.Embed``: an ``nnx.Param`` and dense gradients. With it, ``embedding`` is an
    ``embax.nnx.Table`` of the same initial values, which dense optimizers pass by; ``embax.nnx.value_and_grad`` and
    ``embax.nnx.Optimizer`` train it.

    Args:
      num_embeddings: vocabulary size V.
      features: embedding dimension D.
      optimizer: of the table's rows, such as ``embax.Adagrad(0.1)``; None for dense gradients.
      mask_zero: whether id 0 is padding: ``compute_mask`` then says where ids are not 0, as Keras' Embedding does.
      rngs: for the initial values.
      settings: as for ``flax.nnx.Embed``: dtype, param_dtype, embedding_init, promote_dtype, embedding_metadata. With
        ``optimizer=`` also ``mesh``, a Mesh or ``embax.Devices`` over whose devices the rows are split, and
        ``placement``: "block" (neighbouring rows together, the default), "column" or "replicated". The rows keep their
        order, and are filled up with rows of zeros where the devices do not divide them.

    Raises:
      TypeError: an optimizer that is not one of embax's.
      ValueError: a mesh without an optimizer, or a placement that does not fit.

    >>> import jax.numpy as jnp, embax, embax.nnx
    >>> from flax import nnx
    >>> layer = embax.nnx.Embed(1000, 4, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[5, -1], [5, 5]])).shape
    (2, 2, 4)
    >>> loss, gradients = embax.nnx.value_and_grad(lambda layer: layer(jnp.array([5, -1, 5])).sum())(layer)
    >>> gradients.embedding.row_gradients.rows.tolist()
    [5, 999, 1000]
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        optimizer: Any = None,
        mask_zero: bool = False,
        rngs: Any,
        **settings: Any,
    ):
        where = settings.pop("mesh", None), settings.pop("placement", "block")
        home = embed_home((num_embeddings, features), settings.get("param_dtype"), optimizer, *where)
        if home is not None:
            initializer = settings.get("embedding_init", DEFAULT_INIT)
            settings["embedding_init"] = lambda key, *_: made(home, initializer, key)
        super().__init__(num_embeddings, features, rngs=rngs, **settings)
        self.mask_zero = mask_zero
        self.sentinel = nnx.data(None)
        self.prefetched_rows = nnx.data(None)
        if optimizer is not None:
            check_optimizer("Embed", optimizer, self.param_dtype)
            param = self.embedding
            metadata = {**param.get_metadata(), "optimizer": optimizer, "home": home}
            self.embedding = Table.from_metadata(param.get_value(), metadata)
            self.sentinel = nnx.data(sentinel())

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns the rows at ``inputs``, integers of any shape: ``inputs.shape + (features,)``.

        Ids in ``[-V, -1]`` count from the end; outside of ``[-V, V)`` the result is NaN and trains nothing; V = 1
        gives row 0 for every id.
        """
        if not self.sparse:
            return super().__call__(inputs, out_sharding=out_sharding)
        if out_sharding is not None:
            raise NotImplementedError("Embed: out_sharding is not supported together with optimizer=")
        rows = self._rows(inputs)
        return self.promote_dtype((rows,), dtype=self.dtype, inexact=False)[0]

    def attend(self, query: jax.Array, out_sharding: Any = None, *, candidates: Any = None) -> jax.Array:
        """Returns the inner products of ``query`` with rows of the table.

        Args:
          query: ``[..., features]``.
          out_sharding: as for ``flax.nnx.Embed``; not with ``optimizer=`` or candidates.
          candidates: ids ``[K]`` for all queries, or ``[..., K]`` for each: the result is ``[..., K]``, and gradients
            are of these rows only. None for all rows, ``[..., num_embeddings]``: with ``optimizer=`` that has no
            gradient with respect to the rows, and asking for one raises. On a mesh whose devices divide the rows
            it is split over them.
        """
        if candidates is None and not self.sparse:
            return super().attend(query, out_sharding=out_sharding)
        if out_sharding is not None:
            raise NotImplementedError("Embed.attend: out_sharding is not supported with optimizer= or candidates=")
        rows = self._leaf().whole(self._sentinel()) if candidates is None else self._rows(candidates)
        query, rows = self.promote_dtype((query, rows), dtype=self.dtype)
        return attend_to(query, rows) if candidates is not None else attend_to_all(query, rows, self._leaf().home)

    def compute_mask(self, inputs: jax.Array) -> jax.Array | None:
        """Returns where ``inputs`` are not padding: ``inputs != 0``; None without ``mask_zero``."""
        return mask_of(inputs) if self.mask_zero else None

    @property
    def sparse(self) -> bool:
        """Whether the table has an optimizer of its own."""
        return isinstance(self.embedding, (Table, PrefetchedValues))

    def owned_tables(self) -> dict[tuple, Table]:
        """Returns the tables that ``prefetch`` may replace, by their path in the module."""
        return {("embedding",): self.embedding} if isinstance(self.embedding, Table) else {}

    def set_prefetched(self, key: tuple, values: PrefetchedValues, rows: PrefetchedRows) -> None:
        """Puts prefetched rows in the place of the table."""
        self.embedding, self.prefetched_rows = values, nnx.data(rows)

    def _leaf(self):
        return leaf(self.embedding, self.prefetched_rows, "embedding")

    def _sentinel(self):
        return None if self.sentinel is None else self.sentinel.get_value()

    def _rows(self, ids: jax.Array) -> jax.Array:
        if not self.sparse:
            return super().__call__(ids)
        return self._leaf().lookup_rows(embed_ids(ids, self.num_embeddings), self._sentinel())
