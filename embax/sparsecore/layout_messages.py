"""The layout that a checkpoint's message tells of, and the way between tables and stacks by it.

The message is an ``EmbeddingSpecProto``; any object with its fields will do::

    EmbeddingSpecProto      stacked_table_specs
    StackedTableSpecProto   stack_name, stack_vocab_size, stack_embedding_dim, num_sparsecores, table_specs
    TableSpecProto          table_name, vocab_size, embedding_dim, row_offset_in_shard, shard_rotation
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from embax.sparsecore.layout import Member, StackLayout, of_name


def of_message(stack: Any, tables: Sequence[Any] | None = None) -> StackLayout:
    """Returns the layout that a ``StackedTableSpecProto`` describes, of all its tables or of some.

    Raises:
      ValueError: a message that describes no layout.
    """
    num_sc, rows = stack.num_sparsecores, stack.stack_vocab_size
    members = []
    for table in stack.table_specs if tables is None else tables:
        member = Member(
            table.table_name, table.vocab_size, table.embedding_dim, table.shard_rotation, table.row_offset_in_shard
        )
        last = member.row_offset + -(-member.rows // max(num_sc, 1))
        if num_sc < 1 or rows % num_sc or last > rows // num_sc or member.dim > stack.stack_embedding_dim:
            raise ValueError(
                f'stack "{stack.stack_name}": {member.rows} rows of {member.dim} of table "{member.name}", from row '
                f"{member.row_offset} of every SparseCore on, are not within {rows} rows of "
                f"{stack.stack_embedding_dim} on {num_sc} SparseCores; use the message of create_proto_from_feature_"
                "specs as it is"
            )
        members.append(member)
    return StackLayout(stack.stack_name, rows, stack.stack_embedding_dim, num_sc, tuple(members))


def unstack_and_unshard_stacked_tables(
    stacked_tables: Mapping[str, Any], embedding_specs: Any, donate: bool = False
) -> dict[str, Any]:
    """Returns every table of a proto by its name, as ``[vocabulary_size, embedding_dim]``.

    Args:
      stacked_tables: arrays by the name of the stack, or pytrees of them: rows and slots.
      embedding_specs: the EmbeddingSpecProto of the arrays.
      donate: whether arrays of JAX are deleted, each when its tables are made.

    Raises:
      ValueError: a stack that is missing or has another shape; then nothing is deleted.
    """
    layouts = [of_message(stack) for stack in embedding_specs.stacked_table_specs]
    given = [of_name(stacked_tables, layout.name, "stack", "stacked_tables") for layout in layouts]
    for layout, stack in zip(layouts, given, strict=True):
        jax.tree.map(layout.check_stack, stack)
    found = {}
    for layout, stack in zip(layouts, given, strict=True):
        for member in layout.members:
            found[member.name] = jax.tree.map(functools.partial(layout.take, member), stack)
        if donate:
            _delete(stack, [found[member.name] for member in layout.members])
    return found


def stack_and_shard_feature_tables(
    feature_tables: Mapping[str, Any], embedding_specs: Any, delete_input: bool = False
) -> dict[str, Any]:
    """Returns the arrays of every stack of a proto, made of the tables': the inverse of the function above.

    Args:
      feature_tables: arrays ``[vocabulary_size, embedding_dim]`` by the name of the table, or pytrees of them.
      embedding_specs: the EmbeddingSpecProto of the arrays to make.
      delete_input: whether arrays of JAX are deleted, each when its stack is made.

    Raises:
      ValueError: a table that is missing or has another shape; then nothing is deleted.
    """
    layouts = [of_message(stack) for stack in embedding_specs.stacked_table_specs]
    given = [
        [of_name(feature_tables, member.name, "table", "feature_tables") for member in layout.members]
        for layout in layouts
    ]

    for layout, parts in zip(layouts, given, strict=True):
        for member, part in zip(layout.members, parts, strict=True):
            jax.tree.map(functools.partial(layout.check_table, member), part)
    found = {}
    for layout, parts in zip(layouts, given, strict=True):
        found[layout.name] = jax.tree.map(lambda *own, layout=layout: layout.lay(own), *parts)
        if delete_input:
            _delete(parts, found[layout.name])
    return found


def _delete(arrays: Any, made: Any) -> None:
    jax.block_until_ready(made)
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def get_row_ids_in_stacked_table(stack_table_spec: Any, table_spec: Any, row_ids: Sequence[int]) -> list[int]:
    """Returns the rows of a stack's array that hold ids of one of its tables.

    Args:
      stack_table_spec: the StackedTableSpecProto.
      table_spec: the TableSpecProto.
      row_ids: ids of the table.

    Raises:
      ValueError: an id that is none of the table's.

    >>> from types import SimpleNamespace as Proto
    >>> table = Proto(table_name="a", vocab_size=3, embedding_dim=8, row_offset_in_shard=3, shard_rotation=1)
    >>> stack = Proto(stack_name="s", stack_vocab_size=10, stack_embedding_dim=8, num_sparsecores=2)
    >>> get_row_ids_in_stacked_table(stack, table, [0, 1, 2])
    [8, 3, 9]
    """
    layout = of_message(stack_table_spec, [table_spec])
    member, ids = layout.members[0], np.asarray(row_ids).reshape(-1)
    if not ids.size:
        return []
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f'table "{member.name}": row_ids are {ids.dtype}; ids must be integers')
    if ids.min() < 0 or ids.max() >= member.rows:
        wrong = ids[(ids < 0) | (ids >= member.rows)][0]
        raise ValueError(
            f'table "{member.name}": row id {wrong} is not in its vocabulary of {member.rows}; ids are 0 to '
            f"{member.rows - 1}"
        )
    return layout.rows_of(member, ids.astype(np.int64)).tolist()


def get_row_ids_in_stacked_tables(
    embedding_spec_proto: Any, row_ids: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Returns the rows of the stacks' arrays that hold ids of tables, by the name of the stack.

    Args:
      embedding_spec_proto: the EmbeddingSpecProto.
      row_ids: ids by the name of the table; those of a stack follow each other as its tables do.

    Raises:
      ValueError: a table that no stack has, or an id that is none of its table's.
    """
    stacks = embedding_spec_proto.stacked_table_specs
    known = {table.table_name for stack in stacks for table in stack.table_specs}
    for name in row_ids:
        if name not in known:
            raise ValueError(f'row_ids: there is no table "{name}"; the specifications have {", ".join(sorted(known))}')
    found: dict[str, list[int]] = {}
    for stack in stacks:
        for table in stack.table_specs:
            if table.table_name in row_ids:
                rows = get_row_ids_in_stacked_table(stack, table, row_ids[table.table_name])
                found.setdefault(stack.stack_name, []).extend(rows)
    return found
