"""activation gradients -> tables: ``lookup`` in a mirror."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from embax import kernels
from embax.exchange import over_mesh
from embax.exchange.one_stack import Home
from embax.id_batch import StackIds
from embax.lookup import Residuals, activation_shape
from embax.optimizers.base import Optimizer
from embax.planning import Plan, StackPlan
from embax.row_gradients import RowGradients, check_rows
from embax.table_state import TableState, check_slots, check_trainable


def update(
    plan: Plan, tables: Mapping[str, TableState], residuals: Residuals, gradients: Any, step: Any = None
) -> dict[str, TableState]:
    """Returns the tables after one optimizer step on every row that the batch touched.

    Law: the gain-weighted gradients of every occurrence of a row are added up over the batch, then the row takes one
    step of its optimizer. No other row, and none of its slots, moves by a bit. In place where ``tables`` are donated.

    Args:
      plan: what ``embax.plan`` gave.
      tables: those that were looked up in.
      residuals: from ``lookup``.
      gradients: of the loss with respect to the activations, in their structure and shapes.
      step: int or int32 scalar counted from 0, for schedules and bias correction.

    Raises:
      ValueError: a structure or shape that does not fit, or a schedule without a step.

    >>> import jax, jax.numpy as jnp, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=3, embedding_dim=1, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.SGD(0.5))
    >>> plan = embax.plan(embax.FeatureSpec(name="x", table_spec=table, input_shape=(None,), output_shape=(None, 1)))
    >>> tables = embax.init(plan, jax.random.key(0))
    >>> _, residuals = embax.lookup(plan, tables, embax.preprocess(plan, [[2, 0], [2]]))
    >>> embax.update(plan, tables, residuals, jnp.array([[1.0], [10.0]]), step=0)["item"].table.ravel().tolist()
    [0.5, 1.0, -4.5]
    """
    _check(plan, tables, residuals)
    leaves = _checked_gradients(plan, residuals, gradients)
    hyper = {stack.name: _hyper(stack.optimizer, step) for stack in plan.stacks}
    return _update(plan, kernels.choose(plan.backend).name, dict(tables), residuals, leaves, hyper)


def row_gradients(plan: Plan, residuals: Residuals, gradients: Any) -> dict[str, RowGradients]:
    """Returns the gradient of every stack's table as rows, ``{stack: RowGradients}``, to clip, add, inspect or apply.

    Args as ``update``.
    """
    if not isinstance(residuals, Residuals):
        raise TypeError(f"row_gradients: a {type(residuals).__name__} is not the Residuals that lookup returned")
    leaves = _checked_gradients(plan, residuals, gradients)
    return _row_gradients(plan, kernels.choose(plan.backend).name, residuals, leaves)


def apply_row_gradients(
    plan: Plan, tables: Mapping[str, TableState], gradients: Mapping[str, RowGradients], step: Any = None
) -> dict[str, TableState]:
    """Returns the tables after one optimizer step on the rows of ``gradients``; stacks left out do not move.

    ``update`` does this after ``row_gradients`` without storing the gradients in between; the two agree up to rounding.

    Raises:
      KeyError: a stack that the plan does not have.
      ValueError: gradients of another table.
      TypeError: gradients whose rows are no integers (a tree.map went over them).
    """
    check_slots(plan, tables)
    if not isinstance(gradients, Mapping):
        raise TypeError(
            f"apply_row_gradients: gradients are of type {type(gradients).__name__}; give {{stack: RowGradients}}, as "
            "row_gradients does, or use apply_rows for a bare table"
        )
    for name, gradient in gradients.items():
        stack = plan.stack(name)
        check_rows(gradient, f'stack "{name}"')
        rows, inside = stack.stored_rows, plan.devices is not None and plan.devices.inside()
        width = stack.local_dim if inside else stack.embedding_dim
        if gradient.vocabulary_size != rows or gradient.values.shape[1:] != (width,):
            raise ValueError(
                f'stack "{name}": gradients are of a table [{gradient.vocabulary_size}, '
                f"{gradient.values.shape[1:]}], and the "
                f"stack is [{rows}, {width}]"
            )
    hyper = {name: _hyper(plan.stack(name).optimizer, step) for name in gradients}
    return _apply(plan, kernels.choose(plan.backend).name, dict(tables), dict(gradients), hyper)


def apply_rows(optimizer: Optimizer, state: TableState, gradient: RowGradients, step: Any = None) -> TableState:
    """Returns a bare table's state (``init_slots``) after one step on the rows of ``gradient``; no plan needed.

    >>> import jax.numpy as jnp, embax
    >>> state = embax.init_slots(embax.SGD(0.5), jnp.ones((3, 1)))
    >>> gradient = embax.take_gradient(jnp.array([[2, 0], [2, 2]]), jnp.ones((2, 2, 1)), vocabulary_size=3)
    >>> embax.apply_rows(embax.SGD(0.5), state, gradient).table.ravel().tolist()
    [0.5, 1.0, -0.5]
    """
    check_rows(gradient, "apply_rows")
    check_trainable(state.table, "apply_rows")
    if state.table.shape != (gradient.vocabulary_size, gradient.values.shape[-1]):
        raise ValueError(
            f"apply_rows: the table has shape {state.table.shape}, and the gradient is of a table "
            f"{(gradient.vocabulary_size, gradient.values.shape[-1])}"
        )
    return _apply_one(optimizer, kernels.choose().name, state, gradient, _hyper(optimizer, step))


def apply_at_home(home: Home, state: TableState, gradient: RowGradients, step: Any = None) -> TableState:
    """Returns ``apply_rows`` for a table on a mesh: ``gradient`` has the row numbers of the stored array."""
    backend = kernels.choose().name
    return _apply_at_home(home, backend, state, gradient, _hyper(home.stack.optimizer, step))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_at_home(home, backend, state, gradient, hyper):
    return home.apply(backend, state, gradient, hyper)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(plan, backend, tables, residuals, leaves, hyper):
    if plan.devices is not None:
        batch, gradients = residuals.batch.stacks, _by_stack(plan, leaves)
        return over_mesh.update(plan, backend, tables, batch, residuals.tokens, gradients, hyper)
    kernel, new = kernels.get(backend), {}
    for stack, ids, token, gradients in _parts(plan, residuals, leaves):
        new[stack.name] = kernel.update(stack, tables[stack.name], ids, token, gradients, hyper[stack.name])
    return new


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_gradients(plan, backend, residuals, leaves):
    if plan.devices is not None:
        batch, gradients = residuals.batch.stacks, _by_stack(plan, leaves)
        return over_mesh.row_gradients(plan, backend, batch, residuals.tokens, gradients)
    kernel = kernels.get(backend)
    parts = _parts(plan, residuals, leaves)
    return {stack.name: kernel.row_gradients(stack, ids, token, values) for stack, ids, token, values in parts}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(plan, backend, tables, gradients, hyper):
    if plan.devices is not None:
        return over_mesh.apply(plan, backend, tables, gradients, hyper)
    kernel, new = kernels.get(backend), dict(tables)
    for name, gradient in gradients.items():
        new[name] = kernel.apply(plan.stack(name).optimizer, tables[name], gradient, hyper[name])
    return new


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_one(optimizer, backend, state, gradient, hyper):
    return kernels.get(backend).apply(optimizer, state, gradient, hyper)


def _hyper(optimizer: Optimizer, step: Any) -> tuple:
    # Outside of embax's own jit: a rate that is a callable of no argument is asked at every eager step.
    return optimizer.modifiers(step), optimizer.hyperparameters(step)


def _by_stack(plan: Plan, leaves: list[jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
    return {stack.name: tuple(leaves[i] for i in stack.features) for stack in plan.stacks}


def _parts(
    plan: Plan, residuals: Residuals, leaves: list[jax.Array]
) -> Iterator[tuple[StackPlan, StackIds, jax.Array, tuple[jax.Array, ...]]]:
    """Yields (stack, ids, token, gradients ``[samples, embedding_dim]`` of each of its features)."""
    for stack in plan.stacks:
        ids = residuals.batch.stacks[stack.name].shard(0)
        parts = tuple(jnp.asarray(leaves[i]).reshape(-1, stack.embedding_dim) for i in stack.features)
        yield stack, ids, residuals.tokens[stack.name], parts


def _check(plan: Plan, tables: Mapping[str, TableState], residuals: Residuals) -> None:
    check_slots(plan, tables)
    if not isinstance(residuals, Residuals):
        raise TypeError(f"update: a {type(residuals).__name__} is not the Residuals that lookup returned")


def _checked_gradients(plan: Plan, residuals: Residuals, gradients: Any) -> list[jax.Array]:
    leaves = plan.flatten(gradients, "activation gradients")
    for stack in plan.stacks:
        counts = residuals.batch.stacks[stack.name].all_samples(plan.batch_shards())
        for index, samples in zip(stack.features, counts, strict=True):
            _check_shape(stack, plan.features[index], samples, leaves[index])
    return leaves


def _check_shape(stack: StackPlan, feature: Any, samples: int, leaf: Any) -> None:
    wanted = activation_shape(stack, feature, samples)
    if not hasattr(leaf, "shape") or leaf.shape != wanted or not jnp.issubdtype(leaf.dtype, jnp.floating):
        shown = f"{leaf.dtype}{leaf.shape}" if hasattr(leaf, "shape") else repr(leaf)
        raise ValueError(
            f'feature "{feature.name}": the activation gradient is {shown}; it must be floating point of shape {wanted}'
        )
