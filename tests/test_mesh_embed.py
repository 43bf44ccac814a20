"""Tables of their own on a mesh: Embed, Table.on_mesh and take give what they give on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import line_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import embax
import embax.linen
import embax.nnx

ROWS, DIM = 13, 8  # 13 rows on 4 devices: 4 4 4 1, filled up to 16
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
INIT = jax.nn.initializers.normal(0.37)

pytestmark = pytest.mark.usefixtures("eight_devices")


def _explicit():
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    return embax.Devices(mesh, batch_axes="d", table_axes=("m", "d"))


MESHES = {
    "four": lambda: line_of(4),
    "eight": lambda: embax.Devices(line_of(8), exchange="route"),
    "explicit": _explicit,
}


def _batches():
    """Batches that the devices divide and that they do not; ids from the end, and ids that are none."""
    rng = np.random.default_rng(3)
    shapes = ((16, 3), (7,), (8, 2, 2))
    return [rng.integers(-ROWS, ROWS, shape).astype(np.int32) for shape in shapes]


def _loss(activations):
    return jnp.dot(jnp.sin(activations), jnp.arange(1.0, DIM + 1)).sum()


def _train_nnx(door="value_and_grad", **settings):
    layer = embax.nnx.Embed(ROWS, DIM, optimizer=embax.Adagrad(0.3), embedding_init=INIT, rngs=nnx.Rngs(0), **settings)
    optimizer = embax.nnx.Optimizer(layer, optax.sgd(0.1), max_norm=1.0)

    @nnx.jit
    def step(layer, optimizer, ids):
        if door == "value_and_grad":
            loss, gradients = embax.nnx.value_and_grad(lambda layer: _loss(layer(ids)))(layer)
        else:
            small = embax.nnx.prefetch(layer, ids)
            loss, gradients = nnx.value_and_grad(lambda layer: _loss(layer(ids)))(small)
            gradients = embax.nnx.row_gradients(small, gradients)
        optimizer.update(layer, gradients)
        return loss

    losses = [float(step(layer, optimizer, ids)) for ids in _batches()[:2]]
    return losses, layer


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("placement", ["block", "column", "replicated"])
def test_nnx(mesh, placement):
    devices = MESHES[mesh]()
    wanted, alone = _train_nnx()
    with jax.set_mesh(devices.mesh if isinstance(devices, embax.Devices) else devices):
        found, layer = _train_nnx(mesh=devices, placement=placement)
    np.testing.assert_allclose(found, wanted, **TOLERANCE)
    rows = np.asarray(layer.embedding.get_value())
    np.testing.assert_allclose(rows[:ROWS], np.asarray(alone.embedding.get_value()), **TOLERANCE)
    assert not rows[ROWS:].any()


@pytest.mark.parametrize("placement", ["block", "column"])
def test_nnx_prefetched(placement):
    wanted, alone = _train_nnx("prefetch")
    found, layer = _train_nnx("prefetch", mesh=line_of(4), placement=placement)
    np.testing.assert_allclose(found, wanted, **TOLERANCE)
    rows = np.asarray(layer.embedding.get_value())[:ROWS]
    np.testing.assert_allclose(rows, np.asarray(alone.embedding.get_value()), **TOLERANCE)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("placement", ["block", "column", "replicated"])
def test_rows_and_products(mesh, placement):
    """Initial values, lookups of any shape, attend: to the bit where nothing is summed."""
    devices = MESHES[mesh]()
    settings = {"optimizer": embax.SGD(0.1), "embedding_init": INIT}
    alone = embax.nnx.Embed(ROWS, DIM, rngs=nnx.Rngs(0), **settings)
    layer = embax.nnx.Embed(ROWS, DIM, rngs=nnx.Rngs(0), mesh=devices, placement=placement, **settings)
    query = np.random.default_rng(0).normal(size=(4, 3, DIM)).astype(np.float32)
    for ids in (*_batches(), np.int32(-1), np.zeros((0, 3), np.int32), np.array([ROWS, -ROWS - 1, 2, ROWS + 2])):
        np.testing.assert_array_equal(np.asarray(layer(jnp.asarray(ids))), np.asarray(alone(jnp.asarray(ids))))
    np.testing.assert_allclose(layer.attend(query), alone.attend(query), **TOLERANCE)
    candidates = jnp.array([2, 12, 0])
    np.testing.assert_allclose(
        layer.attend(query, candidates=candidates), alone.attend(query, candidates=candidates), **TOLERANCE
    )


def test_each_device_has_its_part():
    layer = embax.nnx.Embed(ROWS, DIM, optimizer=embax.SGD(0.1), rngs=nnx.Rngs(0), mesh=line_of(4))
    assert {shard.data.shape for shard in layer.embedding.get_value().addressable_shards} == {(4, DIM)}
    assert layer.attend(jnp.ones((2, DIM))).shape == (2, ROWS)


@pytest.mark.parametrize("placement", ["block", "column"])
def test_linen(placement):
    def train(**settings):
        layer = embax.linen.Embed(ROWS, DIM, optimizer=embax.RowwiseAdagrad(0.3), embedding_init=INIT, **settings)
        params = layer.init(jax.random.key(0), _batches()[0])["params"]
        state = embax.linen.TrainState.create(apply_fn=layer.apply, params=params, tx=optax.sgd(0.1))

        @jax.jit
        def step(state, ids):
            loss_fn = embax.linen.value_and_grad(lambda params: _loss(layer.apply({"params": params}, ids)))
            loss, gradients = loss_fn(state.params)
            return state.apply_gradients(grads=gradients), loss

        losses = []
        for ids in _batches()[:2]:
            state, loss = step(state, ids)
            losses.append(float(loss))
        query = np.ones((2, DIM), np.float32)
        attended = layer.apply({"params": state.params}, query, method="attend")
        return losses, np.asarray(state.params["embedding"].value)[:ROWS], attended

    for found, wanted in zip(train(mesh=line_of(4), placement=placement), train(), strict=True):
        np.testing.assert_allclose(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("placement", ["block", "replicated"])
def test_tables_in_a_pytree(placement):
    """Table.on_mesh, embax.take, vmap over ids, and the plain door."""
    values = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    alone = {"word": embax.Table(jnp.asarray(values), embax.Adam(0.1)), "scale": jnp.float32(2.0)}
    meshed = {**alone, "word": embax.Table(values, embax.Adam(0.1)).on_mesh(line_of(4), placement)}

    @jax.jit
    def step(params, ids):
        def loss_fn(params):
            rows = jax.vmap(jax.vmap(lambda ids: embax.take(params["word"], ids), in_axes=1, out_axes=1))(ids)
            return _loss(rows * params["scale"])

        loss, gradients = embax.value_and_grad(loss_fn)(params)
        gradient = gradients["word"].to_dense()[:ROWS]
        return loss, gradient, gradients["scale"], embax.take(params["word"], ids)

    ids = _batches()[2]
    for found, wanted in zip(step(meshed, ids), step(alone, ids), strict=True):
        np.testing.assert_allclose(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("placement", ["block", "column"])
def test_inside_of_a_shard_map(placement):
    values = np.random.default_rng(1).normal(size=(16, DIM)).astype(np.float32)
    word = embax.Table(values, embax.SGD(0.1)).on_mesh(line_of(4), placement)
    ids = _batches()[0]
    spec = P("x", None) if placement == "block" else P(None, "x")
    run = jax.shard_map(
        lambda word, ids: word[ids], mesh=line_of(4), in_specs=(spec, P("x")), out_specs=P("x"), check_vma=False
    )
    np.testing.assert_array_equal(np.asarray(run(word, ids)), values[ids])


@pytest.mark.parametrize("placement", ["block", "column"])
def test_a_donated_step_copies_no_table(placement):
    rows, where = 16_384, {"mesh": line_of(4), "placement": placement}
    layer = embax.nnx.Embed(rows, DIM, optimizer=embax.Adagrad(0.3), rngs=nnx.Rngs(0), **where)
    optimizer = embax.nnx.Optimizer(layer, optax.sgd(0.1), max_norm=1.0)
    ids = np.random.default_rng(0).integers(0, rows, (64, 4)).astype(np.int32)

    def step(layer, optimizer, ids):
        _, gradients = embax.nnx.value_and_grad(lambda layer: _loss(layer(ids)))(layer)
        optimizer.update(layer, gradients)

    report = embax.check_step(nnx.jit(step, donate_argnums=(0, 1)), layer, optimizer, ids)
    assert report.ok, str(report)
    assert not embax.check_step(nnx.jit(step), layer, optimizer, ids).ok


@pytest.mark.parametrize("placement", ["block", "column", "replicated"])
def test_a_jit_that_only_closes_over_the_table(placement):
    """An evaluation step: the table may be a constant of it, an array of the host, or only its shape."""
    values = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    word = embax.Table(values, embax.SGD(0.1)).on_mesh(line_of(4), placement)
    for ids in (np.arange(8), np.int32(3), np.arange(3)):
        np.testing.assert_array_equal(jax.jit(lambda ids: word[ids])(ids), values[ids])
        host = word.with_value(np.asarray(word.value))
        np.testing.assert_array_equal(jax.jit(lambda table, ids: table[ids])(host, ids), values[ids])
        shape = word.with_value(jax.ShapeDtypeStruct(word.shape, word.dtype))
        assert jax.jit(lambda table, ids: table[ids]).lower(shape, ids).compile() is not None


@pytest.mark.parametrize("placement", ["block", "replicated"])
def test_values_of_another_mesh_are_refused(placement):
    table = embax.Table(np.ones((1003, 2), np.float32), embax.SGD(0.1), "word")
    four = table.on_mesh(line_of(4), placement)
    for rows in (1008, 900, 1003 if placement == "block" else 1004):
        with pytest.raises(ValueError, match=rf'table "word": the value has shape \[{rows}, 2\], and on Home\('):
            four.with_value(np.ones((rows, 2), np.float32))[np.arange(3)]
    back = table.on_mesh(line_of(8), placement).off_mesh()
    assert back.home is None and back.shape == (1003, 2)
    with pytest.raises(
        ValueError, match='table "word" .*: off_mesh takes a table that on_mesh or an Embed has put on a'
    ):
        back.off_mesh()


def test_another_optimizer():
    table = embax.Table(np.ones((8, 2), np.float32), embax.SGD(0.1)).on_mesh(line_of(4))
    other = dataclasses.replace(table, optimizer=embax.Adagrad(1.0))
    assert other.home.stack.optimizer == embax.Adagrad(1.0)
    assert type(other.home.fresh_slots()).__name__ == "AdagradSlotVariables"


def test_ids_split_along_another_dimension():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    word = embax.Table(np.arange(16.0, dtype=np.float32).reshape(8, 2), embax.SGD(0.1)).on_mesh(mesh)
    ids = jax.device_put(jnp.arange(32).reshape(8, 4) % 8, jax.NamedSharding(mesh, P(None, "x")))
    np.testing.assert_array_equal(np.asarray(word[ids])[..., 0], 2.0 * np.asarray(ids))


@pytest.mark.parametrize("init", ["glorot_normal", "he_normal", "lecun_uniform"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_initial_values_to_the_bit(init, dtype):
    made = [
        embax.nnx.Embed(
            1003,
            16,
            optimizer=embax.SGD(0.1),
            param_dtype=dtype,
            embedding_init=getattr(jax.nn.initializers, init)(),
            rngs=nnx.Rngs(0),
            **where,
        ).embedding.get_value()
        for where in ({}, {"mesh": line_of(4)})
    ]
    np.testing.assert_array_equal(np.asarray(made[1])[:1003], np.asarray(made[0]))


@pytest.mark.parametrize("batch_axes", ["d", ("d", "m")])
def test_products_stay_split(batch_axes):
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Auto, AxisType.Auto))
    devices = embax.Devices(mesh, batch_axes=batch_axes, table_axes="m")
    query = jax.device_put(np.ones((6, DIM), np.float32), jax.NamedSharding(mesh, P("d")))
    for placement in ("block", "column"):
        layer = embax.nnx.Embed(16, DIM, optimizer=embax.SGD(0.1), rngs=nnx.Rngs(0), mesh=devices, placement=placement)
        products = layer.attend(query)
        assert products.sharding.shard_shape(products.shape) == (3, 4)
        np.testing.assert_allclose(products, query @ layer.embedding.get_value().T, **TOLERANCE)


@pytest.mark.parametrize(
    "settings, text",
    [
        (
            {"placement": "row"},
            "table \"embedding\": placement='row' must be one of block, column, replicated; rows are",
        ),
        (
            {"placement": "column", "features": 6},
            'has embedding_dim 6, and placement "column" splits it over 4 devices',
        ),
        ({"optimizer": None}, "Embed: mesh= and placement= need optimizer=; without it the table is an ordinary param"),
        ({"mesh": None, "placement": "column"}, "placement='column' needs devices to place rows on; pass mesh="),
    ],
)
def test_refused(settings, text):
    arguments = {"features": DIM, "optimizer": embax.SGD(0.1), "mesh": line_of(4), **settings}
    with pytest.raises(ValueError, match=text):
        embax.nnx.Embed(ROWS, rngs=nnx.Rngs(0), **arguments)
    with pytest.raises(ValueError, match=text):
        embax.linen.Embed(ROWS, **arguments).init(jax.random.key(0), np.array([1]))


def test_tables_on_a_mesh_are_not_adapted_and_not_stacked():
    base = embax.nnx.Embed(ROWS, DIM, optimizer=embax.SGD(0.1), rngs=nnx.Rngs(0), mesh=line_of(4))
    with pytest.raises(NotImplementedError, match="LoRAEmbed: the table of base lies on a mesh, and an adapted one"):
        embax.nnx.LoRAEmbed(base, rank=2, optimizer=embax.SGD(0.1), rngs=nnx.Rngs(0))
    tables = jnp.zeros((2, 16, DIM))
    one = embax.Table(tables[0], embax.SGD(0.1), "word").on_mesh(line_of(4))
    with pytest.raises(NotImplementedError, match='table "word": vmap over tables on a mesh is not supported'):
        jax.vmap(lambda value: one.with_value(value)[jnp.array([1])])(tables)


def test_tables_that_go_on_no_mesh():
    layers = embax.Table(jnp.zeros((2, ROWS, DIM)), embax.SGD(0.1), "word")
    with pytest.raises(ValueError, match=r'table "word" \[2, 13, 8\]: on_mesh takes one table'):
        layers.on_mesh(line_of(4))
    with pytest.raises(ValueError, match="that is on no mesh yet"):
        embax.Table(jnp.zeros((ROWS, DIM)), embax.SGD(0.1)).on_mesh(line_of(4)).on_mesh(line_of(4))
    with pytest.raises(ValueError, match=r"an AbstractMesh has no devices to place rows on; give a jax.sharding.Mesh"):
        embax.Table(jnp.zeros((ROWS, DIM)), embax.SGD(0.1)).on_mesh(jax.sharding.AbstractMesh((4,), ("x",)))
