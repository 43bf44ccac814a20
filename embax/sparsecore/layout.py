"""Where the rows of tables stand in the arrays of their stacks, and the way there and back.

A stack is told of by its specifications, or by the message in which a checkpoint keeps them
(``layout_messages``); both are read into a ``StackLayout`` first.

Arrays of NumPy stay there. Those of JAX keep their sharding; where its devices do not divide the rows of a table, the
table is on every one of them.
"""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from embax.specs import StackedTableSpec, TableSpec

MULTIPLE = 8  # rows of a SparseCore, and columns, are padded to multiples of it
MOST_ROWS = 2**31 - 2  # no id is there: a batch has it where an id is absent


def round_up(value: int, multiple: int) -> int:
    """Returns the first multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def round_up_dim_and_vocab_size(tables: Mapping[str, TableSpec], num_sc: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns embedding_dim and vocabulary_size of each table as they are stored.

    >>> import jax, embax
    >>> table = embax.TableSpec(name="a", vocabulary_size=100, embedding_dim=5, combiner="sum",
    ...     initializer=jax.nn.initializers.zeros, optimizer=embax.SGD())
    >>> round_up_dim_and_vocab_size({"a": table}, 4)
    ({'a': 8}, {'a': 128})
    """
    dims = {name: round_up(table.embedding_dim, MULTIPLE) for name, table in tables.items()}
    return dims, {name: round_up(table.vocabulary_size, MULTIPLE * num_sc) for name, table in tables.items()}


def compute_physical_row_ids(
    num_sparse_cores: int, stack_vocab_size: int, shard_rotation: int, row_offset_in_shard: int, row_ids: Any
) -> Any:
    """Returns the rows of a stack's array that hold ids of one of its tables: numbers, or arrays of them.

    >>> [compute_physical_row_ids(2, 10, 1, 3, i) for i in range(3)]
    [8, 3, 9]
    """
    shard = (row_ids % num_sparse_cores + shard_rotation) % num_sparse_cores
    return shard * (stack_vocab_size // num_sparse_cores) + row_ids // num_sparse_cores + row_offset_in_shard


class Member(NamedTuple):
    """A table in a stack: its own rows and columns, and where they lie."""

    name: str
    rows: int
    dim: int
    rotation: int
    row_offset: int


class StackLayout(NamedTuple):
    """A stack's array, and the tables in it, for so many SparseCores."""

    name: str
    rows: int
    dim: int
    num_sc: int
    members: tuple[Member, ...]

    def rows_of(self, member: Member, ids: Any) -> Any:
        """Returns the rows of the array that hold ids of a table."""
        return compute_physical_row_ids(self.num_sc, self.rows, member.rotation, member.row_offset, ids)

    def check_stack(self, stack: Any) -> None:
        """Raises ValueError unless an array has the stack's rows, and its columns or one."""
        if math.prod(stack.shape[:-1]) != self.rows or stack.shape[-1] not in (self.dim, 1):
            raise ValueError(
                f'stack "{self.name}": its array has shape {list(stack.shape)}, and the specification says '
                f"{[self.rows, self.dim]}; give the arrays of these specifications"
            )

    def check_table(self, member: Member, table: Any) -> None:
        """Raises ValueError unless an array has the table's rows, and its columns or one."""
        if table.shape not in ((member.rows, member.dim), (member.rows, 1)):
            raise ValueError(
                f'table "{member.name}": its array has shape {list(table.shape)}, and the specification says '
                f"{[member.rows, member.dim]}; give all of its rows, without padding"
            )

    def take(self, member: Member, stack: Any) -> Any:
        """Returns a table, ``[rows, dim]``, of the stack's array; ``[rows, 1]`` where that has one number a row."""
        self.check_stack(stack)
        if isinstance(stack, np.ndarray):
            rows = self.rows_of(member, np.arange(member.rows))
            return stack.reshape(-1, stack.shape[-1])[rows, : member.dim]
        sharding = _like(stack, (member.rows, min(member.dim, stack.shape[-1])))
        with _over(sharding):
            found = _take(_auto(stack), self, member, _auto(sharding))
        return _placed(found, sharding)

    def lay(self, parts: Sequence[Any], pad_value: float = 0.0) -> Any:
        """Returns the stack's array, of its tables' in their order."""
        for member, part in zip(self.members, parts, strict=True):
            self.check_table(member, part)
        # One number a row is a row-wise slot's, but for a table that has no more.
        row_wise = all(part.shape[1] == 1 and member.dim > 1 for member, part in zip(self.members, parts, strict=True))
        shape = self.rows, 1 if row_wise else self.dim
        if all(isinstance(part, np.ndarray) for part in parts):
            whole = np.full(shape, pad_value, np.result_type(*parts))
            for member, part in zip(self.members, parts, strict=True):
                whole[self.rows_of(member, np.arange(member.rows)), : part.shape[1]] = part
            return whole
        shardings = [sharding for part in parts if (sharding := _like(part, shape)) is not None]
        split = [sharding for sharding in shardings if not sharding.is_fully_replicated]
        sharding = next(iter(split or shardings), None)
        with _over(sharding):
            whole = _lay(tuple(map(_auto, parts)), self, shape, pad_value, _auto(sharding))
        return _placed(whole, sharding)


@functools.partial(jax.jit, static_argnames=("layout", "member", "sharding"))
def _take(stack: Any, layout: StackLayout, member: Member, sharding: Any) -> jax.Array:
    rows = layout.rows_of(member, jnp.arange(member.rows, dtype=jnp.int32))
    found = stack.reshape(-1, stack.shape[-1])[rows, : member.dim]
    return found if sharding is None else jax.lax.with_sharding_constraint(found, sharding)


@functools.partial(jax.jit, static_argnames=("layout", "shape", "pad_value", "sharding"))
def _lay(parts: Any, layout: StackLayout, shape: tuple[int, int], pad_value: float, sharding: Any) -> jax.Array:
    whole = jnp.full(shape, pad_value, jnp.result_type(*parts))
    for member, part in zip(layout.members, parts, strict=True):
        rows = layout.rows_of(member, jnp.arange(member.rows, dtype=jnp.int32))
        whole = whole.at[rows, : part.shape[1]].set(part, unique_indices=True)
    return whole if sharding is None else jax.lax.with_sharding_constraint(whole, sharding)


def _like(array: Any, shape: tuple[int, int]) -> Any:
    """Returns the sharding of an array for another one on its devices; None where JAX is to choose."""
    sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    if array.ndim != 2:  # one that leads with the device
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
    try:
        sharding.shard_shape(shape)
    except ValueError:  # devices that do not divide it
        return NamedSharding(sharding.mesh, P())
    return sharding


def _auto(value: Any) -> Any:
    """Returns a sharding, or an array in one, over a mesh of the same devices whose axes leave the choice to JAX."""
    if isinstance(value, NamedSharding):
        return NamedSharding(Mesh(np.asarray(value.mesh.devices), value.mesh.axis_names), value.spec)
    sharding = None if isinstance(value, Tracer) else getattr(value, "sharding", None)
    return jax.device_put(value, _auto(sharding)) if isinstance(sharding, NamedSharding) else value


def _over(sharding: Any) -> Any:
    """Returns the context of the mesh that ``_auto`` makes: that of the caller may have Explicit axes."""
    return contextlib.nullcontext() if sharding is None else jax.set_mesh(_auto(sharding).mesh)


def _placed(array: Any, sharding: Any) -> Any:
    return array if sharding is None else jax.device_put(array, sharding)


def check_rows(stack: str, rows: int) -> None:
    """Raises ValueError for a stack of more rows than 32 bits number, one more being for absent ids."""
    if rows > MOST_ROWS:
        raise ValueError(
            f'stack "{stack}": {rows} rows with padding, and at most {MOST_ROWS} are possible; put fewer tables into '
            "it, or make a table smaller"
        )


def check_made_for(stack: StackedTableSpec, devices: int | None, num_sc: int) -> None:
    """Raises ValueError where a stack is known to be made for others: rows would lie where nobody looks.

    Args:
      stack: of the features.
      devices: of all processes; None where only the product is known.
      num_sc: SparseCores of each device; of all where ``devices`` is None.
    """
    if stack.made_for is None:
        return
    if (stack.made_for != (devices, num_sc)) if devices is not None else (math.prod(stack.made_for) != num_sc):
        made, given = (_cores(*pair) for pair in (stack.made_for, (devices, num_sc)))
        raise ValueError(
            f'stack "{stack.stack_name}" was made for {made}, and this call is for {given}; pass the '
            "global_device_count and num_sc_per_device of prepare_feature_specs_for_training everywhere (by default a "
            "device has 1 off TPU), or make new specs"
        )


def _cores(devices: int | None, num_sc: int) -> str:
    of_device = f"{num_sc} SparseCore{'s' * (num_sc != 1)}"
    return of_device if devices is None else f"{devices} device{'s' * (devices != 1)} of {of_device}"


def of_tables(tables: Sequence[TableSpec], num_sc: int) -> StackLayout:
    """Returns the layout of tables of one stack, for so many SparseCores.

    Raises:
      ValueError: a table in no stack, or one that was stacked for other SparseCores.
    """
    for table in tables:
        if not table.is_stacked():
            raise ValueError(f'table "{table.name}" is in no stack yet; call prepare_feature_specs_for_training first')
        stored = table.setting_in_stack.padded_vocab_size
        rows = round_up(table.vocabulary_size, MULTIPLE * num_sc)
        if rows != stored:
            raise ValueError(
                f'table "{table.name}" was stacked to have {stored} rows, and for {num_sc} SparseCores it has {rows}; '
                "pass as many shards as it was stacked for: SparseCores of all devices"
            )
    stacked = tables[0].stacked_table_spec
    check_made_for(stacked, None, num_sc)
    members = tuple(
        Member(
            table.name,
            table.vocabulary_size,
            table.embedding_dim,
            table.setting_in_stack.shard_rotation,
            table.setting_in_stack.row_offset_in_shard,
        )
        for table in tables
    )
    return StackLayout(stacked.stack_name, stacked.stack_vocab_size, stacked.stack_embedding_dim, num_sc, members)


def get_table_stacks(table_specs: Any) -> dict[str, list[TableSpec]]:
    """Returns the tables of each stack, by its name; a table that is not stacked is one of its own."""
    stacks: dict[str, list[TableSpec]] = {}
    for table in jax.tree.leaves(table_specs, is_leaf=_is_table):
        name = table.stacked_table_spec.stack_name if table.is_stacked() else table.name
        stacks.setdefault(name, []).append(table)
    return stacks


def _is_table(leaf: Any) -> bool:
    return isinstance(leaf, TableSpec)


def stack_and_shard_tables(table_specs: Any, tables: Any, num_shards: int, pad_value: float = 0.0) -> dict[str, Any]:
    """Returns the arrays of all stacks, made of the tables': the inverse of ``unshard_and_unstack_tables``.

    Args:
      table_specs: any pytree of stacked TableSpecs.
      tables: of the same structure; a table is an array ``[vocabulary_size, embedding_dim]``, or a pytree of such
        arrays: rows and slots.
      num_shards: SparseCores of all devices.
      pad_value: of rows and columns that no id has.

    Raises:
      ValueError: tables in no stack or for other shards, an array of another shape.
    """
    specs, structure = jax.tree.flatten(table_specs, is_leaf=_is_table)
    given = dict(zip([spec.name for spec in specs], structure.flatten_up_to(tables), strict=True))

    def stacked(members: list[TableSpec]) -> Any:
        layout = of_tables(members, num_shards)
        parts = [jax.tree.map(jnp.asarray, given[spec.name]) for spec in members]
        return jax.tree.map(lambda *own: layout.lay(own, pad_value), *parts)

    return {name: stacked(members) for name, members in get_table_stacks(specs).items()}


def unshard_and_unstack_tables(table_specs: Any, stacked_tables: Mapping[str, Any], num_shards: int) -> Any:
    """Returns every table as ``[vocabulary_size, embedding_dim]``, in the structure of ``table_specs``.

    Args:
      table_specs: any pytree of stacked TableSpecs.
      stacked_tables: arrays by the name of the stack, or pytrees of them: rows and slots.
      num_shards: SparseCores of all devices.

    Raises:
      ValueError: tables in no stack or for other shards, a stack that is missing or has another shape.
    """

    def taken(spec: TableSpec) -> Any:
        layout = of_tables([spec], num_shards)
        stack = of_name(stacked_tables, layout.name, "stack", "stacked_tables")
        return jax.tree.map(functools.partial(layout.take, layout.members[0]), stack)

    return jax.tree.map(taken, table_specs, is_leaf=_is_table)


def of_name(arrays: Mapping[str, Any], name: str, kind: str, argument: str) -> Any:
    """Returns the arrays of a name; ValueError where there are none."""
    if name not in arrays:
        raise ValueError(
            f'{kind} "{name}" is not among the {argument} ({", ".join(sorted(arrays)) or "none"}); give an array for '
            "every one of the specifications"
        )
    return arrays[name]
