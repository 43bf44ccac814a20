"""RowGradients against dense gradients: sums, merging, norms, clipping, micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, table_spec
from hypothesis import given
from hypothesis import strategies as st

import embax
from embax.row_gradients import sum_rows
from embax.sorted_rows import stable_order

pytestmark = pytest.mark.once


@given(
    st.tuples(st.sampled_from([1, 100, 2**16, 10**7, 2**31 - 2]), st.sampled_from([1, 2, 80])).flatmap(
        lambda p: st.tuples(st.just(p[0]), st.lists(st.integers(0, p[0]), min_size=p[1], max_size=p[1]))
    )
)
def test_stable_order_is_a_stable_argsort(case):
    bound, keys = case
    keys = np.array(keys, np.int32)
    assert np.array_equal(stable_order(jnp.asarray(keys), bound), np.argsort(keys, kind="stable"))


def test_stable_order_of_many_keys():
    keys = np.random.default_rng(0).integers(0, 10_000_001, 70_001).astype(np.int32)
    assert np.array_equal(stable_order(jnp.asarray(keys), 10_000_000), np.argsort(keys, kind="stable"))


def _random(rng, size, rows=9, dim=3):
    return jnp.asarray(rng.integers(-2, rows + 3, size), jnp.int32), jnp.asarray(
        rng.normal(size=(size, dim)), jnp.float32
    )


def _dense(rows, values, size=9):
    out = np.zeros((size, values.shape[1]))
    for row, value in zip(np.asarray(rows), np.asarray(values, np.float64), strict=True):
        if 0 <= row < size:
            out[row] += value
    return out


@given(st.sampled_from([0, 1, 7, 40]), st.sampled_from([0, 3, 40]), st.integers(0, 1000))
def test_sums_and_merges_are_dense_sums(first, second, seed):
    rng = np.random.default_rng(seed)
    a, b = _random(rng, first), _random(rng, second)
    one, two = sum_rows(*a, 9), sum_rows(*b, 9)
    both = one + two
    np.testing.assert_allclose(one.to_dense(), _dense(*a), atol=1e-5)
    np.testing.assert_allclose(both.to_dense(), _dense(*a) + _dense(*b), atol=1e-5)
    rows = np.asarray(both.rows)
    real = rows[rows < 9]
    assert (np.diff(real) > 0).all() and (rows[len(real) :] == 9).all() and both.count() == len(real)
    assert not np.asarray(both.values)[len(real) :].any()


def test_scale_norm_and_clip():
    rng = np.random.default_rng(0)
    rows, values = _random(rng, 30)
    gradient = sum_rows(rows, values, 9)
    dense = np.asarray(gradient.to_dense())
    norm = np.linalg.norm(dense)
    np.testing.assert_allclose(gradient.norm(), norm, rtol=1e-6)
    np.testing.assert_allclose(gradient.scale(2.5).to_dense(), 2.5 * dense, rtol=1e-6)
    np.testing.assert_allclose(gradient.clip(norm / 2).norm(), norm / 2, rtol=1e-5)
    np.testing.assert_array_equal(gradient.clip(norm * 2).values, gradient.values)
    nothing = sum_rows(rows, jnp.zeros_like(values), 9).clip(1.0)
    assert np.isfinite(nothing.values).all() and nothing.norm() == 0


def _plan():
    return embax.plan(feature(table_spec(optimizer=embax.Adagrad(0.1)), inputs=(None, 3)), backend="reference")


def test_micro_batches_are_one_batch():
    """A scan over micro-batches, merged, takes the very step of the whole batch."""
    plan, rng = _plan(), np.random.default_rng(0)
    tables = embax.init(plan, jax.random.key(0))
    ids, weights = rng.integers(0, 50, (4, 8, 3)), jnp.asarray(rng.normal(size=(4, 8, 4)), jnp.float32)

    def gradients_of(batch, weight):
        activations, residuals = embax.lookup(plan, tables, batch)
        act_grads = jax.grad(lambda a: (a * a * weight).sum())(activations)
        return embax.row_gradients(plan, residuals, act_grads)["item"]

    micro = [embax.preprocess(plan, i) for i in ids]
    stacked = jax.tree.map(lambda *x: np.stack(x), *micro)
    _, gradients = jax.lax.scan(lambda c, x: (c, gradients_of(*x)), 0, (stacked, weights))
    merged = embax.apply_row_gradients(plan, tables, {"item": embax.merge_row_gradients(gradients)}, 0)
    whole = gradients_of(embax.preprocess(plan, ids.reshape(32, 3)), weights.reshape(32, 4))
    once = embax.apply_row_gradients(plan, tables, {"item": whole}, 0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), merged, once)


def test_update_is_row_gradients_applied():
    plan, rng = _plan(), np.random.default_rng(0)
    tables = embax.init(plan, jax.random.key(0))
    activations, residuals = embax.lookup(plan, tables, embax.preprocess(plan, rng.integers(0, 50, (9, 3))))
    one = embax.update(plan, tables, residuals, activations, 0)
    two = embax.apply_row_gradients(plan, tables, embax.row_gradients(plan, residuals, activations), 0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), one, two)


def test_equal_to_the_dense_gradient_of_the_lookup():
    plan, rng = _plan(), np.random.default_rng(0)
    tables = embax.init(plan, jax.random.key(0))
    batch, weight = (
        embax.preprocess(plan, rng.integers(0, 50, (9, 3))),
        jnp.asarray(rng.normal(size=(9, 4)), jnp.float32),
    )

    def loss(table):
        state = {"item": embax.TableState(table, tables["item"].slots)}
        return (jnp.tanh(embax.lookup(plan, state, batch)[0]) * weight).sum()

    dense = jax.grad(loss)(tables["item"].table)
    activations, residuals = embax.lookup(plan, tables, batch)
    act_grads = jax.grad(lambda a: (jnp.tanh(a) * weight).sum())(activations)
    sparse = embax.row_gradients(plan, residuals, act_grads)["item"]
    np.testing.assert_allclose(sparse.to_dense(), dense, rtol=1e-5, atol=1e-6)


def test_a_stray_tree_map_is_named():
    plan = _plan()
    tables = embax.init(plan, jax.random.key(0))
    activations, residuals = embax.lookup(plan, tables, embax.preprocess(plan, np.zeros((2, 3), int)))
    gradients = embax.row_gradients(plan, residuals, activations)
    scaled = jax.tree.map(lambda x: x.astype(jnp.float32) * 0.5, gradients)
    with pytest.raises(TypeError, match='stack "item": the rows of a RowGradients are float32; they must be integers'):
        embax.apply_row_gradients(plan, tables, scaled, 0)
    with pytest.raises(TypeError, match="ArrayImpl is not an embax.RowGradients"):
        embax.apply_row_gradients(plan, tables, {"item": activations}, 0)
    with pytest.raises(KeyError, match="no stack 'user'; the plan has 'item'"):
        embax.apply_row_gradients(plan, tables, {"user": gradients["item"]}, 0)


def test_gradients_of_different_tables_do_not_add():
    one = sum_rows(jnp.array([1]), jnp.ones((1, 2)), 5)
    with pytest.raises(ValueError, match=r"gradients of tables of \[5, 6\] rows cannot be added"):
        _ = one + sum_rows(jnp.array([1]), jnp.ones((1, 2)), 6)
