"""A train step, run as a pipeline: the lookup of batch i beside the dense part of i - 1 and the update of i - 2.

The train step takes the carry first (tables as ``EmbeddingVariables``, and all else that is trained) and returns a
tuple, the new carry first. ``auto_pipelining`` cuts it at its lookups and updates. Four batches, u l d for update,
lookup and dense part, in the order in which they see the carry::

    step      0     1     2     3     finalize_pipelining
    u                     0     1     2     3
    l         0     1     2     3
    d               0     1     2     3
    results   None  0     1     2     3

So batch i is looked up before the batches i - 1 and i - 2 have updated, and the result of a batch comes a step later::

    @auto_pipelining.auto_pipelining
    def train_step(carry, inputs, labels):
        ...
        return new_carry, loss

    state = auto_pipelining.init_state()
    for inputs, labels in batches:
        state, (carry, loss) = train_step(state, carry, inputs, labels)  # loss is None in the first step
    state, (carry, loss) = auto_pipelining.finalize_pipelining(train_step, state, carry)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from embax.sparsecore.train_pipeline import EmbeddingPipeliningState as EmbeddingPipeliningState
from embax.sparsecore.train_pipeline import Static, stepped

Carry = Any


@dataclasses.dataclass
class PipeliningFunction:
    """A train step as ``auto_pipelining`` gives it.

    Attributes:
      train_step_func: ``(state, carry, *args) -> (state, (carry, *results))``.
      finalize: ``(state, carry) -> (state, (carry, *results))``: a step without a new batch.
    """

    train_step_func: Callable
    finalize: Callable

    def __call__(self, state: EmbeddingPipeliningState, *args: Any) -> Any:
        """Returns ``(state, (carry, *results))`` after a step; the results are those of the last batch."""
        return self.train_step_func(state, *args)


def init_state() -> EmbeddingPipeliningState:
    """Returns the state of a pipeline in which nothing is under way."""
    return EmbeddingPipeliningState()


def auto_pipelining(fn: Callable, out_shardings: Any = None, static_argnums: Any = ()) -> PipeliningFunction:
    """Returns a train step that runs as a pipeline, see the module; jitted, and the carry is donated.

    Args:
      fn: ``(carry, *args) -> (new carry, *results)``, jitted or not. Lookups and updates are shard_maps of their own,
        as the SparseCoreEmbed layers have them; a lookup depends on the batch and the tables alone.
      out_shardings: of ``(state, (carry, *results))``, as ``jax.jit`` takes them; None for what JAX chooses.
      static_argnums: arguments of ``fn`` that are no arrays, the carry being number 0.

    Raises:
      ValueError: when first called, a train step that cannot be cut; the text says where.
    """
    numbers = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    if any(number < 1 for number in numbers):
        raise ValueError(f"static_argnums={static_argnums!r}: 0 is the carry; name arguments behind it, from 1")
    options = {} if out_shardings is None else {"out_shardings": out_shardings}

    def program(state: EmbeddingPipeliningState, carry: Carry, args: Any) -> Any:
        return stepped(fn, state, carry, args)

    run = jax.jit(program, donate_argnames="carry", **options)

    def train(state: EmbeddingPipeliningState, carry: Carry, *args: Any) -> Any:
        return run(state, carry, tuple(Static(a) if n in numbers else a for n, a in enumerate(args, 1)))

    def finalize(state: EmbeddingPipeliningState, carry: Carry) -> Any:
        if state.args_1 is None:
            raise ValueError("finalize_pipelining: nothing is under way; call the train step with a batch first")
        return run(state, carry, None)

    return PipeliningFunction(train, finalize)


def finalize_pipelining(fn: Any, state: EmbeddingPipeliningState, carry: Carry) -> Any:
    """Returns ``(state, (carry, *results))`` when all batches have gone through; the results are the last one's.

    Args:
      fn: from ``auto_pipelining``.
      state: from the last step.
      carry: likewise; it is donated.

    Raises:
      ValueError: another function, or a state in which nothing is under way.
    """
    if not isinstance(fn, PipeliningFunction):
        raise ValueError(f"finalize_pipelining: {fn!r} is not from auto_pipelining; pass what that has returned")
    state, (carry, *results) = fn.finalize(state, carry)
    _, (carry, *_) = fn.finalize(state, carry)
    return init_state(), (carry, *results)
