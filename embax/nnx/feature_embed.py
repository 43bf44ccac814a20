"""``embax.nnx.FeatureEmbed``: many features and their tables as one NNX layer."""

from typing import Any

from flax import nnx

from embax.gradients.features import home_of, lookup_features
from embax.nnx.variables import PrefetchedRows, PrefetchedValues, Table, leaf, sentinel
from embax.planning import as_plan
from embax.table_state import init_rows


class FeatureEmbed(nnx.Module):
    """Looks up and pools many features: specifications in, activations out, in one structure.

    Args:
      features: FeatureSpecs in any pytree, as for ``embax.plan``, or a Plan; the tables' optimizers are those of their
        TableSpecs.
      rngs: for the initial values, those of ``embax.init``.
      settings: as for ``embax.plan``: mesh, placement, stacks, capacity, activation_dtype, backend.

    Attributes:
      plan: the ``embax.Plan``, for ``embax.preprocess``.
      tables: an ``embax.nnx.Table`` for each stack.

    >>> import jax, jax.numpy as jnp, embax, embax.nnx
    >>> from flax import nnx
    >>> item = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.Adagrad(0.1))
    >>> features = {"history": embax.FeatureSpec(name="history", table_spec=item, input_shape=(None, 3),
    ...     output_shape=(None, 2))}
    >>> layer = embax.nnx.FeatureEmbed(features, rngs=nnx.Rngs(0))
    >>> layer({"history": jnp.array([[5, 3, 5], [0, 0, 1]])})["history"].tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    >>> batch = embax.preprocess(layer.plan, {"history": [[5], [0, 1, 2, 3]]})
    >>> layer(batch)["history"].tolist()
    [[1.0, 1.0], [4.0, 4.0]]
    """

    def __init__(self, features: Any, *, rngs: Any, **settings: Any):
        self.plan = as_plan(features, settings)
        rows = init_rows(self.plan, rngs.params())
        made = {}
        for stack in self.plan.stacks:
            made[stack.name] = Table(rows[stack.name], optimizer=stack.optimizer, home=home_of(self.plan, stack))
        self.tables = nnx.Dict(made)
        self.prefetched_rows = nnx.Dict({})
        self.sentinel = sentinel()

    def __call__(self, ids: Any, weights: Any = None) -> Any:
        """Returns the activations of every feature, ``[batch, embedding_dim]``, in the structure of the features.

        Args:
          ids: an IdBatch from ``embax.preprocess``; or raw ids in the features' structure, preprocessed here as
            ``embax.preprocess_traced`` does: bad ids are counted and add nothing (preprocess outside to see them).
          weights: of raw ids, in the same structure.
        """
        tables = {name: leaf(variable, self.prefetched_rows.get(name), name) for name, variable in self.tables.items()}
        return lookup_features(self.plan, tables, ids, weights, self.sentinel.get_value())

    def owned_tables(self) -> dict[tuple, Table]:
        """Returns the tables that ``prefetch`` may replace, by their path in the module."""
        return {("tables", name): v for name, v in self.tables.items() if isinstance(v, Table)}

    def set_prefetched(self, key: tuple, values: PrefetchedValues, rows: PrefetchedRows) -> None:
        """Puts prefetched rows in the place of a table."""
        name = key[-1]
        self.tables = nnx.Dict({**self.tables, name: values})
        self.prefetched_rows = nnx.Dict({**self.prefetched_rows, name: rows})
