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


def row_offsets(vocabulary_sizes: Sequence[int], shards: int = 1) -> list[int]:
    """Returns the first row of each table in a stack whose rows are dealt out to ``shards`` devices.

    Row r of a stack lives on device r % shards. Rows are left out between tables so that table t begins on device
    t % shards: the first rows, often the hottest, then do not all live on one device.

    >>> row_offsets([3, 5, 2])
    [0, 3, 8]
    >>> row_offsets([4, 4, 4], shards=4)
    [0, 5, 10]
    """
    offsets, total = [], 0
    for index, size in enumerate(vocabulary_sizes):
        total += (index - total) % shards
        offsets.append(total)
        total += size
    return offsets


def whole_tables(vocabulary_sizes: Sequence[int], shards: int) -> tuple[list[int], int]:
    """Returns the first row of each table where every table lives whole on one device, and the rows of a device.

    Device s holds the rows from ``s * rows`` on. The largest table goes first, each to the device that has least.

    >>> whole_tables([3, 5, 2], shards=2)
    ([5, 0, 8], 5)
    """
    loads, placed = [0] * shards, [(0, 0)] * len(vocabulary_sizes)
    for index in sorted(range(len(vocabulary_sizes)), key=lambda i: -vocabulary_sizes[i]):
        shard = loads.index(min(loads))
        placed[index] = shard, loads[shard]
        loads[shard] += vocabulary_sizes[index]
    rows = max(loads)
    return [shard * rows + offset for shard, offset in placed], rows
