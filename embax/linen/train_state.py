"""``embax.linen.TrainState``: flax's TrainState that also steps the tables."""

from collections.abc import Callable
from typing import Any

import jax
from flax import struct
from flax.training import train_state

from embax.gradients.accumulation import Pending
from embax.gradients.joint_optimizer import JointOptimizer, JointState, split, untouched_tables


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` for models with tables.

    optax steps the dense parameters; each table's optimizer its rows. ``opt_state`` is the optax state of the dense
    parameters; nothing as large as a table is made but the tables' own slot variables.

    Attributes:
      slots: the tables' slot variables, in the order of the tables in ``params``.
      updates: int32, updates made; schedules of the tables count these. ``step`` counts calls.
      pending: what ``every_k`` accumulates.
      touched: which rows were written, where ``track_rows`` asked for it.
      joint: the ``embax.JointOptimizer`` (static).

    >>> import jax, jax.numpy as jnp, optax, embax, embax.linen
    >>> import flax.linen as nn
    >>> layer = embax.linen.Embed(6, 2, optimizer=embax.SGD(1.0), embedding_init=nn.initializers.ones)
    >>> ids = jnp.array([3, 3])
    >>> params = layer.init(jax.random.key(0), ids)["params"]
    >>> state = embax.linen.TrainState.create(apply_fn=layer.apply, params=params, tx=optax.sgd(1.0))
    >>> loss_fn = lambda params: state.apply_fn({"params": params}, ids).sum()
    >>> loss, grads = embax.linen.value_and_grad(loss_fn)(state.params)
    >>> state.apply_gradients(grads=grads).params["embedding"].value[:, 0].tolist()
    [1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    """

    slots: tuple = ()
    updates: Any = 0
    pending: Pending | None = None
    touched: tuple | None = None
    joint: JointOptimizer = struct.field(pytree_node=False, default=JointOptimizer())

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable,
        params: Any,
        tx: Any,
        max_norm: float | None = None,
        every_k: int = 1,
        **kwargs: Any,
    ) -> "TrainState":
        """Returns a state at step 0.

        Args:
          apply_fn: usually ``model.apply``.
          params: from ``model.init``, the tables still in their boxes.
          tx: an optax transformation for the dense parameters; an ``optax.MultiSteps`` of a fixed number of steps too.
          max_norm: the global norm to which all gradients together, dense and rows, are scaled down.
          every_k: gradients of this many calls are averaged before one update is made of them.
          kwargs: further fields of a subclass.
        """
        joint = JointOptimizer(tx, max_norm, every_k)
        state = joint.init(params)
        return cls(
            step=0,
            apply_fn=apply_fn,
            params=params,
            tx=joint.tx,
            opt_state=state.dense,
            slots=state.slots,
            updates=state.step,
            pending=state.pending,
            joint=joint,
            **kwargs,
        )

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """Returns the state after one call of the optimizers.

        Args:
          grads: from ``embax.linen.value_and_grad``.
          kwargs: fields to replace besides.
        """
        state = JointState(self.updates, self.opt_state, self.slots, self.pending, self.touched)
        params, state = self.joint.update(self.params, grads, state)
        return self.replace(
            step=self.step + 1,
            params=params,
            opt_state=state.dense,
            slots=state.slots,
            updates=state.step,
            pending=state.pending,
            touched=state.touched,
            **kwargs,
        )

    def track_rows(self) -> "TrainState":
        """Returns a state with a byte a row, in which every update marks the rows it writes; see ``embax.track``."""
        return self.replace(touched=untouched_tables(split(self.params)[0]))

    def table_arrays(self) -> list[Any]:
        """Returns tables and slot variables, for ``check_step``."""
        return [table.value for table in split(self.params)[0]] + jax.tree.leaves(self.slots)
