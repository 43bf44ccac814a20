"""The lookup of a stack and its mirror, as a device inside of a shard_map sees them: the exchanges of the core."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from embax import kernels
from embax.exchange.over_mesh import exchange_of
from embax.exchange.shards import Here, local_stack
from embax.id_batch import StackIds
from embax.optimizers.adagrad import RowwiseAdagrad
from embax.optimizers.base import Optimizer
from embax.planning import StackPlan
from embax.sparsecore.inputs import PreprocessedInput, SparseDenseMatmulInput
from embax.sparsecore.translation import Stack, core_stack, devices_here
from embax.specs import FeatureSpec, StackedTableSpec
from embax.table_state import TableState


class EmbeddingVariables(NamedTuple):
    """The rows of a stack, ``[stack_vocab_size, stack_embedding_dim]``, and its slot variables."""

    table: Any
    slot: Any


def arrays_of(inputs: Any) -> SparseDenseMatmulInput:
    """Returns the arrays of a batch, of whichever of the two forms."""
    return inputs.sparse_dense_matmul_input if isinstance(inputs, PreprocessedInput) else inputs


def check_stacks(stacks: Mapping[str, Any], arrays: SparseDenseMatmulInput, variables: Mapping[str, Any]) -> None:
    """Raises ValueError unless inputs and variables are those of the stacks."""
    for what, given in (("the inputs", arrays.lhs_row_pointers), ("the embedding variables", variables)):
        if set(given) != set(stacks):
            raise ValueError(
                f"the features have stacks {sorted(stacks)}, and {what} {sorted(given)}; preprocess and initialize "
                "with the same feature_specs"
            )


def looked_up(
    stack: Stack, name: str, arrays: SparseDenseMatmulInput, variable: EmbeddingVariables, device_count: int
) -> jax.Array:
    """Returns the activations ``[samples of this device, stack_embedding_dim]``, in the order of the inputs."""
    here, ids = _here(stack.spec, variable[0], device_count), _ids(arrays, name)
    if not sum(ids.samples):
        return jnp.zeros((0, here.stack.embedding_dim), here.stack.activation_dtype)
    return _looked_up(here, _flat(variable[0]), ids)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _looked_up(here: Here, table: jax.Array, ids: StackIds) -> jax.Array:
    if here.devices is None:
        return kernels.get(here.backend).gather_pool(local_stack(here.stack), table, ids)[0]
    return exchange_of(here.stack).lookup(here, table, ids)


@_looked_up.defjvp
def _(here: Here, _primals: Any, _tangents: Any) -> Any:
    raise TypeError(
        f'stack "{here.stack.name}": tpu_sparse_dense_matmul has no derivative, which would be as large as the tables; '
        "differentiate the loss with respect to the activations, and pass that to tpu_sparse_dense_matmul_grad (the "
        "SparseCoreEmbed layers do both)"
    )


def stepped(
    stack: Stack,
    arrays: SparseDenseMatmulInput,
    variable: EmbeddingVariables,
    gradient: jax.Array,
    device_count: int,
    step: Any,
    limits: tuple[float | None, float | None] | None,
) -> EmbeddingVariables:
    """Returns the variables of a stack after one step on the rows that the batch touched.

    Args:
      stack: the stack.
      arrays: the batch.
      variable: rows and slots, in whichever form; the result has the same.
      gradient: of the activations, as ``looked_up`` gives them.
      device_count: of all processes.
      step: counted from 0, or None.
      limits: what every number of a touched row is clipped to after the step, low and high; None for nothing.
    """
    spec = stack.spec
    optimizer = spec.optimizer if limits is None else limited(spec.optimizer, *limits)
    here = _here(spec.replace(optimizer=optimizer), variable[0], device_count)
    ids, (rows, slots) = _ids(arrays, spec.stack_name), variable
    state = TableState(_flat(rows), _slots(stack, optimizer, slots))
    if gradient.size != sum(ids.samples) * spec.stack_embedding_dim:
        raise ValueError(
            f'stack "{spec.stack_name}": gradients have shape {list(gradient.shape)}, and the inputs have '
            f"{sum(ids.samples)} samples of {spec.stack_embedding_dim} on a device; give the gradients of their "
            "activations"
        )
    gradient = gradient.reshape(-1, spec.stack_embedding_dim)
    hyper = optimizer.modifiers(step), optimizer.hyperparameters(step)
    if gradient.shape[0]:
        token = gradient[:1, :1]
        if here.devices is None:
            update = kernels.get(here.backend).update
            state = update(local_stack(here.stack), state, ids, token, (gradient,), hyper)
        else:
            state = exchange_of(here.stack).update(here, state, ids, token, gradient, hyper)
    new = [part.reshape(old.shape) for old, part in zip(slots, state.slots, strict=True)]
    kind = type(slots)
    again = kind._make(new) if hasattr(kind, "_make") else tuple(new)
    return EmbeddingVariables(state.table.reshape(rows.shape), again)


def limits_by_stack(limits: Any, stacks: Mapping[str, Any]) -> dict[str, tuple | None]:
    """Returns the limits of each stack, low and high, or None for none.

    Args:
      limits: a pair for all, or by the name of the stack; None for none.
      stacks: by name.

    Raises:
      ValueError: something else than two numbers of which the first is not above the second; a name that no stack has.
    """
    given = limits if isinstance(limits, Mapping) else dict.fromkeys(stacks, limits)
    for name, pair in given.items():
        what = f"embedding_var_limits: {pair!r} of stack {name!r}"
        if name not in stacks:
            raise ValueError(f"{what}: the features have stacks {sorted(stacks)}; name these")
        if pair is not None and (not isinstance(pair, (tuple, list)) or len(pair) != 2):
            raise ValueError(f"{what} must be (low, high), of numbers; either may be None")
        if pair is not None and None not in pair and not pair[0] <= pair[1]:
            raise ValueError(f"{what} has its low end above its high end; exchange them")
    ends = {name: pair for name, pair in given.items() if pair is not None}
    return {name: tuple(x if x is None else float(x) for x in ends[name]) if name in ends else None for name in stacks}


def limited(optimizer: Optimizer, low: float | None, high: float | None) -> Optimizer:
    """Returns an optimizer that clips a row to ``[low, high]`` after its step."""
    made = _limited_class(type(optimizer), low, high)
    return made(**{field.name: getattr(optimizer, field.name) for field in dataclasses.fields(optimizer) if field.init})


@functools.lru_cache(maxsize=256)
def _limited_class(kind: type[Optimizer], low: float | None, high: float | None) -> type[Optimizer]:
    def step_rows(self: Any, rows: Any, gradients: Any, slots: Any, hyper: Any) -> Any:
        rows, slots = kind.step_rows(self, rows, gradients, slots, hyper)
        return jnp.clip(rows, low, high), slots

    # Another formula: what the core has a kernel for, it steps by the formula then.
    return type(f"Limited{kind.__name__}", (kind,), {"step_rows": step_rows})


def _here(spec: StackedTableSpec, table: Any, device_count: int) -> Here:
    devices = devices_here(device_count)
    plan: StackPlan = core_stack(spec, jnp.dtype(table.dtype).name, device_count)
    if table.size != plan.local_rows * plan.embedding_dim:
        raise ValueError(
            f'stack "{spec.stack_name}": the table has shape {list(table.shape)} on a device, and {device_count} '
            f"devices have {[plan.local_rows, plan.embedding_dim]} each of "
            f"{[spec.stack_vocab_size, spec.stack_embedding_dim]}; initialize the variables for these devices, and "
            "split them by P(axis)"
        )
    return Here(plan, devices, kernels.choose().name)  # type: ignore[arg-type]


def _flat(table: Any) -> Any:
    return table.reshape(-1, table.shape[-1])  # under pmap a dimension of 1 may lead


def _ids(arrays: SparseDenseMatmulInput, name: str) -> StackIds:
    offsets = arrays.lhs_row_pointers[name].reshape(-1)
    gains = arrays.lhs_gains[name].reshape(-1)
    samples = offsets.shape[0] - 1
    return StackIds(
        arrays.lhs_embedding_ids[name].reshape(-1), offsets, gains if gains.shape[0] else None, (samples,), (None,)
    )


def _slots(stack: Stack, optimizer: Optimizer, slots: Sequence[Any]) -> Any:
    spec, wanted = stack.spec, optimizer.slots()
    if len(slots) != len(wanted):
        raise ValueError(
            f'stack "{spec.stack_name}": {len(slots)} slot variables are given, and '
            f"{type(spec.optimizer).__name__} has {len(wanted)}; initialize the variables with these specifications"
        )
    padded = any(f.table_spec.embedding_dim != spec.stack_embedding_dim for _, f in stack.features)
    if padded and isinstance(spec.optimizer, RowwiseAdagrad):
        raise ValueError(
            f'stack "{spec.stack_name}": rows are padded with columns, which would change the mean that RowwiseAdagrad '
            "takes of a row; make embedding_dim a multiple of 8, or use embax.plan"
        )
    flat = [_flat(slot) for slot in slots]
    return type(wanted)(*flat) if hasattr(wanted, "_fields") else tuple(flat)


def unstacked(
    activations: Mapping[str, jax.Array],
    stacks: Mapping[str, Stack],
    device_count: int,
    num_sc: int,
    count: int,
) -> list[jax.Array]:
    """Returns each feature's activations, in the order of the features.

    Args:
      activations: of the stacks, on this device.
      stacks: by name.
      device_count: of all processes.
      num_sc: SparseCores of a device.
      count: of the features.
    """
    found: list[Any] = [None] * count
    for name, stack in stacks.items():
        parts = activations[name].reshape(num_sc, -1, activations[name].shape[-1])
        at = 0
        for number, feature in stack.features:
            samples = _samples(feature, device_count * num_sc)
            part = parts[:, at : at + samples, : feature.output_shape[-1]]
            found[number] = part.reshape(-1, *_positions(feature), part.shape[-1])
            at += samples
    return found


def stacked(gradients: Sequence[Any], stacks: Mapping[str, Stack], num_sc: int) -> dict[str, jax.Array]:
    """Returns the gradients of the stacks' activations, of those of every feature: the mirror of ``unstacked``."""
    found = {}
    for name, stack in stacks.items():
        parts = []
        for number, feature in stack.features:
            own = jnp.asarray(gradients[number])
            if not own.ndim or own.shape[-1] != feature.table_spec.embedding_dim or own.shape[0] % num_sc:
                raise ValueError(
                    f'feature "{feature.name}": its gradient has shape {list(own.shape)}; it must be that of the '
                    f"activations: samples of {num_sc} SparseCores, and embedding_dim "
                    f"{feature.table_spec.embedding_dim} at the end"
                )
            own = own.reshape(num_sc, -1, feature.table_spec.embedding_dim)
            padding = stack.spec.stack_embedding_dim - own.shape[-1]
            parts.append(jnp.pad(own, ((0, 0), (0, 0), (0, padding))) if padding else own)
        joined = jnp.concatenate(parts, axis=1)
        found[name] = joined.reshape(-1, joined.shape[-1])
    return found


def _samples(feature: FeatureSpec, num_sc: int) -> int:
    total = 1
    for size in feature.output_shape[:-1]:
        assert size is not None  # stacking has checked it
        total *= size
    if total % num_sc:
        raise ValueError(
            f'feature "{feature.name}": {total} samples cannot be shared by {num_sc} SparseCores; make the batch a '
            f"multiple of {num_sc}"
        )
    return total // num_sc


def _positions(feature: FeatureSpec) -> tuple[int, ...]:
    return tuple(size for size in feature.output_shape[1:-1] if size is not None)
