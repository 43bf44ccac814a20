"""Bare arrays: embax.take is jnp.take and indexing, and its gradient as rows is the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embax

pytestmark = pytest.mark.once

SHAPES = st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (2, 2, 2, 2)])
DTYPES = st.sampled_from([np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32])


@st.composite
def cases(draw, outside=False):
    rows, dim = draw(st.integers(1, 30)), draw(st.integers(1, 9))
    shape, dtype = draw(SHAPES), draw(DTYPES)
    low = 0 if np.issubdtype(dtype, np.unsignedinteger) else -rows
    low, high = (low, rows - 1) if not outside else (3 * low, 3 * rows)
    size = int(np.prod(shape))
    ids = np.array(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), dtype).reshape(shape)
    table = np.random.default_rng(draw(st.integers(0, 9))).normal(size=(rows, dim)).astype(np.float32)
    return table, ids


@given(cases())
def test_is_numpy_indexing(case):
    table, ids = case
    taken = embax.take(table, ids)
    assert taken.shape == ids.shape + table.shape[1:] and taken.dtype == table.dtype
    assert np.array_equal(taken, table[ids])
    assert np.array_equal(taken, jnp.take(table, ids, axis=0))


@given(cases(outside=True))
def test_is_jnp_take_outside_too(case):
    table, ids = case
    assert np.array_equal(embax.take(table, ids), jnp.take(table, ids, axis=0), equal_nan=True)


@given(cases(outside=True))
def test_gradient_as_rows_is_the_dense_one(case):
    table, ids = case
    cotangents = np.random.default_rng(0).normal(size=ids.shape + table.shape[1:]).astype(np.float32)
    dense = jax.vjp(lambda t: embax.take(t, ids), jnp.asarray(table))[1](jnp.asarray(cotangents))[0]
    sparse = embax.take_gradient(ids, cotangents, vocabulary_size=len(table))
    rows = np.asarray(sparse.rows)
    real = rows[rows < len(table)]
    assert (np.diff(real) > 0).all() and (rows[len(real) :] == len(table)).all() and (real >= 0).all()
    np.testing.assert_allclose(sparse.to_dense(), dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sparse.norm(), jnp.linalg.norm(dense), rtol=1e-5, atol=1e-6)


def test_vmap_over_ids_tables_and_both():
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.normal(size=(3, 2, 7, 4)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 7, (3, 2, 5)))
    nested = jax.vmap(jax.vmap(embax.take))(tables, ids)
    over_tables = jax.vmap(embax.take, (0, None))(tables[0], ids[0, 0])
    over_ids = jax.vmap(embax.take, (None, 0))(tables[0, 0], ids[0])
    for i in range(3):
        for j in range(2):
            assert np.array_equal(nested[i, j], tables[i, j][ids[i, j]])
    assert np.array_equal(over_tables, np.stack([t[ids[0, 0]] for t in tables[0]]))
    assert np.array_equal(over_ids, tables[0, 0][ids[0]])


def test_gradient_under_vmap_and_nested_vmap():
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 7, (3, 2, 5)))
    cotangents = jnp.asarray(rng.normal(size=(3, 2, 5, 4)), jnp.float32)

    def gradient(i, c):
        return embax.take_gradient(i, c, vocabulary_size=7).to_dense()

    nested = jax.vmap(jax.vmap(gradient))(ids, cotangents)
    for i in range(3):
        for j in range(2):
            np.testing.assert_allclose(nested[i, j], gradient(ids[i, j], cotangents[i, j]), rtol=1e-6)


def test_differentiable_under_jit_and_vmap():
    table, ids = jnp.arange(12.0).reshape(6, 2), jnp.array([[1, 1, 5], [0, 1, 1]])

    def loss(table):
        return jax.vmap(lambda i: embax.take(table, i).sum())(ids).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(table)[:, 0], [1, 4, 0, 0, 0, 1])


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_high_arity_trains_like_dense(dim):
    """A million rows, narrow: the step from row gradients moves what the dense gradient would move."""
    rng, rows = np.random.default_rng(dim), 1_000_000
    ids = jnp.asarray(rng.integers(0, rows, (64, 3)))
    table = jnp.asarray(rng.normal(size=(rows, dim)), jnp.float32)
    cotangents = jnp.asarray(rng.normal(size=(64, 3, dim)), jnp.float32)
    state = embax.init_slots(embax.SGD(0.5), table)
    sparse = embax.take_gradient(ids, cotangents, vocabulary_size=rows)
    stepped = embax.apply_rows(embax.SGD(0.5), state, sparse).table
    wanted = np.array(table)
    np.subtract.at(wanted, np.asarray(ids).ravel(), 0.5 * np.asarray(cotangents).reshape(-1, dim))
    np.testing.assert_allclose(stepped, wanted, rtol=1e-6, atol=1e-6)


def test_integer_tables_and_one_row():
    assert embax.take(jnp.array([[1], [2]]), jnp.array([5]))[0, 0] == jnp.iinfo(jnp.int32).min
    assert np.array_equal(embax.take(jnp.ones((1, 2)), jnp.zeros((3,), jnp.int32)), np.ones((3, 2)))


@pytest.mark.parametrize("ids", [1.0, [True, False], [0.5]])
def test_ids_must_be_integers(ids):
    with pytest.raises(ValueError, match="Input type must be an integer or unsigned integer"):
        embax.take(jnp.ones((3, 2)), ids)


def test_cotangents_must_fit():
    with pytest.raises(ValueError, match=r"cotangents have shape \(2, 4\) for ids of shape \(3,\)"):
        embax.take_gradient(jnp.zeros(3, jnp.int32), jnp.ones((2, 4)), vocabulary_size=5)


@pytest.mark.parametrize("wide", [2**32 + 1, -(2**32) + 1, 2**63 - 1])
def test_64_bit_numpy_ids_do_not_wrap(wide):
    ids = np.array([wide, 1])
    assert np.isnan(embax.take(jnp.ones((4, 1)), ids)[:, 0]).tolist() == [True, False]
    assert embax.take_gradient(ids, jnp.ones((2, 1)), vocabulary_size=4).to_dense().ravel().tolist() == [0, 1, 0, 0]


def test_64_bit_ids_do_not_wrap():
    with jax.enable_x64(True):
        ids = jnp.array([2**32 + 1, 1, -(2**32) + 1], jnp.int64)
        gradient = embax.take_gradient(ids, jnp.ones((3, 1), jnp.float32), vocabulary_size=4)
        assert gradient.to_dense().ravel().tolist() == [0, 1, 0, 0]
        assert np.isnan(embax.take(jnp.ones((4, 1), jnp.float32), ids)[:, 0]).tolist() == [True, False, True]
