"""Stochastic rounding to 16 bits: up with the probability of what is cut off, by random bits that are a pure function.

A small step added to a 16-bit number is lost when it is rounded to nearest; rounded at random it is kept in the mean.
The bits depend on a seed for the step, the row and the column, so a step can be repeated exactly, on any backend and
any number of threads. csrc/numbers.h computes the same.
"""

from typing import Any

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def mixed(bits: jax.Array) -> jax.Array:
    """Returns uint32 ``bits`` well spread: the finalizer of MurmurHash3.

    >>> import jax.numpy as jnp
    >>> int(mixed(jnp.uint32(1)))
    1364076727
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def step_seed(seed: int, step: Any) -> jax.Array:
    """Returns the uint32 seed of one step, counted from 0."""
    step = jnp.asarray(step).astype(jnp.uint32)
    return mixed(step + mixed(jnp.uint32(seed & 0xFFFFFFFF)))


def rounded(values: jax.Array, rows: jax.Array, dtype: Any, seed: jax.Array) -> jax.Array:
    """Returns float32 ``values`` ``[n, D]`` of ``rows`` ``[n]`` in a 16-bit ``dtype``.

    >>> import jax.numpy as jnp
    >>> many = rounded(jnp.full((4096, 1), 1 + 2**-9), jnp.arange(4096), jnp.bfloat16, jnp.uint32(7))
    >>> abs(float(many.astype(jnp.float32).mean()) - (1 + 2**-9)) < 2**-12
    True
    """
    columns = jnp.arange(values.shape[1], dtype=jnp.uint32)
    by_row = mixed(seed + rows.astype(jnp.uint32) * jnp.uint32(_GOLDEN))
    random = mixed(by_row[:, None] + (columns * jnp.uint32(_GOLDEN))[None, :])
    make = {"bfloat16": _to_bfloat16, "float16": _to_float16}[jnp.dtype(dtype).name]
    return make(values.astype(jnp.float32), random)


def _to_bfloat16(values: jax.Array, random: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    cut = ((bits + (random & 0xFFFF)) >> 16).astype(jnp.uint16)
    return jnp.where(jnp.isfinite(values), jax.lax.bitcast_convert_type(cut, jnp.bfloat16), values.astype(jnp.bfloat16))


def _to_float16(values: jax.Array, random: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign, magnitude = bits & jnp.uint32(0x80000000), bits & jnp.uint32(0x7FFFFFFF)
    # Normal numbers: 13 bits of the significand are cut off. Below 2^-14 float16 holds the multiples of 2^-24.
    normal = jax.lax.bitcast_convert_type(
        sign | ((magnitude + (random & 0x1FFF)) & jnp.uint32(0xFFFFE000)), jnp.float32
    )
    units = jnp.abs(values) * 2.0**24 + (random >> 8).astype(jnp.float32) * 2.0**-24
    small = jnp.where(sign > 0, -1.0, 1.0) * jnp.trunc(units) * 2.0**-24
    chosen = jnp.where(magnitude >= 0x38800000, normal, small)
    return jnp.where(magnitude >= 0x47800000, values, chosen).astype(jnp.float16)
