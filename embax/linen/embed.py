"""``embax.linen.Embed``: ``flax.linen.Embed``, and with ``optimizer=`` the same with row gradients."""

from typing import Any

import flax.linen as nn
import jax

from embax.exchange.ordered import made
from embax.gradients.embed_rows import attend_to, attend_to_all, embed_home, embed_ids, mask_of
from embax.gradients.table import Prefetched, check_optimizer
from embax.linen.box import Table


class Embed(nn.Embed):
    """``flax.linen.Embed`` whose table can have an optimizer of its own, at the cost of the ids of a batch.

    Without ``optimizer`` it is ``flax.linen.Embed``. With it, ``params/embedding`` is an ``embax.linen.Table`` around
    the same initial values; ``embax.linen.value_and_grad`` and ``embax.linen.TrainState`` train it.

    Attributes:
      optimizer: of the table's rows, such as ``embax.Adagrad(0.1)``; None for dense gradients.
      mask_zero: whether id 0 is padding: ``compute_mask`` then says where ids are not 0, as Keras' Embedding does.
      mesh: a Mesh, or ``embax.Devices``, over whose devices the rows are split; with ``optimizer`` only. The rows keep
        their order, and are filled up with rows of zeros where the devices do not divide them.
      placement: on the mesh: "block" (neighbouring rows together), "column" or "replicated".
      num_embeddings, features, dtype, param_dtype, embedding_init, promote_dtype: as for ``flax.linen.Embed``.

    Raises:
      TypeError: an optimizer that is not one of embax's.
      ValueError: a mesh without an optimizer, or a placement that does not fit.

    >>> import jax, jax.numpy as jnp, embax, embax.linen
    >>> layer, ids = embax.linen.Embed(1000, 4, optimizer=embax.Adagrad(0.1)), jnp.array([5, -1, 5])
    >>> variables = layer.init(jax.random.key(0), ids)
    >>> loss, gradients = embax.linen.value_and_grad(lambda v: layer.apply(v, ids).sum())(variables)
    >>> gradients["params"]["embedding"].rows.tolist()
    [5, 999, 1000]
    """

    optimizer: Any = None
    mask_zero: bool = False
    mesh: Any = None
    placement: str = "block"

    def setup(self):
        """Makes, or takes up, the table."""
        shape = (self.num_embeddings, self.features)
        home = embed_home(shape, self.param_dtype, self.optimizer, self.mesh, self.placement)
        if self.optimizer is None:
            super().setup()
            return
        check_optimizer("Embed", self.optimizer, self.param_dtype)
        name = "/".join((*self.path, "embedding"))
        stored = self.get_variable("params", "embedding") if self.has_variable("params", "embedding") else None
        if isinstance(stored, Prefetched):
            self.rows = stored
            return
        init = self.embedding_init
        static = (self.optimizer, name, home)

        def boxed(key):
            value = init(key, shape, self.param_dtype) if home is None else made(home, init, key)
            return Table.tree_unflatten(static, (value,))

        self.embedding = self.param("embedding", boxed)
        self.rows = Table.tree_unflatten(static, (self.embedding,))

    def __call__(self, inputs: jax.Array) -> Any:
        """Returns the rows at ``inputs``, integers of any shape: ``inputs.shape + (features,)``.

        Ids in ``[-V, -1]`` count from the end; outside of ``[-V, V)`` the result is NaN and trains nothing; V = 1
        gives row 0 for every id.
        """
        if self.optimizer is None:
            return super().__call__(inputs)
        rows = self.rows.lookup_rows(embed_ids(inputs, self.num_embeddings))
        return self.promote_dtype(rows, dtype=self.dtype, inexact=False)[0]

    def attend(self, query: jax.Array, *, candidates: Any = None) -> Any:
        """Returns the inner products of ``query`` with rows of the table.

        Args:
          query: ``[..., features]``.
          candidates: ids ``[K]`` for all queries, or ``[..., K]`` for each: the result is ``[..., K]``, and gradients
            are of these rows only. None for all rows, ``[..., num_embeddings]``: with ``optimizer`` that has no
            gradient with respect to the rows, and asking for one raises. On a mesh whose devices divide the rows
            it is split over them.
        """
        if candidates is None and self.optimizer is None:
            return super().attend(query)
        if candidates is None:
            rows = self.rows.whole()
        elif self.optimizer is None:
            rows = super().__call__(candidates)
        else:
            rows = self.rows.lookup_rows(embed_ids(candidates, self.num_embeddings))
        pair: Any = self.promote_dtype(query, rows, dtype=self.dtype)
        query, rows = pair
        return attend_to(query, rows) if candidates is not None else attend_to_all(query, rows, self.rows.home)

    def compute_mask(self, inputs: jax.Array) -> jax.Array | None:
        """Returns where ``inputs`` are not padding: ``inputs != 0``; None without ``mask_zero``."""
        return mask_of(inputs) if self.mask_zero else None
