"""``embax.linen.LoRAEmbed``: low-rank adaptation of a frozen table, at the cost of a batch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from embax.gradients.embed_rows import embed_ids, low_rank
from embax.linen.embed import Embed
from embax.take import take


class LoRAEmbed(nn.Module):
    """A frozen table plus ``scale * A[ids] @ B``: rows of A ``[V, rank]`` train sparsely, B ``[rank, D]`` densely.

    The table is ``frozen/embedding``, outside of ``params``: pass a trained one there. A starts at zero.

    Attributes:
      num_embeddings: vocabulary size V.
      features: embedding dimension D.
      rank: of the adaptation.
      optimizer: of the rows of A.
      alpha: the scale is ``alpha / rank``; None for ``rank``.
      dtype: of the activations; None for the parameters' own.
      param_dtype: of the parameters.
      embedding_init: of the frozen table, where none is passed.
      b_init: of B.

    >>> import jax, jax.numpy as jnp, embax, embax.linen
    >>> layer, ids = embax.linen.LoRAEmbed(1000, 8, rank=2, optimizer=embax.Adagrad(0.1)), jnp.array([3, 5])
    >>> variables = layer.init(jax.random.key(0), ids)
    >>> variables = {**variables, "frozen": {"embedding": jnp.ones((1000, 8))}}
    >>> layer.apply(variables, ids).sum().tolist()
    16.0
    """

    num_embeddings: int
    features: int
    rank: int
    optimizer: Any
    alpha: float | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Any = nn.linear.default_embed_init
    b_init: Any = nn.initializers.normal(0.02)

    def setup(self):
        """Makes, or takes up, the frozen table and the adaptation."""
        shape = (self.num_embeddings, self.features)
        self.frozen = self.variable(
            "frozen", "embedding", lambda: self.embedding_init(self.make_rng("params"), shape, self.param_dtype)
        )
        self.lora_a = Embed(
            self.num_embeddings,
            self.rank,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.zeros,
            optimizer=self.optimizer,
        )
        self.lora_b = self.param("lora_b", self.b_init, (self.rank, self.features), self.param_dtype)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the adapted rows at ``inputs``, as ``Embed``."""
        rows = take(self.frozen.value, embed_ids(inputs, self.num_embeddings))
        parts = promote_dtype(rows, self.lora_a(inputs), self.lora_b, dtype=self.dtype)
        return low_rank(*parts, scale=1.0 if self.alpha is None else self.alpha / self.rank)
