"""Rows of a stack in their order, a piece on each device, and back to where they live: what checkpoints read and write.

A piece is so many neighbouring rows. Six rows from row 1 on, in pieces of 3, of a stack dealt out over 2 devices::

    stored      device 0: rows 0 2 4 6      device 1: rows 1 3 5 7
    in pieces   device 0: rows 1 2 3        device 1: rows 4 5 6

No device ever has more than its rows and a few pieces.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from embax.exchange.over_mesh import mapped
from embax.placement import Devices
from embax.planning import StackPlan
from embax.sharded_tables import deal_columns, deal_rows, write_rows


class Part(NamedTuple):
    """The rows of a stack, or a slot variable of them: where they live, and how that array is split."""

    stack: StackPlan
    devices: Devices | None
    spec: P

    @property
    def split(self) -> str:
        """How rows are spread: "dealt", "ranges", "columns" or "whole"."""
        if self.devices is None or self.stack.placement == "replicated":
            return "whole"
        if self.stack.placement == "column":
            return "columns" if self.spec != P(None, None) else "whole"
        return "dealt" if self.stack.placement == "row" else "ranges"

    @property
    def pieces(self) -> int:
        """How many pieces are made at a time."""
        return 1 if self.devices is None else self.devices.table_shards

    def pieces_spec(self) -> P:
        """Returns how pieces ``[pieces * size, width]`` are split."""
        assert self.devices is not None
        return P(self.devices.table_axes, None)


def collect(part: Part, size: int, array: jax.Array, first: Any) -> jax.Array:
    """Returns rows of ``array`` from row ``first`` of the stack on, ``[pieces * size, width]``, a piece on each device.

    Behind the stack's last row there is anything.
    """
    return _collect(part, size, array, jnp.int32(first))


def deal(part: Part, array: jax.Array, pieces: jax.Array, first: Any, count: Any) -> jax.Array:
    """Returns ``array`` with ``count`` rows from row ``first`` of the stack on replaced by those of ``pieces``.

    Args:
      part: what the array is.
      array: as it is stored; donated.
      pieces: as ``collect`` gives them.
      first: row of the stack.
      count: of the rows in pieces, from the front.
    """
    if part.devices is None and count >= pieces.shape[0]:
        return _put(array, pieces, jnp.int32(first))
    return _deal(part, array, pieces, jnp.int32(first), jnp.int32(count))


@functools.partial(jax.jit, static_argnums=0)
def pick(part: Part, array: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns some rows of ``array``, ``[pieces * size, width]``, a piece on each device.

    Args:
      part: what the array is.
      array: as it is stored.
      rows: int32 ``[pieces * size]``, each device's the numbers that its rows have there; of columns and
        copies, of which all have all rows, the rows that it shall bring.
    """
    if part.devices is None:
        return jnp.take(array, rows, axis=0, mode="clip")

    def local(array, rows):
        if part.split != "columns":
            return jnp.take(array, rows, axis=0, mode="clip")
        every = jax.lax.all_gather(rows, devices.table_axes, tiled=True)
        found = jnp.take(array, every, axis=0, mode="clip").reshape(part.pieces, rows.shape[0], -1)
        return _sent(part, found).swapaxes(0, 1).reshape(rows.shape[0], -1)

    devices = part.devices
    return mapped(devices, local, (part.spec, P(devices.table_axes)), part.pieces_spec())(array, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _collect(part: Part, size: int, array: jax.Array, first: jax.Array) -> jax.Array:
    if part.devices is None:
        return jnp.take(array, first + jnp.arange(size, dtype=jnp.int32), axis=0, mode="clip")
    local = functools.partial(_COLLECTORS[part.split], part, size)
    return mapped(part.devices, local, (part.spec, P()), part.pieces_spec())(array, first)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _deal(part: Part, array: jax.Array, pieces: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    if part.devices is None:
        return write_rows(array, pieces, first, count)
    local = functools.partial(_DEALERS[part.split], part)
    in_specs = (part.spec, part.pieces_spec(), P(), P())
    return mapped(part.devices, local, in_specs, part.spec)(array, pieces, first, count)


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, rows: jax.Array, first: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, rows, (first, jnp.int32(0)))


def _here(part: Part) -> jax.Array:
    assert part.devices is not None
    return jax.lax.axis_index(part.devices.table_axes)


def _everybody(part: Part) -> jax.Array:
    return jnp.arange(part.pieces, dtype=jnp.int32)


def _sent(part: Part, blocks: jax.Array) -> jax.Array:
    """Returns, from a block for each device, the blocks that all devices have for this one."""
    assert part.devices is not None
    return jax.lax.all_to_all(blocks, part.devices.table_axes, 0, 0, tiled=True)


def _collect_dealt(part: Part, size: int, array: jax.Array, first: jax.Array) -> jax.Array:
    shards, here, places = part.pieces, _here(part), _everybody(part)
    most = -(-size // shards)
    begins = first + places * size
    own = _first_of(here, begins, shards)[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    came = _sent(part, jnp.take(array, own, axis=0, mode="clip"))
    rows = begins[here] + jnp.arange(size, dtype=jnp.int32)
    source = rows % shards
    return came[source, rows // shards - _first_of(source, begins[here], shards)]


def _deal_dealt(part: Part, array: jax.Array, pieces: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    assert part.devices is not None
    return deal_rows(part.devices.table_axes, array, pieces, first, count)


def _first_of(device: Any, begin: Any, shards: int) -> jax.Array:
    """Returns the number, on a device, of its first row that is not before row ``begin``."""
    return -((device - begin) // shards)


def _collect_ranges(part: Part, size: int, array: jax.Array, first: jax.Array) -> jax.Array:
    assert part.devices is not None
    local = array.shape[0]
    own = first + jnp.arange(part.pieces * size, dtype=jnp.int32) - _here(part) * local
    rows = jnp.take(array, own, axis=0, mode="clip")
    # One device has each row; added up as integers, the sum with nothing is that row to the bit.
    bits = jax.lax.bitcast_convert_type(rows, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    bits = jnp.where(((own >= 0) & (own < local))[:, None], bits, 0)
    bits = jax.lax.psum_scatter(bits, part.devices.table_axes, tiled=True)
    return jax.lax.bitcast_convert_type(bits, array.dtype)


def _deal_ranges(part: Part, array: jax.Array, pieces: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    return write_rows(array, _whole(part, pieces), first - _here(part) * array.shape[0], count)


def _collect_columns(part: Part, size: int, array: jax.Array, first: jax.Array) -> jax.Array:
    rows = first + jnp.arange(part.pieces * size, dtype=jnp.int32)
    found = jnp.take(array, rows, axis=0, mode="clip").reshape(part.pieces, size, -1)
    return _sent(part, found).swapaxes(0, 1).reshape(size, -1)


def _deal_columns(part: Part, array: jax.Array, pieces: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    assert part.devices is not None
    return deal_columns(part.devices.table_axes, array, pieces, first, count)


def _collect_whole(part: Part, size: int, array: jax.Array, first: jax.Array) -> jax.Array:
    own = first + _here(part) * size + jnp.arange(size, dtype=jnp.int32)
    return jnp.take(array, own, axis=0, mode="clip")


def _deal_whole(part: Part, array: jax.Array, pieces: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    return write_rows(array, _whole(part, pieces), first, count)


def _whole(part: Part, pieces: jax.Array) -> jax.Array:
    assert part.devices is not None
    return jax.lax.all_gather(pieces, part.devices.table_axes, tiled=True)


_COLLECTORS = {
    "dealt": _collect_dealt,
    "ranges": _collect_ranges,
    "columns": _collect_columns,
    "whole": _collect_whole,
}
_DEALERS = {"dealt": _deal_dealt, "ranges": _deal_ranges, "columns": _deal_columns, "whole": _deal_whole}
