"""Every stack's exchange, over the mesh: arrays of the whole job in, arrays of the whole job out.

Inside of a shard_map (or pmap) over the same axes the caller's arrays are shards already, and the same code runs on
them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from embax import kernels
from embax.exchange import column, gather, replicated, route
from embax.exchange.shards import Here, seeded_here
from embax.id_batch import StackIds
from embax.placement import Devices
from embax.planning import FeaturePlan, Plan, StackPlan
from embax.row_gradients import RowGradients
from embax.sharded_tables import slot_specs, table_spec, touched_spec
from embax.table_state import TableState

_BY_EXCHANGE = {"gather": gather, "route": route}
_BY_PLACEMENT = {"column": column, "replicated": replicated}


def exchange_of(stack: StackPlan) -> Any:
    """Returns the exchange of a stack."""
    return _BY_PLACEMENT.get(stack.placement) or _BY_EXCHANGE[stack.exchange]


def lookup(plan: Plan, backend: str, rows: Mapping[str, Any], batch: Mapping[str, StackIds]) -> tuple[dict, dict]:
    """Returns the activations of every stack's features, and a token for each stack; differentiable in the gains."""
    gains, devices = {name: ids.gains for name, ids in batch.items()}, _devices(plan)
    if devices.explicit and not devices.inside():
        gains = jax.tree.map(lambda part: jax.sharding.reshard(part, devices.sharding(devices.batch_spec())), gains)
    ungained = {name: dataclasses.replace(ids, gains=None) for name, ids in batch.items()}
    return _lookup(plan, backend, dict(rows), gains, ungained)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(plan: Plan, backend: str, rows: dict, gains: dict, batch: dict) -> tuple[dict, dict]:
    devices = _devices(plan)
    batch = {name: dataclasses.replace(ids, gains=gains[name]) for name, ids in batch.items()}

    def local(rows, batch):
        activations, tokens = {}, {}
        for stack in plan.stacks:
            ids = batch[stack.name].shard(0)
            whole = looked_up(stack, devices, backend, rows[stack.name], ids)
            tokens[stack.name] = whole[:1, :1]
            activations[stack.name] = by_feature([plan.features[i] for i in stack.features], whole, ids.samples)
        return activations, tokens

    tables = {stack.name: table_spec(stack, devices) for stack in plan.stacks}
    samples = devices.batch_spec()
    activations, tokens = mapped(devices, local, (tables, samples), samples)(dict(rows), dict(batch))
    return {stack.name: _cut(plan, stack, activations[stack.name], batch) for stack in plan.stacks}, tokens


def looked_up(stack: StackPlan, devices: Devices, backend: str, table: Any, ids: StackIds) -> jax.Array:
    """Returns the activations of this device's samples; of none nothing is sent."""
    if not sum(ids.samples):
        return jnp.zeros((0, stack.embedding_dim), stack.activation_dtype)
    return exchange_of(stack).lookup(Here(stack, devices, backend), table, ids)


def _forward(plan, backend, rows, gains, batch):
    if any(leaf.perturbed for leaf in jax.tree.leaves(rows, is_leaf=_is_primal)):
        raise NotImplementedError(
            "a plain jax.grad with respect to tables on a mesh would be as large as they are; differentiate with "
            "respect to the activations and call embax.update, or use embax.value_and_grad"
        )
    wanted = any(leaf.perturbed for leaf in jax.tree.leaves(gains, is_leaf=_is_primal))
    rows, gains, batch = jax.tree.map(lambda leaf: leaf.value, (rows, gains, batch), is_leaf=_is_primal)
    kept = (rows, gains, batch) if wanted else None
    return _lookup(plan, backend, rows, gains, batch), kept


def _backward(plan, backend, kept, cotangents):
    if kept is None:
        return None, None, None
    rows, gains, batch = kept
    devices = _devices(plan)
    activations = jax.tree.map(_as_array, cotangents[0], is_leaf=_is_zero)
    filled = {stack.name: _filled(plan, stack, activations[stack.name], batch) for stack in plan.stacks}

    def local(rows, batch, cotangents):
        made = {}
        for stack in plan.stacks:
            name = stack.name
            own = batch[name].shard(0), _joined(stack, cotangents[name]).astype(jnp.float32)
            if gains[name] is not None:
                products = exchange_of(stack).gain_products(Here(stack, devices, backend), rows[name], *own)
                made[name] = products[None]
        return made

    tables, samples = {stack.name: table_spec(stack, devices) for stack in plan.stacks}, devices.batch_spec()
    made = mapped(devices, local, (tables, samples, samples), samples)(rows, batch, filled)
    return None, {name: made.get(name) for name in gains}, None


_lookup.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _as_array(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_zero(leaf) else leaf


def update(
    plan: Plan,
    backend: str,
    tables: Mapping[str, TableState],
    batch: Mapping[str, StackIds],
    tokens: Mapping[str, Any],
    gradients: Mapping[str, tuple],
    hyper: Mapping[str, Any],
) -> dict[str, TableState]:
    """Returns every stack's state after one step on the rows that the batch touched."""
    devices = _devices(plan)

    def local(tables, batch, tokens, gradients, hyper):
        new = {}
        for here, ids, *args in _each_stack(plan, backend, batch, tokens, gradients):
            name = here.stack.name
            state, own = tables[name], hyper[name]
            new[name] = exchange_of(here.stack).update(here, state, ids, *args, own) if sum(ids.samples) else state
        return new

    states = {stack.name: state_spec(stack, devices, tables[stack.name]) for stack in plan.stacks}
    samples = devices.batch_spec()
    filled = {stack.name: _filled(plan, stack, gradients[stack.name], batch) for stack in plan.stacks}
    run = mapped(devices, local, (states, samples, samples, samples, P()), states)
    return run(dict(tables), dict(batch), dict(tokens), filled, dict(hyper))


def row_gradients(
    plan: Plan,
    backend: str,
    batch: Mapping[str, StackIds],
    tokens: Mapping[str, Any],
    gradients: Mapping[str, tuple],
) -> dict[str, RowGradients]:
    """Returns the gradient of every stack's table, each device's rows where they live.

    Rows have the numbers of the stored table. They are unique, and rise within a device's part, which is filled up with
    ``stored_rows``.
    """
    devices = _devices(plan)

    def local(batch, tokens, gradients):
        made = {}
        for here, ids, *args in _each_stack(plan, backend, batch, tokens, gradients):
            stack = here.stack
            nothing = RowGradients(jnp.zeros(0, jnp.int32), jnp.zeros((0, stack.local_dim), jnp.float32), 0)
            own = exchange_of(stack).row_gradients(here, ids, *args) if sum(ids.samples) else nothing
            made[stack.name] = RowGradients(_stored_rows(stack, devices, own.rows), own.values, stack.stored_rows)
        return made

    samples = devices.batch_spec()
    filled = {stack.name: _filled(plan, stack, gradients[stack.name], batch) for stack in plan.stacks}
    specs = {stack.name: gradient_spec(stack, devices) for stack in plan.stacks}
    return mapped(devices, local, (samples, samples, samples), specs)(dict(batch), dict(tokens), filled)


def _each_stack(
    plan: Plan, backend: str, batch: Mapping[str, StackIds], tokens: Mapping, gradients: Mapping
) -> Iterator[tuple[Here, StackIds, jax.Array, jax.Array]]:
    """Yields of each stack where it is, and this device's ids, token and gradients of all its samples."""
    for stack in plan.stacks:
        name, here = stack.name, Here(stack, _devices(plan), backend)
        yield here, batch[name].shard(0), tokens[name], _joined(stack, gradients[name])


def apply(
    plan: Plan,
    backend: str,
    tables: Mapping[str, TableState],
    gradients: Mapping[str, RowGradients],
    hyper: Mapping[str, Any],
) -> dict[str, TableState]:
    """Returns the state after one step on the rows of ``gradients``, of the stacks that they name."""
    devices = _devices(plan)
    stacks = [plan.stack(name) for name in gradients]

    def local(tables, gradients, hyper):
        new = {}
        for stack in stacks:
            name, here = stack.name, Here(stack, devices, backend)
            new[name] = applied(here, tables[name], gradients[name], hyper[name])
        return new

    states = {stack.name: state_spec(stack, devices, tables[stack.name]) for stack in stacks}
    specs = {stack.name: gradient_spec(stack, devices) for stack in stacks}
    own = {stack.name: tables[stack.name] for stack in stacks}
    return {**tables, **mapped(devices, local, (states, specs, P()), states)(own, dict(gradients), dict(hyper))}


def state_spec(stack: StackPlan, devices: Devices, state: TableState) -> TableState:
    """Returns how rows, slots and marks of a stack are split."""
    touched = state.touched
    if touched is not None:
        touched = touched._replace(rows=touched_spec(stack, devices), since=P())
    return TableState(table_spec(stack, devices), slot_specs(stack, devices), touched)


def applied(here: Here, state: TableState, gradient: RowGradients, hyper: Any) -> TableState:
    """Returns this device's rows after one step on those of ``gradient``, by their stored numbers."""
    stack, devices, backend = here
    own = RowGradients(rows_here(stack, devices, gradient.rows), gradient.values, stack.local_rows)
    if stack.placement == "column":
        return column.apply(here, state, own, hyper)
    if stack.placement != "replicated":
        hyper = seeded_here(hyper, devices.table_axes)
    return kernels.get(backend).apply(stack.optimizer, state, own, hyper)


def gradient_spec(stack: StackPlan, devices: Devices) -> RowGradients:
    """Returns how the rows and values of a stack's gradient are split."""
    values = table_spec(stack, devices)
    rows = P(None) if stack.placement == "column" else P(values[0])
    return RowGradients(rows, values, stack.stored_rows)  # type: ignore[arg-type]


def _devices(plan: Plan) -> Devices:
    assert plan.devices is not None
    return plan.devices


def mapped(devices: Devices, local: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """Returns ``local`` as a function of whole arrays; as it is inside of a shard_map."""
    if devices.inside():
        return local
    mapped = jax.shard_map(local, mesh=devices.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if not devices.explicit:
        return mapped

    # Along Explicit axes JAX takes only what is split already; arrays of the host, for one, are not.
    def split(spec, part):
        return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, devices.sharding(spec)), part)

    return lambda *args: mapped(*jax.tree.map(split, in_specs, args, is_leaf=lambda leaf: isinstance(leaf, P)))


def _stored_rows(stack: StackPlan, devices: Devices, rows: jax.Array) -> jax.Array:
    if not stack.by_rows:
        return rows
    first = jax.lax.axis_index(devices.table_axes) * stack.local_rows
    return jnp.where(rows < stack.local_rows, rows + first, stack.stored_rows)


def rows_here(stack: StackPlan, devices: Devices, rows: jax.Array) -> jax.Array:
    """Returns the numbers that stored rows have on this device, ``local_rows`` where they are another's."""
    if not stack.by_rows:
        return rows
    own = rows - jax.lax.axis_index(devices.table_axes) * stack.local_rows
    return jnp.where((own >= 0) & (own < stack.local_rows), own, stack.local_rows).astype(jnp.int32)


def by_feature(features: Sequence[FeaturePlan], whole: jax.Array, samples: Sequence[int]) -> tuple[jax.Array, ...]:
    """Returns each feature's part of the activations of all, one a sample, in the feature's shape."""
    ends = itertools.accumulate(samples)
    parts = [whole[end - count : end] for end, count in zip(ends, samples, strict=True)]
    return tuple(
        part.reshape(count // feature.samples_per_row, *feature.positions, whole.shape[-1])
        for part, count, feature in zip(parts, samples, features, strict=True)
    )


def _joined(stack: StackPlan, gradients: tuple) -> jax.Array:
    parts = [part.reshape(-1, stack.embedding_dim) for part in gradients]
    kinds = {part.dtype for part in parts}
    if len(kinds) > 1:
        parts = [part.astype(jnp.float32) for part in parts]
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _cut(plan: Plan, stack: StackPlan, parts: tuple, batch: Mapping[str, StackIds]) -> tuple[jax.Array, ...]:
    """Returns the activations without the samples that only fill the last devices up."""
    totals = batch[stack.name].all_samples(plan.batch_shards())
    widths = [plan.features[i].samples_per_row for i in stack.features]
    counts = [total // width for total, width in zip(totals, widths, strict=True)]
    return tuple(cut(_devices(plan), part, count) for part, count in zip(parts, counts, strict=True))


def cut(devices: Devices, part: jax.Array, count: int) -> jax.Array:
    """Returns the first ``count`` samples; whole on every device if they cannot be split evenly."""
    return part if part.shape[0] == count else devices.whole(part)[:count]


def _filled(plan: Plan, stack: StackPlan, parts: tuple, batch: Mapping[str, StackIds]) -> tuple[jax.Array, ...]:
    """Returns gradients of the samples that only fill up, too: zeros."""
    shards, filled = plan.batch_shards(), []
    for part, index, samples in zip(parts, stack.features, batch[stack.name].samples, strict=True):
        rows = shards * samples // plan.features[index].samples_per_row
        missing = rows - part.shape[0]
        if missing:
            part = jnp.pad(_devices(plan).whole(part), [(0, missing)] + [(0, 0)] * (part.ndim - 1))
        filled.append(part)
    return tuple(filled)
