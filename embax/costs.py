"""What a plan will move and hold: bytes of memory, bytes on the wire and rows touched, by stack and by device.

The formulas follow ``embax.exchange`` collective by collective. Bytes on the wire are those that one device receives:

    all_gather of X bytes from each of n devices      (n - 1) X
    psum_scatter to X bytes on each of n devices      (n - 1) X
    all_to_all of Y bytes on each of n devices        (n - 1) / n Y
    psum of Y bytes                                   2 (n - 1) / n Y

Time is their sum with the bytes of touched rows, at the two bandwidths of ``Machine``.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from embax.id_batch import bucket
from embax.placement import Devices, sums_travel
from embax.planning import FeaturePlan, Plan, StackPlan, plan

NOMINAL_SAMPLES = 1024  # on each device, where no feature says how large a batch is
NOMINAL_VALENCY = 8  # ids of a sample, where a feature does not say
CACHE_LINE = 64


@dataclasses.dataclass(frozen=True)
class Machine:
    """Bandwidths of one device, bytes a second: ``wire`` to the others, ``memory`` to its own."""

    wire: float = 25e9
    memory: float = 200e9


@dataclasses.dataclass(frozen=True)
class StackCost:
    """What one stack costs one device.

    Attributes:
      stack: its plan.
      memory: bytes of rows and slots.
      forward: bytes received in a lookup.
      backward: bytes received in an update.
      rows: rows read in a step, in the lookup and in the update together, if ids are uniform.
      row_bytes: bytes of cache lines of such a row, slots left out.
    """

    stack: StackPlan
    memory: int
    forward: int
    backward: int
    rows: int
    row_bytes: int

    def seconds(self, machine: Machine) -> float:
        """Returns the time of a step that nothing else slows down."""
        return (self.forward + self.backward) / machine.wire + self.rows * self.row_bytes / machine.memory


def costs(plan: Plan, batch_size: int | None = None) -> list[StackCost]:
    """Returns what every stack of ``plan`` costs one device of its mesh.

    Args:
      plan: of a mesh.
      batch_size: of all devices together; None for the features' own.

    Raises:
      ValueError: a plan without a mesh.

    >>> import jax, embax
    >>> from embax.costs import costs
    >>> table = embax.TableSpec(name="item", vocabulary_size=1000, embedding_dim=16, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.Adagrad(0.1))
    >>> feature = embax.FeatureSpec(name="x", table_spec=table, input_shape=(None, 4), output_shape=(None, 16))
    >>> plan = embax.plan(feature, mesh=jax.make_mesh((1,), ("x",)))
    >>> [(cost.memory, cost.forward) for cost in costs(plan, 64)]
    [(128000, 0)]
    """
    if plan.devices is None:
        raise ValueError("costs: the plan is of one device, which sends nothing; pass mesh= to embax.plan")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"costs: batch_size={batch_size} must be at least 1, or None for the features' own")
    return [_cost(plan, stack, plan.devices, batch_size) for stack in plan.stacks]


def explain(plan: Plan, batch_size: int | None = None, machine: Machine | None = None) -> str:
    """Returns ``costs`` as a table in words: one line a stack, and the sums.

    Args as ``costs``; ``machine`` for the estimate of time.
    """
    found, machine = costs(plan, batch_size), machine or Machine()
    lines = [("stack", "placement", "exchange", "memory/device", "forward", "backward", "rows/step", "estimate")]
    for cost in found:
        stack = cost.stack
        exchange = stack.exchange if stack.by_rows else "-"
        numbers = (_bytes(cost.memory), _bytes(cost.forward), _bytes(cost.backward), f"{cost.rows:,}")
        lines.append((stack.name, stack.placement, exchange, *numbers, f"{1e3 * cost.seconds(machine):.3f} ms"))
    totals = (_bytes(sum(c.memory for c in found)), _bytes(sum(c.forward for c in found)))
    totals += (_bytes(sum(c.backward for c in found)), f"{sum(c.rows for c in found):,}")
    lines.append(("all", "", "", *totals, f"{1e3 * sum(c.seconds(machine) for c in found):.3f} ms"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = ["  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(texts)


def chosen_placements(
    features: Any, devices: Devices, machine: Machine | None = None, stacks: Any = "auto"
) -> dict[str, str]:
    """Returns the placement of every table for which a step is estimated fastest, within memory.

    Candidates are "row", "column" where rows stay a cache line wide and the optimizer steps numbers one by one, and
    "replicated" while all copies together take no more memory on a device than the rows dealt out do. Tables that
    ``stacks`` puts together are placed together; else each for itself.
    """
    machine, found = machine or Machine(), {}
    stacks = stacks if isinstance(stacks, Mapping) else "none"
    by_rows = plan(features, stacks=stacks, mesh=devices)
    divided = [s for s in by_rows.stacks if s.embedding_dim % devices.table_shards == 0]
    columns = {table.name: "column" for stack in divided for table in stack.tables}
    others = [plan(features, stacks=stacks, mesh=devices, placement=placement) for placement in (columns, "replicated")]
    for candidate in (by_rows, *others):
        for cost in costs(candidate):
            found.setdefault(cost.stack.name, {})[cost.stack.placement] = cost
    room = sum(by["row"].memory for by in found.values())
    chosen = {}
    for by in sorted(found.values(), key=lambda by: by["row"].memory):
        best, room = _best(by, room, machine)
        chosen.update({table.name: best for table in by["row"].stack.tables})
    return chosen


def _best(by: dict[str, StackCost], room: int, machine: Machine) -> tuple[str, int]:
    allowed = {"row": by["row"]}
    column, copy = by.get("column"), by["replicated"]
    if column is not None and _is_wide(column.stack) and column.stack.optimizer.element_wise():
        allowed["column"] = column
    if copy.memory <= room:
        allowed["replicated"] = copy
    best = min(allowed, key=lambda placement: allowed[placement].seconds(machine))
    return best, room - copy.memory if best == "replicated" else room


def _is_wide(stack: StackPlan) -> bool:
    return stack.local_dim * jnp.dtype(stack.dtype).itemsize >= CACHE_LINE


def _cost(plan: Plan, stack: StackPlan, devices: Devices, batch_size: int | None) -> StackCost:
    samples, ids, gained = _brought(plan, stack, devices, batch_size)
    shared, everybody = devices.size(devices.shared_axes), devices.batch_shards
    alone, dim = devices.size(devices.table_only_axes), stack.embedding_dim
    batch = 4 * ids + 4 * samples + (4 * ids if gained else 0)
    table = jnp.dtype(stack.dtype).itemsize
    gradient, partial = (jnp.dtype(devices.wire_dtype or d).itemsize for d in (stack.activation_dtype, "float32"))
    width = stack.local_dim
    if stack.placement == "replicated":
        forward, backward = 0.0, float((everybody - 1) * (batch + samples * dim * gradient))
        if sums_travel(stack.rows, samples, everybody):
            backward = 2 * (1 - 1 / everybody) * stack.rows * (dim + 1) * 4
    elif stack.placement == "column":
        columns = (shared - 1) * samples * width * gradient + (1 - 1 / alone) * samples * dim * gradient
        forward = (shared - 1) * batch + columns
        copies = everybody // shared
        backward = (everybody - 1) * batch + (shared - 1 + (copies - 1) * shared) * samples * width * gradient
    elif stack.exchange == "route":
        most = min(ids, stack.stored_rows)
        block = shared * min(bucket(math.ceil(most / shared * 5 / 4)), most, stack.local_rows)
        forward = (1 - 1 / shared) * block * (4 + dim * table)
        backward = (1 - 1 / shared) * block * (4 + dim * partial)
    else:
        sums = partial * samples * dim
        forward = (shared - 1) * (batch + sums) + 2 * (1 - 1 / alone) * shared * sums
        backward = (everybody - 1) * (batch + samples * dim * gradient)
    return StackCost(
        stack=stack,
        memory=_memory(stack),
        forward=round(forward),
        backward=round(backward),
        rows=_rows(stack, devices, ids),
        row_bytes=CACHE_LINE * -(-width * table // CACHE_LINE),
    )


def _brought(plan: Plan, stack: StackPlan, devices: Devices, batch_size: int | None) -> tuple[int, int, bool]:
    """Returns the samples and ids that one device brings to a stack, and whether ids have gains."""
    samples, ids, gained = 0, 0, False
    for index in stack.features:
        feature: FeaturePlan = plan.features[index]
        whole = batch_size or feature.batch_size or NOMINAL_SAMPLES * devices.batch_shards
        own = -(-whole // devices.batch_shards) * feature.samples_per_row
        valency = 1 if not feature.pooled else NOMINAL_VALENCY if feature.valency is None else feature.valency
        samples += own
        ids += own * valency
        gained |= feature.table.combiner != "sum" and valency != 1
    return samples, ids, gained


def _memory(stack: StackPlan) -> int:
    rows = stack.local_rows * stack.local_dim * jnp.dtype(stack.dtype).itemsize
    for slot in stack.optimizer.slots():
        rows += stack.local_rows * (1 if slot.row_wise else stack.local_dim) * jnp.dtype(slot.dtype).itemsize
    return rows


def _rows(stack: StackPlan, devices: Devices, ids: int) -> int:
    """Returns the rows that one device reads for a step: one an id in the lookup, each distinct one in the update."""
    everybodys = ids * devices.batch_shards
    distinct = stack.rows * -math.expm1(everybodys * math.log1p(-1 / stack.rows)) if stack.rows > 1 else stack.rows
    if stack.placement == "column":
        return round(everybodys + distinct)
    if stack.placement == "replicated":
        return round(ids + distinct)
    return round((everybodys + distinct) / stack.shards)


def _bytes(count: int) -> str:
    """Returns ``count`` bytes in words.

    >>> _bytes(1_500_000)
    '1.50 MB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
