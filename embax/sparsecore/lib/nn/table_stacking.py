"""Stacking in the SparseCore layout: which tables share an array, and where each row of them stands in it.

A stack is split over S SparseCores. Id i of a table lives on SparseCore ``(i % S + rotation) % S``, as row ``i // S``
of the table's rows there, which begin at ``row_offset_in_shard``. Two tables of 5 and 3 ids on 2 SparseCores, their
rows padded to 3 and 2 on each (in truth to multiples of 8), the second one rotated by 1::

    SparseCore 0   a0 a2 a4   b1 .
    SparseCore 1   a1 a3 .    b0 b2
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from embax.sparsecore.layout import MOST_ROWS, MULTIPLE, check_rows, round_up
from embax.sparsecore.layout import compute_physical_row_ids as compute_physical_row_ids
from embax.sparsecore.layout import get_table_stacks as get_table_stacks
from embax.sparsecore.layout import round_up_dim_and_vocab_size as round_up_dim_and_vocab_size
from embax.sparsecore.layout import stack_and_shard_tables as stack_and_shard_tables
from embax.sparsecore.layout import unshard_and_unstack_tables as unshard_and_unstack_tables
from embax.sparsecore.layout_messages import get_row_ids_in_stacked_table as get_row_ids_in_stacked_table
from embax.sparsecore.layout_messages import get_row_ids_in_stacked_tables as get_row_ids_in_stacked_tables
from embax.sparsecore.layout_messages import stack_and_shard_feature_tables as stack_and_shard_feature_tables
from embax.sparsecore.layout_messages import unstack_and_unshard_stacked_tables as unstack_and_unshard_stacked_tables
from embax.sparsecore.utils.utils import all_cores
from embax.specs import FeatureIdTransformation, FeatureSpec, StackedTableSpec, TableSettingInStack, TableSpec
from embax.stacking import stack_name as short_name

LimitsCallable = Callable[[str, int], int]
ACTIVATION_BYTES = 2048 * 1024

log = logging.getLogger(__name__)


def get_default_limits(name: str, batch_size: int) -> int:
    """Returns the limit of ids that a stack has where nobody says otherwise."""
    del name, batch_size
    return 256


def auto_stack_tables(
    features: Any,
    global_device_count: int,
    num_sc_per_device: int,
    rotation: int | None = None,
    stack_to_max_ids_per_partition: LimitsCallable = get_default_limits,
    stack_to_max_unique_ids_per_partition: LimitsCallable = get_default_limits,
    *,
    use_short_stack_names: bool = True,
    activation_mem_bytes_limit: int = ACTIVATION_BYTES,
) -> None:
    """Stacks all tables of one padded dim, optimizer, combiner and quantization, in place.

    In order of first appearance; a table goes to the first stack in which the activations of a SparseCore stay within
    the limit.

    Args:
      features: any pytree of FeatureSpecs.
      global_device_count: devices of all processes.
      num_sc_per_device: SparseCores of each.
      rotation: by which the next table of a stack is rotated; None for num_sc_per_device.
      stack_to_max_ids_per_partition: ``(stack name, samples) -> limit``, for stacks of several tables.
      stack_to_max_unique_ids_per_partition: likewise.
      use_short_stack_names: whether names of more than 50 characters are cut, and end in a hash.
      activation_mem_bytes_limit: of the activations of a stack on a SparseCore.
    """
    leaves, num_sc = feature_leaves(features), all_cores(global_device_count, num_sc_per_device)
    tables = {feature.table_spec.name: feature.table_spec for feature in leaves}
    dims, rows = round_up_dim_and_vocab_size(tables, num_sc)
    room = {
        name: dims[name] * 4 * sum(_samples(f) // num_sc for f in leaves if f.table_spec.name == name)
        for name in tables
    }
    groups: list[list[str]] = []
    for name, table in tables.items():
        for group in groups:
            full = sum(room[member] for member in [*group, name]) > activation_mem_bytes_limit
            full |= sum(rows[member] for member in [*group, name]) > MOST_ROWS
            if _kind(tables[group[0]]) == _kind(table) and not full:
                group.append(name)
                break
        else:
            groups.append([name])
    limits = stack_to_max_ids_per_partition, stack_to_max_unique_ids_per_partition
    for group in groups:
        name = short_name(group) if use_short_stack_names else "_".join(group)
        stack_tables(features, group, global_device_count, num_sc_per_device, rotation, *limits, stack_name=name)


def stack_tables(
    features: Any,
    table_names: Sequence[str],
    global_device_count: int,
    num_sc_per_device: int,
    rotation: int | None = None,
    stack_to_max_ids_per_partition: LimitsCallable = get_default_limits,
    stack_to_max_unique_ids_per_partition: LimitsCallable = get_default_limits,
    stack_name: str | None = None,
    fail_on_excess_padding: bool = False,
) -> None:
    """Puts tables into one stack, in place.

    Args:
      features: any pytree of FeatureSpecs.
      table_names: of the tables, in the order in which they shall stand.
      global_device_count: devices of all processes.
      num_sc_per_device: SparseCores of each.
      rotation: by which the next table is rotated; None for num_sc_per_device.
      stack_to_max_ids_per_partition: ``(stack name, samples) -> limit``, for a stack of several tables.
      stack_to_max_unique_ids_per_partition: likewise.
      stack_name: None for the tables' names joined by "_", shortened beyond 50 characters.
      fail_on_excess_padding: whether tables of different padded dims are refused, and not only warned of.

    Raises:
      ValueError: a table that no feature has, that is stacked already or named twice; tables that differ in optimizer,
        combiner or quantization; a name that is in use; padding beyond need, if that was asked for.
    """
    name = stack_name or short_name(table_names)
    leaves = feature_leaves(features)
    tables = _checked(name, table_names, leaves)
    num_sc = all_cores(global_device_count, num_sc_per_device)
    dims, rows = round_up_dim_and_vocab_size(tables, num_sc)
    check_rows(name, sum(rows.values()))
    dim = max(dims.values())
    if len(set(dims.values())) > 1:
        excess = sum((dim - dims[table]) * rows[table] for table in table_names)
        text = (
            f'stack "{name}": tables {list(table_names)} have padded dims {list(dims.values())}; {excess} numbers of '
            "padding could be saved by stacking tables of one padded dim"
        )
        if fail_on_excess_padding:
            raise ValueError(text)
        log.warning("%s", text)
    own = [feature for feature in leaves if feature.table_spec.name in tables]
    settings = _settings(name, table_names, dim, rows, num_sc, num_sc_per_device if rotation is None else rotation)
    samples = sum(map(_samples, own))
    first = tables[table_names[0]]
    if len(table_names) == 1:
        most, unique = first.max_ids_per_partition, first.max_unique_ids_per_partition
    else:
        most, unique = (
            limit(name, samples) for limit in (stack_to_max_ids_per_partition, stack_to_max_unique_ids_per_partition)
        )
    stacked = StackedTableSpec(
        stack_name=name,
        stack_vocab_size=sum(rows.values()),
        stack_embedding_dim=dim,
        optimizer=first.optimizer,
        combiner=first.combiner,
        total_sample_count=samples,
        max_ids_per_partition=most,
        max_unique_ids_per_partition=unique,
        suggested_coo_buffer_size_per_device=first.suggested_coo_buffer_size_per_device if len(tables) == 1 else None,
        quantization_config=first.quantization_config,
        made_for=(int(global_device_count), int(num_sc_per_device)),
    )
    write_stack(own, stacked, settings, num_sc)


def write_stack(
    features: Sequence[FeatureSpec], stacked: StackedTableSpec, settings: Mapping[str, TableSettingInStack], num_sc: int
) -> None:
    """Writes a stack into its features and their tables."""
    at = 0
    for feature in features:
        setting = settings[feature.table_spec.name]
        feature.table_spec._stacked_table_spec, feature.table_spec._setting_in_stack = stacked, setting
        feature._id_transformation = FeatureIdTransformation(
            row_offset=at, col_offset=setting.row_offset_in_shard * num_sc, col_shift=setting.shard_rotation
        )
        at += _samples(feature)


def compute_table_to_setting_in_stack(
    stack_name: str,
    tables: Mapping[str, TableSpec],
    global_device_count: int,
    num_sc_per_device: int,
    rotation: int | None = None,
) -> dict[str, TableSettingInStack]:
    """Returns where each table lies in a stack of ``tables``, in their order."""
    num_sc = all_cores(global_device_count, num_sc_per_device)
    dims, rows = round_up_dim_and_vocab_size(tables, num_sc)
    turn = num_sc_per_device if rotation is None else rotation
    return _settings(stack_name, list(tables), max(dims.values()), rows, num_sc, turn)


def feature_leaves(features: Any) -> list[FeatureSpec]:
    """Returns the FeatureSpecs of a pytree; TypeError for anything else in it."""
    leaves = jax.tree.leaves(features, is_leaf=lambda leaf: isinstance(leaf, FeatureSpec))
    for leaf in leaves:
        if not isinstance(leaf, FeatureSpec):
            raise TypeError(f"features hold {leaf!r}, a {type(leaf).__name__}; every leaf must be a FeatureSpec")
    return leaves


def _samples(feature: FeatureSpec) -> int:
    if feature.output_shape[0] is None:
        raise ValueError(
            f'feature "{feature.name}": output_shape {feature.output_shape} must name the size of the global batch: '
            "SparseCore limits are counted from it"
        )
    return int(np.prod(feature.output_shape[:-1]))  # type: ignore[arg-type]


def _kind(table: TableSpec) -> tuple:
    return (
        round_up(table.embedding_dim, MULTIPLE),
        table.optimizer,
        table.combiner,
        table.quantization_config,
        table.dtype,
    )


def _checked(name: str, names: Sequence[str], features: Sequence[FeatureSpec]) -> dict[str, TableSpec]:
    """Returns the tables of a new stack; ValueError for what cannot be stacked."""
    known = {feature.table_spec.name: feature.table_spec for feature in features}
    what = f'stack "{name}"'
    for table, count in Counter(names).items():
        if table not in known:
            raise ValueError(f'{what}: there is no table "{table}"; the features have {", ".join(sorted(known))}')
        if count > 1:
            raise ValueError(f'{what}: table "{table}" is repeated; name each table once')
        if known[table].is_stacked():
            stack = known[table].stacked_table_spec.stack_name
            raise ValueError(f'{what}: table "{table}" is already stacked in "{stack}"; stack a table once')
    for table in known.values():
        if table.is_stacked() and table.stacked_table_spec.stack_name == name:
            raise ValueError(f'{what}: the name is already used by the stack of table "{table.name}"; give another')
    for field in ("optimizer", "combiner", "quantization_config", "dtype"):
        values = [getattr(known[table], field) for table in names]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{what}: tables {list(names)} have different values of {field}: {values}; they must agree"
            )
    return {table: known[table] for table in names}


def _settings(
    stack: str, names: Sequence[str], dim: int, rows: Mapping[str, int], num_sc: int, rotation: int
) -> dict[str, TableSettingInStack]:
    settings, first = {}, 0
    for number, name in enumerate(names):
        settings[name] = TableSettingInStack(
            stack_name=stack,
            padded_vocab_size=rows[name],
            padded_embedding_dim=dim,
            row_offset_in_shard=first,
            shard_rotation=number * rotation % num_sc,
        )
        first += rows[name] // num_sc
    return settings
