"""ids -> activations."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax import kernels
from embax.exchange import over_mesh
from embax.id_batch import IdBatch
from embax.kernels import differentiable
from embax.planning import FeaturePlan, Plan, StackPlan
from embax.table_state import TableState, check_tables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What ``update`` needs of a lookup: the batch, and a token for each stack.

    The token is one activation. An update that needs it comes after the lookup in every schedule; without such a
    need XLA may run the update first and copy the table for the lookup.
    """

    batch: IdBatch
    tokens: dict[str, Any]


def lookup(plan: Plan, tables: Mapping[str, TableState], batch: IdBatch) -> tuple[Any, Residuals]:
    """Returns the activations of every feature, and what ``update`` will need.

    Args:
      plan: what ``embax.plan`` gave.
      tables: ``{stack: TableState}`` from ``init`` or ``update``, or from ``quantize_tables``.
      batch: from ``preprocess`` or ``preprocess_traced``.

    Returns:
      Activations in the structure of the features, ``[batch, embedding_dim]`` each (``[batch, positions,
      embedding_dim]`` for sequences), and residuals. A sample without ids has activation 0.

    Raises:
      ValueError: tables or a batch of another plan.

    >>> import jax, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.SGD(0.5))
    >>> plan = embax.plan(embax.FeatureSpec(name="x", table_spec=table, input_shape=(None,), output_shape=(None, 2)))
    >>> tables = embax.init(plan, jax.random.key(0))
    >>> embax.lookup(plan, tables, embax.preprocess(plan, [[5, 3, 5], []]))[0].tolist()
    [[3.0, 3.0], [0.0, 0.0]]
    """
    check_tables(plan, tables)
    check_batch(plan, batch)
    rows = {stack.name: tables[stack.name].table for stack in plan.stacks}
    backend = kernels.choose(plan.backend).name
    return _lookup(plan, backend, rows, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lookup(plan: Plan, backend: str, rows: dict[str, Any], batch: IdBatch) -> tuple[Any, Residuals]:
    if plan.devices is not None:
        pooled, tokens = over_mesh.lookup(plan, backend, rows, batch.stacks)
        return by_feature(plan, pooled), Residuals(batch, tokens)
    pooled = {
        stack.name: differentiable.pool(backend, stack, rows[stack.name], batch.stacks[stack.name].shard(0))
        for stack in plan.stacks
    }
    tokens = {name: _token(activations) for name, activations in pooled.items()}
    return by_feature(plan, pooled), Residuals(batch, tokens)


def _token(activations: tuple[jax.Array, ...]) -> jax.Array:
    """Returns one activation of a stack, of no feature in particular: one call makes them all."""
    return max(activations, key=lambda part: part.size)[:1, :1]


def by_feature(plan: Plan, pooled: Mapping[str, Sequence[jax.Array]]) -> Any:
    """Returns the features' activations ``[samples, embedding_dim]``, given by stack, in the features' structure."""
    activations: list[Any] = [None] * len(plan.features)
    for stack in plan.stacks:
        for index, part in zip(stack.features, pooled[stack.name], strict=True):
            if plan.devices is None:  # a mesh gives them in shape
                part = part.reshape(activation_shape(stack, plan.features[index], part.shape[0]))
            activations[index] = part
    return jax.tree.unflatten(plan.structure, activations)


def activation_shape(stack: StackPlan, feature: FeaturePlan, samples: int) -> tuple[int, ...]:
    """Returns the shape of a feature's activations for that many samples (positions counted)."""
    return (samples // feature.samples_per_row, *feature.positions, stack.embedding_dim)


def check_batch(plan: Plan, batch: IdBatch) -> None:
    """Raises unless ``batch`` has the stacks, features and shards of ``plan``."""
    if not isinstance(batch, IdBatch):
        raise TypeError(f"a {type(batch).__name__} is not an IdBatch; pass what preprocess returned")
    names = {stack.name for stack in plan.stacks}
    if set(batch.stacks) != names:
        raise ValueError(f"the plan has stacks {sorted(names)}, and the batch has {sorted(batch.stacks)}")
    for stack in plan.stacks:
        ids = batch.stacks[stack.name]
        if len(ids.samples) != len(stack.features) or jnp.ndim(ids.ids) != 2:
            raise ValueError(
                f'stack "{stack.name}": the batch has ids of shape {jnp.shape(ids.ids)} for {len(ids.samples)} '
                "features, and "
                f"the plan has {len(stack.features)}; preprocess the ids with this plan"
            )
        if ids.layout is not None and ids.layout != stack.layout:
            raise ValueError(
                f'stack "{stack.name}": the batch was made for tables at other rows of their stack (another '
                "placement or mesh); preprocess the ids with this plan"
            )
        if jnp.shape(ids.ids)[0] != plan.batch_shards():
            raise ValueError(
                f'stack "{stack.name}": the batch has {jnp.shape(ids.ids)[0]} shards, and the plan '
                f"{plan.batch_shards()}; preprocess the ids with this plan"
            )
