"""The lookup of a whole plan in tables that get row gradients: what the FeatureEmbed layers call."""

import itertools
from collections.abc import Mapping
from typing import Any

from embax import kernels
from embax.exchange.one_stack import Home
from embax.gradients.table import Prefetched, Table
from embax.id_batch import IdBatch
from embax.lookup import by_feature, check_batch
from embax.planning import Plan, StackPlan
from embax.preprocess_traced import preprocess_traced


def lookup_features(
    plan: Plan, tables: Mapping[str, Table | Prefetched], ids: Any, weights: Any = None, sentinel: Any = None
) -> Any:
    """Returns the activations of every feature, in the features' structure.

    Args:
      plan: what ``embax.plan`` gave.
      tables: the rows of every stack.
      ids: an IdBatch, or raw ids as for ``preprocess_traced``.
      weights: of the ids, for raw ids only.
      sentinel: a scalar of the dense parameters beside the tables.
    """
    if not isinstance(ids, IdBatch):
        ids = preprocess_traced(plan, ids, weights)
    elif weights is not None:
        raise ValueError("FeatureEmbed: an IdBatch has its weights already; give weights to preprocess")
    check_batch(plan, ids)
    backend = kernels.choose(plan.backend).name
    pooled = {}
    for stack in plan.stacks:
        if plan.devices is not None:
            own = ids.stacks[stack.name]
            together = tables[stack.name].lookup_pooled(stack, backend, own, sentinel)
            features = [plan.features[i] for i in stack.features]
            pooled[stack.name] = Home(stack, plan.devices).by_feature(together, features, own)
            continue
        stack_ids = ids.stacks[stack.name].shard(0)
        together = tables[stack.name].lookup_pooled(stack, backend, stack_ids, sentinel)
        ends = itertools.accumulate(stack_ids.samples)
        pooled[stack.name] = [together[e - n : e] for e, n in zip(ends, stack_ids.samples, strict=True)]
    return by_feature(plan, pooled)


def home_of(plan: Plan, stack: StackPlan) -> Home | None:
    """Returns where a stack of the plan lives; None for one device."""
    return None if plan.devices is None else Home(stack, plan.devices)
