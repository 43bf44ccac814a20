"""What both SparseCore layers do: look up over a mesh, and give the updated variables where a gradient would stand."""

import functools
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from embax.sparsecore.lib.nn import embedding
from embax.sparsecore.translation import over_axes


class Door:
    """A layer's features and mesh; compared by identity, as a static argument.

    Args:
      feature_specs: prepared FeatureSpecs.
      mesh: of the layer.
      axis: of the mesh, or several, along which batch and tables are split.
      num_sc: SparseCores of a device.
    """

    def __init__(self, feature_specs: Any, mesh: Any, axis: Any, num_sc: int):
        self.feature_specs, self.mesh, self.axis, self.num_sc = feature_specs, mesh, axis, num_sc

    @property
    def shards(self) -> int:
        """Devices along the axis."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes, in the order in which they number the devices."""
        return tuple(self.axis) if isinstance(self.axis, (tuple, list)) else (self.axis,)

    def shared(self) -> dict[str, Any]:
        """Returns what lookups and updates are told alike."""
        return {
            "feature_specs": self.feature_specs,
            "global_device_count": self.shards,
            "num_sc_per_device": self.num_sc,
        }

    def mapped(self, function: Any, inputs: int) -> Any:
        """Returns ``function`` of so many inputs over the mesh."""
        split = P(self.axis)

        def local(*args: Any) -> Any:
            with over_axes(self.axes):
                return function(*args)

        mapped = jax.shard_map(local, mesh=self.mesh, in_specs=(split,) * inputs, out_specs=split, check_vma=False)
        if jax.sharding.AxisType.Explicit not in self.mesh.axis_types:
            return mapped
        # Along Explicit axes JAX takes only what is split already; a batch of the host, for one, is not.
        where = NamedSharding(self.mesh, split)
        return lambda *args: mapped(*jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, where), args))

    def lookup(self, inputs: Any, variables: Any) -> Any:
        """Returns the activations."""
        return self.mapped(functools.partial(embedding.tpu_sparse_dense_matmul, **self.shared()), 2)(inputs, variables)

    def update(self, gradients: Any, inputs: Any, variables: Any, step: Any) -> Any:
        """Returns the variables after a step, in the structure that they have."""

        def local(gradients, inputs, variables):
            return embedding.tpu_sparse_dense_matmul_grad(gradients, inputs, variables, step=step, **self.shared())

        new = self.mapped(local, 3)(gradients, inputs, variables)
        return jax.tree.unflatten(jax.tree.structure(variables), jax.tree.leaves(new))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def looked_up(door: Door, inputs: Any, variables: Any, step: Any) -> Any:
    """Returns the activations; under ``jax.grad`` the variables' "gradient" is the updated variables.

    Args:
      door: the layer's.
      inputs: from ``preprocess_sparse_dense_matmul_input``.
      variables: rows and slots of every stack.
      step: counted from 0, for schedules and bias corrections; None for none.
    """
    del step
    return door.lookup(inputs, variables)


def _forward(door, inputs, variables, step):
    return door.lookup(inputs, variables), (inputs, variables, step)


def _backward(door, kept, gradients):
    inputs, variables, step = kept
    return None, door.update(gradients, inputs, variables, step), None


looked_up.defvjp(_forward, _backward)
