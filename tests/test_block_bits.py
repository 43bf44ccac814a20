"""Law: a key in pieces gives the numbers of its key, whatever is asked of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import embax
from embax import block_bits
from tests.helpers import feature, line_of, table_spec

PIECE = 64
SHAPES = [(), (5,), (PIECE,), (3 * PIECE,), (33, 8)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(block_bits, "PIECE", PIECE)


def _same(draw, key):
    np.testing.assert_array_equal(draw(block_bits.in_pieces(key)), draw(key))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_bits_are_the_same(dtype):
    for shape in SHAPES:
        _same(lambda key, shape=shape: jax.random.bits(key, shape, dtype), jax.random.key(3))


@pytest.mark.parametrize(
    "draw",
    [
        lambda key: jax.random.normal(key, (33, 8)),
        lambda key: jax.random.truncated_normal(key, -2, 2, (33, 8), jnp.float16),
        lambda key: jax.random.uniform(jax.random.fold_in(key, 2), (33, 8), jnp.bfloat16),
        lambda key: jax.random.randint(jax.random.split(key, 3)[1], (33, 8), 0, 1000),
        lambda key: jax.vmap(lambda key: jax.random.gumbel(key, (33, 8)))(jax.random.split(key, 3)),
        lambda key: jax.random.permutation(key, 200),
    ],
)
def test_numbers_are_the_same(draw):
    _same(draw, jax.random.key(7))


def test_other_keys_stay_as_they_are():
    keys = jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0)
    assert all(block_bits.in_pieces(key) is key for key in keys)
    with jax.threefry_partitionable(False):
        key = jax.random.key(0)
        assert block_bits.in_pieces(key) is key


def test_a_jax_of_other_bits_keeps_its_own(monkeypatch):
    key = jax.random.key(0)
    monkeypatch.setattr(block_bits, "_same_bits", lambda: False)
    assert block_bits.in_pieces(key) is key


def _normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


def _particular(key, shape, dtype):
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise NotImplementedError("as jax.random.poisson says")
    return _normal(key, shape, dtype)


@pytest.mark.parametrize("initializer", [_normal, _particular])
def test_tables_on_a_mesh_start_as_on_one_device(initializer):
    table = table_spec("a", 2000, 8, initializer=initializer)
    wanted = embax.init(embax.plan(feature(table)), jax.random.key(0))["a"].table
    plan = embax.plan(feature(table), mesh=line_of(2))
    found = embax.to_arrays(plan, embax.init(plan, jax.random.key(0)))["a"]["table"]
    np.testing.assert_array_equal(found, wanted)
