"""The SparseCore layer for Linen: under ``jax.grad`` its variables' "gradient" is the updated variables."""

from typing import Any

import jax
from flax import linen as nn
from flax.core import meta, unfreeze
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from embax.sparsecore.layers import Door, looked_up
from embax.sparsecore.lib.nn import embedding
from embax.sparsecore.utils import utils
from embax.sparsecore.variables import all_variables
from embax.specs import FeatureSpec

EMBEDDING_PARAM_NAME = "sc_embedding_variables"
EmbeddingLookupInput = embedding.PreprocessedInput

MOST_DOORS = 64
_DOORS: dict[Any, Door] = {}  # a layer is made anew at every apply; its door must be the same one


class SparseCoreEmbed(nn.Module):
    """Looks up the features of a batch that ``preprocess_inputs`` has prepared.

    Attributes:
      feature_specs: FeatureSpecs, stacked or not; those that are not are given their stacks.
      sharding_axis: of the mesh, along which batch and tables are split; several in a tuple.
      mesh: of the layer; None for all devices in a row.
      table_sharding_strategy: "MOD".
      enable_minibatching: without effect.
    """

    feature_specs: Any
    sharding_axis: Any = "sparsecore_sharding"
    mesh: Any = None
    table_sharding_strategy: str = "MOD"
    enable_minibatching: bool = False

    def __post_init__(self):
        if self.mesh is None:
            axes = self.sharding_axis if isinstance(self.sharding_axis, (tuple, list)) else (self.sharding_axis,)
            if len(axes) > 1:
                raise ValueError(f"SparseCoreEmbed: sharding_axis={self.sharding_axis!r} needs a mesh of these axes")
            self.mesh = jax.sharding.Mesh(jax.devices(), axes)
        super().__post_init__()

    @property
    def num_sc_per_device(self) -> int:
        """SparseCores of a device."""
        return utils.num_sparsecores_per_device(self.mesh.devices.item(0))

    @property
    def door(self) -> Door:
        """What the layer looks up by."""
        specs = unfreeze(self.feature_specs)  # a module freezes what it is given
        leaves, structure = jax.tree.flatten(specs, is_leaf=lambda leaf: isinstance(leaf, FeatureSpec))
        axis = tuple(self.sharding_axis) if isinstance(self.sharding_axis, list) else self.sharding_axis
        key = (tuple(map(id, leaves)), structure, self.mesh, axis)  # the door keeps the leaves, and so their ids
        if key not in _DOORS:
            while len(_DOORS) >= MOST_DOORS:
                del _DOORS[next(iter(_DOORS))]
            door = Door(specs, self.mesh, axis, self.num_sc_per_device)
            embedding.prepare_feature_specs_for_training(specs, door.shards, self.num_sc_per_device)
            _DOORS[key] = door
        return _DOORS[key]

    @nn.nowrap
    def preprocess_inputs(
        self, step: int, features: Any, features_weights: Any = None, all_reduce_interface: Any = None
    ) -> embedding.PreprocessedInput:
        """Returns a batch prepared for the layer; needs no parameters.

        Args:
          step: without effect.
          features: ids, in the structure of the features.
          features_weights: likewise, or None.
          all_reduce_interface: without effect.
        """
        door = self.door
        return embedding.preprocess_sparse_dense_matmul_input(
            features,
            features_weights,
            door.feature_specs,
            self.mesh.local_mesh.size * door.shards // self.mesh.size,
            door.shards,
            num_sc_per_device=door.num_sc,
            sharding_strategy=self.table_sharding_strategy,
            batch_number=step,
            all_reduce_interface=all_reduce_interface,
        )[0]

    @nn.compact
    def __call__(self, embedding_lookup_inputs: Any, step: Any = None) -> Any:
        """Returns the activations, in the structure of the features.

        Args:
          embedding_lookup_inputs: from ``preprocess_inputs``.
          step: counted from 0, for schedules and bias corrections of the update.
        """
        return looked_up(self.door, embedding_lookup_inputs, self._variables(), step)

    @nn.compact
    def apply_gradient(self, gradients: Any, embedding_lookup_inputs: Any, step: Any = None) -> dict[str, Any]:
        """Returns the updated variables, ``{path of the parameter: variables}``.

        Args:
          gradients: of the activations.
          embedding_lookup_inputs: those of the lookup.
          step: counted from 0, or None.
        """
        new = self.door.update(gradients, embedding_lookup_inputs, self._variables(), step)
        return {"/".join((*self.path, EMBEDDING_PARAM_NAME)): new}

    def _variables(self) -> Any:
        door = self.door
        names = (door.axis, None)

        def fresh(rng: jax.Array) -> Any:
            variables = all_variables(
                rng,
                embedding.get_table_specs(door.feature_specs),
                NamedSharding(self.mesh, P(*names)),
                door.num_sc,
            )
            if jax.sharding.AxisType.Explicit in self.mesh.axis_types:
                return variables  # a box would constrain what is split already, which JAX refuses there
            return nn.Partitioned(variables, names, mesh=self.mesh)

        return meta.unbox(self.param(EMBEDDING_PARAM_NAME, fresh))
