"""``embax.nnx.LoRAEmbed``: low-rank adaptation of a frozen table, at the cost of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from embax.gradients.embed_rows import embed_ids, low_rank
from embax.nnx.embed import Embed
from embax.nnx.variables import Frozen
from embax.take import take


class LoRAEmbed(nnx.Module):
    """A frozen table plus ``scale * A[ids] @ B``: rows of A ``[V, rank]`` train sparsely, B ``[rank, D]`` densely.

    The table is taken over from ``base`` and becomes ``embax.nnx.Frozen``: no gradient, no optimizer state. A starts at
    zero, so the layer starts as ``base``.

    Args:
      base: a trained ``flax.nnx.Embed`` or ``embax.nnx.Embed``.
      rank: of the adaptation.
      optimizer: of the rows of A.
      alpha: the scale is ``alpha / rank``; None for ``rank``.
      b_init: initializer of B; None for ``normal(0.02)``.
      rngs: for B.

    >>> import jax.numpy as jnp, embax, embax.nnx
    >>> from flax import nnx
    >>> base = nnx.Embed(1000, 8, rngs=nnx.Rngs(0))
    >>> before = base(jnp.array([3, 5]))
    >>> layer = embax.nnx.LoRAEmbed(base, rank=2, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(1))
    >>> bool((layer(jnp.array([3, 5])) == before).all())
    True
    >>> loss, gradients = embax.nnx.value_and_grad(lambda layer: layer(jnp.array([3, 5])).sum())(layer)
    >>> gradients.lora_a.embedding.row_gradients.values.shape, gradients.lora_b.shape
    ((2, 2), (2, 8))
    """

    def __init__(
        self,
        base: nnx.Embed,
        rank: int,
        *,
        optimizer: Any,
        alpha: float | None = None,
        b_init: Any = None,
        rngs: Any,
    ):
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"LoRAEmbed: rank={rank!r} must be an integer of at least 1")
        if base.embedding.get_metadata("home", None) is not None:
            raise NotImplementedError(
                "LoRAEmbed: the table of base lies on a mesh, and an adapted one lies on one device today; take base's "
                "rows over into an Embed without mesh="
            )
        self.num_embeddings, self.features, self.rank = base.num_embeddings, base.features, rank
        self.scale = 1.0 if alpha is None else alpha / rank
        self.dtype, self.promote_dtype = base.dtype, base.promote_dtype
        self.frozen = Frozen(base.embedding.get_value())
        zeros, dtype = nnx.initializers.zeros, base.param_dtype
        self.lora_a = Embed(
            self.num_embeddings, rank, optimizer=optimizer, embedding_init=zeros, param_dtype=dtype, rngs=rngs
        )
        b_init = nnx.initializers.normal(0.02) if b_init is None else b_init
        self.lora_b = nnx.LoRAParam(b_init(rngs.params(), (rank, self.features), dtype))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the adapted rows at ``inputs``, as ``Embed``."""
        rows = take(self.frozen.get_value(), embed_ids(inputs, self.num_embeddings))
        parts = self.promote_dtype((rows, self.lora_a(inputs), self.lora_b.get_value()), dtype=self.dtype)
        return low_rank(*parts, scale=self.scale)

    def merged(self) -> jax.Array:
        """Returns the adapted table ``[V, D]``: as large as the table, for export."""
        everything = jnp.arange(self.num_embeddings, dtype=jnp.int32)
        return self(everything)
