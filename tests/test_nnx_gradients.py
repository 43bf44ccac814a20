"""embax.nnx.value_and_grad does to a model what nnx.value_and_grad does, or says that it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import embax
import embax.nnx

IDS = jnp.array([1, 5, 1])


class Model(nnx.Module):
    def __init__(self, optimizer=None):
        self.words = embax.nnx.Embed(6, 2, optimizer=optimizer, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(2, 2, rngs=nnx.Rngs(1))

    def __call__(self, ids):
        return jnp.sum(jnp.tanh(self.out(self.words(ids))))


@pytest.fixture
def model():
    return Model(embax.SGD(0.1))


@pytest.mark.parametrize("pick, argnums", [(lambda m: m, 1), (lambda m: m.out, 1), (lambda m: m.words, (0, 1))])
def test_a_variable_in_two_arguments_is_refused(model, pick, argnums):
    with pytest.raises(ValueError, match="are one variable, and its gradient cannot be that of two arguments"):
        embax.nnx.value_and_grad(lambda a, b: b(IDS), argnums=argnums)(pick(model), model)


def test_a_parameter_that_the_loss_changes_is_changed(model):
    def loss(model):
        model.out.bias[...] = model.out.bias[...] + 1.0
        return model(IDS)

    embax.nnx.value_and_grad(loss)(model)
    assert model.out.bias[...].tolist() == [1.0, 1.0]


def test_a_variable_that_the_loss_makes_is_named(model):
    def loss(model):
        model.out.count = nnx.Variable(jnp.zeros(()))
        return model(IDS)

    with pytest.raises(
        NotImplementedError, match=r"the loss makes new variables \(out/count\).*return the values as aux"
    ):
        embax.nnx.value_and_grad(loss)(model)


def test_arguments_are_counted_from_either_end(model):
    def loss(scale, model):
        return scale * model(IDS)

    first = embax.nnx.value_and_grad(loss, argnums=1)(jnp.float32(2), model)[1]
    last = embax.nnx.value_and_grad(loss, argnums=-1)(jnp.float32(2), model)[1]
    np.testing.assert_array_equal(first.out.kernel[...], last.out.kernel[...])
    dense = nnx.value_and_grad(loss, argnums=1)(jnp.float32(2), Model())[1]
    np.testing.assert_allclose(last.words.embedding.row_gradients.to_dense(), dense.words.embedding[...], rtol=1e-6)
    with pytest.raises(ValueError, match="argnums=2 names argument 2 of 2"):
        embax.nnx.value_and_grad(loss, argnums=2)(jnp.float32(2), model)


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x.astype(jnp.bfloat16), lambda x: x[::-1]])
def test_a_lookup_in_a_changed_table_names_the_change(change):
    table = embax.Table(jnp.ones((6, 2)), embax.SGD(0.1), "word")
    with pytest.raises(embax.SparseGradientError, match='table "word".*whole table in an operation'):
        embax.value_and_grad(lambda t: jnp.sum(jax.tree.map(change, t)[IDS]).astype(jnp.float32))(table)


def test_accumulation_keeps_the_dtype_of_narrow_parameters():
    params = {"word": embax.Table(jnp.ones((6, 2), jnp.float16), embax.SGD(1.0)), "w": jnp.ones(2, jnp.bfloat16)}
    optimizer = embax.JointOptimizer(optax.sgd(1.0), every_k=2)
    state = optimizer.init(params)
    gradients = {
        "word": embax.RowGradients(jnp.array([3, 6]), jnp.array([[2.0, 2.0], [0.0, 0.0]]), 6),
        "w": jnp.full(2, 0.5, jnp.bfloat16),
    }
    for _ in range(2):
        params, state = optimizer.update(params, gradients, state)
    assert params["w"].dtype == jnp.bfloat16 and params["w"].tolist() == [0.5, 0.5]
    assert params["word"].value[:, 0].tolist() == [1, 1, 1, -1, 1, 1]
