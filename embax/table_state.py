"""Tables and their slot variables: made block by block, in place, and seen table by table.

Law: the initial rows of a table depend on the key, the table's name and its initializer, on nothing else.
Block b of a table is ``initializer(fold_in(table_key, b), (65_536, embedding_dim), dtype)``, where table_key is the
key folded with the table's name; a table keeps its first rows when its vocabulary grows, and no other table,
stack or device moves them.
"""

import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh

from embax.optimizers.base import Optimizer, map_slots, slot_names
from embax.placement import Devices
from embax.planning import Plan, StackPlan, TablePlan
from embax.sharded_tables import (
    empty_rows,
    fill_table,
    fresh_slots,
    in_order,
    initial_rows,
    part_specs,
    placed,
    stored,
    table_spec,
    written,
)

BLOCK_ROWS = 65_536
SMALLEST_BLOCK = 1024


class TableState(NamedTuple):
    """A stack's rows ``[rows, embedding_dim]`` and the slot variables beside them, by name.

    ``touched`` says which rows were written since a checkpoint, where that is tracked (``embax.track``).
    """

    table: Any
    slots: Any
    touched: Any = None

    def table_arrays(self) -> list[Any]:
        """Returns the arrays, for ``check_step``."""
        return jax.tree.leaves((self.table, self.slots))


def init(plan: Plan, key: jax.Array) -> dict[str, TableState]:
    """Returns fresh tables and slot variables, ``{stack name: TableState}``.

    Peak memory is the tables and one block. Works inside jit too.

    Args:
      plan: what ``embax.plan`` gave.
      key: from ``jax.random.key``.

    Raises:
      ValueError: an initializer whose scale depends on the number of rows; such values would change with
        the vocabulary.

    >>> import jax, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.normal(1.0), optimizer=embax.Adagrad(0.5))
    >>> history = embax.FeatureSpec(name="history", table_spec=table, input_shape=(None, 3), output_shape=(None, 2))
    >>> embax.init(embax.plan(history), jax.random.key(0))["item"].slots.accumulator.shape
    (6, 2)
    """
    _check_outside(plan, "init")
    rows = init_rows(plan, key)
    if plan.devices is not None:
        return {s.name: TableState(rows[s.name], fresh_slots(s, plan.devices)) for s in plan.stacks}
    return {stack.name: init_slots(stack.optimizer, rows[stack.name]) for stack in plan.stacks}


def init_rows(plan: Plan, key: jax.Array) -> dict[str, jax.Array]:
    """Returns the fresh rows of every stack, without slot variables."""
    return {stack.name: init_stack_rows(stack, key, plan.devices) for stack in plan.stacks}


def init_stack_rows(stack: StackPlan, key: jax.Array, devices: Devices | None = None) -> jax.Array:
    """Returns the fresh rows of one stack, on the devices of its plan if there are any."""
    exact = [_has_exact_tail(stack, table, key) for table in stack.tables]
    if devices is not None:
        values = empty_rows(stack, devices)
        for table, exact_tail in zip(stack.tables, exact, strict=True):
            rows = _tail_rows(table.vocabulary_size, exact_tail) if table.vocabulary_size < BLOCK_ROWS else BLOCK_ROWS
            extent = jnp.array([table.row_offset, table.vocabulary_size], jnp.int32)
            own_key = table_key(key, table.name)
            values = fill_table(stack, devices, table.initializer, rows, values, own_key, extent)
        return values
    values = jnp.zeros((stack.rows, stack.embedding_dim), stack.dtype)
    for table, exact_tail in zip(stack.tables, exact, strict=True):
        values = _filled(values, table_key(key, table.name), table, exact_tail)
    return values


def table_key(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of the table of that name: ``key`` folded with a checksum of the name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def init_slots(optimizer: Optimizer, table: jax.Array) -> TableState:
    """Returns ``table``, a plain ``[V, D]`` array, with fresh slot variables for ``optimizer``.

    >>> import jax.numpy as jnp, embax
    >>> embax.init_slots(embax.RowwiseAdagrad(0.5), jnp.ones((6, 2))).slots.accumulator.shape
    (6, 1)
    """
    if jnp.ndim(table) != 2:
        raise ValueError(
            f"init_slots: the table has shape {jnp.shape(table)}; it must be [vocabulary_size, embedding_dim]"
        )
    return TableState(table, map_slots(lambda slot: slot.full(table.shape), optimizer.slots()))


def _filled(values: jax.Array, key: jax.Array, table: TablePlan, exact_tail: bool) -> jax.Array:
    """Returns ``values`` with the rows of ``table`` initialized, block by block, in place.

    The initializer is called from Python, one block at a time: its programs are then compiled once for all tables.
    Inside jit, where unrolling would write every block into the program, a loop does the same.
    """
    whole, tail = divmod(table.vocabulary_size, BLOCK_ROWS)

    def block_of(index, rows):
        return initial_rows(table.initializer, jax.random.fold_in(key, index), (rows, values.shape[1]), values.dtype)

    def write(index, values):
        block = block_of(index, BLOCK_ROWS)
        return written(values, block, table.row_offset + index * BLOCK_ROWS, BLOCK_ROWS)

    if whole and isinstance(key, Tracer):
        values = jax.lax.fori_loop(0, whole, write, values)
    else:
        for index in range(whole):
            # Waiting keeps the blocks that are under way from piling up.
            values = jax.block_until_ready(write(index, values))
    if tail:
        block = block_of(whole, _tail_rows(tail, exact_tail))
        values = written(values, block, table.row_offset + whole * BLOCK_ROWS, tail)
    return values


def _tail_rows(tail: int, exact_tail: bool) -> int:
    """Returns the rows that are made for a last block of ``tail`` rows.

    Sizes are rounded up to a power of two, so that tables of all sizes share a few programs.
    """
    return max(SMALLEST_BLOCK, 1 << (tail - 1).bit_length()) if exact_tail else BLOCK_ROWS


@functools.lru_cache(maxsize=1024)
def _prefix_stable(initializer: Any, dim: int, dtype: str, impl: str, partitionable: bool) -> bool:
    """Returns whether fewer rows are the first rows of more rows, for this initializer and generator."""
    with jax.ensure_compile_time_eval(), jax.threefry_partitionable(partitionable):
        key = jax.random.key(0, impl=impl)
        short, long = (np.asarray(initializer(key, (n, dim), dtype), np.float32) for n in (16, 48))
    return short.shape == (16, dim) and np.array_equal(short, long[:16], equal_nan=True)


def _has_exact_tail(stack: StackPlan, table: TablePlan, key: jax.Array) -> bool:
    """Returns whether the last block may be made of its own rows only; else it is made whole and cut.

    Counter-based generators give fewer rows as the first of more rows. If threefry does not, that is the
    initializer's own doing, and it is refused; another generator has its last block made whole.
    """
    args = (table.initializer, stack.embedding_dim, stack.dtype)
    impl = str(jax.random.key_impl(key))
    if _prefix_stable(*args, impl, bool(jax.config.jax_threefry_partitionable)):  # type: ignore[attr-defined]
        return True
    if not _prefix_stable(*args, "threefry2x32", True):
        name = getattr(table.initializer, "__qualname__", repr(table.initializer))
        raise ValueError(
            f'table "{table.name}": the values of initializer {name} depend on the number of rows (a fan over '
            "vocabulary_size, or rows made together); they would change with the vocabulary. Use one of fixed "
            "scale, such "
            "as jax.nn.initializers.normal(stddev) or uniform(scale), or embax.from_arrays for given values"
        )
    return False


def to_arrays(plan: Plan, tables: Mapping[str, TableState]) -> dict[str, dict[str, jax.Array]]:
    """Returns a copy of every table by its own name: ``{table: {"table": [V, D], slot name: [V, D] or [V, 1]}}``.

    >>> import jax, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.Adagrad(0.5))
    >>> plan = embax.plan(embax.FeatureSpec(name="x", table_spec=table, input_shape=(None,), output_shape=(None, 2)))
    >>> sorted(embax.to_arrays(plan, embax.init(plan, jax.random.key(0)))["item"])
    ['accumulator', 'table']
    """
    _check_outside(plan, "to_arrays")
    check_slots(plan, tables)
    arrays = {}
    for stack in plan.stacks:
        state = tables[stack.name]
        for table in stack.tables:
            rows = slice(table.row_offset, table.row_offset + table.vocabulary_size)
            named = zip(slot_names(stack.optimizer), state.slots, strict=True)
            parts = {"table": state.table, **dict(named)}
            if plan.devices is not None:
                specs = part_specs(stack, plan.devices)
                parts = {n: in_order(stack, plan.devices, specs[n], part) for n, part in parts.items()}
            # A copy even where the table is the whole stack: donating the tables must not delete what was taken out.
            arrays[table.name] = {name: jnp.copy(part[rows]) for name, part in parts.items()}
    return arrays


def from_arrays(plan: Plan, arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, TableState]:
    """Returns the tables of ``plan`` with the given values; the inverse of ``to_arrays``.

    Args:
      plan: what ``embax.plan`` gave.
      arrays: ``{table: {"table": [V, D], slot name: array}}``; slots left out start fresh.

    Raises:
      ValueError: a table is missing or unknown, a slot is unknown, or a shape does not fit.
    """
    known = {table.name: (stack, table) for stack in plan.stacks for table in stack.tables}
    if set(arrays) != set(known):
        raise ValueError(f"from_arrays: the plan has tables {sorted(known)}, and arrays are given for {sorted(arrays)}")
    state = {}
    for stack in plan.stacks:
        slots = dict(zip(slot_names(stack.optimizer), stack.optimizer.slots(), strict=True))
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("table", *slots)}
        for table in stack.tables:
            given = arrays[table.name]
            if not isinstance(given, Mapping):
                raise TypeError(
                    f'from_arrays: table "{table.name}" is given as a {type(given).__name__}; give {{"table": array}}, '
                    "and slots by name"
                )
            unknown = set(given) - set(parts)
            if unknown or "table" not in given:
                raise ValueError(
                    f'from_arrays: table "{table.name}" has parts {sorted(given)}; it takes "table" and of its '
                    "optimizer "
                    f"{sorted(slots)}"
                )
            shape = (table.vocabulary_size, stack.embedding_dim)
            for name, collected in parts.items():
                wanted = shape if name == "table" else slots[name].shape(shape)
                dtype = stack.dtype if name == "table" else slots[name].dtype
                value = given[name] if name in given else np.full(wanted, slots[name].initial_value)
                if np.shape(value) != wanted:
                    raise ValueError(
                        f'from_arrays: {name} of table "{table.name}" has shape {np.shape(value)}; it must be {wanted}'
                    )
                value = np.asarray(value)
                if value.dtype.kind == "V" and value.dtype.itemsize == jnp.dtype(dtype).itemsize:
                    value = value.view(jnp.dtype(dtype))  # numpy.savez forgets the name of bfloat16
                collected.append(value.astype(jnp.dtype(dtype)))
        fills = {"table": 0, **{name: slot.initial_value for name, slot in slots.items()}}
        joined = {name: _stacked(stack, values, fills[name]) for name, values in parts.items()}
        if plan.devices is None:
            joined = {name: jnp.asarray(value) for name, value in joined.items()}
        else:
            specs = part_specs(stack, plan.devices)
            joined = {n: placed(stored(stack, v, fills[n]), specs[n], plan.devices) for n, v in joined.items()}
        values = joined.pop("table")
        state[stack.name] = TableState(values, _like(stack.optimizer, list(joined.values())))
    return state


def _stacked(stack: StackPlan, values: list[np.ndarray], fill: Any) -> np.ndarray:
    """Returns the tables' rows at their places in the stack."""
    if len(values) == 1 and values[0].shape[0] == stack.rows:
        return values[0]
    rows = np.full((stack.rows, values[0].shape[1]), fill, values[0].dtype)
    for table, value in zip(stack.tables, values, strict=True):
        rows[table.row_offset : table.row_offset + table.vocabulary_size] = value
    return rows


def _like(optimizer: Optimizer, values: list) -> Any:
    remaining = iter(values)
    return map_slots(lambda _: next(remaining), optimizer.slots())


def check_tables(plan: Plan, tables: Mapping[str, TableState]) -> None:
    """Raises ValueError unless ``tables`` are those of ``plan``, by name and shape."""
    if not isinstance(plan, Plan):
        raise TypeError(f"a {type(plan).__name__} is not a Plan; the arguments are plan, tables, ... in this order")
    names = {stack.name for stack in plan.stacks}
    if not isinstance(tables, Mapping) or not all(isinstance(state, TableState) for state in tables.values()):
        raise TypeError(
            "the tables must be {stack: TableState}, as init returns them; for a bare array use embax.take, "
            "embax.init_slots and embax.apply_rows"
        )
    if set(tables) != names:
        raise ValueError(
            f"the plan has stacks {sorted(names)}, and the tables given are {sorted(tables)}; pass what init returned"
        )
    for stack in plan.stacks:
        table = tables[stack.name].table
        shape = table.shape if hasattr(table, "shape") else jnp.shape(table)
        if shape != _stored_shape(plan, stack):
            raise ValueError(
                f'stack "{stack.name}": the table has shape {shape}, and the plan says '
                f"{_stored_shape(plan, stack)}; pass the tables that init made for this plan"
            )
        _check_place(plan, stack, table)


def _check_outside(plan: Plan, what: str) -> None:
    """Raises ValueError where whole arrays cannot be made: inside of a shard_map, or without the mesh's devices."""
    if plan.devices is not None and plan.devices.inside():
        raise ValueError(f"{what}: inside of a shard_map there are shards only; call it outside, with the whole tables")
    if plan.devices is not None and isinstance(plan.devices.mesh, AbstractMesh):
        raise ValueError(f"{what}: the plan is of an AbstractMesh, which has no devices; it is for planning only")


def _check_place(plan: Plan, stack: StackPlan, table: Any) -> None:
    """Raises ValueError for an array that lies otherwise than the plan says: its rows may stand in another order.

    Arrays of the host and traced ones do not say how they lie.
    """
    for leaf in jax.tree.leaves(table):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
            continue
        if plan.devices is None:
            fits = len(leaf.sharding.device_set) == 1 or leaf.sharding.is_fully_replicated
        else:
            wanted = plan.devices.sharding(table_spec(stack, plan.devices))
            fits = plan.devices.inside() or leaf.sharding.is_equivalent_to(wanted, 2)
        if not fits:
            quantized = "" if leaf is table else ", and quantize those (embax.quantize_tables)"
            raise ValueError(
                f'stack "{stack.name}": the table lies on its devices as {leaf.sharding}, and the plan has it '
                f"{_place(plan, stack)}; the rows of another plan's tables may stand in another order: carry them over "
                f"by embax.from_arrays(plan, embax.to_arrays(other_plan, tables)){quantized}"
            )


def _place(plan: Plan, stack: StackPlan) -> str:
    if plan.devices is None:
        return "on one device"
    return f'placed "{stack.placement}" over {plan.devices.table_shards} devices'


def _stored_shape(plan: Plan, stack: StackPlan) -> tuple[int, int]:
    """Returns the shape of a stack's rows where the caller stands: on one device inside of a shard_map, else on all."""
    inside = plan.devices is not None and plan.devices.inside()
    return (stack.local_rows, stack.local_dim) if inside else (stack.stored_rows, stack.embedding_dim)


def check_slots(plan: Plan, tables: Mapping[str, TableState]) -> None:
    """Raises as ``check_tables``, and unless the slot variables are those of the plan's optimizers."""
    check_tables(plan, tables)
    for stack in plan.stacks:
        check_trainable(tables[stack.name].table, f'stack "{stack.name}"')
        slots = stack.optimizer.slots()
        shapes = [slot.shape(_stored_shape(plan, stack)) for slot in slots]
        given = tables[stack.name].slots
        if type(given) is not type(slots) or [jnp.shape(slot) for slot in given] != shapes:
            raise ValueError(
                f'stack "{stack.name}": the slot variables given are not those of {type(stack.optimizer).__name__}; '
                "pass the tables that init made for this plan, or make fresh slots with embax.from_arrays"
            )
        touched = tables[stack.name].touched
        if touched is not None and jnp.shape(touched.rows) != _stored_shape(plan, stack)[:1]:
            raise ValueError(
                f'stack "{stack.name}": {jnp.shape(touched.rows)} rows are tracked, and the stack has '
                f"{_stored_shape(plan, stack)[:1]}; pass the tables that embax.track made for this plan"
            )


def check_trainable(table: Any, what: str) -> None:
    """Raises ValueError for quantized rows: they cannot take a step."""
    bits = getattr(table, "bits", None)
    if bits is not None:
        raise ValueError(
            f"{what}: the rows are quantized to {bits} bits, for lookups only; update the tables that they were made "
            "from, and quantize those again (embax.quantize_tables, embax.quantize_rows)"
        )
