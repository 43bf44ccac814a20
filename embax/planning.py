"""The plan: every static fact about tables and features, said once, frozen and hashable.

``plan`` reads the specifications and takes a snapshot: changing a spec afterwards changes no plan. Everything
else in embax reads the plan, so it can be a static argument of a jitted function.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from embax.optimizers.base import Optimizer
from embax.placement import Devices, as_devices, checked_placements, chosen_exchange
from embax.specs import FeatureSpec, QuantizationConfig, TableSpec, float_dtype
from embax.stacking import MAX_STACK_ROWS, group_tables, row_offsets, stack_name, whole_tables


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """One table inside a stack: rows ``row_offset`` to ``row_offset + vocabulary_size``."""

    name: str
    vocabulary_size: int
    row_offset: int
    initializer: Any
    combiner: str


@dataclasses.dataclass(frozen=True)
class FeaturePlan:
    """One feature: its table and the shapes of its ids and activations, without the batch."""

    name: str
    table: TablePlan
    stack: str
    batch_size: int | None
    positions: tuple[int, ...]
    valency: int | None
    pooled: bool
    padding_id: int | None
    out_of_range: str
    truncate: str
    capacity: int | None

    @property
    def samples_per_row(self) -> int:
        """How many activations one row of the batch has: the product of its positions."""
        return math.prod(self.positions)

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """Returns the shape of dense ids for ``batch`` samples."""
        tail = (self.valency,) if self.pooled and self.valency is not None else ()
        return (batch, *self.positions, *tail)


@dataclasses.dataclass(frozen=True)
class StackPlan:
    """Tables that share one array of ``rows`` rows; ``rows`` itself, one past the end, means "no row".

    On a mesh the array is stored in the order of its owners: ``stored_rows`` rows, ``local_rows`` on each of ``shards``
    devices, ``local_dim`` columns.
    """

    name: str
    tables: tuple[TablePlan, ...]
    features: tuple[int, ...]
    rows: int
    embedding_dim: int
    dtype: str
    activation_dtype: str
    optimizer: Optimizer
    quantization: QuantizationConfig | None
    placement: str = "row"
    shards: int = 1
    exchange: str = "gather"

    @property
    def layout(self) -> tuple[int, ...]:
        """Its rows, and the first row of each table: what the ids of a batch are numbered by."""
        return (self.rows, *(table.row_offset for table in self.tables))

    @property
    def by_rows(self) -> bool:
        """Whether different devices hold different rows."""
        return self.placement not in ("column", "replicated")

    @property
    def local_rows(self) -> int:
        """Rows that one device holds."""
        return -(-self.rows // self.shards) if self.by_rows else self.rows

    @property
    def stored_rows(self) -> int:
        """Rows of the array over all devices, those included that no id names."""
        return self.local_rows * self.shards if self.by_rows else self.rows

    @property
    def local_dim(self) -> int:
        """Columns of a row that one device holds."""
        return self.embedding_dim // self.shards if self.placement == "column" else self.embedding_dim


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every static fact: stacks, tables, features, the structure of the batch, the backend.

    Compared and hashed by value, so that it can be a static argument of ``jax.jit``.
    """

    stacks: tuple[StackPlan, ...]
    features: tuple[FeaturePlan, ...]
    structure: Any
    backend: str | None
    devices: Devices | None = None

    def __hash__(self):
        # The hash of every field of every table is worth keeping: a jitted call asks for it at each step.
        cached = self.__dict__.get("_hash")
        if cached is None:
            cached = hash((self.stacks, self.features, self.structure, self.backend, self.devices))
            object.__setattr__(self, "_hash", cached)
        return cached

    def __getstate__(self):
        # What is kept beside the fields (a hash, which differs between processes) must not travel with the plan.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def batch_shards(self) -> int:
        """Returns how many shards a batch has where the caller stands: one inside of a shard_map."""
        return 1 if self.devices is None or self.devices.inside() else self.devices.batch_shards

    def stack(self, name: str) -> StackPlan:
        """Returns the stack of that name; KeyError lists the names there are."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise KeyError(f"no stack {name!r}; the plan has {', '.join(repr(s.name) for s in self.stacks)}")

    def table(self, name: str) -> tuple[StackPlan, TablePlan]:
        """Returns the table of that name with its stack; KeyError lists the names there are."""
        known = [(stack, table) for stack in self.stacks for table in stack.tables]
        for stack, table in known:
            if table.name == name:
                return stack, table
        raise KeyError(f"no table {name!r}; the plan has {', '.join(repr(t.name) for _, t in known)}")

    def flatten(self, tree: Any, what: str) -> list[Any]:
        """Returns the leaves of ``tree``, one per feature; ValueError if its structure is not the features'."""
        try:
            return self.structure.flatten_up_to(tree)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{what} must have the structure of the features given to plan, {self.structure}; {error}"
            ) from None


def plan(
    features: Any,
    *,
    stacks: str | Mapping[str, Sequence[str]] = "auto",
    capacity: Mapping[str, int] | None = None,
    activation_dtype: Any = None,
    backend: str | None = None,
    mesh: Any = None,
    placement: str | Mapping[str, str] = "row",
) -> Plan:
    """Returns the plan of the given features: tables stacked, rows numbered, everything checked.

    Args:
      features: FeatureSpecs in any pytree; ids, weights and activations will have its structure.
      stacks: "auto": tables that agree in embedding_dim, dtype, optimizer and quantization share one array
        (schedules agree when they are one object: make a schedule once, not once per table);
        "none": every table has its own; a mapping from stack names to table names: those, the rest alone.
      capacity: ids per batch that a ragged feature may bring, by feature name; without it, capacities are
        rounded up, so that a new batch seldom compiles anew.
      activation_dtype: of the activations; None for the table's own.
      backend: the kernels to use, by name; None for the best one at hand.
      mesh: a jax.sharding.Mesh whose axes split both batch and tables, or ``embax.Devices`` that says which; None for
        one device.
      placement: of all tables, or by table name: "row", "table", "column", "replicated" (``embax.placement``); "auto"
        for those that ``embax.costs`` estimates to be fastest.

    Raises:
      ValueError: duplicate or differing names, tables that cannot be stacked, more than 2**31 - 2 rows, a placement
        that the mesh or the table does not allow.

    >>> import jax, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.SGD(0.5))
    >>> history = embax.FeatureSpec(name="history", table_spec=table, input_shape=(None, 3), output_shape=(None, 2))
    >>> [stack.rows for stack in embax.plan({"history": history}).stacks]
    [6]
    """
    if activation_dtype is not None:
        activation_dtype = float_dtype("plan", "activation_dtype", activation_dtype)
    specs, structure = jax.tree.flatten(features, is_leaf=lambda x: isinstance(x, FeatureSpec))
    devices = as_devices(mesh)
    tables = _tables_of(specs)
    if placement == "auto" and devices is not None:
        from embax.costs import chosen_placements

        placement = chosen_placements(features, devices, stacks=stacks)
    rule = _Rule(checked_placements(placement, [t.name for t in tables], devices), devices)
    groups = {name: rule.lay(name, group) for name, group in _grouped(tables, stacks, rule.kind).items()}
    by_table = {table.name: (name, table) for name, laid in groups.items() for table in laid.tables}
    capacity = _checked_capacity(specs, capacity)
    planned = tuple(_feature_plan(spec, *by_table[spec.table_spec.name], capacity.get(spec.name)) for spec in specs)
    stack_plans = []
    for name, laid in groups.items():
        members = tuple(i for i, feature in enumerate(planned) if feature.stack == name)
        chosen = chosen_exchange(devices, [planned[i].valency for i in members])
        stack_plans.append(_stack_plan(name, laid, members, activation_dtype, chosen))
    return Plan(tuple(stack_plans), planned, structure, backend, devices)


def as_plan(features: Any, settings: Mapping[str, Any]) -> Plan:
    """Returns ``features`` if they are a Plan already, else their plan with these settings."""
    if not isinstance(features, Plan):
        return plan(features, **settings)
    if settings:
        raise ValueError(f"{', '.join(settings)}: a Plan is given, which has its settings; give them to embax.plan")
    return features


def _tables_of(specs: Sequence[FeatureSpec]) -> list[TableSpec]:
    """Returns the features' tables in order of first appearance, after checking every name."""
    if not specs:
        raise ValueError("plan: there are no features; pass at least one FeatureSpec")
    tables: dict[str, TableSpec] = {}
    seen: set[str] = set()
    for spec in specs:
        if not isinstance(spec, FeatureSpec):
            raise TypeError(f"plan: {spec!r} is not a FeatureSpec")
        if spec.name in seen:
            raise ValueError(f'plan: two features are named "{spec.name}"; every feature needs a name of its own')
        seen.add(spec.name)
        known = tables.setdefault(spec.table_spec.name, spec.table_spec)
        if known != spec.table_spec:
            raise ValueError(
                f'plan: feature "{spec.name}" brings another table named "{known.name}" with other settings; share one '
                "TableSpec, or rename one of the tables"
            )
        if known.vocabulary_size > MAX_STACK_ROWS:
            raise ValueError(
                f'table "{known.name}": vocabulary_size {known.vocabulary_size} is above {MAX_STACK_ROWS}, the '
                "most rows "
                "that one device can number; hash the ids into fewer rows or split the table by id"
            )
    return list(tables.values())


class _Laid(NamedTuple):
    """The tables of a stack with their first rows, and how the stack lies on the devices."""

    spec: TableSpec
    tables: tuple[TablePlan, ...]
    rows: int
    placement: str
    shards: int


class _Rule(NamedTuple):
    """The placement of every table by name, and the devices there are."""

    placements: dict[str, str]
    devices: Devices | None

    def kind(self, table: TableSpec) -> tuple:
        """Returns what tables of one stack have in common."""
        common = (table.embedding_dim, table.dtype, table.optimizer, table.quantization_config)
        return (*common, self.placements[table.name])

    def lay(self, stack: str, group: list[TableSpec]) -> _Laid:
        """Returns the tables of a stack, laid out."""
        placement, sizes = self.placements[group[0].name], [table.vocabulary_size for table in group]
        shards = 1 if self.devices is None or placement == "replicated" else self.devices.table_shards
        if placement == "table":
            offsets, rows = whole_tables(sizes, shards)
            rows *= shards
        else:
            offsets = row_offsets(sizes, shards if placement == "row" else 1)
            rows = offsets[-1] + sizes[-1]
        check_columns(f'plan: table "{group[0].name}"', group[0].embedding_dim, placement, shards)
        if rows > MAX_STACK_ROWS - (shards - 1):  # stored, they are filled up to a multiple of the devices
            raise ValueError(f'plan: stack "{stack}" would have more than {MAX_STACK_ROWS} rows; split it')
        tables = tuple(
            TablePlan(t.name, t.vocabulary_size, offset, t.initializer, t.combiner)
            for t, offset in zip(group, offsets, strict=True)
        )
        return _Laid(group[0], tables, rows, placement, shards)


def check_columns(what: str, dim: int, placement: str, shards: int) -> None:
    """Raises ValueError unless ``shards`` devices can share the columns, where they are to."""
    if placement == "column" and dim % shards:
        raise ValueError(
            f'{what} has embedding_dim {dim}, and placement "column" splits it over {shards} devices; make it a '
            f"multiple of {shards}, or place it otherwise"
        )


def _grouped(tables: list[TableSpec], stacks: Any, kind: Any) -> dict[str, list[TableSpec]]:
    if stacks == "auto":
        groups = group_tables(tables, kind)
    elif stacks == "none":
        groups = [[table] for table in tables]
    elif isinstance(stacks, Mapping):
        return _explicit_groups(tables, stacks, kind)
    else:
        raise ValueError(f'plan: stacks={stacks!r} must be "auto", "none", or a mapping from stack to table names')
    named: dict[str, list[TableSpec]] = {}
    for group in groups:
        _add_group(named, stack_name([t.name for t in group]), group)
    return named


def _explicit_groups(
    tables: list[TableSpec], stacks: Mapping[str, Sequence[str]], kind: Any
) -> dict[str, list[TableSpec]]:
    remaining = {table.name: table for table in tables}
    named: dict[str, list[TableSpec]] = {}
    for name, members in stacks.items():
        if isinstance(members, str):
            raise TypeError(f'plan: stack "{name}" is given as the text {members!r}; give a list of table names')
        for member in members:
            if member not in {t.name for t in tables}:
                raise ValueError(f'plan: stack "{name}" names table "{member}", which no feature uses')
            if member not in remaining or list(members).count(member) > 1:
                raise ValueError(f'plan: table "{member}" is in two stacks, or twice in one')
        group = [remaining.pop(member) for member in members]
        for table in group[1:]:
            if kind(table) != kind(group[0]):
                raise ValueError(
                    f'plan: stack "{name}" cannot hold tables "{group[0].name}" and "{table.name}": they differ in '
                    "embedding_dim, dtype, optimizer, quantization_config or placement"
                )
        _add_group(named, name, group)
    for table in remaining.values():
        _add_group(named, stack_name([table.name]), [table])
    return named


def _add_group(named: dict[str, list[TableSpec]], name: str, group: list[TableSpec]) -> None:
    if not group:
        raise ValueError(f'plan: stack "{name}" has no tables')
    if name in named:
        raise ValueError(f'plan: two stacks would be named "{name}"; rename a table, or name the stacks')
    named[name] = group


def _checked_capacity(specs: Sequence[FeatureSpec], capacity: Mapping[str, int] | None) -> dict[str, int]:
    capacity = dict(capacity or {})
    for name, value in capacity.items():
        if name not in {spec.name for spec in specs}:
            raise ValueError(f'plan: capacity names feature "{name}", which is not among the features')
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f'plan: capacity of feature "{name}" is {value!r}; it must be an integer of at least 1')
    return capacity


def _feature_plan(spec: FeatureSpec, stack: str, table: TablePlan, capacity: int | None) -> FeaturePlan:
    positions = spec.output_shape[1:-1]
    pooled = len(spec.input_shape) > len(spec.output_shape) - 1 or not positions
    valency = spec.input_shape[-1] if len(spec.input_shape) == len(spec.output_shape) else None
    return FeaturePlan(
        name=spec.name,
        table=table,
        stack=stack,
        batch_size=spec.input_shape[0],
        positions=tuple(positions),  # type: ignore[arg-type]
        valency=valency,
        pooled=pooled,
        padding_id=None if spec.padding_id is None else int(spec.padding_id),
        out_of_range=spec.out_of_range,
        truncate=spec.truncate,
        capacity=capacity,
    )


def _stack_plan(name: str, laid: _Laid, features: tuple[int, ...], activation_dtype: Any, exchange: str) -> StackPlan:
    first = laid.spec
    return StackPlan(
        name=name,
        tables=laid.tables,
        features=features,
        rows=laid.rows,
        embedding_dim=first.embedding_dim,
        dtype=first.dtype,
        activation_dtype=activation_dtype or first.dtype,
        optimizer=first.optimizer,
        quantization=first.quantization_config,
        placement=laid.placement,
        shards=laid.shards,
        exchange=exchange,
    )
