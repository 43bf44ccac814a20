"""``embax.linen.FeatureEmbed``: many features and their tables as one Linen layer."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict, unfreeze

from embax.gradients.features import home_of, lookup_features
from embax.gradients.table import Prefetched
from embax.linen.box import Table
from embax.planning import Plan, as_plan
from embax.table_state import init_stack_rows


class FeatureEmbed(nn.Module):
    """Looks up and pools many features: specifications in, activations out, in one structure.

    Attributes:
      features: FeatureSpecs in dicts, or a Plan (Linen turns lists in a module's attributes into tuples: with lists
        give a Plan); the tables' optimizers are those of their TableSpecs.
      settings: as for ``embax.plan``: mesh, placement, stacks, capacity, activation_dtype, backend.

    >>> import jax, jax.numpy as jnp, embax, embax.linen
    >>> item = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.Adagrad(0.1))
    >>> features = {"history": embax.FeatureSpec(name="history", table_spec=item, input_shape=(None, 3),
    ...     output_shape=(None, 2))}
    >>> layer, ids = embax.linen.FeatureEmbed(features), {"history": jnp.array([[5, 3, 5], [0, 0, 1]])}
    >>> variables = layer.init(jax.random.key(0), ids)
    >>> layer.apply(variables, ids)["history"].tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """

    features: Any
    settings: Mapping[str, Any] = FrozenDict()

    @property
    def plan(self) -> Plan:
        """The Plan, for ``embax.preprocess``."""
        features = unfreeze(self.features) if isinstance(self.features, FrozenDict) else self.features
        return as_plan(features, self.settings)

    @nn.compact
    def __call__(self, ids: Any, weights: Any = None) -> Any:
        """Returns the activations of every feature, ``[batch, embedding_dim]``, in the structure of the features.

        Args:
          ids: an IdBatch from ``embax.preprocess``; or raw ids in the features' structure, preprocessed here as
            ``embax.preprocess_traced`` does: bad ids are counted and add nothing (preprocess outside to see them).
          weights: of raw ids, in the same structure.
        """
        plan = self.plan
        # One key for all stacks: the values of a table do not depend on what it is stacked with.
        key = self.make_rng("params") if self.is_initializing() else None
        tables = {stack.name: self._rows(stack, key) for stack in plan.stacks}
        return lookup_features(plan, tables, ids, weights)

    def _rows(self, stack: Any, key: Any) -> Table | Prefetched:
        static = (stack.optimizer, "/".join((*self.path, stack.name)), home_of(self.plan, stack))
        if not self.has_variable("params", stack.name):
            # With a key of its own: the parameter's would change with the stack's name.
            value = self.param(
                stack.name, lambda _: Table.tree_unflatten(static, (init_stack_rows(stack, key, self.plan.devices),))
            )
            return Table.tree_unflatten(static, (value,))
        stored = self.get_variable("params", stack.name)
        if isinstance(stored, Prefetched):
            return stored
        value = stored.unbox() if isinstance(stored, Table) else stored
        if value.shape != (stack.stored_rows, stack.embedding_dim):
            raise ValueError(
                f'table "{static[1]}": the parameter has shape {value.shape}, and the features say '
                f"{(stack.stored_rows, stack.embedding_dim)}; pass the parameters that init made for these features"
            )
        return Table.tree_unflatten(static, (value,))
