"""optax for models with ``SparseCoreEmbed``: tables come updated, all else is stepped."""

from typing import Any

import jax

from embax.sparsecore.lib.flax.linen.embed import EMBEDDING_PARAM_NAME


def create_optimizer_for_sc_model(params: Any, tc_optimizer: Any) -> Any:
    """Returns an optax transformation that steps the dense parameters, and lets updated tables through.

    Args:
      params: of the model.
      tc_optimizer: an optax transformation.
    """
    import optax

    through = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: (updates, state)
    )
    kinds = jax.tree.map_with_path(lambda path, _: "table" if is_table(path) else "dense", params)
    return optax.multi_transform({"dense": tc_optimizer, "table": through}, kinds)


def apply_updates_for_sc_model(params: Any, updates: Any) -> Any:
    """Returns the parameters with updates added, and tables replaced."""

    def apply(path: Any, old: Any, update: Any) -> Any:
        return update if is_table(path) else (old + update).astype(old.dtype)

    return jax.tree.map_with_path(apply, params, updates)


def is_table(path: Any) -> bool:
    """Returns whether a path in the parameters is that of embedding variables."""
    return any(getattr(part, "key", None) == EMBEDDING_PARAM_NAME for part in path)
