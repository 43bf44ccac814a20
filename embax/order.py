"""Stable order of row numbers, by sorts that every XLA backend does well."""

import jax
import jax.numpy as jnp


def stable_order(keys: jax.Array, bound: int) -> jax.Array:
    """Returns the positions of ``keys`` in ascending order, equal keys in order of position.

    XLA's sort of one 32-bit operand is several times faster than that of a key and its position together (on CPU
    6 ms against 35 ms for 163,840 keys). So a few bits of the key and the position are packed into one word, and the
    keys are sorted digit by digit, least significant first.

    Args:
      keys: int32 ``[n]``, in ``[0, bound]``.
      bound: the largest key (static).

    >>> import jax.numpy as jnp
    >>> stable_order(jnp.array([5, 3, 6, 6, 3, 0]), 6).tolist()
    [5, 1, 4, 0, 2, 3]
    """
    count = keys.shape[0]
    position_bits = max(1, (count - 1).bit_length())
    digit_bits = 32 - position_bits
    passes = -(-max(1, bound.bit_length()) // digit_bits)
    if passes > 3:
        return jnp.argsort(keys, stable=True).astype(jnp.int32)
    words = keys.astype(jnp.uint32)
    positions = jnp.arange(count, dtype=jnp.uint32)
    order = positions
    for digit in range(passes):
        bits = (words[order] if digit else words) >> (digit * digit_bits)
        packed = jax.lax.sort((bits << position_bits) | positions, is_stable=False)
        order = order[packed & ((1 << position_bits) - 1)]
    return order.astype(jnp.int32)
