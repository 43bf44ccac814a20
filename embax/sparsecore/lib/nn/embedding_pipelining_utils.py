"""Training in a pipeline of three steps: the update of batch i - 2, the lookup of batch i, the dense part of i - 1.

The three do not wait for each other, so that a machine may do them at once. Four batches, u l d for update, lookup and
dense part; nothing is there yet where a number is missing::

    step      0     1     2     3     4     5
    u                     0     1     2     3
    l         0     1     2     3     .     .        the last batches come again, or zeros: nobody uses them
    d               0     1     2     3     .        is_output_valid in steps 1 to 4
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from embax.sparsecore.layers import Door
from embax.sparsecore.utils import utils


class CurrentStepInput(NamedTuple):
    """Batch i: what the lookup reads, and what the dense part will."""

    sparse_inputs: Any
    dense_inputs: Any


class LastStepInput(NamedTuple):
    """Batch i - 1: looked up, not yet through the dense part."""

    sparse_inputs: Any
    embedding_activations: Any
    dense_inputs: Any
    sc_fwd_aux: Any = None


class StepBeforeLastStepInput(NamedTuple):
    """Batch i - 2: through the dense part, tables not yet updated."""

    sparse_inputs: Any
    embedding_gradients: Any
    tc_aux: Any = None


class PipelineState(NamedTuple):
    """What is under way.

    Attributes:
      pipeline_step: int32, counted from 0.
      last_step_inputs: a LastStepInput.
      step_before_last_step_inputs: a StepBeforeLastStepInput.
      placeholder_output: what a step gives out that has no dense part.
      placeholder_tc_aux: likewise.
    """

    pipeline_step: Any
    last_step_inputs: Any
    step_before_last_step_inputs: Any
    placeholder_output: Any
    placeholder_tc_aux: Any = None

    def replace(self, **changes: Any) -> "PipelineState":
        """Returns the state with some fields changed."""
        return self._replace(**changes)


def get_pipeline_train_steps(num_steps: int) -> int:
    """Returns the steps of the pipeline for so many batches: two more, in which it runs empty."""
    return num_steps + 2


def is_output_valid(pipeline_step: int, num_steps: int) -> bool:
    """Returns whether a step, counted from 0, gives out what a batch made.

    >>> [is_output_valid(step, 2) for step in range(4)]
    [False, True, True, False]
    """
    return 1 <= pipeline_step <= num_steps


def get_default_sc_fwd_function(feature_specs: Any, global_mesh: Any, num_sc_per_device: int | None = None) -> Callable:
    """Returns ``(sparse_inputs, variables) -> (activations, None)``: the lookup, over a mesh of one axis."""
    door = _door(feature_specs, global_mesh, num_sc_per_device)

    def forward(sparse_inputs: Any, embedding_variables: Any) -> tuple[Any, None]:
        return door.lookup(sparse_inputs, embedding_variables), None

    return forward


def get_default_sc_bwd_function(feature_specs: Any, global_mesh: Any, num_sc_per_device: int | None = None) -> Callable:
    """Returns ``(sparse_inputs, gradients, variables, tc_aux, step=None) -> (variables, None)``: the update."""
    door = _door(feature_specs, global_mesh, num_sc_per_device)

    def backward(
        sparse_inputs: Any, embedding_gradients: Any, embedding_variables: Any, tc_aux: Any = None, step: Any = None
    ) -> tuple[Any, None]:
        del tc_aux
        return door.update(embedding_gradients, sparse_inputs, embedding_variables, step), None

    backward.takes_step = True  # type: ignore[attr-defined]
    return backward


def get_initial_state(
    pipeline_input: CurrentStepInput,
    tc_train_state: Any,
    embedding_variables: Any,
    sc_fwd_function: Callable,
    tc_function: Callable,
    dense_input_sharding: Any = None,
    sparse_input_sharding: Any = None,
) -> PipelineState:
    """Returns the state of a pipeline in which nothing is under way: zeros, which are batches without ids.

    Args:
      pipeline_input: any batch.
      tc_train_state: of the dense part.
      embedding_variables: rows and slots.
      sc_fwd_function: the lookup.
      tc_function: ``(activations, dense_inputs, train_state, sc_fwd_aux) -> (gradients, output, train_state, tc_aux)``.
      dense_input_sharding: of the zeros of the dense part; None for wherever JAX puts them.
      sparse_input_sharding: likewise of the ids, activations and gradients.
    """
    dense = jax.tree.map(functools.partial(_zeros, dense_input_sharding), pipeline_input.dense_inputs)
    split = functools.partial(_zeros, sparse_input_sharding)
    sparse = jax.tree.map(split, pipeline_input.sparse_inputs)
    activations, forward_aux = jax.eval_shape(sc_fwd_function, sparse, embedding_variables)
    forward_aux = jax.tree.map(jnp.zeros_like, forward_aux)
    gradients, output, _, aux = jax.eval_shape(tc_function, activations, dense, tc_train_state, forward_aux)
    return PipelineState(
        pipeline_step=jnp.int32(0),
        last_step_inputs=LastStepInput(sparse, jax.tree.map(split, activations), dense, forward_aux),
        # Copies: a step may be given its state to keep, and must not be given an array twice.
        step_before_last_step_inputs=StepBeforeLastStepInput(
            jax.tree.map(split, pipeline_input.sparse_inputs),
            jax.tree.map(split, gradients),
            jax.tree.map(jnp.zeros_like, aux),
        ),
        placeholder_output=jax.tree.map(jnp.zeros_like, output),
        placeholder_tc_aux=jax.tree.map(jnp.zeros_like, aux),
    )


def get_pipeline_state_sharding(
    pipeline_state_cls: Callable,
    dense_input_sharding: Any,
    sparse_input_sharding: Any,
    pipeline_output_sharding: Any,
    tc_aux_sharding: Any,
) -> Any:
    """Returns the shardings of a pipeline's state, for ``jax.jit``."""
    sparse, dense = sparse_input_sharding, dense_input_sharding
    return pipeline_state_cls(
        pipeline_step=None,
        last_step_inputs=LastStepInput(sparse, sparse, dense, dense),
        step_before_last_step_inputs=StepBeforeLastStepInput(sparse, sparse, tc_aux_sharding),
        placeholder_output=pipeline_output_sharding,
        placeholder_tc_aux=tc_aux_sharding,
    )


def step(
    pipeline_input: CurrentStepInput,
    tc_train_state: Any,
    embedding_variables: Any,
    pipeline_state: PipelineState,
    sc_fwd_function: Callable,
    tc_function: Callable,
    sc_bwd_function: Callable,
    *,
    fake_tc_step: bool,
) -> tuple[Any, Any, Any, Any, PipelineState]:
    """Returns (output, what the update gave beside, train state, variables, pipeline state) after one step.

    Args:
      pipeline_input: batch i.
      tc_train_state: of the dense part.
      embedding_variables: rows and slots.
      pipeline_state: what is under way.
      sc_fwd_function: the lookup.
      tc_function: the dense part, forward and backward.
      sc_bwd_function: the update. One of ``get_default_sc_bwd_function`` is told the number of its batch, too.
      fake_tc_step: whether there is nothing for the dense part to do: in step 0 and in the last one.
    """
    last, before = pipeline_state.last_step_inputs, pipeline_state.step_before_last_step_inputs
    # The batch that is updated came in two steps ago; before that the gradients are zeros, of no ids.
    known = {}
    if getattr(sc_bwd_function, "takes_step", False):
        known = {"step": jnp.maximum(pipeline_state.pipeline_step - 2, 0)}
    embedding_variables, backward_aux = sc_bwd_function(
        before.sparse_inputs, before.embedding_gradients, embedding_variables, before.tc_aux, **known
    )
    activations, forward_aux = sc_fwd_function(pipeline_input.sparse_inputs, embedding_variables)
    if fake_tc_step:
        gradients, output, tc_aux = (
            jax.tree.map(jnp.zeros_like, before.embedding_gradients),
            pipeline_state.placeholder_output,
            pipeline_state.placeholder_tc_aux,
        )
    else:
        gradients, output, tc_train_state, tc_aux = tc_function(
            last.embedding_activations, last.dense_inputs, tc_train_state, last.sc_fwd_aux
        )
    pipeline_state = pipeline_state.replace(
        pipeline_step=pipeline_state.pipeline_step + 1,
        last_step_inputs=LastStepInput(
            pipeline_input.sparse_inputs, activations, pipeline_input.dense_inputs, forward_aux
        ),
        step_before_last_step_inputs=StepBeforeLastStepInput(last.sparse_inputs, gradients, tc_aux),
    )
    return output, backward_aux, tc_train_state, embedding_variables, pipeline_state


def _door(feature_specs: Any, mesh: Any, num_sc_per_device: int | None) -> Door:
    if len(mesh.axis_names) != 1:
        raise ValueError(f"global_mesh has the axes {mesh.axis_names}; it must have one")
    return Door(feature_specs, mesh, mesh.axis_names[0], utils.checked(num_sc_per_device))


def _zeros(sharding: Any, array: Any) -> Any:
    if sharding is None or not array.ndim or sharding.is_fully_replicated:
        return jnp.zeros(array.shape, array.dtype)
    return jnp.zeros(array.shape, array.dtype, device=sharding)
