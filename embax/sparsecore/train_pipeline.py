"""A step of the pipeline that ``auto_pipelining`` makes of a train step: a part of each of three batches."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from embax.sparsecore.train_step_split import TrainStep


class EmbeddingPipeliningState(NamedTuple):
    """What is under way; None for what is not.

    Attributes:
      activations_1: of the last batch, which is looked up.
      args_1: the last batch itself.
      updates_0: what the update of the batch before it is told.
    """

    activations_1: Any = None
    args_1: Any = None
    updates_0: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Updates:
    """What an update is told, and the types of the batch that it was made for: the next one may be larger."""

    values: list[Any]
    batch: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """An argument that is no array."""

    value: Any


def stepped(fn: Callable, state: EmbeddingPipeliningState, carry: Any, args: Any) -> Any:
    """Returns ``(state, (carry, *results))`` after a step of the pipeline.

    Args:
      fn: the train step.
      state: what is under way.
      carry: tables and all else that is trained.
      args: the next batch, those of its arguments that are no arrays as ``Static``; None for none.
    """
    known: dict[Any, TrainStep] = {}
    types = jax.tree.map(jax.typeof, carry)

    def cut(batch: Any) -> TrainStep:
        if batch not in known:
            known[batch] = TrainStep(_named(fn), types, jax.tree.unflatten(batch[0], batch[1]))
        return known[batch]

    if state.updates_0 is not None:
        carry = cut(state.updates_0.batch).update(state.updates_0.values, carry)
    activations, updates = None, None
    if args is not None:
        activations = cut(_types(args)).lookup(carry, args)
    if state.activations_1 is None:
        results = cut(_types(state.args_1 if args is None else args)).no_results()
    else:
        batch = _types(state.args_1)
        values, carry, results = cut(batch).dense(state.activations_1, carry, state.args_1)
        updates = Updates(values, batch)
    state = EmbeddingPipeliningState(activations, state.args_1 if args is None else args, updates)
    return state, (carry, *results)


def _named(fn: Callable) -> Callable:
    """Returns ``fn`` of arguments whose static ones are wrapped."""

    def plain(carry: Any, *args: Any) -> Any:
        return fn(carry, *(arg.value if isinstance(arg, Static) else arg for arg in args))

    plain.__name__ = getattr(fn, "__name__", "train_step")
    return plain


def _types(args: Any) -> Any:
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple(map(jax.typeof, leaves))
