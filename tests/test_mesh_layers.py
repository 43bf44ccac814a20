"""Layers and both doors on a mesh: the same losses, tables and slots as on one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import feature, line_of, table_spec
from jax.sharding import AxisType

import embax
import embax.linen
import embax.nnx

SAMPLES, DIM, STEPS = 13, 8, 2
NORMAL = jax.nn.initializers.normal(1.0)


pytestmark = pytest.mark.usefixtures("eight_devices")


def _line():
    return line_of(4)


def _square():
    explicit = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    return embax.Devices(explicit, "d", ("m", "d"))


def _features():
    a = table_spec("a", 101, DIM, embax.RowwiseAdagrad(0.1), "mean", initializer=NORMAL)
    b = table_spec("b", 37, DIM, embax.RowwiseAdagrad(0.1), "sum", initializer=NORMAL)
    return {
        "dense": feature(a, "dense", (None, 4)),
        "ragged": feature(b, "ragged", (None,)),
        "sequence": feature(a, "sequence", (None, 3), (None, 3, DIM)),
    }


def _batches():
    rng = np.random.default_rng(0)
    return [
        {
            "dense": rng.integers(0, 101, (SAMPLES, 4)),
            "ragged": [rng.integers(0, 37, n) for n in rng.poisson(2, SAMPLES)],
            "sequence": rng.integers(0, 101, (SAMPLES, 3)),
        }
        for _ in range(STEPS)
    ]


def _loss(activations):
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=part.shape).astype(np.float32) for name, part in sorted(activations.items())}
    return sum((jnp.tanh(part) * weights[name]).sum() for name, part in activations.items())


def _nnx(door, **settings):
    layer = embax.nnx.FeatureEmbed(_features(), rngs=nnx.Rngs(0), **settings)
    optimizer = embax.nnx.Optimizer(layer, optax.sgd(0.1), max_norm=1.0)

    @nnx.jit
    def step(layer, optimizer, batch):
        if door == "value_and_grad":
            loss, gradients = embax.nnx.value_and_grad(lambda layer, batch: _loss(layer(batch)))(layer, batch)
        else:
            small = embax.nnx.prefetch(layer, batch)
            loss, gradients = nnx.value_and_grad(lambda layer, batch: _loss(layer(batch)))(small, batch)
            gradients = embax.nnx.row_gradients(small, gradients)
        optimizer.update(layer, gradients)
        return loss

    losses = [float(step(layer, optimizer, embax.preprocess(layer.plan, ids))) for ids in _batches()]
    slots = {name.removeprefix("tables/"): slots.get_value() for name, slots in optimizer.slots.items()}
    states = {name: embax.TableState(table.get_value(), slots[name]) for name, table in layer.tables.items()}
    return losses, embax.to_arrays(layer.plan, states)


def _linen(**settings):
    layer = embax.linen.FeatureEmbed(_features(), settings)
    batches = [embax.preprocess(layer.plan, ids) for ids in _batches()]
    params = layer.init(jax.random.key(0), batches[0])["params"]
    state = embax.linen.TrainState.create(apply_fn=layer.apply, params=params, tx=optax.sgd(0.1), max_norm=1.0)

    @jax.jit
    def step(state, batch):
        loss_fn = embax.linen.value_and_grad(lambda params: _loss(layer.apply({"params": params}, batch)))
        loss, gradients = loss_fn(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for batch in batches:
        state, loss = step(state, batch)
        losses.append(float(loss))
    states = {
        name: embax.TableState(state.params[name].value, slots)
        for name, slots in zip(sorted(state.params), state.slots, strict=True)
    }
    return losses, embax.to_arrays(layer.plan, states)


def _same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found[1], wanted[1])


def _in(mesh):
    return jax.set_mesh(mesh.mesh) if isinstance(mesh, embax.Devices) else contextlib.nullcontext()


@pytest.mark.parametrize(
    ("door", "make", "placement"),
    [
        ("value_and_grad", _line, "row"),
        ("value_and_grad", _square, {"a": "column", "b": "row"}),
        ("prefetch", _line, {"a": "column", "b": "table"}),
        ("prefetch", _square, {"a": "row", "b": "replicated"}),
    ],
)
def test_nnx(door, make, placement):
    mesh = make()
    with _in(mesh):
        found = _nnx(door, mesh=mesh, placement=placement)
    _same(found, _nnx(door))


@pytest.mark.parametrize(("make", "placement"), [(_line, {"a": "table", "b": "replicated"}), (_square, "row")])
def test_linen(make, placement):
    mesh = make()
    with _in(mesh):
        found = _linen(mesh=mesh, placement=placement)
    _same(found, _linen())


@pytest.mark.parametrize("placement", ["row", "column", "replicated"])
def test_weights_that_are_learned(placement):
    """A parameter that weights ids are made of has the same derivative, beside the tables' rows."""
    spec = feature(table_spec("a", 101, DIM, initializer=NORMAL), "x", (None, 4))
    ids = np.random.default_rng(0).integers(0, 101, (8, 4))

    def gradients(**settings):
        layer = embax.linen.FeatureEmbed({"x": spec}, settings)
        params = layer.init(jax.random.key(0), {"x": ids})["params"]

        def loss_fn(variables):
            weights = {"x": jax.nn.sigmoid(variables["logits"])}
            return _loss(layer.apply({"params": variables["params"]}, {"x": ids}, weights))

        variables = {"params": params, "logits": jnp.linspace(-1, 1, 32).reshape(8, 4)}
        loss, found = jax.jit(embax.linen.value_and_grad(loss_fn))(variables)
        values = found["params"]["a"].values
        return loss, found["logits"], jnp.sort(jnp.abs(values).sum(axis=1))[-32:]

    found, wanted = gradients(mesh=_line(), placement=placement), gradients()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found, wanted)


def test_what_a_table_on_a_mesh_does_not_do():
    layer = embax.nnx.FeatureEmbed(_features(), rngs=nnx.Rngs(0), mesh=_line())
    table = embax.nnx.variables.table_leaf(layer.tables["a_b"], "a_b")
    with pytest.raises(NotImplementedError, match='table "a_b": it lies on a mesh.*look up through its FeatureEmbed'):
        table[jnp.array([1])]
    plan = layer.plan
    batch = embax.preprocess(plan, _batches()[0])
    tables = embax.init(plan, jax.random.key(0))
    with pytest.raises(NotImplementedError, match="a plain jax.grad with respect to tables on a mesh"):
        jax.grad(lambda tables: _loss(embax.lookup(plan, tables, batch)[0]))(tables)
