"""Specifications as the protos that stand beside a SparseCore checkpoint, and optimizers back from them."""

from typing import Any

from embax.optimizers.base import Optimizer
from embax.sparsecore import proto_specs


def get_optimizer_class(optimizer_type: int) -> type[Optimizer] | None:
    """Returns the optimizer class of an ``OptimizerSpecProto.OptimizerType``; None for CUSTOM and unknown ones."""
    return proto_specs.class_of(optimizer_type)


def get_optimizer_type(optimizer_class: type[Optimizer]) -> int:
    """Returns the ``OptimizerSpecProto.OptimizerType`` of an optimizer class; CUSTOM where it has none of its own."""
    return proto_specs.type_of(optimizer_class)


def optimizer_spec_to_proto(opt: Optimizer | None) -> Any:
    """Returns an optimizer as an ``OptimizerSpecProto``; None for None.

    Args:
      opt: any optimizer of ``embedding_spec``. Of a callable learning rate a tag is kept: its ``tag``, or its name. Of
        a CustomOptimizerSpec the learning rate is kept alone.

    Raises:
      ValueError: an optimizer that is not among them, or a number that float32 cannot hold.

    >>> from embax.sparsecore.lib.nn import embedding_spec
    >>> proto = optimizer_spec_to_proto(embedding_spec.AdagradOptimizerSpec(0.5))
    >>> proto.learning_rate, dict(proto.float_params)
    (0.5, {'initial_accumulator_value': 0.10000000149011612})
    """
    return proto_specs.optimizer_to_proto(opt)


def proto_to_optimizer_spec(proto: Any) -> Optimizer:
    """Returns the optimizer of an ``OptimizerSpecProto``; SGD that does not move for None.

    A learning rate that was a callable comes back as a ``CallablePlaceholder`` with its tag.

    Raises:
      ValueError: an optimizer whose function was not data, or of a type that is not known.
    """
    return proto_specs.proto_to_optimizer(proto)


def create_proto_from_feature_specs(
    feature_specs: Any, global_device_count: int | None, num_sparsecore_per_device: int | None = None
) -> Any:
    """Returns features, tables and stacks as an ``EmbeddingSpecProto``: all that it takes to find a row in an array.

    Args:
      feature_specs: prepared FeatureSpecs.
      global_device_count: devices of all processes; None for those that jax has.
      num_sparsecore_per_device: SparseCores of each; None for those of this machine.

    Raises:
      ValueError: features that are not prepared, or for another number of SparseCores.
    """
    return proto_specs.proto_of_features(feature_specs, global_device_count, num_sparsecore_per_device)
