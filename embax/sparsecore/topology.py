"""Where rows of a table stand in the array of a stack, and how they get from one such array into another.

A checkpoint has arrays of its own devices, SparseCores and stacks. Rows and slots are copied as they are, piece by
piece of the new array, so that no table is ever whole in between.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from embax.optimizers.base import Optimizer, slot_names
from embax.sparsecore.lib.nn.table_stacking import compute_physical_row_ids
from embax.sparsecore.proto_specs import named_class, table_protos
from embax.sparsecore.translation import Stack


class Layout(NamedTuple):
    """A table in the array of its stack.

    Attributes:
      stack: its name.
      stack_shape: of the array of rows.
      num_sc: SparseCores of all devices.
      row_offset: of the table on each SparseCore.
      rotation: of the table.
      rows: vocabulary_size.
      width: embedding_dim.
    """

    stack: str
    stack_shape: tuple[int, int]
    num_sc: int
    row_offset: int
    rotation: int
    rows: int
    width: int

    def physical(self, ids: Any) -> Any:
        """Returns the rows of the array that hold ids."""
        return compute_physical_row_ids(self.num_sc, self.stack_shape[0], self.rotation, self.row_offset, ids)


Sources = Mapping[str, tuple[Layout, np.ndarray]]


class Target(NamedTuple):
    """A stack to be filled: its tables, its SparseCores, and what its padding holds.

    Attributes:
      layouts: of its tables, by name.
      optimizers: of its tables, by name; None where nobody knows.
    """

    layouts: dict[str, Layout]
    optimizers: dict[str, Optimizer | None]

    def fill(self, part: str, sources: Sources) -> float:
        """Returns what no row of a part has: 0 for rows; the initial value for a slot, by which others may divide."""
        if part == "table":
            return 0.0
        optimizer = next(iter(self.optimizers.values()))
        names = () if optimizer is None else slot_names(optimizer)
        number = names.index(part) if part in names else int(part) if part.isdigit() else len(names)
        if optimizer is not None and number < len(names):
            return tuple(optimizer.slots())[number].initial_value
        # Padding that stood beside a row has never been anything else.
        padding = [array[at.physical(0), at.width] for at, array in sources.values() if at.width < array.shape[1]]
        return padding[0] if padding else 0.0

    def piece(self, part: str, sources: Sources, where: tuple[int, int]) -> np.ndarray:
        """Returns rows of the array of a part.

        Args:
          part: "table", or the name of a slot.
          sources: of its tables, where they stand now, and in which array.
          where: first row, and the one behind the last.
        """
        width, dtype = _width(self, part, sources)
        made = np.full((where[1] - where[0], width), self.fill(part, sources), dtype)
        for name, layout in self.layouts.items():
            source, array = sources[name]
            columns = min(layout.width, width)
            # The ids of a SparseCore stand one behind the other on it.
            for core in range(min(layout.num_sc, layout.rows)):
                first = layout.physical(core)
                count = -(-(layout.rows - core) // layout.num_sc)
                low, high = max(first, where[0]), min(first + count, where[1])
                if low < high:
                    ids = core + layout.num_sc * np.arange(low - first, high - first)
                    made[low - where[0] : high - where[0], :columns] = array[source.physical(ids), :columns]
        return made


def _width(target: Target, part: str, sources: Sources) -> tuple[int, Any]:
    """Returns columns and dtype of a part: row-wise slots have one column, whatever the rows have."""
    layout = next(iter(target.layouts.values()))
    source, array = next(iter(sources.values()))
    row_wise = part != "table" and array.shape[1] == 1 and source.stack_shape[1] > 1
    return 1 if row_wise else layout.stack_shape[1], array.dtype


def layouts_of_stacks(stacks: Mapping[str, Stack], num_sc: int) -> dict[str, Target]:
    """Returns stacks of prepared features as stacks to be filled."""
    made = {}
    for name, stack in stacks.items():
        tables = {feature.table_spec.name: feature.table_spec for _, feature in stack.features}
        shape = stack.spec.stack_vocab_size, stack.spec.stack_embedding_dim
        layouts = {}
        for table in tables.values():
            setting = table.setting_in_stack
            where = setting.row_offset_in_shard, setting.shard_rotation
            layouts[table.name] = Layout(name, shape, num_sc, *where, table.vocabulary_size, table.embedding_dim)
        made[name] = Target(layouts, {table.name: table.optimizer for table in tables.values()})
    return made


def layouts_of_proto(proto: Any) -> dict[str, Layout]:
    """Returns the tables of an EmbeddingSpecProto by name.

    Raises:
      ValueError: tables that cannot stand where it says.
    """
    made = {}
    for name, (stack, table) in table_protos(proto).items():
        shape = stack.stack_vocab_size, stack.stack_embedding_dim
        where = table.row_offset_in_shard, table.shard_rotation
        layout = Layout(stack.stack_name, shape, stack.num_sparsecores, *where, table.vocab_size, table.embedding_dim)
        if not _stands(layout):
            raise ValueError(
                f'embedding_spec: table "{name}" of {layout.rows} rows of {layout.width} numbers cannot stand at row '
                f'{layout.row_offset} of each of {layout.num_sc} SparseCores in stack "{layout.stack}" of shape '
                f"{layout.stack_shape}; it is not one that was saved"
            )
        made[name] = layout
    return made


def _stands(layout: Layout) -> bool:
    rows, width = layout.stack_shape
    if layout.num_sc < 1 or layout.rows < 1 or not 0 < layout.width <= width or rows % layout.num_sc:
        return False
    on_each = -(-layout.rows // layout.num_sc)
    inside = 0 <= layout.row_offset and layout.row_offset + on_each <= rows // layout.num_sc
    return inside and 0 <= layout.rotation < layout.num_sc


def misfits(proto: Any, targets: Mapping[str, Target]) -> list[str]:
    """Returns what keeps the tables of a checkpoint from being those of ``targets``, a line each."""
    stored, protos, found, known = layouts_of_proto(proto), table_protos(proto), [], set()
    for target in targets.values():
        for name, layout in target.layouts.items():
            known.add(name)
            if name not in stored:
                found.append(f'table "{name}": the checkpoint has none; it has {", ".join(sorted(stored))}')
                continue
            for field, old, new in (
                ("vocabulary_size", stored[name].rows, layout.rows),
                ("embedding_dim", stored[name].width, layout.width),
            ):
                if old != new:
                    found.append(f'table "{name}": {field} was {old} and is {new}')
            found += _optimizers(name, protos[name][1], target.optimizers[name])
    found += [f'table "{name}": it is in the checkpoint, and no feature looks it up' for name in stored.keys() - known]
    return sorted(found)


def _optimizers(name: str, proto: Any, optimizer: Optimizer | None) -> list[str]:
    """Returns a line where the proto tells that a table had another optimizer; settings may change."""
    old = named_class(proto.optimizer) if proto.HasField("optimizer") else None
    if old is None or optimizer is None or old is type(optimizer):
        return []
    return [f'table "{name}": its optimizer was {old.__name__} and is {type(optimizer).__name__}']
