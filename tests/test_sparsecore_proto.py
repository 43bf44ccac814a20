"""Protos of SparseCore specifications: the same bytes as everybody else's, and optimizers that come back."""

import builtins
import functools

import jax
import pytest
from google.protobuf import text_format
from helpers import feature, table_spec

import embax
from embax.sparsecore import proto_messages
from embax.sparsecore.lib.nn import embedding, embedding_spec, table_stacking
from embax.sparsecore.lib.nn import embedding_proto_utils as protos
from embax.sparsecore.lib.proto import embedding_spec_pb2

OPTIMIZERS = [
    embedding_spec.SGDOptimizerSpec(0.01),
    embedding_spec.AdagradOptimizerSpec(0.3, initial_accumulator_value=0.7),
    embedding_spec.AdagradMomentumOptimizerSpec(
        0.1, momentum=0.8, beta2=0.9, epsilon=1e-7, exponent=3.0, use_nesterov=True, initial_momentum_value=0.25
    ),
    embedding_spec.AdamOptimizerSpec(1e-4, beta_1=0.85, beta_2=0.99, epsilon=1e-6),
    embedding_spec.LaPropOptimizerSpec(0.02, b1=0.8, b2=0.9, eps=1e-20, initial_slot_value=0.5),
    embedding_spec.FTRLOptimizerSpec(
        0.05, learning_rate_power=-0.6, l1_regularization_strength=0.1, beta=1.0, multiply_linear_by_learning_rate=True
    ),
    embedding_spec.F2AOptimizerSpec(0.015, rho=0.6, initial_local_step_value=1.0, max_lr_multiplier=1e5),
    embax.RowwiseAdagrad(0.2, initial_accumulator_value=0.3),
    embax.Adam(0.1, row_clip_norm=2.5, l2_weight_decay=0.01, decoupled_weight_decay=0.1, stochastic_rounding=7),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.short_name())
def test_optimizers_come_back(optimizer):
    proto = embedding.optimizer_spec_to_proto(optimizer)
    wire = type(proto).FromString(proto.SerializeToString())
    text = text_format.Parse(text_format.MessageToString(proto), type(proto)())
    assert embedding.proto_to_optimizer_spec(wire) == embedding.proto_to_optimizer_spec(text) == optimizer


def _schedule(step):
    return 0.1 / (1 + step)


class Tagged:
    tag = "warmup"

    def __call__(self, step):
        return step


def test_learning_rates():
    """A number is one to the last of its float32 digits; of a callable the name is left, and two differ."""
    for rate in (0.1, 1e-3, 1 / 3, 123456.7):
        back = embedding.proto_to_optimizer_spec(embedding.optimizer_spec_to_proto(embax.SGD(rate))).learning_rate
        assert back == pytest.approx(rate, rel=1e-7) and (back == rate) == (rate != 1 / 3)

    def tag(rate):
        proto = embedding.optimizer_spec_to_proto(embax.SGD(rate))
        assert proto.WhichOneof("learning_rate_spec") == "learning_rate_tag"
        back = embedding.proto_to_optimizer_spec(proto)
        assert back.learning_rate == embedding_spec.CallablePlaceholder(proto.learning_rate_tag)
        again = embedding.optimizer_spec_to_proto(back)
        assert again == proto
        with pytest.raises(RuntimeError, match="set learning_rate to the callable again"):
            back.get_learning_rate(0)
        return proto.learning_rate_tag

    assert tag(_schedule) == f"{__name__}._schedule" and tag(Tagged()) == "warmup"
    lambdas = [lambda step, k=k: k * step for k in (1.0, 2.0)]
    partials = [functools.partial(lambda k, step: k * step, k) for k in (1.0, 2.0)]
    assert tag(lambdas[0]) == tag(lambdas[0]) and len({*map(tag, lambdas), *map(tag, partials)}) == 4


def test_what_no_proto_says():
    class Mine(embax.SGD):
        pass

    with pytest.raises(ValueError, match="optimizer Mine has no name in protos, which know Adagrad, .* use one"):
        embedding.optimizer_spec_to_proto(Mine(0.1))
    custom = embedding_spec.CustomOptimizerSpec(0.1, lambda gradient, row, rate: row - rate * gradient)
    proto = embedding.optimizer_spec_to_proto(custom)
    assert proto.type == type(proto).CUSTOM == 7 and proto.learning_rate == pytest.approx(0.1)
    with pytest.raises(ValueError, match="of type CUSTOM, from which none can be made: a function is not data; make"):
        embedding.proto_to_optimizer_spec(proto)
    for number in (0, 12):
        with pytest.raises(ValueError, match="optimizer of type (OPTIMIZER_TYPE_UNSPECIFIED|12), from which"):
            embedding.proto_to_optimizer_spec(embedding_spec_pb2.OptimizerSpecProto(type=number))
    with pytest.raises(ValueError, match="Adam: stochastic_rounding=16777217 is not a float32"):
        embedding.optimizer_spec_to_proto(embax.Adam(0.1, stochastic_rounding=2**24 + 1))
    with pytest.raises(ValueError, match="Adam: epsilon=1e.60 is not a float32"):
        embedding.optimizer_spec_to_proto(embax.Adam(0.1, epsilon=1e60))
    assert embedding.optimizer_spec_to_proto(None) is None
    assert embedding.proto_to_optimizer_spec(None) == embax.SGD(0.0)
    types = [protos.get_optimizer_type(type(optimizer)) for optimizer in OPTIMIZERS]
    assert types == [1, 2, 6, 3, 7, 4, 5, 7, 3]
    assert protos.get_optimizer_class(3) is embax.Adam and protos.get_optimizer_class(7) is None


def _features():
    tables = {
        name: table_spec(name, rows, dim, optimizer=embax.Adagrad(0.5), combiner="mean")
        for name, rows, dim in (("a", 20, 5), ("b", 33, 8), ("c", 9, 3))
    }
    return {
        "x": feature(tables["a"], "x", (16, 2)),
        "y": feature(tables["b"], "y", (16, 1)),
        "z": feature(tables["a"], "z", (16, 3)),
        "w": feature(tables["c"], "w", (32, 1)),
    }


def test_features_on_the_wire():
    """Against text and bytes written by hand from the published field names and numbers."""
    features = _features()
    table_stacking.stack_tables(features, ["a", "b"], 2, 2)
    embedding.prepare_feature_specs_for_training(features, 2, 2)
    proto = embedding.create_proto_from_feature_specs(features, 2, 2)
    # Rows are padded to multiples of 32, a takes 8 of them on each SparseCore, and b is rotated by 2.
    expected = """
      stack_name: "a_b" stack_vocab_size: 96 stack_embedding_dim: 8 total_sample_count: 48
      max_ids_per_partition: 256 max_unique_ids_per_partition: 256 num_sparsecores: 4
      table_specs {
        table_name: "a" vocab_size: 20 embedding_dim: 5 max_ids_per_partition: 256 max_unique_ids_per_partition: 256
        padded_vocab_size: 32 padded_embedding_dim: 8 combiner: "mean"
        feature_specs { feature_name: "x" input_shape: [16, 2] output_shape: [16, 5] }
        feature_specs { feature_name: "z" input_shape: [16, 3] output_shape: [16, 5] row_offset: %d }
        optimizer { type: ADAGRAD learning_rate: 0.5 float_params { key: "initial_accumulator_value" value: 0.1 } }
      }
      table_specs {
        table_name: "b" vocab_size: 33 embedding_dim: 8 max_ids_per_partition: 256 max_unique_ids_per_partition: 256
        padded_vocab_size: 64 padded_embedding_dim: 8 row_offset_in_shard: 8 shard_rotation: 2 combiner: "mean"
        feature_specs {
          feature_name: "y" input_shape: [16, 1] output_shape: [16, 8] row_offset: %d col_offset: 32 col_shift: 2
        }
        optimizer { type: ADAGRAD learning_rate: 0.5 float_params { key: "initial_accumulator_value" value: 0.1 } }
      }"""
    offsets = features["z"].id_transformation.row_offset, features["y"].id_transformation.row_offset
    assert sorted(offsets) == [16, 32]
    wanted = text_format.Parse(expected % offsets, embedding_spec_pb2.StackedTableSpecProto())
    found = {stack.stack_name: stack for stack in proto.stacked_table_specs}
    assert found["a_b"] == wanted and set(found) == {"a_b", "c"}
    feature_proto = embedding_spec_pb2.FeatureSpecProto(feature_name="x", input_shape=[16, 2], row_offset=16)
    assert feature_proto.SerializeToString() == b"\x0a\x01x\x12\x02\x10\x02\x20\x10"
    table_proto = embedding_spec_pb2.TableSpecProto(table_name="a", shard_rotation=2, combiner="sum")
    table_proto.optimizer.bool_params["b"] = True
    table_proto.optimizer.float_params["f"] = 0.5
    optimizer = b"\x22\x08\x0a\x01f\x15\x00\x00\x00\x3f" + b"\x2a\x05\x0a\x01b\x10\x01"
    wire = b"\x0a\x01a\x50\x02\x62\x03sum\x6a" + bytes([len(optimizer)]) + optimizer
    assert type(table_proto).FromString(wire) == table_proto
    assert sorted(table_proto.SerializeToString()) == sorted(wire)
    assert proto == type(proto).FromString(proto.SerializeToString())


def test_a_limit_that_is_not_usual_is_told():
    features = _features()
    embedding.prepare_feature_specs_for_training(features, 1, 1)
    table = features["y"].table_spec
    table._stacked_table_spec = table.stacked_table_spec.replace(activation_mem_bytes_limit=4096)
    proto = embedding.create_proto_from_feature_specs(features, 1, 1)
    limits = {stack.stack_name: stack.activation_mem_bytes_limit for stack in proto.stacked_table_specs}
    assert limits == {"a": 0, "b": 4096, "c": 0}


def test_features_for_other_devices_are_refused():
    features = _features()
    with pytest.raises(ValueError, match='table "[abc]" is in no stack yet'):
        embedding.create_proto_from_feature_specs(features, 2, 2)
    embedding.prepare_feature_specs_for_training(features, 2, 2)
    with pytest.raises(
        ValueError, match="was made for 2 devices of 2 SparseCores, and this call is for 64 SparseCores; pass"
    ):
        embedding.create_proto_from_feature_specs(features, 16, 4)
    assert len(jax.devices()) != 4 or embedding.create_proto_from_feature_specs(features, None, 1)


def test_names_of_messages(monkeypatch):
    assert "EmbeddingSpecProto" in dir(embedding_spec_pb2)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        embedding_spec_pb2.Nothing  # noqa: B018
    known = builtins.__import__

    def without(name, *args):
        if name.startswith("google"):
            raise ImportError(name)
        return known(name, *args)

    proto_messages._pool.cache_clear()
    proto_messages.message_class.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=r"protobuf is not installed.*pip install 'embax\[checkpoint\]'"):
            embedding_spec_pb2.EmbeddingSpecProto()
    proto_messages._pool.cache_clear()
    proto_messages.message_class.cache_clear()
    assert embedding_spec_pb2.EmbeddingSpecProto().SerializeToString() == b""
