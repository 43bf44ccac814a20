"""Tables on a mesh: made where they live, block by block; the same values as on one device.

Rows dealt out by row % devices are made so: each device makes one block, cuts it up by owner, and all send their
pieces at once. No device ever holds more than its shard and a few blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal
from jax.sharding import PartitionSpec as P

from embax.block_bits import in_pieces
from embax.optimizers.base import map_slots, slot_names
from embax.placement import Devices
from embax.planning import StackPlan

PARTS = 8  # of a block, dealt out one after another


def part_specs(stack: StackPlan, devices: Devices) -> dict[str, P]:
    """Returns how "table" and each slot of a stack, by name, are split."""
    slots = jax.tree.leaves(slot_specs(stack, devices), is_leaf=lambda leaf: isinstance(leaf, P))
    names = slot_names(stack.optimizer)
    return {"table": table_spec(stack, devices), **dict(zip(names, slots, strict=True))}


def table_spec(stack: StackPlan, devices: Devices) -> P:
    """Returns how the rows of a stack are split."""
    axes = devices.table_axes
    return {"column": P(None, axes), "replicated": P(None, None)}.get(stack.placement, P(axes, None))


def slot_specs(stack: StackPlan, devices: Devices) -> Any:
    """Returns how the slots of a stack are split; a row-wise slot has no columns to split."""
    rows = table_spec(stack, devices)
    row_wise = P(None, None) if stack.placement == "column" else rows
    return map_slots(lambda slot: row_wise if slot.row_wise else rows, stack.optimizer.slots())


def touched_spec(stack: StackPlan, devices: Devices) -> P:
    """Returns how the marks of touched rows of a stack are split."""
    return P(table_spec(stack, devices)[0])


def initial_rows(initializer: Any, key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Returns what ``initializer`` makes, inside of jit as outside; ValueError unless of that shape and dtype.

    Those of JAX are the same to the bit. Where one's own adds to a product, a compiler may round once instead of twice.
    """
    if isinstance(key, Tracer):
        made = _step_by_step(lambda key: initializer(key, shape, dtype), key)
    else:
        made = initializer(key, shape, dtype)
    if made.shape != shape or made.dtype != dtype:
        raise ValueError(
            f"initializer {initializer!r} gave {made.dtype}{made.shape} for {dtype}{shape}; it must return an array of "
            "the shape and dtype it is called with"
        )
    return made


def _step_by_step(function: Any, key: jax.Array) -> jax.Array:
    """Returns ``function(key)`` with its operations kept apart, as they are outside of jit.

    XLA would make one of the two products in ``normal(0.1)``, sqrt(2) and the scale, which changes last bits.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(key)
    if not hasattr(shape, "dtype"):
        return function(key)
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env[closed.jaxpr.invars[0]] = key
    for eqn in closed.jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        outs = _apart(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    (out,) = closed.jaxpr.outvars
    return out.val if isinstance(out, Literal) else env[out]


def _apart(eqn: Any, values: list) -> list:
    """Returns the outputs of an operation as it makes them alone."""
    parameters = eqn.primitive.get_bind_params(eqn.params)
    if not any(isinstance(value, Tracer) for value in values):
        # Of constants XLA would make another constant, in other steps: a root in half precision, for one.
        with jax.ensure_compile_time_eval():
            outs = eqn.primitive.bind(*values, **parameters)
        return list(outs) if eqn.primitive.multiple_results else [outs]
    outs = eqn.primitive.bind(*values, **parameters)
    return jax.lax.optimization_barrier(list(outs) if eqn.primitive.multiple_results else [outs])


def empty_rows(stack: StackPlan, devices: Devices) -> jax.Array:
    """Returns rows of zeros, each device's made there."""
    return full((stack.stored_rows, stack.embedding_dim), stack.dtype, 0, devices.sharding(table_spec(stack, devices)))


def fresh_slots(stack: StackPlan, devices: Devices) -> Any:
    """Returns the initial slot variables."""
    shape = (stack.stored_rows, stack.embedding_dim)

    def fresh(slot, spec):
        return full(slot.shape(shape), slot.dtype, slot.initial_value, devices.sharding(spec))

    return map_slots(fresh, stack.optimizer.slots(), slot_specs(stack, devices))


def full(shape: tuple[int, ...], dtype: Any, value: Any, sharding: Any) -> jax.Array:
    """Returns an array of one value, each device's part made there."""
    return jax.jit(lambda: jnp.full(shape, value, dtype), out_shardings=sharding)()


def stored(stack: StackPlan, logical: np.ndarray, fill: Any = 0) -> np.ndarray:
    """Returns rows in the order in which they are stored, from their order in the stack.

    Six rows on 2 devices: 0 2 4 1 3 5.
    """
    missing = stack.stored_rows - logical.shape[0]
    if missing:
        logical = np.pad(logical, ((0, missing), (0, 0)), constant_values=fill)
    if stack.placement != "row" or stack.shards == 1:
        return logical
    return logical.reshape(stack.local_rows, stack.shards, -1).swapaxes(0, 1).reshape(logical.shape)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def in_order(stack: StackPlan, devices: Devices, spec: P, array: jax.Array) -> jax.Array:
    """Returns stored rows or slots, split by ``spec``, in the order of the stack and whole on every device."""

    def local(part):
        for dimension, axes in enumerate(spec):
            if axes is not None:
                part = jax.lax.all_gather(part, axes, axis=dimension, tiled=True)
        if stack.placement != "row" or stack.shards == 1:
            return part
        return part.reshape(stack.shards, stack.local_rows, -1).swapaxes(0, 1).reshape(part.shape)

    return jax.shard_map(local, mesh=devices.mesh, in_specs=spec, out_specs=P(), check_vma=False)(array)


def placed(array: np.ndarray, spec: P, devices: Devices) -> jax.Array:
    """Returns an array that every process has, with each device holding its part."""
    return jax.make_array_from_callback(array.shape, devices.sharding(spec), lambda index: array[index])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def fill_table(
    stack: StackPlan, devices: Devices, initializer: Any, rows: int, values: jax.Array, key: jax.Array, table: Any
) -> jax.Array:
    """Returns ``values`` with the rows of one table initialized, on every device its own.

    Args:
      stack: the table's.
      devices: that hold it.
      initializer: the table's.
      rows: of a block.
      values: the stored rows.
      key: the table's; block b is made with ``fold_in(key, b)``.
      table: int32: the table's first row in the stack, and its number of rows.
    """
    spec = table_spec(stack, devices)
    made = _Maker(stack, devices, initializer, rows)
    body = {"row": made.dealt, "column": made.split}.get(stack.placement, made.whole)
    if devices.explicit:
        values = jax.sharding.reshard(values, devices.sharding(spec))
    mapped = jax.shard_map(body, mesh=devices.mesh, in_specs=(spec, P(), P()), out_specs=spec, check_vma=False)
    return mapped(values, key, table)


class _Maker:
    """Makes blocks on one device; see ``fill_table``."""

    def __init__(self, stack: StackPlan, devices: Devices, initializer: Any, rows: int):
        self.stack, self.devices, self.initializer, self.rows = stack, devices, initializer, rows

    def block(self, key: jax.Array, number: Any) -> jax.Array:
        shape, dtype = (self.rows, self.stack.embedding_dim), jnp.dtype(self.stack.dtype)
        key = jax.random.fold_in(key, number)
        try:
            return initial_rows(self.initializer, in_pieces(key), shape, dtype)
        except (NotImplementedError, TypeError):  # jax.random.poisson, for one, takes no key but threefry's own
            return initial_rows(self.initializer, key, shape, dtype)

    def dealt(self, values: jax.Array, key: jax.Array, table: jax.Array) -> jax.Array:
        """Makes as many blocks at a time as there are devices, one on each, and deals their rows out."""
        return self._by_turns(functools.partial(deal_rows, parts=PARTS), values, key, table)

    def split(self, values: jax.Array, key: jax.Array, table: jax.Array) -> jax.Array:
        """Makes as many blocks at a time as there are devices, one on each, and sends their columns out."""
        return self._by_turns(deal_columns, values, key, table)

    def _by_turns(self, deal: Any, values: jax.Array, key: jax.Array, table: jax.Array) -> jax.Array:
        (first, total), shards, axes = table, self.stack.shards, self.devices.table_axes
        here, step = jax.lax.axis_index(axes), self.rows * shards

        def turn(number, values):
            block = self.block(key, number * shards + here)
            return deal(axes, values, block, first + number * step, total - number * step)

        return jax.lax.fori_loop(jnp.int32(0), -(-total // step), turn, values)

    def whole(self, values: jax.Array, key: jax.Array, table: jax.Array) -> jax.Array:
        """Makes all blocks of a table that this device has whole."""
        (first, total), stack = table, self.stack
        here = jax.lax.axis_index(self.devices.table_axes)
        mine, start = jnp.bool_(True), first
        if stack.placement == "table":
            mine, start = first // stack.local_rows == here, first % stack.local_rows

        def one(number, values):
            block = self.block(key, number)
            count = jnp.minimum(total - number * self.rows, self.rows)
            return write_rows(values, block, start + number * self.rows, count)

        return jax.lax.fori_loop(jnp.int32(0), jnp.where(mine, -(-total // self.rows), jnp.int32(0)), one, values)


def deal_rows(axes: Any, values: jax.Array, block: jax.Array, first: Any, count: Any, parts: int = 1) -> jax.Array:
    """Returns this device's rows of a stack dealt out by row, with those of everybody's blocks written.

    Six rows from row 1 on, in blocks of 3 on 2 devices: device 0 has the rows 1 2 3 and sends 1 3 to device 1.

    Args:
      axes: of the devices, inside of a shard_map.
      values: this device's rows.
      block: of rows one after another; the block of device i follows that of device i - 1.
      first: row of the stack that the block of device 0 begins with.
      count: of the rows in all blocks that are meant, from the front.
      parts: of a block, sent one after another.
    """
    shards, rows = jax.lax.axis_size(axes), block.shape[0]
    here, places = jax.lax.axis_index(axes), jnp.arange(shards, dtype=jnp.int32)
    part = -(-rows // (shards * parts))
    begins = first + places * rows
    # Of the block that is here, device j owns the rows begin, begin + shards, ... from its first one on.
    own = (places - begins[here]) % shards
    skipped = (here - begins) % shards
    counts = jnp.maximum(-((skipped - jnp.clip(count - places * rows, 0, rows)) // shards), 0)
    starts = (begins + skipped) // shards

    def deal(number, values):
        done = number * part
        asked = own[:, None] + shards * (done + jnp.arange(part, dtype=jnp.int32)[None])
        pieces = jax.lax.all_to_all(jnp.take(block, asked, axis=0, mode="clip"), axes, 0, 0, tiled=True)

        def write(source, values):
            return write_rows(values, pieces[source], starts[source] + done, jnp.clip(counts[source] - done, 0, part))

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(shards), write, values)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(parts), deal, values)


def deal_columns(axes: Any, values: jax.Array, block: jax.Array, first: Any, count: Any) -> jax.Array:
    """Returns this device's columns of all rows, with everybody's blocks written; arguments as ``deal_rows``."""
    shards, rows, width = jax.lax.axis_size(axes), block.shape[0], values.shape[1]
    pieces = jax.lax.all_to_all(block.reshape(rows, shards, width), axes, 1, 0).reshape(shards, rows, width)

    def write(source, values):
        begin = source * rows
        return write_rows(values, pieces[source], first + begin, jnp.clip(count - begin, 0, rows))

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(shards), write, values)


def write_rows(values: jax.Array, block: jax.Array, first: Any, count: Any) -> jax.Array:
    """Returns ``values`` with its rows from ``first`` on replaced by the first ``count`` rows of ``block``.

    Rows that would lie before the first or behind the last one of ``values`` are left out.
    """
    window = min(block.shape[0], values.shape[0])
    first = jnp.asarray(first, jnp.int32)  # under x64 the counters of loops are wider
    start = jnp.clip(first, 0, values.shape[0] - window)
    source = start - first + jnp.arange(window, dtype=jnp.int32)
    old = jax.lax.dynamic_slice(values, (start, jnp.int32(0)), (window, values.shape[1]))
    mine = ((source >= 0) & (source < count))[:, None]
    new = jnp.where(mine, jnp.take(block, source, axis=0, mode="clip"), old)
    return jax.lax.dynamic_update_slice(values, new, (start, jnp.int32(0)))


written = functools.partial(jax.jit, donate_argnums=0)(write_rows)
