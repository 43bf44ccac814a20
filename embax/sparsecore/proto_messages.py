"""The messages in which SparseCore checkpoints describe their tables, made when they are first asked for.

They are made from the description below and not from generated code, which would be bound to one version of protobuf,
and in a pool of their own, so that another library may have messages of the same names.
"""

import functools
from typing import Any

PACKAGE = "third_party.py.jax_tpu_embedding.sparsecore_lib_proto"

OPTIMIZER_TYPES = ("OPTIMIZER_TYPE_UNSPECIFIED", "SGD", "ADAGRAD", "ADAM", "FTRL", "F2A", "ADAGRAD_MOMENTUM", "CUSTOM")

# "type name number", * for repeated, ? for optional, a fourth word for the oneof.
_FIELDS = {
    "FeatureSpecProto": """
        string feature_name 1, int64* input_shape 2, int64* output_shape 3, int64 row_offset 4, int64 col_offset 5,
        int64 col_shift 6""",
    "OptimizerSpecProto": """
        OptimizerSpecProto.OptimizerType type 1, float learning_rate 2 learning_rate_spec,
        string learning_rate_tag 3 learning_rate_spec, map:float float_params 4, map:bool bool_params 5""",
    "TableSpecProto": """
        string table_name 1, int64 vocab_size 2, int64 embedding_dim 3, int64 max_ids_per_partition 5,
        int64 max_unique_ids_per_partition 6, int64 padded_vocab_size 7, int64 padded_embedding_dim 8,
        int64 row_offset_in_shard 9, int64 shard_rotation 10, FeatureSpecProto* feature_specs 11, string combiner 12,
        OptimizerSpecProto optimizer 13""",
    "StackedTableSpecProto": """
        string stack_name 1, int64 stack_vocab_size 2, int64 stack_embedding_dim 3, int64 total_sample_count 6,
        int64 max_ids_per_partition 7, int64 max_unique_ids_per_partition 8, int64 num_sparsecores 9,
        TableSpecProto* table_specs 10, int64? activation_mem_bytes_limit 11""",
    "EmbeddingSpecProto": "StackedTableSpecProto* stacked_table_specs 1",
}

MESSAGES = tuple(_FIELDS)


@functools.cache
def message_class(name: str) -> Any:
    """Returns the class of a message.

    >>> stack = message_class("StackedTableSpecProto")(stack_name="a_b", num_sparsecores=8)
    >>> stack.SerializeToString().hex()
    '0a03615f624808'
    """
    factory, pool = _pool()
    return factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


@functools.cache
def _pool() -> tuple[Any, Any]:
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise ImportError(
            "protobuf is not installed, and protos of specifications need it: pip install 'embax[checkpoint]'"
        ) from error
    file = descriptor_pb2.FileDescriptorProto(name="embax/embedding_spec.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        if name == "OptimizerSpecProto":
            kinds = message.enum_type.add(name="OptimizerType")
            for number, kind in enumerate(OPTIMIZER_TYPES):
                kinds.value.add(name=kind, number=number)
        for field in fields.split(","):
            _add_field(message, *field.split())
        # protobuf wants what it makes of "optional" behind every other oneof.
        for field in message.field:
            if field.proto3_optional:
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field.name}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory, pool


def _add_field(message: Any, kind: str, name: str, number: str, oneof: str | None = None) -> None:
    entry = kind.startswith("map:")
    repeated = entry or kind.endswith("*")
    field = message.field.add(name=name, number=int(number), label="LABEL_REPEATED" if repeated else "LABEL_OPTIONAL")
    field.proto3_optional = kind.endswith("?")
    if entry:
        kind_of_value, kind = kind.removeprefix("map:"), f"{message.name}.{name.title().replace('_', '')}Entry"
        pair = message.nested_type.add(name=kind.rpartition(".")[2])
        pair.options.map_entry = True
        _add_field(pair, "string", "key", "1")
        _add_field(pair, kind_of_value, "value", "2")
    kind = kind.rstrip("*?")
    if kind[0].isupper():
        field.type = "TYPE_ENUM" if kind.endswith("Type") else "TYPE_MESSAGE"
        field.type_name = f".{PACKAGE}.{kind}"
    else:
        field.type = f"TYPE_{kind.upper()}"
    if oneof is not None:
        if oneof not in [one.name for one in message.oneof_decl]:
            message.oneof_decl.add(name=oneof)
        field.oneof_index = [one.name for one in message.oneof_decl].index(oneof)
