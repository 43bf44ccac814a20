"""A SparseCore checkpoint as one of other devices, without a model: from file to file, on the host."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from embax.optimizers.base import Optimizer
from embax.optimizers.sgd import SGD, SGDSlotVariables
from embax.sparsecore.lib.nn.table_stacking import ACTIVATION_BYTES, auto_stack_tables, stack_tables
from embax.sparsecore.proto_messages import message_class
from embax.sparsecore.proto_specs import named_class, proto_of_features, proto_to_optimizer, table_protos
from embax.sparsecore.topology import Layout, Target, layouts_of_proto, layouts_of_stacks, misfits
from embax.sparsecore.topology_files import TABLES, Path, Step, is_table, nested, orbax
from embax.sparsecore.topology_restore import Source, in_turn
from embax.sparsecore.translation import stacks_of
from embax.specs import FeatureSpec, TableSpec


class Wanted(NamedTuple):
    """The tables of a new checkpoint.

    Attributes:
      targets: its stacks.
      proto: what it says of them.
    """

    targets: dict[str, Target]
    proto: Any


def given(feature_specs: Any, devices: int, num_sc_per_device: int) -> Wanted:
    """Returns stacked features as the tables of a new checkpoint."""
    stacks, num_sc = stacks_of(feature_specs), devices * num_sc_per_device
    proto = proto_of_features(feature_specs, devices, num_sc_per_device)
    return Wanted(layouts_of_stacks(stacks, num_sc), proto)


def regrouped(step: Step, devices: int, num_sc_per_device: int, batch_size: int | None) -> Wanted:
    """Returns the tables of a checkpoint, stacked for other devices.

    By ``auto_stack_tables`` where the checkpoint tells all tables' optimizers and combiners, and in the stacks that
    they were in where it does not.

    Args:
      step: of the checkpoint.
      devices: global_device_count.
      num_sc_per_device: SparseCores of each.
      batch_size: of the global batch; None for that of the checkpoint.
    """
    tables = table_protos(step.proto)
    known = all(t.combiner and t.HasField("optimizer") and named_class(t.optimizer) for _, t in tables.values())
    stacks = {  # tables of a stack that stays stay in the order in which they stand
        stack.stack_name: stack.table_specs if known else sorted(stack.table_specs, key=lambda t: t.row_offset_in_shard)
        for stack in step.proto.stacked_table_specs
    }
    features = [
        feature
        for stack in step.proto.stacked_table_specs
        for table in stacks[stack.stack_name]
        for feature in _features(step, stack, table, known, batch_size)
    ]
    if known:
        limit = max((stack.activation_mem_bytes_limit for stack, _ in tables.values()), default=0) or ACTIVATION_BYTES
        auto_stack_tables(features, devices, num_sc_per_device, activation_mem_bytes_limit=limit)
        return given(features, devices, num_sc_per_device)
    for name, members in stacks.items():
        names = [table.table_name for table in members]
        stack_tables(features, names, devices, num_sc_per_device, stack_name=name)
    wanted = given(features, devices, num_sc_per_device)
    for name, (_, table) in table_protos(wanted.proto).items():  # no more is told than was known
        for field in ("combiner", "optimizer"):
            table.ClearField(field)
        table.MergeFrom(type(table)(combiner=tables[name][1].combiner))
        if tables[name][1].HasField("optimizer"):
            table.optimizer.CopyFrom(tables[name][1].optimizer)
    unknown = {
        name: target._replace(optimizers=dict.fromkeys(target.layouts)) for name, target in wanted.targets.items()
    }
    return wanted._replace(targets=unknown)


def unstacked(step: Step) -> Wanted:
    """Returns every table as a stack of its own on one SparseCore, without padding: ``[vocabulary_size, dim]``."""
    proto = message_class("EmbeddingSpecProto")()
    targets = {}
    for stack, table in table_protos(step.proto).values():
        name, rows, width = table.table_name, table.vocab_size, table.embedding_dim
        targets[name] = Target({name: Layout(name, (rows, width), 1, 0, 0, rows, width)}, {name: None})
        own = proto.stacked_table_specs.add()
        own.CopyFrom(stack)
        del own.table_specs[:]
        own.stack_name, own.stack_vocab_size, own.stack_embedding_dim, own.num_sparsecores = name, rows, width, 1
        made = own.table_specs.add()
        made.CopyFrom(table)
        made.padded_vocab_size, made.padded_embedding_dim = rows, width
        made.row_offset_in_shard = made.shard_rotation = 0
        for feature in made.feature_specs:
            feature.col_offset = feature.col_shift = 0
    return Wanted(targets, proto)


def convert(step: Step, manager: Any, save_step: int | None, wanted: Wanted) -> None:
    """Writes a step with its tables where they are wanted, and all else as it is.

    Args:
      step: of the checkpoint.
      manager: of the new one.
      save_step: its step; None for the same.
      wanted: the tables.

    Raises:
      ValueError: other tables than those of the checkpoint.
    """
    ocp, keys = orbax(), step.keys
    found = misfits(step.proto, wanted.targets) or _slot_misfits(step, wanted.targets)
    if found:
        lines = "\n  ".join(found)
        raise ValueError(f"{step.name}: the checkpoint does not fit:\n  {lines}\ngive the tables as they were saved")
    items = {}
    for key in (keys.model, keys.optimizer):
        leaves = {path: leaf for path, leaf in step.trees[key].items() if not is_table(path)}
        tree = {step.full(key, path): leaf for path, leaf in _dense(step, key, leaves).items()}
        lists = {path for path in step.sequences(key) if TABLES not in path}
        if key == keys.model:
            moved, own_lists = _moved(step, wanted.targets)
            tree, lists = tree | moved, lists | own_lists
        items[key] = ocp.args.StandardSave(nested(tree, lists))
    items[keys.spec] = ocp.args.ProtoSave(wanted.proto)
    manager.save(step.number if save_step is None else save_step, args=ocp.args.Composite(**items))
    manager.wait_until_finished()


def _slots(step: Step, stack: str) -> tuple[str, ...]:
    return tuple(sorted(part for part in step.parts.get(stack, {}) if part != "table"))


def _slot_misfits(step: Step, targets: Mapping[str, Target]) -> list[str]:
    """Returns stacks whose arrays are not there, not of the shape they should have, or differ in slots, a line each."""
    found, layouts, leaves = [], layouts_of_proto(step.proto), step.trees[step.keys.model]
    for name, layout in layouts.items():
        if "table" not in step.parts.get(layout.stack, {}):
            found.append(f'table "{name}": its stack "{layout.stack}" has no array; stacks are {sorted(step.parts)}')
            continue
        for part, path in step.parts[layout.stack].items():
            shape = leaves[path].shape
            if math.prod(shape[:-1]) != layout.stack_shape[0] or shape[-1] not in (1, layout.stack_shape[1]):
                found.append(f'table "{name}": {part} has shape {shape}, and embedding_spec has {layout.stack_shape}')
    for target in targets.values() if not found else ():
        kinds = {table: _slots(step, layouts[table].stack) for table in target.layouts}
        if len(set(kinds.values())) > 1:
            found.append(f"tables of one stack have different slots: {kinds}")
    return found


def _moved(step: Step, targets: Mapping[str, Target]) -> tuple[dict[Path, Any], set[Path]]:
    """Returns rows and slots of the new stacks by the paths of the new file, and those of their lists."""
    layouts = layouts_of_proto(step.proto)
    slots = {name: _slots(step, layout.stack) for name, layout in layouts.items()}
    source = Source(step, slots)
    first = {name: next(iter(target.layouts)) for name, target in targets.items()}
    made: dict[Path, Any] = {}
    lists, old_lists = set(), step.sequences(step.keys.model)
    wanted = {name: ("table", *slots[table]) for name, table in first.items()}
    for name, part in in_turn(wanted, source, lambda name: targets[name].layouts):
        arrays = source.of(targets[name].layouts, part)
        short = source.path(first[name], part)
        full = step.full(step.keys.model, short)
        at = len(full) - len(short) + short.index(TABLES) + 1
        rows = targets[name].layouts[first[name]].stack_shape[0]
        made[(*full[:at], name, *full[at + 1 :])] = targets[name].piece(part, arrays, (0, rows))
        if part == "table" and not slots[first[name]]:
            made[(*full[:at], name, "slot")] = SGDSlotVariables()
        if full[:-1] in old_lists:
            lists.add((*full[:at], name, *full[at + 1 : -1]))
    return made, lists


def _dense(step: Step, key: str, leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """Returns leaves of an item on the host, as they are."""
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host) if hasattr(leaf, "sharding") else None
        for path, leaf in leaves.items()
    }
    return step.read(key, wanted)


def _features(step: Step, stack: Any, proto: Any, known: bool, batch_size: int | None) -> list[FeatureSpec]:
    """Returns the features of a table, in no stack."""
    path = step.parts[stack.stack_name]["table"]
    limits = {
        name: value
        for name in ("max_ids_per_partition", "max_unique_ids_per_partition")
        if (value := getattr(proto, name) or getattr(stack, name))
    }
    optimizer: Optimizer = proto_to_optimizer(proto.optimizer) if known else SGD(0.0)
    table = TableSpec(
        name=proto.table_name,
        vocabulary_size=proto.vocab_size,
        embedding_dim=proto.embedding_dim,
        initializer=jax.nn.initializers.zeros,
        optimizer=optimizer,
        combiner=proto.combiner if known else "mean",
        dtype=np.dtype(step.trees[step.keys.model][path].dtype).name,
        **limits,
    )
    samples = stack.total_sample_count if batch_size is None else batch_size
    if not proto.feature_specs:
        shapes = [(f"feature_{proto.table_name}", (samples, 1), (samples, proto.embedding_dim))]
    else:
        shapes = [(f.feature_name, tuple(f.input_shape), tuple(f.output_shape)) for f in proto.feature_specs]
    if batch_size is not None:
        shapes = [(name, (batch_size, *given[1:]), (batch_size, *out[1:])) for name, given, out in shapes]
    return [FeatureSpec(name=name, table_spec=table, input_shape=i, output_shape=o) for name, i, o in shapes]
