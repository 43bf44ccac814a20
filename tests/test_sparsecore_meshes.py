"""SparseCore tables over meshes of every kind, and calls for other SparseCores than the stacks were made for."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from embax.sparsecore.lib.flax.linen import embed as linen_embed
from embax.sparsecore.lib.flax.nnx import embed as nnx_embed
from embax.sparsecore.lib.nn import embedding, embedding_spec, table_stacking

pytestmark = pytest.mark.usefixtures("eight_devices")
ROWS, DIM, BATCH = 50, 8, 16


def _features(count=1, rows=ROWS):
    table = embedding_spec.TableSpec(
        name="t",
        vocabulary_size=rows,
        embedding_dim=DIM,
        initializer=jax.nn.initializers.normal(1.0),
        optimizer=embedding_spec.SGDOptimizerSpec(0.5),
        combiner="sum",
    )
    return [
        embedding_spec.FeatureSpec(name=f"f{i}", table_spec=table, input_shape=(BATCH, 3), output_shape=(BATCH, DIM))
        for i in range(count)
    ]


def _ids(features):
    return [np.random.default_rng(i).integers(0, ROWS, (BATCH, 3)) for i in range(len(features))]


def _mesh(shape, names, kind=AxisType.Auto):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


# Both axes in the mesh's order and in the other; one of two that are of one length; Explicit ones.
MESHES = [
    ((4, 2), ("a", "b"), ("a", "b"), AxisType.Auto),
    ((4, 2), ("a", "b"), ("b", "a"), AxisType.Auto),
    ((2, 2), ("a", "b"), "a", AxisType.Auto),
    ((2, 2), ("a", "b"), "b", AxisType.Auto),
    ((4,), ("a",), "a", AxisType.Explicit),
]


@pytest.mark.parametrize("shape, names, axis, kind", MESHES)
@pytest.mark.parametrize("flax", ["nnx", "linen"])
def test_a_layer_over_any_mesh(shape, names, axis, kind, flax):
    """The activations are sums of the table's rows, and the update is a step of SGD with their gradient."""
    mesh, features = _mesh(shape, names, kind), _features()
    shards = int(np.prod([mesh.shape[a] for a in axis]))
    if flax == "nnx":
        layer = nnx_embed.SparseCoreEmbed(features, axis, mesh, nnx.Rngs(0))
        variables, params = layer.embedding_table.get_value(), layer
    else:
        layer = linen_embed.SparseCoreEmbed(features, axis, mesh)
        params = nn.unbox(layer.init(jax.random.key(0), layer.preprocess_inputs(0, _ids(features))))
        variables = params["params"][linen_embed.EMBEDDING_PARAM_NAME]
    inputs, _ = embedding.preprocess_sparse_dense_matmul_input(_ids(features), None, features, shards, shards)

    def loss(params):
        found = layer.apply(params, inputs) if flax == "linen" else params(inputs)
        return (found[0] ** 2).sum(), found[0]

    # JAX asks for the mesh around a program whose arrays have it in their types.
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        gradient = nnx.value_and_grad if flax == "nnx" else jax.value_and_grad
        (_, found), new = gradient(loss, has_aux=True)(params)
    new = new["embedding_table"].get_value() if flax == "nnx" else new["params"][linen_embed.EMBEDDING_PARAM_NAME]
    tables = embedding.get_table_specs(features)
    before, after = (
        np.asarray(table_stacking.unshard_and_unstack_tables(tables, v, shards)["t"].table, np.float64)
        for v in (variables, new)
    )
    (ids,) = _ids(features)
    wanted = before[ids].sum(1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    stepped = before.copy()
    np.add.at(stepped, ids, -0.5 * 2 * wanted[:, None])
    np.testing.assert_allclose(after, stepped, rtol=1e-5, atol=1e-4)


def test_tables_inside_of_an_explicit_mesh():
    mesh, features = _mesh((4,), ("x",), AxisType.Explicit), _features()
    embedding.prepare_feature_specs_for_training(features, 4, 1)
    tables = embedding.get_table_specs(features)
    made = embedding.init_embedding_variables(jax.random.key(0), tables, NamedSharding(mesh, P("x", None)), 1)
    outside = table_stacking.unshard_and_unstack_tables(tables, made, 4)
    with jax.set_mesh(mesh):
        inside = table_stacking.unshard_and_unstack_tables(tables, made, 4)
        again = table_stacking.stack_and_shard_tables(tables, inside, 4)
    np.testing.assert_array_equal(inside["t"].table, outside["t"].table)
    np.testing.assert_array_equal(again["t"].table, made["t"].table)


def test_primitives_name_axes_in_the_meshs_order():
    mesh, features = _mesh((4, 2), ("a", "b")), _features()
    embedding.prepare_feature_specs_for_training(features, 8, 1)
    tables = embedding.get_table_specs(features)
    with pytest.raises(ValueError, match=r"names axes in another order than the mesh, \('a', 'b'\); name them in the"):
        embedding.init_embedding_variables(jax.random.key(0), tables, NamedSharding(mesh, P(("b", "a"), None)), 1)
    with pytest.raises(ValueError, match="the mesh has other devices than the first of jax.devices.*bypass_mesh_check"):
        other = Mesh(np.array(jax.devices()[::-1]), ("x",))
        embedding.init_embedding_variables(jax.random.key(0), tables, NamedSharding(other, P("x", None)), 1)


@pytest.mark.parametrize("given", [(2, 1), (2, 4), (4, 1), (1, 4)])
def test_other_sparsecores_are_refused_everywhere(given):
    """Some of these have rows of the same number, or SparseCores, and would look where others lie."""
    features = _features(2)
    embedding.prepare_feature_specs_for_training(features, 2, 2)
    tables, mesh = embedding.get_table_specs(features), _mesh(given[:1], ("x",))
    split, shared = P("x"), {"feature_specs": features, "global_device_count": given[0], "num_sc_per_device": given[1]}
    plural = ["s" * (count != 1) for count in given]
    rule = (
        'stack "t" was made for 2 devices of 2 SparseCores, and this call is for '
        f"{given[0]} device{plural[0]} of {given[1]} SparseCore{plural[1]};"
    )
    with pytest.raises(ValueError, match=rule):
        sharding = NamedSharding(mesh, P("x", None))
        embedding.init_embedding_variables(jax.random.key(0), tables, sharding, given[1])
    with pytest.raises(ValueError, match=rule):
        embedding.preprocess_sparse_dense_matmul_input(
            _ids(features), None, features, given[0], given[0], num_sc_per_device=given[1]
        )
    inputs, _ = embedding.preprocess_sparse_dense_matmul_input(
        _ids(features), None, features, 2, 2, num_sc_per_device=2
    )
    variables = {"t": embedding.EmbeddingVariables(jnp.ones((64, DIM)), ())}
    gradients = [jnp.ones((BATCH, DIM))] * 2

    def look(inputs, variables):
        return embedding.tpu_sparse_dense_matmul(inputs, variables, **shared)

    def step(gradients, inputs, variables):
        return embedding.tpu_sparse_dense_matmul_grad(gradients, inputs, variables, **shared)

    for function, args in ((look, (inputs, variables)), (step, (gradients, inputs, variables))):
        with pytest.raises(ValueError, match=rule):
            jax.eval_shape(jax.shard_map(function, mesh=_mesh((2,), ("x",)), in_specs=split, out_specs=split), *args)
    if given[0] * given[1] != 4:
        with pytest.raises(ValueError, match='table "t" was stacked to have 64 rows|stack "t" was made for 2 devices'):
            table_stacking.unshard_and_unstack_tables(tables, variables, given[0] * given[1])


def test_a_lookup_has_no_derivative_and_says_so():
    features = _features()
    embedding.prepare_feature_specs_for_training(features, 1, 1)
    inputs, _ = embedding.preprocess_sparse_dense_matmul_input(_ids(features), None, features, 1, 1)
    variables = {"t": embedding.EmbeddingVariables(jnp.ones((56, DIM)), ())}

    def loss(variables, scale):
        found = embedding.tpu_sparse_dense_matmul(inputs, variables, features, global_device_count=1)
        return (scale * found[0]).sum()

    for function in (loss, jax.jit(loss)):
        with pytest.raises(TypeError, match='stack "t": tpu_sparse_dense_matmul has no derivative.*_matmul_grad'):
            jax.grad(function)(variables, 2.0)
        # What is beside it has one, and so has a loss that holds the tables still.
        assert jax.grad(function, 1)(variables, 2.0) == BATCH * 3 * DIM
        still = jax.grad(lambda v, s, f=function: f(jax.lax.stop_gradient(v), s))(variables, 2.0)
        assert not still["t"].table.any()


def test_rows_that_32_bits_do_not_number():
    (feature,) = _features(rows=2**31 - 10)
    with pytest.raises(ValueError, match='stack "t": 2147483648 rows with padding, and at most 2147483646 are'):
        embedding.prepare_feature_specs_for_training(feature, 1, 4)
    assert not feature.table_spec.is_stacked()
    both = _features(rows=2**30 + 5) + _features(rows=2**30 + 5)
    both[1].name, both[1].table_spec.name = "other", "u"
    embedding.auto_stack_tables(both, 1, 1)
    assert set(embedding.get_stacked_table_specs(both)) == {"t", "u"}


@pytest.mark.parametrize(
    "limits, text",
    [
        ((0.5, -0.5), r"\(0.5, -0.5\) of stack 't' has its low end above its high end; exchange them"),
        ({"nope": (0, 1)}, r"\(0, 1\) of stack 'nope': the features have stacks \['t'\]; name these"),
        ((1,), r"\(1,\) of stack 't' must be \(low, high\), of numbers; either may be None"),
        ("x", "'x' of stack 't' must be"),
        (5, "5 of stack 't' must be"),
    ],
)
def test_limits_that_are_none(limits, text):
    features = _features()
    embedding.prepare_feature_specs_for_training(features, 1, 1)
    inputs, _ = embedding.preprocess_sparse_dense_matmul_input(_ids(features), None, features, 1, 1)
    variables = {"t": embedding.EmbeddingVariables(jnp.ones((56, DIM)), ())}
    with pytest.raises(ValueError, match=f"embedding_var_limits: {text}"):
        embedding.tpu_sparse_dense_matmul_grad(
            [jnp.ones((BATCH, DIM))], inputs, variables, features, global_device_count=1, embedding_var_limits=limits
        )
