"""Random bits of a block of rows, made piece by piece: the same bits in less memory.

JAX's threefry makes all bits of an array at once. On CPU its counters, its state and their copies then take six times
the memory of the bits, and none of it stays in a cache.
"""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp

PIECE = 1 << 15  # numbers; six arrays of as many uint32 fit in a core's second cache


def in_pieces(key: jax.Array) -> jax.Array:
    """Returns ``key`` as one that gives the same bits, made piece by piece; keys of other generators as they are.

    >>> key = jax.random.key(7)
    >>> (jax.random.uniform(in_pieces(key), (300, 400)) == jax.random.uniform(key, (300, 400))).all().item()
    True
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or str(jax.random.key_impl(key)) != "threefry2x32":
        return key
    if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        return key  # a number's bits then depend on how many there are
    if not _same_bits():
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_implementation())


@functools.cache
def _same_bits() -> bool:
    """Returns whether this version of JAX makes bits as ``_bits`` does: what is saved in memory is not worth others."""
    with jax.ensure_compile_time_eval():
        return bool(jax.jit(_compared)(jax.random.key(7)))


def _compared(key: jax.Array) -> jax.Array:
    shape = (PIECE + 5,)
    return (_bits(jax.random.key_data(key), 32, shape) == jax.random.bits(key, shape)).all()


@functools.cache
def _implementation():
    return jax.extend.random.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
        split=lambda key, shape: jax.random.key_data(jax.random.split(_plain(key), shape)),
        random_bits=_bits,
        fold_in=lambda key, number: jax.random.key_data(jax.random.fold_in(_plain(key), number)),
        name="threefry2x32_in_pieces",
        tag="fryp",
    )


def _plain(key: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns ``jax.random.bits``: number i of an array is the two halves of the hash of the 64 bits of i, together."""
    total = math.prod(shape)
    if total <= PIECE or total >= 1 << 31 or width == 64:
        return jax.random.bits(_plain(key), shape, f"uint{width}")

    def write(number, made):
        first = jnp.minimum(number * PIECE, total - PIECE)  # the last piece makes some numbers again
        counts = first.astype(jnp.uint32) + jnp.arange(PIECE, dtype=jnp.uint32)
        hashed = jax.extend.random.threefry_2x32(key, jnp.concatenate([jnp.zeros_like(counts), counts]))
        piece = (hashed[:PIECE] ^ hashed[PIECE:]).astype(made.dtype)
        return jax.lax.dynamic_update_slice(made, piece, (first,))

    made = jnp.zeros(total, f"uint{width}")
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-total // PIECE)), write, made).reshape(shape)
