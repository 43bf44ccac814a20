"""The SparseCore layers and FDO clients: training by them is training by the primitives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import line_of
from jax.sharding import PartitionSpec as P

import embax
from embax.sparsecore.lib.fdo import csv_file_fdo_client, file_fdo_client
from embax.sparsecore.lib.flax.linen import embed as linen_embed
from embax.sparsecore.lib.flax.linen import embed_optimizer
from embax.sparsecore.lib.flax.nnx import embed as nnx_embed
from embax.sparsecore.lib.nn import embedding, embedding_spec

pytestmark = pytest.mark.usefixtures("eight_devices")
BATCH, DIM, STEPS = 16, 8, 4


def _features():
    optimizers = {"a": embedding_spec.AdamOptimizerSpec(0.1), "b": embedding_spec.AdagradOptimizerSpec(_rate)}
    tables = {
        name: embedding_spec.TableSpec(
            name=name,
            vocabulary_size=40,
            embedding_dim=DIM,
            initializer=jax.nn.initializers.normal(1.0),
            optimizer=optimizer,
            combiner="mean",
        )
        for name, optimizer in optimizers.items()
    }
    return {
        name: embedding_spec.FeatureSpec(name=name, table_spec=table, input_shape=(BATCH, 3), output_shape=(BATCH, DIM))
        for name, table in tables.items()
    }


def _rate(step):
    return 0.1 / (1.0 + jnp.asarray(step, jnp.float32))


def _ids(number):
    rng = np.random.default_rng(number)
    return {name: rng.integers(0, 40, (BATCH, 3)) for name in "ab"}


def _labels(number):
    return np.random.default_rng(100 + number).normal(size=BATCH).astype(np.float32)


def _by_the_core():
    """Returns the losses of a dense layer over the sum of both features, trained by embax itself."""
    plan = embax.plan(_features())
    kernel = jnp.full((DIM, 1), 0.1)
    tables, losses = embax.init(plan, jax.random.key(0)), []
    for number in range(STEPS):
        activations, residuals = embax.lookup(plan, tables, embax.preprocess(plan, _ids(number)))

        def loss_of(activations, kernel, number=number):
            return _loss((activations["a"] + activations["b"]) @ kernel, _labels(number))

        loss, gradients = jax.value_and_grad(loss_of, (0, 1))(activations, kernel)
        tables = embax.update(plan, tables, residuals, gradients[0], step=number)
        kernel = kernel - 0.1 * gradients[1]
        losses.append(float(loss))
    return losses, embax.to_arrays(plan, tables)


def _loss(out, labels):
    return jnp.mean((out[:, 0] - labels) ** 2)


def _check(losses, variables, devices):
    wanted, arrays = _by_the_core()
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)
    for name, parts in variables.items():
        order = _order(devices)
        np.testing.assert_allclose(np.asarray(parts[0])[order], arrays[name]["table"], rtol=3e-5, atol=3e-6)


def _order(devices):
    rows = -(-40 // (8 * devices)) * 8 * devices
    return [(i % devices) * (rows // devices) + i // devices for i in range(40)]


class NNXModel(nnx.Module):
    def __init__(self, mesh):
        # The key of embax.init: a stream gives folded ones.
        self.embed = nnx_embed.SparseCoreEmbed(_features(), "x", mesh, _Key())
        self.kernel = nnx.Param(jnp.full((DIM, 1), 0.1))

    def __call__(self, inputs, step):
        found = self.embed(inputs, step)
        return (found["a"] + found["b"]) @ self.kernel[...]


class _Key:
    def params(self):
        return jax.random.key(0)


@pytest.mark.parametrize("devices", [1, 4])
def test_nnx(devices):
    mesh = line_of(devices)
    model = NNXModel(mesh)
    optimizer = nnx_embed.PartitionedOptimizer(model, optax.sgd(0.1))

    @nnx.jit
    def train(model, optimizer, inputs, labels, step):
        loss, grads = nnx.value_and_grad(lambda model: _loss(model(inputs, step), labels))(model)
        optimizer.update(model, grads)
        return loss

    losses = []
    for number in range(STEPS):
        inputs, _ = embedding.preprocess_sparse_dense_matmul_input(
            _ids(number), None, model.embed.door.feature_specs, devices, devices
        )
        losses.append(float(train(model, optimizer, inputs, _labels(number), jnp.int32(number))))
    _check(losses, model.embed.embedding_table.get_value(), devices)
    sharding = nnx_embed.get_named_sharding(model, mesh)
    assert [one.spec for one in sharding.shardings] == [P("x", None), P()]
    placed = nnx.jit(
        lambda model, inputs: model(inputs, 0), in_shardings=(sharding, jax.sharding.NamedSharding(mesh, P("x")))
    )(model, inputs)
    np.testing.assert_allclose(placed, model(inputs, 0), rtol=1e-6)
    updated = nnx_embed.embedding_lookup_bwd(
        (model.embed, inputs), {name: jnp.ones((BATCH, DIM)) for name in "ab"}, jnp.int32(0)
    )
    assert (updated["a"].table != model.embed.embedding_table.get_value()["a"].table).any()


class LinenModel(nn.Module):
    mesh: jax.sharding.Mesh
    features: dict

    def setup(self):
        self.embed = linen_embed.SparseCoreEmbed(self.features, "x", self.mesh)
        self.kernel = self.param("kernel", lambda _: jnp.full((DIM, 1), 0.1))

    def __call__(self, inputs, step):
        found = self.embed(inputs, step)
        return (found["a"] + found["b"]) @ self.kernel


@pytest.mark.parametrize("devices", [1, 4])
def test_linen(devices):
    mesh, features = line_of(devices), _features()
    model = LinenModel(mesh, features)
    layer = linen_embed.SparseCoreEmbed(features, "x", mesh)
    params = nn.unbox(model.init(jax.random.key(0), layer.preprocess_inputs(0, _ids(0)), 0)["params"])
    # Of the same first rows as the core's, whatever key the layer was given.
    params["embed"][linen_embed.EMBEDDING_PARAM_NAME] = embedding.init_embedding_variables(
        jax.random.key(0), embedding.get_table_specs(features), jax.sharding.NamedSharding(mesh, P("x", None)), 1
    )
    optimizer = embed_optimizer.create_optimizer_for_sc_model(params, optax.sgd(0.1))
    state = optimizer.init(params)

    @jax.jit
    def train(params, state, inputs, labels, step):
        loss, grads = jax.value_and_grad(lambda p: _loss(model.apply({"params": p}, inputs, step), labels))(params)
        updates, state = optimizer.update(grads, state, params)
        return loss, embed_optimizer.apply_updates_for_sc_model(params, updates), state

    losses = []
    for number in range(STEPS):
        inputs = layer.preprocess_inputs(number, _ids(number))
        loss, params, state = train(params, state, inputs, _labels(number), jnp.int32(number))
        losses.append(float(loss))
    _check(losses, params["embed"][linen_embed.EMBEDDING_PARAM_NAME], devices)
    (path,) = layer.apply(
        {"params": params["embed"]}, {name: jnp.ones((BATCH, DIM)) for name in "ab"}, inputs, 0, method="apply_gradient"
    )
    assert path == "sc_embedding_variables"


CLIENTS = [file_fdo_client.NPZFileFDOClient, csv_file_fdo_client.CSVFileFDOClient]


def _statistics(*ids):
    return embedding.SparseDenseMatmulInputStats(
        {"t": np.array(ids), "t_max": np.array([1])}, {"t": np.array(ids) - 1, "t_max": np.array([1])}
    )


@pytest.mark.parametrize("client", CLIENTS)
def test_statistics_come_back(tmp_path, client, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there are no statistics fdo_stats_"):
        client(tmp_path / "nothing").load()
    first = client(tmp_path)
    first.record(_statistics(3, 9))
    first.publish()
    first.record(_statistics(5, 1))
    first.publish()
    found = client(tmp_path).load()
    assert found.max_ids_per_partition["t"].tolist() == [5, 9]
    assert found.max_unique_ids_per_partition["t"].tolist() == [4, 8]
    assert found.max_ids_per_partition["t_max"].tolist() == [1]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    second = client(tmp_path)
    second.record({"max_ids_per_partition": {"t": [1, 2, 30]}, "max_unique_ids_per_partition": {"t": [1, 2, 3]}})
    second.publish()
    found = client(tmp_path).load()
    assert found.max_ids_per_partition["t"].tolist() == [5, 9, 30]  # of all processes, other widths too
    with pytest.raises(ValueError, match="record: the statistics have no max_ids_per_partition; give what prepro"):
        first.record({})
    (tmp_path / f"fdo_stats_2_1.{'npz' if client is CLIENTS[0] else 'csv'}").touch()
    np.savez(tmp_path / "fdo_stats_2_1.npz", other=np.ones(3))
    (tmp_path / "fdo_stats_2_1.csv").write_text("key,values\nother,1 1\n")
    with pytest.raises(ValueError, match="column 'other' does not end in one of _max_ids"):
        client(tmp_path).load()


def test_one_record_and_the_largest(tmp_path):
    client = csv_file_fdo_client.CSVFileFDOClient(tmp_path, retain_history=False)
    client.record(_statistics(7))
    client.record(_statistics(2))
    client.publish()
    (path,) = tmp_path.iterdir()
    assert path.read_text().splitlines()[:2] == ["key,values", "t_max_ids,7"]
    assert client.load().max_ids_per_partition["t"].tolist() == [7]


def test_stacks_for_other_cores_are_refused():
    features = [_features()["a"], _features()["b"]]
    features[1].table_spec.optimizer = features[0].table_spec.optimizer
    embedding.auto_stack_tables(features, 1, 4)
    assert features[0].table_spec.stacked_table_spec.stack_name == "a_b"
    ids = list(_ids(0).values())
    with pytest.raises(ValueError, match='stack "a_b" was made for 1 device of 4 SparseCores, and this'):
        embedding.preprocess_sparse_dense_matmul_input(ids, None, features, 1, 1, num_sc_per_device=1)
    embedding.preprocess_sparse_dense_matmul_input(ids, None, features, 1, 1, num_sc_per_device=4)


def test_a_mesh_of_two_axes():
    """Split along one axis, the same along the other: the number of devices says which."""
    mesh, features = jax.make_mesh((2, 4), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2), _features()
    layer = linen_embed.SparseCoreEmbed(features, "m", mesh)
    inputs = layer.preprocess_inputs(0, _ids(0))
    params = layer.init(jax.random.key(0), inputs)
    found = layer.apply(params, inputs)
    alone = linen_embed.SparseCoreEmbed(_features(), "x", line_of(4))
    wanted = alone.apply(jax.device_get(nn.unbox(params)), alone.preprocess_inputs(0, _ids(0)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
