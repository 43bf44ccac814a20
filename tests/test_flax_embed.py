"""One set of properties, asked of flax's Embed layers and of embax's.

Without ``optimizer=`` embax's are flax's; with it they differ in the form of the gradient only. Values are compared bit
by bit, gradients up to the rounding of a sum in another order.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import embax
import embax.linen
import embax.nnx

SGD = embax.SGD(0.1)
LOOKUP, ATTEND = "__call__", "attend"


class NNXLayer:
    """An ``nnx`` Embed, and how NNX calls and differentiates it."""

    def __init__(self, layer, rows, dim, **given):
        self.model = layer(rows, dim, rngs=nnx.Rngs(3), **given)
        self.table = self.model.embedding.get_value()
        self.door, self.jit = embax.nnx.value_and_grad if "optimizer" in given else nnx.value_and_grad, nnx.jit

    def call(self, name, *args, **kwargs):
        return getattr(self.model, name)(*args, **kwargs)

    def with_dense(self, dense):
        return nnx.Dict(layer=self.model, dense=nnx.data(jax.tree.map(nnx.Param, dense)))

    def opened(self, both):
        dense = jax.tree.map(lambda p: p.get_value(), both.dense, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return lambda name, *args, **kwargs: getattr(both.layer, name)(*args, **kwargs), dense

    def closed(self, gradients):
        table = gradients["layer"]["embedding"]
        table = table.row_gradients.to_dense() if hasattr(table, "row_gradients") else table.get_value()
        return table, nnx.as_pure(gradients["dense"])


class LinenLayer:
    """A ``linen`` Embed with its variables, and how Linen calls and differentiates it."""

    def __init__(self, layer, rows, dim, **given):
        self.model = layer(rows, dim, **given)
        self.variables = self.model.init(jax.random.key(3), jnp.zeros(1, jnp.int32))
        self.table = nn.meta.unbox(self.variables)["params"]["embedding"]
        self.door, self.jit = embax.linen.value_and_grad if "optimizer" in given else jax.value_and_grad, jax.jit

    def call(self, name, *args, **kwargs):
        return self.model.apply(self.variables, *args, method=name, **kwargs)

    def with_dense(self, dense):
        return {"layer": self.variables, "dense": dense}

    def opened(self, both):
        return lambda name, *a, **kwargs: self.model.apply(both["layer"], *a, method=name, **kwargs), both["dense"]

    def closed(self, gradients):
        table = gradients["layer"]["params"]["embedding"]
        return table.to_dense() if isinstance(table, embax.RowGradients) else table, gradients["dense"]


def step_of(layer, loss):
    """Returns the jitted ``(dense, *args) -> (value, table's gradient, dense's)`` of ``loss(call, dense, *args)``."""

    def step(both, *args):
        value, gradients = layer.door(lambda both, *args: loss(*layer.opened(both), *args))(both, *args)
        return value, *layer.closed(gradients)

    step = layer.jit(step)
    return lambda dense, *args: step(layer.with_dense(dense), *args)


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    family: type
    layer: type
    sparse: bool = False

    def __call__(self, rows=7, dim=3, **given):
        given = {"optimizer": SGD, **given} if self.sparse else given
        return self.family(self.layer, rows, dim, **given)

    def flax(self, rows=7, dim=3, **given):
        return self.family(nnx.Embed if self.family is NNXLayer else nn.Embed, rows, dim, **given)


CONTENDERS = [
    Contender("flax.nnx", NNXLayer, nnx.Embed),
    Contender("embax.nnx", NNXLayer, embax.nnx.Embed),
    Contender("embax.nnx sparse", NNXLayer, embax.nnx.Embed, True),
    Contender("flax.linen", LinenLayer, nn.Embed),
    Contender("embax.linen", LinenLayer, embax.linen.Embed),
    Contender("embax.linen sparse", LinenLayer, embax.linen.Embed, True),
]


def among(contenders):
    return pytest.mark.parametrize("contender", contenders, ids=lambda c: c.name)


every = among(CONTENDERS)
drop_in = among([c for c in CONTENDERS if c.name.startswith("embax")])
sparse = among([c for c in CONTENDERS if c.sparse])


def assert_same(one, other):
    """Asserts equal dtypes, shapes and bits; every NaN is the same."""
    assert one.dtype == other.dtype and one.shape == other.shape
    nans = [np.isnan(np.asarray(x, np.float64)) for x in (one, other)]
    assert np.array_equal(*nans)
    assert np.where(nans[0], 0, one).tobytes() == np.where(nans[1], 0, other).tobytes()


def rows_of(ids, size):
    """The rule: one row is there for every id; below 0 ids count from the end; the rest is outside (``size``)."""
    ids = np.zeros(ids.shape, np.int64) if size == 1 else np.asarray(ids).astype(np.int64)
    rows = np.where(ids < 0, ids + size, ids)
    return np.where((rows >= 0) & (rows < size), rows, size)


def integers(key, shape, dtype):
    return jax.random.randint(key, shape, 0, 9, dtype)


def doubled(args, *more, dtype=None, inexact=True):
    """A ``promote_dtype``: NNX gives a tuple, Linen the arrays one by one."""
    args = args if isinstance(args, tuple) else (args, *more)
    return tuple(2 * jnp.asarray(x, dtype or jnp.float32) for x in args)


SETTINGS = {
    "plain": (7, 3, {}),
    "one row": (1, 3, {}),
    "two rows": (2, 3, {}),
    "one column": (7, 1, {}),
    "one number": (1, 1, {}),
    "embedding_init": (7, 3, {"embedding_init": jax.nn.initializers.uniform(0.5)}),
    "promote_dtype": (7, 3, {"promote_dtype": doubled, "dtype": jnp.float32, "param_dtype": jnp.bfloat16}),
    **{f"dtype {d}": (7, 3, {"dtype": jnp.dtype(d)}) for d in ("float32", "bfloat16", "float16")},
    **{f"param_dtype {d}": (7, 3, {"param_dtype": jnp.dtype(d)}) for d in ("bfloat16", "float16")},
    "bfloat16, looked up in float32": (7, 3, {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}),
    "float16, looked up in bfloat16": (7, 3, {"param_dtype": jnp.float16, "dtype": jnp.bfloat16}),
    "integers": (7, 3, {"param_dtype": jnp.int32, "embedding_init": integers}),
}


@pytest.mark.parametrize("name", SETTINGS)
@drop_in
def test_every_setting_is_flax_bit_by_bit(contender, name):
    rows, dim, given = SETTINGS[name]
    if contender.sparse and name == "integers":
        with pytest.raises(TypeError, match="Embed: param_dtype=int32 cannot be trained; leave optimizer= out"):
            contender(rows, dim, **given)
        return
    mine, wanted = contender(rows, dim, **given), contender.flax(rows, dim, **given)
    assert_same(mine.table, wanted.table)
    ids = jnp.array([[0, rows - 1, -1], [-rows, -rows - 1, rows]])
    assert_same(mine.call(LOOKUP, ids), wanted.call(LOOKUP, ids))
    if name != "integers":
        dtype = given.get("dtype", given.get("param_dtype", jnp.float32))
        query = jax.random.normal(jax.random.key(1), (2, dim), dtype)
        assert_same(mine.call(ATTEND, query), wanted.call(ATTEND, query))


@st.composite
def lookups(draw):
    rows, dim = draw(st.sampled_from([(1, 3), (2, 3), (7, 1), (7, 3)]))
    shape = draw(st.sampled_from([(0,), (4,), (2, 3), (2, 1, 2)] + [()] * (rows > 1)))
    dtype = np.dtype(draw(st.sampled_from(["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"])))
    low, size = -2 * rows if dtype.kind == "i" else 0, int(np.prod(shape))
    ids = draw(st.lists(st.integers(low, 2 * rows), min_size=size, max_size=size))
    ids = np.array(ids, dtype).reshape(shape)
    return rows, dim, jnp.asarray(ids) if dtype.itemsize < 8 and draw(st.booleans()) else ids


@every
@settings(max_examples=15)
@given(case=lookups())
def test_values_follow_the_rule(contender, case):
    rows, dim, ids = case
    layer = contender(rows, dim)
    padded = np.concatenate([np.asarray(layer.table), np.full((1, dim), np.nan, np.float32)])
    assert_same(layer.call(LOOKUP, ids), padded[rows_of(ids, rows)])


@every
@pytest.mark.parametrize("ids", [np.ones(2, np.float32), jnp.ones(()), np.array([True, False])], ids=str)
def test_what_is_no_integer_raises(contender, ids):
    with pytest.raises(ValueError, match=r"^Input type must be an integer or unsigned integer\."):
        contender().call(LOOKUP, ids)


@sparse
def test_ids_that_flax_stumbles_over(contender):
    """jnp.take cuts 64 bits to 32 and wraps an int8 in 8 bits; flax broadcasts one row to no axes. Not with
    ``optimizer=``: the id is that row, or none."""
    wide, narrow = np.array([2**32 + 1, -(2**32)]), np.array([-1, -128, 127], np.int8)
    assert_same(contender.flax().call(LOOKUP, wide), contender.flax().call(LOOKUP, np.array([1, 0])))
    assert np.isnan(contender().call(LOOKUP, wide)).all()
    assert_same(contender(300).call(LOOKUP, narrow), contender.flax(300).call(LOOKUP, narrow.astype(np.int32)))
    with pytest.raises(ValueError, match="Cannot broadcast"):
        contender.flax(1).call(LOOKUP, jnp.array(0))
    assert_same(contender(1).call(LOOKUP, jnp.array(5)), contender(1).table[0])


@every
def test_jit_and_vmap_change_nothing(contender):
    layer, ids = contender(), jnp.array([[0, -1, 6], [-8, 7, 3]])
    lookup, wanted = functools.partial(layer.call, LOOKUP), layer.call(LOOKUP, ids)
    jitted = layer.jit(lambda both, ids: layer.opened(both)[0](LOOKUP, ids))
    assert_same(jitted(layer.with_dense({}), ids), wanted)
    assert_same(jax.vmap(lookup)(ids), wanted)
    assert_same(jax.vmap(lookup, in_axes=1, out_axes=1)(ids), wanted)


def linear(call, cotangents, ids):
    return (call(LOOKUP, ids) * cotangents).sum()


def check_linear(step, rows, ids):
    """What is outside trains nothing, though its activation is NaN and its cotangent is not 0."""
    cotangents = np.random.default_rng(0).normal(size=(*ids.shape, 3)).astype(np.float32)
    wanted = np.zeros((rows + 1, 3))
    np.add.at(wanted, rows_of(ids, rows), cotangents)
    table = step(jnp.asarray(cotangents), ids)[1]
    np.testing.assert_allclose(table, wanted[:rows], rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("rows", [1, 7])
def test_gradient_is_the_sum_over_occurrences(contender, rows):
    step = step_of(contender(rows), linear)

    @settings(max_examples=25)
    @given(ids=st.lists(st.integers(-2 * rows, 2 * rows), min_size=6, max_size=6))
    def check(ids):
        check_linear(step, rows, np.array(ids, np.int32).reshape(2, 3))

    check()


@pytest.mark.parametrize("dtype, shape", [("int8", ()), ("uint8", (0,)), ("uint32", (2, 1, 3))], ids=str)
@sparse
def test_gradient_of_ids_of_any_shape_and_dtype(contender, dtype, shape):
    ids = np.resize(np.array([6, 1, 1, 100], dtype), shape)
    check_linear(step_of(contender(), linear), 7, ids)


def network(call, dense):
    """A loss that is nonlinear in the rows, with two lookups, one of them vmapped, and parameters of its own."""
    ids = jnp.array([[0, -1, 6], [6, 3, 3]])
    rows = [call(LOOKUP, ids).reshape(6, -1), jax.vmap(lambda i: call(LOOKUP, i))(jnp.array([3, 2]))]
    rows = jnp.concatenate(rows).astype(jnp.float32)
    return jnp.square(jnp.tanh(rows @ dense["kernel"] + dense["bias"])).sum()


def dense_parameters():
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=(n, 4)), jnp.float32) for name, n in (("kernel", 3), ("bias", 1))}


def assert_like_flax(contender, loss, dense, flax_loss=None, **given):
    """Asserts equal values and gradients: float32 to rounding, 16 bits to that of the few sums flax makes in them."""
    value, table, gradients = step_of(contender(**given), loss)(dense)
    flax_value, flax_table, flax_gradients = step_of(contender.flax(**given), flax_loss or loss)(dense)
    eps = max(float(jnp.finfo(dtype).eps) for dtype in (jnp.float32, *given.values()))
    flax_table = np.asarray(flax_table, np.float32)
    scale = np.abs(flax_table).max()
    assert scale > 0.1 and table.shape == flax_table.shape
    np.testing.assert_allclose(value, flax_value, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(table, np.float32), flax_table, rtol=0, atol=4 * eps * scale)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradients, flax_gradients)


GRADIENT_SETTINGS = [
    {},
    {"param_dtype": jnp.float16},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
]


@pytest.mark.parametrize("given", GRADIENT_SETTINGS, ids=str)
@sparse
def test_gradients_of_a_network_are_those_of_flax(contender, given):
    assert_like_flax(contender, network, dense_parameters(), **given)


@sparse
def test_a_frozen_table_is_a_constant(contender):
    """Plain JAX differentiates everything else beside a table."""
    networks = [functools.partial(network, make().call) for make in (contender, contender.flax)]
    mine, wanted = (jax.jit(jax.grad(fun))(dense_parameters()) for fun in networks)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), mine, wanted)


@drop_in
def test_weight_tying(contender):
    """Embedded and attended by one table, in one loss."""

    def loss(candidates, call, dense):
        rows = jnp.tanh(call(LOOKUP, jnp.array([[1, 2, -1], [2, 2, 0]])) * dense)
        logits = jax.nn.log_softmax(call(ATTEND, rows, **candidates))
        return -jnp.take_along_axis(logits, jnp.array([[[2], [6], [0]], [[2], [0], [1]]]), 2).sum()

    candidates = {"candidates": jnp.arange(7)} if contender.sparse else {}
    parts = functools.partial(loss, candidates), jnp.ones((1, 1, 3)), functools.partial(loss, {})
    assert_like_flax(contender, *parts)


QUERIES = {"one": (3,), "batch": (2, 3), "positions": (2, 4, 3)}


def squares(call, query, **candidates):
    return jnp.square(call(ATTEND, query, **candidates)).sum()


@pytest.mark.parametrize("shape", QUERIES.values(), ids=QUERIES)
@drop_in
def test_candidates_that_are_all_rows(contender, shape):
    query, everything = jax.random.normal(jax.random.key(0), shape), jnp.arange(7)
    mine, wanted = contender(), contender.flax().call(ATTEND, query)
    assert_same(mine.call(ATTEND, query), wanted)
    np.testing.assert_allclose(mine.call(ATTEND, query, candidates=everything), wanted, rtol=1e-5, atol=1e-6)
    assert_like_flax(contender, functools.partial(squares, candidates=everything), query, squares)


@drop_in
def test_candidates_of_each_query(contender):
    ids, query = jnp.array([[0, -1], [6, 6]]), jax.random.normal(jax.random.key(0), (2, 3))

    def full(call, query):
        return jnp.square(jnp.take_along_axis(call(ATTEND, query), ids % 7, 1)).sum()

    assert_like_flax(contender, functools.partial(squares, candidates=ids), query, full)
    outside = contender().call(ATTEND, query, candidates=jnp.array([[0, 7], [-8, 1]]))
    assert np.isnan(outside).tolist() == [[False, True], [True, False]]
    alone = contender(1).call(ATTEND, query, candidates=jnp.array([0, 5]))
    assert_same(alone[:, 0], alone[:, 1])


WRONG = [((2, 3), (3, 4)), ((2, 5, 3), (2, 4)), ((3,), (2, 4)), ((2, 3), ()), ((3,), ())]


@pytest.mark.parametrize("query, ids", WRONG, ids=str)
@drop_in
def test_candidates_of_a_wrong_shape_raise(contender, query, ids):
    with pytest.raises(ValueError, match=r"attend: query has shape .* candidates must be \[K\]"):
        contender().call(ATTEND, jnp.ones(query), candidates=jnp.zeros(ids, jnp.int32))
    with pytest.raises(ValueError, match=r"^Input type must be an integer or unsigned integer\."):
        contender().call(ATTEND, jnp.ones(query), candidates=jnp.zeros(ids))


@sparse
def test_a_gradient_through_all_rows_raises(contender):
    with pytest.raises(embax.SparseGradientError, match="attend.*candidates=ids"):
        step_of(contender(), squares)(jnp.ones((2, 3)))
    np.testing.assert_allclose(contender().call(ATTEND, jnp.ones(3)), contender().table.sum(1), rtol=1e-5, atol=1e-6)


# Keras' Embedding(mask_zero=True).compute_mask(inputs) is not_equal(inputs, 0); with mask_zero=False it is None.
@pytest.mark.parametrize("ids", [jnp.array(0), jnp.zeros(0, jnp.int32), np.array([[0, 1], [-1, 7]], np.int8)], ids=str)
@drop_in
def test_mask_is_that_of_keras(contender, ids):
    mask = contender(mask_zero=True).call("compute_mask", ids)
    assert mask.dtype == bool and np.array_equal(mask, np.asarray(ids) != 0)
    assert_same(contender(mask_zero=True).call(LOOKUP, ids), contender.flax().call(LOOKUP, ids))
    assert contender().call("compute_mask", ids) is None


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), "sgd", 0.1], ids=lambda o: type(o).__name__)
@sparse
def test_an_optimizer_that_is_none_of_embax_raises(contender, optimizer):
    with pytest.raises(TypeError, match=r"Embed: optimizer=.* must be an embax optimizer, such as embax.Adagrad"):
        contender(optimizer=optimizer)


@sparse
def test_a_plain_derivative_raises(contender):
    layer = contender()
    layer.door = nnx.value_and_grad if contender.family is NNXLayer else jax.value_and_grad
    with pytest.raises(embax.SparseGradientError, match=r"\[7, 3\]: a plain jax.grad .* embax.value_and_grad"):
        step_of(layer, linear)(jnp.ones((2, 3)), jnp.array([1, 2]))
