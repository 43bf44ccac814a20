"""SparseCore specifications in the words of the core: which stack, which rows, whose samples.

A stack of the SparseCore layout is a stack of the core whose rows are numbered as they stand in the array, each device
holding a range of them: the core's placement "table". Everything else is the core's.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from embax.placement import Devices
from embax.planning import Plan, StackPlan, TablePlan, plan
from embax.sparsecore.layout import MOST_ROWS, check_made_for
from embax.sparsecore.lib.nn.table_stacking import compute_physical_row_ids, feature_leaves
from embax.specs import FeatureSpec, StackedTableSpec


class Stack(NamedTuple):
    """A stack, and its features in the order of their samples: (number among all features, specification)."""

    spec: StackedTableSpec
    features: tuple[tuple[int, FeatureSpec], ...]

    def physical(self, feature: FeatureSpec, ids: np.ndarray, num_sc: int) -> np.ndarray:
        """Returns the rows of the stack's array that hold ids of a feature."""
        setting = feature.table_spec.setting_in_stack
        if num_sc == 1:
            return ids + setting.row_offset_in_shard
        where = setting.shard_rotation, setting.row_offset_in_shard
        return compute_physical_row_ids(num_sc, self.spec.stack_vocab_size, *where, ids)

    def layout(self, samples: tuple[int, ...]) -> np.ndarray:
        """Returns samples, rotation and row offset of each feature, of so many samples, as ``host.lay`` reads them."""
        settings = (feature.table_spec.setting_in_stack for _, feature in self.features)
        return np.array(
            [(n, one.shard_rotation, one.row_offset_in_shard) for n, one in zip(samples, settings, strict=True)],
            np.int64,
        )


def stacks_of(feature_specs: Any) -> dict[str, Stack]:
    """Returns the stacks of prepared features by name.

    Raises:
      ValueError: a name that two features have, or a table that is in no stack yet.
    """
    leaves = feature_leaves(feature_specs)
    check_names(leaves)
    found: dict[str, list[tuple[int, FeatureSpec]]] = {}
    for number, feature in enumerate(leaves):
        if not feature.table_spec.is_stacked() or feature.id_transformation is None:
            raise ValueError(
                f'feature "{feature.name}": its table "{feature.table_spec.name}" is in no stack yet; call '
                "embedding.prepare_feature_specs_for_training first"
            )
        found.setdefault(feature.table_spec.stacked_table_spec.stack_name, []).append((number, feature))
    return {
        name: Stack(
            members[0][1].table_spec.stacked_table_spec,
            tuple(sorted(members, key=lambda member: member[1].id_transformation.row_offset)),  # type: ignore
        )
        for name, members in found.items()
    }


def check_cores(stacks: Mapping[str, Stack], devices: int | None, num_sc: int) -> None:
    """Raises ValueError unless stacks were made for these SparseCores; else rows lie where nobody looks.

    Args:
      stacks: by name.
      devices: of all processes; None where only the product is known.
      num_sc: SparseCores of each device; of all where ``devices`` is None.
    """
    for stack in stacks.values():
        check_made_for(stack.spec, devices, num_sc)
    num_sc *= devices or 1
    for stack in stacks.values():
        settings = {f.table_spec.name: f.table_spec.setting_in_stack for _, f in stack.features}
        rows = stack.spec.stack_vocab_size
        ordered = sorted(settings.values(), key=lambda setting: setting.row_offset_in_shard)
        first = 0
        fits = rows % num_sc == 0
        for setting in ordered:
            fits &= setting.row_offset_in_shard == first and setting.padded_vocab_size % num_sc == 0
            first += setting.padded_vocab_size // num_sc
        if not fits:
            raise ValueError(
                f'stack "{stack.spec.stack_name}" was not made for {num_sc} SparseCores; pass the global_device_count '
                "and num_sc_per_device with which its tables were stacked"
            )


def check_names(features: Sequence[FeatureSpec]) -> None:
    """Raises ValueError for two features of one name, or none at all."""
    if not features:
        raise ValueError("there are no features; pass at least one FeatureSpec")
    seen = set()
    for feature in features:
        if feature.name in seen:
            raise ValueError(f'feature "{feature.name}" is already defined; every feature needs a name of its own')
        seen.add(feature.name)


def input_plan(features: Sequence[FeatureSpec]) -> Plan:
    """Returns the plan by which the core reads a part of a batch: ids of every table as they are, stack by stack."""
    return _input_plan(tuple(features), tuple(feature.id_transformation for feature in features))


@functools.lru_cache(maxsize=64)
def _input_plan(features: tuple[FeatureSpec, ...], _: tuple) -> Plan:
    free = [
        dataclasses.replace(
            feature,
            table_spec=_plain(feature.table_spec),
            input_shape=(None, *feature.input_shape[1:]),
            output_shape=(None, *feature.output_shape[1:]),
        )
        for feature in features
    ]
    core = plan(free, stacks="none")
    own = stacks_of(features)
    stack_name = {number: name for name, stack in own.items() for number, _ in stack.features}
    planned = tuple(dataclasses.replace(f, stack=stack_name[number]) for number, f in enumerate(core.features))
    stacks = tuple(
        dataclasses.replace(
            core.stacks[0], name=name, tables=(), features=tuple(n for n, _ in stack.features), rows=MOST_ROWS
        )
        for name, stack in own.items()
    )
    return dataclasses.replace(core, stacks=stacks, features=planned)


def _plain(table: Any) -> Any:
    """Returns a table as it was before it was stacked."""
    fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    return type(table)(**{name: value for name, value in fields.items() if not name.startswith("_")})


def core_stack(spec: StackedTableSpec, dtype: str, devices: int) -> StackPlan:
    """Returns a stack as the core's exchanges and kernels know it."""
    return StackPlan(
        name=spec.stack_name,
        tables=(TablePlan(spec.stack_name, spec.stack_vocab_size, 0, None, spec.combiner),),
        features=(0,),
        rows=spec.stack_vocab_size,
        embedding_dim=spec.stack_embedding_dim,
        dtype=dtype,
        activation_dtype=dtype,
        optimizer=spec.optimizer,
        quantization=spec.quantization_config,
        placement="table",
        shards=devices,
    )


_AXES: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("axes", default=None)


@contextlib.contextmanager
def over_axes(axes: tuple[str, ...]) -> Iterator[None]:
    """Says along which axes of a mesh tables are split, and in which order: inside of a shard_map nobody could tell."""
    token = _AXES.set(axes)
    try:
        yield
    finally:
        _AXES.reset(token)


def devices_here(global_device_count: int) -> Devices | None:
    """Returns the devices of the shard_map or pmap that the caller is inside of; None for one device alone.

    Raises:
      ValueError: there are not ``global_device_count`` of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = _AXES.get()
    if known is not None and global_device_count > 1:
        return Devices(AbstractMesh(tuple(mesh.shape[axis] for axis in known), known), exchange="gather")
    manual = tuple(axis for axis in mesh.axis_names if axis in mesh.manual_axes)
    # The batch may be split along some of the axes only; the number of devices says which.
    choices = [axes for size in range(len(manual), 0, -1) for axes in itertools.combinations(manual, size)]
    fitting = [axes for axes in choices if math.prod(mesh.shape[axis] for axis in axes) == global_device_count]
    if not fitting and (manual or global_device_count != 1):
        where = f"inside of a shard_map over {dict(mesh.shape)}" if manual else "outside of a shard_map: 1 device"
        raise ValueError(
            f"global_device_count={global_device_count}, and the call is {where}; call it inside of jax.shard_map (or "
            "jax.pmap) over all devices, and pass mesh.size"
        )
    if global_device_count == 1:
        return None  # one device has nobody to exchange with, in a mesh or not
    # Axes of length 1 more or less are the same devices; others would be a guess.
    if len({tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in fitting}) > 1:
        raise ValueError(
            f"global_device_count={global_device_count} fits several axes of {dict(mesh.shape)}: {fitting}; call it "
            "inside of a shard_map over those axes only (axis_names=)"
        )
    axes = fitting[0]
    # Over Manual axes nothing can be planned; what they are called and how long they are is all that is asked for.
    return Devices(AbstractMesh(tuple(mesh.shape[axis] for axis in axes), axes), exchange="gather")
