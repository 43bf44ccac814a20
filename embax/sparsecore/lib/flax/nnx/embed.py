"""The SparseCore layer for NNX: under ``nnx.grad`` its variables' "gradient" is the updated variables."""

from typing import Any

from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from embax.sparsecore.layers import Door, looked_up
from embax.sparsecore.lib.nn import embedding
from embax.sparsecore.utils import utils
from embax.sparsecore.variables import all_variables


class EmbeddingVariablesParam(nnx.Param):
    """Rows and slots of every stack: ``{stack: EmbeddingVariables}``."""


def is_embedding_variables(_: Any, value: Any) -> bool:
    """Filters embedding variables, as an NNX filter."""
    return issubclass(getattr(value, "type", type(value)), EmbeddingVariablesParam)


def is_non_embedding_variables(path: Any, value: Any) -> bool:
    """Filters everything else, as an NNX filter."""
    return not is_embedding_variables(path, value)


class SparseCoreEmbed(nnx.Module):
    """Looks up the features of a batch that ``preprocess_sparse_dense_matmul_input`` has prepared.

    Args:
      feature_specs: FeatureSpecs, stacked or not; those that are not are given their stacks.
      sharding_axis: of the mesh, along which batch and tables are split.
      mesh: of the layer.
      rngs: for the initial values, those of ``embax.init``.
      enable_minibatching: without effect.
      table_sharding_strategy: "MOD".
    """

    def __init__(
        self,
        feature_specs: Any,
        sharding_axis: Any,
        mesh: Any,
        rngs: Any,
        *,
        enable_minibatching: bool = False,
        table_sharding_strategy: str = "MOD",
    ):
        self.feature_specs = nnx.static(feature_specs)
        self.sharding_axis, self.mesh = sharding_axis, mesh
        self.enable_minibatching, self.table_sharding_strategy = enable_minibatching, table_sharding_strategy
        self.num_sc_per_device = utils.num_sparsecores_per_device(mesh.devices.item(0))
        self.door = Door(feature_specs, mesh, sharding_axis, self.num_sc_per_device)
        self.num_shards = self.door.shards
        self.embedding_table_partition, self.data_partition = P(sharding_axis, None), P(sharding_axis)
        embedding.prepare_feature_specs_for_training(feature_specs, self.num_shards, self.num_sc_per_device)
        variables = all_variables(
            rngs.params(),
            embedding.get_table_specs(feature_specs),
            NamedSharding(mesh, self.embedding_table_partition),
            self.num_sc_per_device,
        )
        self.embedding_table = EmbeddingVariablesParam(
            variables, embedding_sharding=NamedSharding(mesh, self.embedding_table_partition)
        )

    def __call__(self, embedding_lookup_inputs: Any, step: Any = None) -> Any:
        """Returns the activations, in the structure of the features.

        Args:
          embedding_lookup_inputs: from ``preprocess_sparse_dense_matmul_input``.
          step: counted from 0, for schedules and bias corrections of the update.
        """
        return embedding_lookup(self, embedding_lookup_inputs, step)


def embedding_lookup(embedding_layer: SparseCoreEmbed, embedding_lookup_inputs: Any, step: Any = None) -> Any:
    """Returns the activations of a layer."""
    variables = embedding_layer.embedding_table.get_value()
    return looked_up(embedding_layer.door, embedding_lookup_inputs, variables, step)


def embedding_lookup_bwd(res: Any, g: Any, step: Any = None) -> Any:
    """Returns the updated variables of a layer.

    Args:
      res: ``(layer, inputs)``.
      g: gradients of the activations.
      step: counted from 0, or None.
    """
    layer, inputs = res
    return layer.door.update(g, inputs, layer.embedding_table.get_value(), step)


def get_named_sharding(node: Any, mesh: Any) -> nnx.StateSharding:
    """Returns the shardings of a model or optimizer, for ``nnx.jit``.

    Tables are split; all else is as its variables say (``nnx.with_partitioning``), or on every device.
    """

    def sharding(path: Any, variable: Any) -> Any:
        if is_embedding_variables(path, variable):
            # One for all arrays of a variable, as jax.jit takes them.
            return variable.replace(variable.get_metadata("embedding_sharding"))
        return nnx.get_named_sharding(variable, mesh)

    return nnx.StateSharding(nnx.map_state(sharding, nnx.state(node)))


class PartitionedOptimizer(nnx.Optimizer):
    """``flax.nnx.Optimizer`` for a model with ``SparseCoreEmbed``: optax steps what is dense, tables are put in place.

    Args:
      model: the model.
      dense_optimizer: an optax transformation.
    """

    def __init__(self, model: Any, dense_optimizer: Any):
        super().__init__(model, dense_optimizer, wrt=nnx.All(nnx.Param, is_non_embedding_variables))

    def update(self, model: Any, grads: Any) -> None:  # type: ignore[override]
        """Steps the model in place.

        Args:
          model: as given at construction.
          grads: from ``nnx.grad`` with respect to ``nnx.Param``.
        """
        tables, dense = [], []
        for path, variable in nnx.to_flat_state(grads):
            (tables if is_embedding_variables(path, variable) else dense).append((path, variable))
        nnx.update(model, nnx.from_flat_state(tables))
        super().update(model, nnx.from_flat_state(dense))
