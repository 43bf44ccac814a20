"""Occurrences of rows, sorted and added up: what every update and every sparse gradient is made of.

The sorted occurrences are walked in chunks, so that temporaries stay in cache and do not grow with the batch; on GPUs
chunks are wide, and most batches are one. Six occurrences in chunks of 4; ``part`` is the carried, unfinished sum::

    sorted rows   0 3 3 5 | 6 6        values  f b e a | c d
    chunk 0: running sums f, b, b + e, a; rows 0, 3, 5 end here (the row after 5 is another); part = 0
    chunk 1: running sums c, c + d; row 6 ends here

A row whose occurrences cross a boundary is carried over, and shown once, where its last occurrence stands. There is no
scatter-add: sums are made by doubling steps within a run, in an order that depends on nothing but the input.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# On CPU a chunk of rows fits the second-level cache; elsewhere width is speed, and the bound is one of memory.
CPU_CHUNK = 4096
WIDE_CHUNK = 1 << 20


def by_platform(function: Callable, *operands: Any) -> Any:
    """Returns ``function(limit, *operands)`` with the largest chunk of the platform that the program is lowered for.

    That is not always the platform at hand: a program may be exported for a GPU on a machine without one.
    """
    cpu, wide = functools.partial(function, CPU_CHUNK), functools.partial(function, WIDE_CHUNK)
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=wide)


def in_order(keys: jax.Array, bound: int) -> tuple[jax.Array, jax.Array]:
    """Returns the keys in ascending order and their positions, equal keys in order of position.

    XLA makes one radix sort (CUB's) of a stable sort of two operands on GPUs, where there are more than some 20,000.

    Args:
      keys: int32 ``[n]``, in ``[0, bound]``.
      bound: the largest key (static).
    """

    def packed(keys):
        order = stable_order(keys, bound)
        return keys[order], order

    def paired(keys):
        # A third operand, or the position as a second key, would keep XLA from the radix sort.
        places = jnp.arange(keys.shape[0], dtype=jnp.int32)
        keys, order = jax.lax.sort((keys, varying_with(places, keys)), num_keys=1, is_stable=True)
        return keys, order

    return jax.lax.platform_dependent(keys, cpu=packed, default=paired)


def stable_order(keys: jax.Array, bound: int) -> jax.Array:
    """Returns the positions of ``keys`` in ascending order, equal keys in order of position: the form for CPU.

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


def walk(
    keys: jax.Array, bound: int, width: int, values_at: Callable[[jax.Array], jax.Array], visit: Callable, state: Any
) -> Any:
    """Returns ``state`` after every distinct row was shown once, with the sum of its occurrences.

    Args:
      keys: int32 ``[n]``, n > 0: the row of each occurrence, in ``[0, bound]``; ``bound`` is no row.
      bound: rows of the table (static).
      width: embedding_dim (static).
      values_at: maps int32 ``[m]`` places in ``keys`` to their float32 values ``[m, width]``.
      visit: ``(state, rows, sums, ranks) -> state`` for int32 ``[m]`` rows, of which only those below ``bound`` count
        (they are distinct), float32 ``[m, width]`` sums, and the rank of each row among all rows there are.
      state: a pytree.
    """
    return walk_in_order(*in_order(keys, bound), bound, width, values_at, visit, state)


def walk_in_order(
    keys: jax.Array,
    order: jax.Array,
    bound: int,
    width: int,
    values_at: Callable[[jax.Array], jax.Array],
    visit: Callable,
    state: Any,
) -> Any:
    """Returns ``walk`` of keys that rise already; ``order`` says which place each of them has for ``values_at``."""

    def chunks(limit, keys, order, state):
        chunk = min(keys.shape[0], limit)
        keys, order = padded(keys, chunk, bound), padded(order, chunk, 0)
        following = jnp.append(keys[1:], bound)

        def body(index, carry):
            state, part, before = carry
            rows, places, after = (
                jax.lax.dynamic_slice(x, (index * chunk,), (chunk,)) for x in (keys, order, following)
            )
            starts = jnp.append(False, rows[1:] != rows[:-1])
            sums = run_sums(starts, values_at(places).at[0].add(part, unique_indices=True))
            ends = rows != after
            ranks = before + jnp.cumsum(starts, dtype=jnp.int32)
            state = visit(state, jnp.where(ends, rows, bound), sums, ranks)
            return state, jnp.where(ends[-1], 0.0, sums[-1]), ranks[-1] + ends[-1].astype(jnp.int32)

        used = jnp.sum(keys < bound, dtype=jnp.int32)
        start = (state, jnp.zeros(width, jnp.float32), jnp.int32(0))
        start = varying_with(start, order, values_at(order[:chunk]))
        return in_chunks(limit, chunk, keys.shape[0], used, body, start)[0]

    return by_platform(chunks, keys, order, state)


def in_chunks(limit: int, chunk: int, count: int, used: jax.Array, body: Callable, start: Any) -> Any:
    """Returns what ``body(index, carry)`` makes of ``start``, over chunks with the first ``used`` of ``count`` in them.

    One wide chunk takes no loop, in which a device would have to tell the host whether to go on.
    """
    if limit > CPU_CHUNK and chunk == count:
        return body(jnp.int32(0), start)
    return jax.lax.fori_loop(0, -(-used // chunk), body, start)


def run_sums(starts: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the running sums of ``values`` ``[m, D]`` within runs; ``starts`` ``[m]`` says where a run begins.

    As many passes as the longest run has binary digits: none where every row occurs once.

    >>> import jax.numpy as jnp
    >>> run_sums(jnp.array([True, True, False, True, False]), jnp.array([[1.0], [2], [3], [4], [5]])).ravel().tolist()
    [1.0, 2.0, 5.0, 4.0, 9.0]
    """
    places = jnp.arange(values.shape[0], dtype=jnp.int32)
    depth = places - jax.lax.cummax(jnp.where(starts, places, 0))

    def double(carry):
        shift, sums = carry
        earlier = sums[jnp.maximum(places - shift, 0)]
        return 2 * shift, sums + jnp.where((depth >= shift)[:, None], earlier, 0)

    longest = jnp.max(depth)
    return jax.lax.while_loop(lambda carry: carry[0] <= longest, double, (jnp.int32(1), values))[1]


def varying_with(tree: Any, *likes: Any) -> Any:
    """Returns ``tree`` in the type of what it is added to inside of a shard_map: varying along the axes of ``likes``.

    A loop that carries it would else have another type after its first turn. Elsewhere nothing changes.
    """
    axes = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves((tree, likes))))
    if not axes:
        return tree

    def cast(leaf):
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def varying_axes(array: Any) -> frozenset:
    """Returns the mesh axes of the shard_map around along which ``array`` differs from device to device."""
    kind = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", ()))


def padded(array: jax.Array, chunk: int, fill: Any) -> jax.Array:
    """Returns ``array`` filled up to a multiple of ``chunk``."""
    missing = -array.shape[0] % chunk
    return jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)), constant_values=fill)
