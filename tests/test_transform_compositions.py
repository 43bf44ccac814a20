"""Transformations in any order around a lookup: the gradient is that of the dense table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embax

pytestmark = pytest.mark.once

VOCABULARY, DIM = 7, 2
TABLE = jax.random.normal(jax.random.key(0), (VOCABULARY, DIM))
IDS = jnp.array([[1, 6, 6], [-1, 0, 3]])


def base(table, ids, x):
    # Rows outside of the vocabulary are NaN in both; they are replaced, and must train nothing.
    return jnp.sum(jnp.tanh(x * jnp.nan_to_num(embax.take(table, ids))))


def jit(f):
    return jax.jit(f)


def remat(f):
    return jax.checkpoint(f)


def remat_saving_dots(f):
    return jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)


def vmap_scalar(f):
    return lambda t, i, x: jnp.sum(jax.vmap(f, (None, None, 0))(t, i, jnp.stack([x, 2 * x])))


def vmap_ids(f):
    return lambda t, i, x: jnp.sum(jax.vmap(f, (None, 0, None), axis_size=2)(t, jnp.stack([i, i + 1]), x))


def vmap_everything(f):
    return lambda t, i, x: jnp.sum(jax.vmap(f, (None, 0, 0))(t, jnp.stack([i, 2 * i]), jnp.stack([x, -x])))


def scan(f):
    def step(t, i, c, k):
        return jnp.tanh(c + f(t, i + k, c)), c

    return lambda t, i, x: jax.lax.scan(functools.partial(step, t, i), x, jnp.arange(2, dtype=jnp.int32))[0]


def scan_backwards(f):
    def step(t, carry, i):
        return (carry[0] + 1, jnp.tanh(carry[1] * f(t, i, carry[1]))), carry[1]

    def run(t, i, x):
        carry, seen = jax.lax.scan(functools.partial(step, t), (0, x), jnp.stack([i, i - 1]), reverse=True)
        return carry[1] + jnp.sum(seen)

    return run


def fori(f):
    return lambda t, i, x: jax.lax.fori_loop(0, 2, lambda k, c: jnp.tanh(c + f(t, i + k, c)), x)


def cond(f):
    return lambda t, i, x: jax.lax.cond(x > 0, lambda: f(t, i, x), lambda: x * f(t, i + 1, 2 * x))


def switch(f):
    branches = [lambda t, i, x: x, f, lambda t, i, x: f(t, i, x) + f(t, i + 2, x)]
    return lambda t, i, x: jax.lax.switch(jnp.sum(i) % 3, branches, t, i, x)


def twice(f):
    return lambda t, i, x: f(t, i, x) * f(t, 2 * i, x)


def table_in_the_carry(f):
    def step(carry, k):
        t, i, c = carry
        return (t, i, jnp.tanh(c + f(t, i + k, c))), None

    return lambda t, i, x: jax.lax.scan(step, (t, i, x), jnp.arange(2, dtype=jnp.int32))[0][2]


def unused_loop(f):
    def run(t, i, x):
        loop = jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(t, i, c[1])), (0, x))
        return f(t, i, x) + jax.lax.stop_gradient(loop[1])

    return run


def inner_derivative(f):
    return lambda t, i, x: jax.grad(f, 2)(t, i, x)


def forward_derivative(f):
    return lambda t, i, x: jax.jvp(lambda x: f(t, i, x), (x,), (jnp.float32(1),))[1]


# A while loop has no reverse mode, so a derivative around it would raise in dense JAX too.
ANYWHERE = [jit, remat, remat_saving_dots, vmap_scalar, vmap_ids, vmap_everything, scan, scan_backwards, fori, cond]
ANYWHERE += [switch, twice, table_in_the_carry]
INNERMOST = [inner_derivative, forward_derivative, unused_loop]


COMPOSITIONS = (
    st.lists(st.sampled_from(ANYWHERE), min_size=1, max_size=3),
    st.lists(st.sampled_from(INNERMOST), max_size=1),
    st.sampled_from([0.7, -0.4]),
)


@given(*COMPOSITIONS)
def test_any_composition_has_the_dense_gradient(outer, inner, x):
    check_composition(outer, inner, x)


@pytest.mark.nightly
@settings(max_examples=200)
@given(*COMPOSITIONS)
def test_many_compositions_have_the_dense_gradient(outer, inner, x):
    check_composition(outer, inner, x)


def copies_the_table(outer):
    """Returns whether a vmap stands around a cond."""
    inside = [place for place, transform in enumerate(outer) if transform in (cond, switch)]
    return any(transform.__name__.startswith("vmap") for transform in outer[min(inside, default=len(outer)) :])


def check_composition(outer, inner, x):
    f = base
    for transform in [*inner, *outer]:
        f = transform(f)
    x = jnp.float32(x)
    value, (table, scale) = jax.jit(jax.value_and_grad(f, (0, 2)))(TABLE, IDS, x)
    given_table = embax.Table(TABLE, embax.SGD(0.1), "word")
    try:
        got, (rows, got_scale) = jax.jit(embax.value_and_grad(f, (0, 2)))(given_table, IDS, x)
    except embax.SparseGradientError as error:
        # JAX makes a select of such a cond, and copies of whatever its branches read.
        assert "vmap of a cond" in str(error) and copies_the_table(outer), outer
        return
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(got_scale, scale, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(rows.to_dense(), table, rtol=2e-4, atol=1e-5)
    assert np.all(np.diff(rows.rows[: int(rows.count())]) > 0)


@settings(max_examples=8)
@given(COMPOSITIONS[0])
def test_a_plain_gradient_raises_in_any_composition(outer):
    f = base
    for transform in outer:
        f = transform(f)
    for warm in (False, True):
        if warm:
            jax.jit(f)(embax.Table(TABLE, embax.SGD(0.1)), IDS, jnp.float32(0.5))
        try:
            jax.grad(f)(embax.Table(TABLE, embax.SGD(0.1), "word"), IDS, jnp.float32(0.5))
        except embax.SparseGradientError as error:
            assert 'table "word"' in str(error) and "embax.value_and_grad" in str(error)
        else:
            raise AssertionError("a plain gradient of a table was returned")
