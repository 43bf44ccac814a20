"""Rows dealt out over devices; each distinct row goes once to every device whose samples need it.

A device sorts its ids by owner, asks the owners for its distinct rows, and adds them up itself, to the bits of one
device. In the update it sums the gradients of each of them and sends the sums to the owners. Six ids of one of 2
devices, a stack of 6 rows dealt out by row % 2: 3 rows on each, so that row r has the key ``r % 2 * 3 + r // 2``::

    ids     4 1 4 5 1 0
    keys    2 3 2 5 3 0
    unique  0 2 | 3 5       the rows 0 and 2 of device 0, 0 and 2 of device 1
    places  1 2 1 3 2 0     which of them each id is

What one device asks of another travels in blocks of a fixed size, in as many rounds as are needed: one where ids are
spread evenly. Nothing is lost, and nothing is to be tuned. In an update all devices send an owner what they have of the
same rows in the same round, so that a row takes one step of its optimizer. One owner's rows, in blocks of 2::

    device 0   1 2 | 3 8    a round ends before the first row for which a device's block is too small, here 3
    device 1   2   | 4 9
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from embax import kernels
from embax.exchange import gather
from embax.exchange.shards import Here, local_stack, on_wire, owners, pooled, seeded_here, together
from embax.id_batch import StackIds, bucket
from embax.placement import Devices
from embax.planning import StackPlan
from embax.row_gradients import RowGradients
from embax.sorted_rows import varying_with
from embax.table_state import TableState


def lookup(here: Here, table: Any, ids: StackIds) -> jax.Array:
    """Returns the activations of this device's samples, ``[samples, embedding_dim]`` of all features together."""
    backend = here.backend
    way = _way(here, ids)
    if way is None or hasattr(table, "lookup_pooled"):  # quantized rows pool themselves
        return gather.lookup(here, table, ids)
    return pooled(backend, *_fetched(way, table, together(ids)))


def update(
    here: Here, state: TableState, ids: StackIds, token: jax.Array, gradient: jax.Array, hyper: Any
) -> TableState:
    """Returns this device's rows after one step on those that anybody's samples touched."""
    stack, devices, backend = here
    way = _way(here, ids)
    if way is None:
        return gather.update(here, state, ids, token, gradient, hyper)
    kernel, hyper = kernels.get(backend), seeded_here(hyper, devices.table_axes)
    keyed = dataclasses.replace(stack, rows=stack.stored_rows)
    own = kernel.row_gradients(keyed, dataclasses.replace(ids, ids=_keys(stack, ids)[1]), token, (gradient,))
    begins = way.begins(own.rows)

    def turn(carry):
        state, begin, _ = carry
        # The first row of each owner that no longer fits, for whoever has the least room.
        after = begin + way.size
        beyond = own.rows[jnp.minimum(after, way.room - 1)] - way.first_keys()
        bound = jax.lax.pmin(jnp.where(after < begins[1:], beyond, stack.local_rows), devices.batch_axes)
        end = jnp.searchsorted(own.rows, way.first_keys() + bound).astype(jnp.int32)
        block = way.block(begin, end)
        rows = way.sent(way.local_rows(own.rows, block))
        values = way.sent(on_wire(devices, way.cut(own.values, block)))
        if devices.copies_axes:
            rows, values = (jax.lax.all_gather(part, devices.copies_axes) for part in (rows, values))
        one_each = _one_each(rows.reshape(-1))
        values = values.reshape(-1, stack.embedding_dim)
        state = kernel.update(local_stack(stack), state, one_each, token, (values,), hyper)
        return varying_with((state, end, jnp.any(bound < stack.local_rows)), own)

    start = varying_with((state, begins[:-1], jnp.bool_(True)), own)
    return turn(start)[0] if way.single else jax.lax.while_loop(lambda carry: carry[2], turn, start)[0]


def row_gradients(here: Here, ids: StackIds, token: jax.Array, gradient: jax.Array) -> RowGradients:
    """Returns the gradient of this device's rows, by their numbers here."""
    return gather.row_gradients(here, ids, token, gradient)


def gain_products(here: Here, table: Any, ids: StackIds, cotangent: jax.Array) -> jax.Array:
    """Returns the derivatives of the gains of this device's ids, from those of its activations."""
    backend = here.backend
    way = _way(here, ids)
    if way is None or hasattr(table, "lookup_pooled"):
        return gather.gain_products(here, table, ids, cotangent)
    return kernels.get(backend).row_products(*_fetched(way, table, together(ids)), cotangent)


class _Block(NamedTuple):
    """For each owner ``size`` neighbours among a device's distinct rows, and which of them are meant.

    Attributes:
      first: int32 ``[shards]``, where the block begins.
      places: int32 ``[shards, size]``, always places that there are.
      valid: bool ``[shards, size]``.
    """

    first: jax.Array
    places: jax.Array
    valid: jax.Array


class _Way(NamedTuple):
    """How rows of a stack travel: ``room`` distinct rows at most, ``size`` of an owner in a round. Static."""

    stack: StackPlan
    devices: Devices
    backend: str
    room: int
    size: int

    @property
    def single(self) -> bool:
        """Whether one round is enough, whatever the ids are."""
        return self.size >= min(self.room, self.stack.local_rows)

    @property
    def slots(self) -> int:
        """Rows that a round brings; never fewer than ``room``."""
        return self.stack.shards * self.size

    def first_keys(self) -> jax.Array:
        """Returns the key of each owner's first row, int32 ``[shards]``."""
        return jnp.arange(self.stack.shards, dtype=jnp.int32) * self.stack.local_rows

    def begins(self, unique: jax.Array) -> jax.Array:
        """Returns where each owner's rows begin among rising keys, and where the last one's end, ``[shards + 1]``."""
        keys = jnp.append(self.first_keys(), jnp.int32(self.stack.stored_rows))
        return jnp.searchsorted(unique, keys).astype(jnp.int32)

    def block(self, begin: jax.Array, end: jax.Array) -> _Block:
        """Returns the first ``size`` places of ``[begin, end)`` for each owner."""
        first = jnp.minimum(begin, self.room - self.size)
        places = first[:, None] + jnp.arange(self.size, dtype=jnp.int32)[None]
        last = jnp.minimum(end, begin + self.size)
        return _Block(first, places, (places >= begin[:, None]) & (places < last[:, None]))

    def local_rows(self, unique: jax.Array, block: _Block) -> jax.Array:
        """Returns the rows of a block by their numbers at their owners, ``local_rows`` where there is none."""
        return jnp.where(block.valid, unique[block.places] - self.first_keys()[:, None], self.stack.local_rows)

    def cut(self, values: jax.Array, block: _Block) -> jax.Array:
        """Returns the places of a block among ``values``, ``[shards, size, ...]``; all of them, valid or not."""
        firsts = [block.first[owner] for owner in range(self.stack.shards)]
        return jnp.stack([jax.lax.dynamic_slice_in_dim(values, first, self.size) for first in firsts])

    def sent(self, blocks: jax.Array) -> jax.Array:
        """Returns, from a block for each device, the blocks that all devices have for this one."""
        dtype, axes = blocks.dtype, self.devices.table_axes
        if dtype.itemsize == 2:  # XLA's CPU backend would send bfloat16 as float32
            blocks = jax.lax.bitcast_convert_type(blocks, jnp.uint16)
        blocks = jax.lax.all_to_all(blocks, axes, 0, 0, tiled=True)
        return blocks if dtype.itemsize != 2 else jax.lax.bitcast_convert_type(blocks, dtype)


def _way(here: Here, ids: StackIds) -> _Way | None:
    """Returns how the rows travel; None where none does, for there is one device or no id."""
    stack, devices, backend = here
    room = min(ids.ids.shape[0], stack.stored_rows)
    if stack.shards == 1 or not room:
        return None
    # A quarter more than an even share, which ids that are spread by chance do not exceed.
    size = bucket(-(-5 * room // (4 * stack.shards)))
    return _Way(stack, devices, backend, room, min(size, room, stack.local_rows))


def _keys(stack: StackPlan, ids: StackIds) -> tuple[jax.Array, jax.Array]:
    """Returns each id's owner and its key, which rises with the owner; ``shards`` and ``stored_rows`` if absent."""
    used = jnp.arange(ids.ids.shape[0], dtype=jnp.int32) < ids.offsets[-1]
    owner, local = owners(stack, jnp.where(used, ids.ids, stack.rows))
    return owner, jnp.where(owner < stack.shards, owner * stack.local_rows + local, stack.stored_rows)


def _one_each(rows: jax.Array) -> StackIds:
    """Returns samples of one id each."""
    count = rows.shape[0]
    return StackIds(rows, jnp.arange(count + 1, dtype=jnp.int32), None, (count,), (1,))


def _fetched(way: _Way, table: jax.Array, ids: StackIds) -> tuple[StackPlan, jax.Array, StackIds]:
    """Returns this device's distinct rows as a small table, with its stack, and its ids as rows of it."""
    stack = way.stack
    owner, keys = _keys(stack, ids)
    unique, places = kernels.get(way.backend).distinct_rows(keys, stack.stored_rows)
    begins = way.begins(unique)
    block = way.block(begins[:-1], begins[1:])
    # One round leaves the rows in the blocks that they came in; several put them together.
    owner = jnp.minimum(owner, stack.shards - 1)
    slots = owner * way.size + places - block.first[owner]
    if way.single:
        rows = _brought(way, table, unique, block)
    else:
        most = jnp.max(-(-(begins[1:] - begins[:-1]) // way.size))
        rounds = jax.lax.pmax(most, way.devices.batch_axes)
        rows = _in_rounds(way, table, unique, begins, rounds)
        slots = jnp.where(rounds > 1, places, slots)
    slots = jnp.where(places < way.room, slots, way.slots)
    return dataclasses.replace(local_stack(stack), rows=way.slots), rows, dataclasses.replace(ids, ids=slots)


def _in_rounds(way: _Way, table: jax.Array, unique: jax.Array, begins: jax.Array, rounds: jax.Array) -> jax.Array:
    """Returns the rows ``unique``, ``[slots, embedding_dim]``: in blocks by owner after one round, else one by one."""

    def once():
        return varying_with(_brought(way, table, unique, way.block(begins[:-1], begins[1:])), table, unique)

    def often():
        start = varying_with((jnp.int32(0), jnp.zeros((way.slots, table.shape[1]), table.dtype)), table, unique)
        return jax.lax.while_loop(lambda carry: carry[0] < rounds, turn, start)[1]

    def turn(carry):
        number, kept = carry
        block = way.block(begins[:-1] + number * way.size, begins[1:])
        blocks = _brought(way, table, unique, block).reshape(*block.places.shape, -1)
        return number + 1, jax.lax.fori_loop(
            jnp.int32(0), jnp.int32(way.stack.shards), functools.partial(_put, block, blocks), kept
        )

    return jax.lax.cond(rounds > 1, often, once)


def _brought(way: _Way, table: jax.Array, unique: jax.Array, block: _Block) -> jax.Array:
    """Returns the rows of a block from their owners, ``[slots, embedding_dim]``; anything where there is none."""
    asked, take = way.sent(way.local_rows(unique, block)), kernels.get(way.backend).take
    # One call for each device that asks: of one array for all, every block would be copied before it is sent.
    blocks = jnp.stack([take(table, asked[device]) for device in range(way.stack.shards)])
    return way.sent(blocks).reshape(way.slots, -1)


def _put(block: _Block, blocks: jax.Array, owner: jax.Array, kept: jax.Array) -> jax.Array:
    """Returns ``kept`` with the rows of one owner where they belong."""
    at = block.first[owner], jnp.int32(0)
    old = jax.lax.dynamic_slice(kept, at, blocks.shape[1:])
    return jax.lax.dynamic_update_slice(kept, jnp.where(block.valid[owner][:, None], blocks[owner], old), at)
