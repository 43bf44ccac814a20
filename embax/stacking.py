"""Pure arithmetic of stacks: which tables share one array, under which name, at which rows."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

# Row numbers are int32 on every backend; the number one past the end must fit too.
MAX_STACK_ROWS = 2**31 - 2
MAX_NAME_LENGTH = 50


def stack_name(table_names: Sequence[str]) -> str:
    """Returns the name of a stack: its tables' joined by "_", shortened with a hash beyond 50 characters.

    >>> stack_name(["user", "item"])
    'user_item'
    >>> stack_name(["a" * 60])[50:]
    '...11ee391211c6'
    """
    name = "_".join(table_names)
    if len(name) <= MAX_NAME_LENGTH:
        return name
    return f"{name[:MAX_NAME_LENGTH]}...{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def group_tables(tables: Sequence[Any], kind: Callable[[Any], Hashable]) -> list[list[Any]]:
    """Returns the tables in groups of one kind, first fit, in order of first appearance.

    A group never holds more than ``MAX_STACK_ROWS`` rows; a table that does not fit opens the next group.
    """
    groups: list[list[Any]] = []
    for table in tables:
        for group in groups:
            rows = sum(t.vocabulary_size for t in group)
            if kind(group[0]) == kind(table) and rows + table.vocabulary_size <= MAX_STACK_ROWS:
                group.append(table)
                break
        else:
            groups.append([table])
    return groups


def row_offsets(vocabulary_sizes: Sequence[int]) -> list[int]:
    """Returns the first row of each table in its stack.

    >>> row_offsets([3, 5, 2])
    [0, 3, 8]
    """
    offsets, total = [], 0
    for size in vocabulary_sizes:
        offsets.append(total)
        total += size
    return offsets
