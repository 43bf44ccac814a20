"""Specifications as protos and back: what a SparseCore checkpoint says of the tables in it.

Numbers are float32 there. They come back as the shortest decimal that means the same float32: 0.1 as 0.1.
"""

from typing import Any

import jax
import numpy as np

from embax.optimizers.adagrad import Adagrad, AdagradMomentum, RowwiseAdagrad
from embax.optimizers.adam import Adam, LaProp
from embax.optimizers.base import CallablePlaceholder, Optimizer
from embax.optimizers.custom import Custom
from embax.optimizers.frequency import F2A
from embax.optimizers.ftrl import FTRL
from embax.optimizers.sgd import SGD
from embax.sparsecore.lib.nn.table_stacking import ACTIVATION_BYTES
from embax.sparsecore.proto_messages import OPTIMIZER_TYPES, message_class
from embax.sparsecore.translation import check_cores, stacks_of
from embax.sparsecore.utils import utils
from embax.specs import FeatureSpec, StackedTableSpec, TableSpec

CLASSES: dict[str, type[Optimizer]] = {
    "SGD": SGD,
    "ADAGRAD": Adagrad,
    "ADAM": Adam,
    "FTRL": FTRL,
    "F2A": F2A,
    "ADAGRAD_MOMENTUM": AdagradMomentum,
    "CUSTOM": Custom,
}

# Optimizers without a type of their own: of type CUSTOM, and named among the booleans, where readers that do not know
# them find nothing that they would stumble over.
NAMED: dict[str, type[Optimizer]] = {"laprop": LaProp, "rowwise_adagrad": RowwiseAdagrad}
_OPTIONAL = ("row_clip_norm", "stochastic_rounding")  # None, or a number


def type_of(optimizer_class: type) -> int:
    """Returns the number of an optimizer's type in protos: CUSTOM for those that have none of their own."""
    names = [name for name, known in CLASSES.items() if known is optimizer_class]
    return OPTIMIZER_TYPES.index(names[0] if names else "CUSTOM")


def class_of(optimizer_type: int) -> type[Optimizer] | None:
    """Returns the optimizer class of a type in protos; None for CUSTOM and for unknown ones."""
    known = 0 <= optimizer_type < len(OPTIMIZER_TYPES) and OPTIMIZER_TYPES[optimizer_type] != "CUSTOM"
    return CLASSES.get(OPTIMIZER_TYPES[optimizer_type]) if known else None


def optimizer_to_proto(optimizer: Optimizer | None) -> Any:
    """Returns an OptimizerSpecProto; None for None.

    Raises:
      ValueError: an optimizer that protos have no name for, or a number that float32 cannot hold.
    """
    if optimizer is None:
        return None
    kind = type(optimizer)
    marks = [mark for mark, named in NAMED.items() if named is kind]
    if not marks and kind not in CLASSES.values():
        names = ", ".join(sorted(known.__name__ for known in (*CLASSES.values(), *NAMED.values())))
        raise ValueError(f"optimizer {kind.__name__} has no name in protos, which know {names}; use one of them")
    proto = message_class("OptimizerSpecProto")(type=type_of(kind))
    if callable(optimizer.learning_rate):
        proto.learning_rate_tag = _tag(optimizer.learning_rate)
    else:
        proto.learning_rate = _checked(kind, "learning_rate", optimizer.learning_rate)
    if kind is Custom:
        return proto  # a function is not data
    optional = {name: getattr(optimizer, name) for name in _OPTIONAL}
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in {**optimizer.get_float_params(), **given}.items():
        proto.float_params[name] = _checked(kind, name, value)
    for name, value in {**optimizer.get_bool_params(), **dict.fromkeys(marks, True)}.items():
        proto.bool_params[name] = bool(value)
    return proto


def proto_to_optimizer(proto: Any) -> Optimizer:
    """Returns the optimizer of an OptimizerSpecProto; a callable learning rate comes back as a CallablePlaceholder.

    Raises:
      ValueError: an optimizer whose function was not data, or of a type that is not known.

    >>> import embax
    >>> proto_to_optimizer(optimizer_to_proto(embax.LaProp(0.1, b1=0.8))) == embax.LaProp(0.1, b1=0.8)
    True
    """
    if proto is None:
        return SGD(learning_rate=0.0)
    rate: Any = _decimal(proto.learning_rate)
    if proto.WhichOneof("learning_rate_spec") == "learning_rate_tag":
        rate = CallablePlaceholder(proto.learning_rate_tag)
    known = named_class(proto)
    if known is None:
        kind = OPTIMIZER_TYPES[proto.type] if 0 <= proto.type < len(OPTIMIZER_TYPES) else proto.type
        raise ValueError(
            f"the proto has an optimizer of type {kind}, from which none can be made: a function is not data; make the "
            "optimizer yourself, and pass specifications with it where they are taken"
        )
    numbers: dict[str, Any] = {name: _decimal(value) for name, value in proto.float_params.items()}
    if "stochastic_rounding" in numbers:
        numbers["stochastic_rounding"] = int(numbers["stochastic_rounding"])
    return known.from_float_and_bool_params(numbers, dict(proto.bool_params), rate)


def named_class(proto: Any) -> type[Optimizer] | None:
    """Returns the class of an OptimizerSpecProto; None where it does not tell."""
    marks = [NAMED[mark] for mark, value in proto.bool_params.items() if value and mark in NAMED]
    return marks[0] if marks else class_of(proto.type)


def proto_of_features(feature_specs: Any, global_device_count: int | None, num_sc_per_device: int | None) -> Any:
    """Returns an EmbeddingSpecProto of prepared features; ``embedding_proto_utils`` has the words."""
    devices = jax.device_count() if global_device_count is None else global_device_count
    num_sc = devices * utils.checked(num_sc_per_device)
    stacks = stacks_of(feature_specs)
    check_cores(stacks, None, num_sc)
    made = message_class("EmbeddingSpecProto")()
    for stack in stacks.values():
        proto = _stack_proto(made.stacked_table_specs.add(), stack.spec, num_sc)
        tables: dict[str, Any] = {}
        # In the order in which the features were given.
        for _, feature in sorted(stack.features, key=lambda member: member[0]):
            table = feature.table_spec
            if table.name not in tables:
                tables[table.name] = _table_proto(proto.table_specs.add(), table)
            _feature_proto(tables[table.name].feature_specs.add(), feature)
    return made


def table_protos(proto: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the tables of an EmbeddingSpecProto by name, each behind its stack.

    Raises:
      ValueError: a table or stack that is there twice.
    """
    found: dict[str, tuple[Any, Any]] = {}
    stacks = set()
    for stack in proto.stacked_table_specs:
        for table in stack.table_specs:
            if table.table_name in found or stack.stack_name in stacks:
                raise ValueError(
                    f'embedding_spec: table "{table.table_name}" or its stack "{stack.stack_name}" is in it twice; it '
                    "is not one that was saved"
                )
            found[table.table_name] = stack, table
        stacks.add(stack.stack_name)
    return found


def _stack_proto(proto: Any, stack: StackedTableSpec, num_sc: int) -> Any:
    for name in ("stack_name", "stack_vocab_size", "stack_embedding_dim", "total_sample_count"):
        setattr(proto, name, getattr(stack, name))
    proto.max_ids_per_partition = stack.max_ids_per_partition
    proto.max_unique_ids_per_partition = stack.max_unique_ids_per_partition
    proto.num_sparsecores = num_sc
    # Readers from before there was this field stumble over it.
    if stack.activation_mem_bytes_limit != ACTIVATION_BYTES:
        proto.activation_mem_bytes_limit = stack.activation_mem_bytes_limit
    return proto


def _table_proto(proto: Any, table: TableSpec) -> Any:
    setting = table.setting_in_stack
    proto.table_name, proto.vocab_size, proto.combiner = table.name, table.vocabulary_size, table.combiner
    proto.embedding_dim = table.embedding_dim
    proto.max_ids_per_partition = table.max_ids_per_partition
    proto.max_unique_ids_per_partition = table.max_unique_ids_per_partition
    for name in ("padded_vocab_size", "padded_embedding_dim", "row_offset_in_shard", "shard_rotation"):
        setattr(proto, name, getattr(setting, name))
    proto.optimizer.CopyFrom(optimizer_to_proto(table.optimizer))
    return proto


def _feature_proto(proto: Any, feature: FeatureSpec) -> None:
    where = feature.id_transformation
    assert where is not None  # of a prepared feature
    proto.feature_name = feature.name
    proto.input_shape.extend(feature.input_shape)
    proto.output_shape.extend(feature.output_shape)
    proto.row_offset, proto.col_offset, proto.col_shift = where.row_offset, where.col_offset, where.col_shift


def _checked(kind: type, name: str, value: float) -> float:
    with np.errstate(over="ignore"):
        small = float(np.float32(value))
    if not np.isfinite(small) or (name == "stochastic_rounding" and small != value):
        raise ValueError(f"{kind.__name__}: {name}={value!r} is not a float32, which protos have; choose a smaller one")
    return small


def _decimal(value: float) -> float:
    return float(str(np.float32(value)))


def _tag(rate: Any) -> str:
    """Returns a name for a callable learning rate: two that differ have two, and one has one wherever it can."""
    given = getattr(rate, "tag", None)
    if given:
        return str(given)
    name = getattr(rate, "__qualname__", "")
    if not name:
        return f"{type(rate).__name__}_{id(rate)}"
    full = f"{getattr(rate, '__module__', '')}.{name}".lstrip(".")
    # Lambdas and functions made by functions share their names.
    return f"{full}_{id(rate)}" if "<" in name else full
