"""LoRAEmbed is the dense computation, at the cost of a batch. And what layers keep in a model."""

import copy
import functools
import pickle

import flax.core
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import embax
import embax.linen
import embax.nnx

pytestmark = pytest.mark.once

SGD, V, D, RANK = embax.SGD(0.5), 40, 6, 2
IDS = jnp.array([[3, -1, 3], [0, 39, 7]])
same = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def close(one, other):
    """Asserts that both are equal up to rounding, in units of the largest number there."""
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def arrays(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, ((V, D), (V, RANK), (RANK, D)), strict=True)]


def loss_of(rows):
    return jnp.square(jnp.tanh(rows) - 0.5).sum()


def dense_loss(a, b, frozen, scale):
    return loss_of(frozen[IDS] + scale * (a @ b)[IDS])


class NNXLoRA:
    """The NNX layer, its arrays, and a jitted, donated step of everything that trains."""

    def __init__(self, frozen, a=None, b=None, **settings):
        base = nnx.Embed(V, D, rngs=nnx.Rngs(0))
        base.embedding.set_value(frozen)
        self.layer = embax.nnx.LoRAEmbed(base, RANK, optimizer=SGD, rngs=nnx.Rngs(1), **settings)
        if a is not None:
            self.layer.lora_a.embedding.set_value(a)
            self.layer.lora_b.set_value(b)
        wrt = nnx.Any(nnx.LoRAParam, nnx.Param)
        self.optimizer = embax.nnx.Optimizer(self.layer, optax.sgd(0.5), wrt=wrt)
        door = embax.nnx.value_and_grad(lambda layer: loss_of(layer(IDS)), argnums=nnx.DiffState(0, wrt))

        def step(layer, optimizer):
            loss, gradients = door(layer)
            optimizer.update(layer, gradients)
            return loss, gradients["lora_a"]["embedding"].row_gradients, gradients["lora_b"].get_value()

        self.donated = nnx.jit(step, donate_argnums=(0, 1))
        self.arguments = lambda: (self.layer, self.optimizer)

    def __call__(self, ids):
        return self.layer(ids)

    def step(self):
        return self.donated(*self.arguments())

    def arrays(self):
        layer = self.layer
        return [jnp.array(v.get_value()) for v in (layer.frozen, layer.lora_a.embedding, layer.lora_b)]


class LinenLoRA:
    """The Linen layer with its variables, and a jitted, donated step of everything that trains."""

    def __init__(self, frozen, a=None, b=None, **settings):
        self.layer = embax.linen.LoRAEmbed(V, D, RANK, SGD, **settings)
        params = self.layer.init(jax.random.key(1), IDS)["params"]
        if a is not None:
            params = {"lora_a": {"embedding": params["lora_a"]["embedding"].with_value(a)}, "lora_b": b}
        self.frozen = frozen
        self.state = embax.linen.TrainState.create(apply_fn=self.layer.apply, params=params, tx=optax.sgd(0.5))

        def step(state, frozen):
            def loss(params):
                return loss_of(self.layer.apply({"params": params, "frozen": {"embedding": frozen}}, IDS))

            value, gradients = embax.linen.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=gradients), value, gradients

        self.donated = jax.jit(step, donate_argnums=0)
        self.arguments = lambda: (self.state, self.frozen)

    def __call__(self, ids):
        return self.layer.apply({"params": self.state.params, "frozen": {"embedding": self.frozen}}, ids)

    def step(self):
        self.state, loss, gradients = self.donated(*self.arguments())
        return loss, gradients["lora_a"]["embedding"], gradients["lora_b"]

    def arrays(self):
        return [self.frozen, jnp.array(self.state.params["lora_a"]["embedding"].value), self.state.params["lora_b"]]


both = pytest.mark.parametrize("model", [NNXLoRA, LinenLoRA])


@both
def test_it_starts_as_its_base(model):
    layer, frozen = model(arrays()[0]), arrays()[0]
    assert np.array_equal(layer(IDS), frozen[IDS])
    assert np.isnan(layer(jnp.array([V, -V - 1]))).all()
    assert not layer.arrays()[1].any() and layer.arrays()[2].any()


@pytest.mark.parametrize("alpha", [None, 3.0])
@both
def test_gradients_and_step_are_those_of_the_dense_computation(model, alpha):
    frozen, a, b = arrays()
    scale = 1.0 if alpha is None else alpha / RANK
    layer = model(*map(jnp.copy, (frozen, a, b)), alpha=alpha)
    wanted, (wanted_a, wanted_b) = jax.value_and_grad(dense_loss, (0, 1))(a, b, frozen, scale)
    close(layer(IDS), (frozen + scale * a @ b)[IDS])
    loss, rows, gradient = layer.step()
    close(loss, wanted)
    assert rows.rows.tolist() == [0, 3, 7, 39, V, V]
    close(rows.to_dense(), wanted_a)
    close(gradient, wanted_b)
    jax.tree.map(close, layer.arrays(), [frozen, a - 0.5 * wanted_a, b - 0.5 * wanted_b])


@both
def test_a_donated_step_makes_nothing_of_the_frozen_tables_size(model):
    layer = model(*arrays())
    report = embax.check_step(layer.donated, *layer.arguments())
    assert report.ok and report.writes == 1, report
    text = layer.donated.lower(*layer.arguments()).compile().as_text()
    made = [line.strip() for line in text.splitlines() if f"= f32[{V},{D}]" in line]
    assert made and all("parameter(" in line for line in made), made
    frozen = layer.arrays()[0]
    layer.step()
    assert layer.arrays()[0].tobytes() == frozen.tobytes()


@both
def test_training_lowers_the_loss(model):
    layer = model(arrays()[0])
    losses = [float(layer.step()[0]) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0], losses
    assert np.array_equal(layer.arrays()[0], arrays()[0])


@pytest.mark.optimized
def test_merged_is_the_adapted_table():
    frozen, a, b = arrays()
    layer = NNXLoRA(frozen, a, b, alpha=3.0).layer
    close(layer.merged(), frozen + 1.5 * a @ b)
    assert np.array_equal(layer.merged()[IDS], layer(IDS))
    with pytest.raises(ValueError, match="LoRAEmbed: rank=0 must be an integer of at least 1"):
        embax.nnx.LoRAEmbed(nnx.Embed(V, D, rngs=nnx.Rngs(0)), 0, optimizer=SGD, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_of_the_base_are_kept(param_dtype):
    base = embax.nnx.Embed(V, D, param_dtype=param_dtype, optimizer=SGD, rngs=nnx.Rngs(0))
    layer = embax.nnx.LoRAEmbed(base, RANK, optimizer=SGD, rngs=nnx.Rngs(1))
    assert layer(IDS).dtype == layer.lora_b.dtype == param_dtype and np.array_equal(layer(IDS), base(IDS))
    linen = embax.linen.LoRAEmbed(V, D, RANK, SGD, param_dtype=param_dtype, dtype=jnp.float32)
    rows, variables = linen.init_with_output(jax.random.key(0), IDS)
    assert rows.dtype == jnp.float32 and {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}


# ---- what the layers keep in a model ----------------------------------------------------------------------


def embed(optimizer=SGD, seed=0, **settings):
    return embax.nnx.Embed(V, D, optimizer=optimizer, rngs=nnx.Rngs(seed), **settings)


NNX = {
    "Embed": embed,
    "dense Embed": lambda seed=0: embed(None, seed),
    "LoRAEmbed": lambda seed=0: embax.nnx.LoRAEmbed(embed(None, seed), 2, optimizer=SGD, rngs=nnx.Rngs(9 - seed)),
}
layers = pytest.mark.parametrize("make", NNX.values(), ids=NNX)


def test_an_embed_is_found_where_flax_has_it():
    metadata = {"embedding_metadata": {"note": "kept"}}
    flax_layer = nnx.Embed(V, D, rngs=nnx.Rngs(0), **metadata)
    for layer in (flax_layer, embed(None, **metadata), embed(**metadata)):
        state = dict(nnx.to_flat_state(nnx.state(layer)))
        sentinel = {("sentinel",)} if isinstance(layer.embedding, embax.nnx.Table) else set()
        assert set(state) == {("embedding",), *sentinel}
        assert state["embedding",].get_metadata("note") == "kept"
        parameters = jax.tree.leaves(nnx.state(layer, nnx.Param))
        assert [x.shape for x in parameters] == ([()] if sentinel else [(V, D)])
        assert np.array_equal(layer.embedding[3], flax_layer.embedding[3])


@layers
def test_nnx_copies(make):
    """What NNX and Python make of a layer answers as the layer does, and is another one."""
    layer, wanted = make(), make()(IDS)
    merged, copies = nnx.merge(*nnx.split(layer)), [nnx.clone(layer), copy.deepcopy(layer)]
    other, abstract = make(seed=1), nnx.eval_shape(make)
    assert not np.array_equal(other(IDS), wanted)
    nnx.update(other, nnx.state(layer))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(abstract)))
    nnx.update(abstract, pickle.loads(pickle.dumps(nnx.state(layer))))
    pure = make(seed=1)
    nnx.update(pure, pickle.loads(pickle.dumps(nnx.to_pure_dict(nnx.state(layer)))))
    for made in (merged, *copies, other, abstract, pure):
        assert np.array_equal(made(IDS), wanted)
        assert jax.tree.structure(nnx.state(made)) == jax.tree.structure(nnx.state(layer))
    for made in (*copies, other, abstract, pure):
        for _, variable in nnx.to_flat_state(nnx.state(made)):
            variable.set_value(variable.get_value() + 1)
        assert not np.array_equal(made(IDS), wanted)
    assert np.array_equal(layer(IDS), wanted)


@layers
def test_nnx_shows_a_layer(make, capsys):
    nnx.display(make())
    assert "Embed(" in capsys.readouterr().out and "num_embeddings=40" in repr(make())


def test_a_flax_checkpoint_goes_into_a_sparse_layer():
    flax_layer, layer = nnx.Embed(V, D, rngs=nnx.Rngs(5)), embed()
    nnx.update(layer, nnx.to_pure_dict(nnx.state(flax_layer)))
    assert np.array_equal(layer(IDS), flax_layer(IDS)) and layer.sparse


def test_a_plain_nnx_optimizer_raises():
    layer = embed()
    _, gradients = embax.nnx.value_and_grad(lambda layer: layer(IDS).sum())(layer)
    with pytest.raises(embax.SparseGradientError, match="embax.nnx.Optimizer"):
        nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param).update(layer, gradients)


def test_gradients_leave_nnx_jit():
    layer = embed()
    _, gradients = nnx.jit(embax.nnx.value_and_grad(lambda layer: layer(IDS).sum()))(layer)
    assert gradients.embedding.row_gradients.rows.tolist() == [0, 3, 7, 39, V, V]


@pytest.mark.parametrize("argnums", [1, (0, 1)], ids=str)
def test_nnx_differentiates_arrays_too(argnums):
    def loss(layer, scale):
        return (layer(IDS) * scale).sum()

    layers = nnx.Embed(V, D, rngs=nnx.Rngs(0)), embed()
    doors = nnx.value_and_grad(loss, argnums=argnums), embax.nnx.value_and_grad(loss, argnums=argnums)
    wanted, mine = (door(layer, jnp.ones((1, 1, D)))[1] for door, layer in zip(doors, layers, strict=True))
    wanted, mine = (wanted, mine) if argnums == 1 else (wanted[1], mine[1])
    close(mine, wanted)


@pytest.fixture(scope="module")
def linen():
    """A sparse Linen layer, its variables, and those of flax."""
    layer = embax.linen.Embed(V, D, optimizer=SGD)
    return layer, layer.init(jax.random.key(0), IDS), nn.Embed(V, D).init(jax.random.key(0), IDS)


def test_linen_variables_are_those_of_flax_in_a_box(linen):
    layer, variables, flax_variables = linen
    assert jax.tree.structure(nn.meta.unbox(variables)) == jax.tree.structure(flax_variables)
    same(nn.meta.unbox(variables), flax_variables)
    assert isinstance(variables["params"]["embedding"], embax.linen.Table)
    dense = embax.linen.Embed(V, D).init(jax.random.key(0), IDS)
    assert jax.tree.structure(dense) == jax.tree.structure(flax_variables)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), IDS)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    assert shapes["params"]["embedding"].value == jax.ShapeDtypeStruct((V, D), jnp.float32)


def test_linen_copies(linen):
    """A copy of the variables, frozen, pickled or out of its box, gives the same values."""
    layer, variables, flax_variables = linen
    wanted = layer.apply(variables, IDS)
    state = flax.serialization.to_state_dict(variables)
    restored = flax.serialization.from_state_dict(variables, copy.deepcopy(state))
    assert isinstance(restored["params"]["embedding"], embax.linen.Table)
    copies = [copy.deepcopy(variables), pickle.loads(pickle.dumps(variables)), flax.core.freeze(variables), restored]
    for made in (*copies, nn.meta.unbox(variables), flax_variables):
        assert np.array_equal(layer.apply(made, IDS), wanted)
    for made in copies:
        _, gradients = embax.linen.value_and_grad(lambda v: layer.apply(v, IDS).sum())(made)
        assert gradients["params"]["embedding"].rows.tolist() == [0, 3, 7, 39, V, V]
    with pytest.raises(
        embax.SparseGradientError, match="It must stay the embax.Table that init made, not a bare array"
    ):
        embax.linen.value_and_grad(lambda v: layer.apply(v, IDS).sum())(flax_variables)


def test_linen_checkpoints_are_bytes(linen):
    _, variables, flax_variables = linen
    restored = flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables))
    assert isinstance(restored["params"]["embedding"], embax.linen.Table)
    same(nn.meta.unbox(restored), flax_variables)


def test_a_flax_checkpoint_goes_into_the_box(linen):
    _, variables, flax_variables = linen
    restored = flax.serialization.from_state_dict(variables, flax.serialization.to_state_dict(flax_variables))
    assert isinstance(restored["params"]["embedding"], embax.linen.Table)


def test_linen_shows_a_layer(linen):
    layer, _, _ = linen
    assert "embedding" in layer.tabulate(jax.random.key(0), IDS) and "num_embeddings = 40" in repr(layer)
    assert layer == layer.clone() != embax.linen.Embed(V, D) and hash(layer) == hash(layer.clone())
