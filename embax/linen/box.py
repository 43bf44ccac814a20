"""What a sparse layer keeps under ``params``: a box around the table's array, as Linen's ``nn.Partitioned`` is one."""

from typing import Any

import jax
from flax import serialization
from flax.core.meta import AxisMetadata

from embax.gradients.table import Table as TableLeaf


@jax.tree_util.register_pytree_with_keys_class
class Table(TableLeaf, AxisMetadata):
    """An ``embax.Table`` that Linen opens when a module asks for the parameter.

    Its leaf is the array, so ``jax.tree.map`` and checkpoints see what they would see of ``flax.linen.Embed``.
    """

    def unbox(self) -> Any:
        """Returns the array."""
        return self.value

    def replace_boxed(self, val: Any) -> "Table":
        """Returns the box around another array."""
        return self.tree_unflatten((self.optimizer, self.name, self.home), (val,))

    def add_axis(self, index: int, params: Any) -> "Table":
        """Returns the box: the layers of ``nn.scan`` and ``nn.vmap`` are a leading axis of the array."""
        return self

    def remove_axis(self, index: int, params: Any) -> "Table":
        """Returns the box."""
        return self


# A checkpoint of the box is that of the array, as flax.linen.Embed would have written it; either goes into the box.
serialization.register_serialization_state(
    Table,
    lambda box: serialization.to_state_dict(box.value),
    lambda box, state: box.replace_boxed(serialization.from_state_dict(box.value, state)),
)
