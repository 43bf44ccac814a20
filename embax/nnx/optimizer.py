"""``embax.nnx.Optimizer``: ``flax.nnx.Optimizer`` that also steps the tables."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from embax.gradients.joint_optimizer import JointOptimizer, JointState, check_steady, fresh_slots, untouched_tables
from embax.nnx.gradients import table_name
from embax.nnx.variables import Marks, Pending, PrefetchedValues, Slots, Table, TableGradient, table_leaf


class Optimizer(nnx.Optimizer):
    """``flax.nnx.Optimizer`` for models with tables: optax steps the parameters, each table's optimizer its rows.

    Args:
      model: the model.
      tx: an optax transformation for the parameters; an ``optax.MultiSteps`` of a fixed number of steps too.
      wrt: the parameters' filter, as for ``flax.nnx.Optimizer``.
      max_norm: the global norm to which all gradients together, dense and rows, are scaled down.
      every_k: gradients of this many calls are averaged before one update is made of them.

    Attributes:
      step: calls of ``update`` so far; ``updates`` those that changed the model, which schedules of tables count.

    >>> import jax.numpy as jnp, optax, embax, embax.nnx
    >>> from flax import nnx
    >>> layer = embax.nnx.Embed(6, 2, optimizer=embax.SGD(1.0), embedding_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    >>> optimizer = embax.nnx.Optimizer(layer, optax.sgd(1.0), wrt=nnx.Param)
    >>> loss, gradients = embax.nnx.value_and_grad(lambda layer: layer(jnp.array([3, 3])).sum())(layer)
    >>> optimizer.update(layer, gradients)
    >>> layer.embedding[:, 0].tolist()
    [1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    """

    def __init__(self, model: Any, tx: Any, *, wrt: Any = nnx.Param, max_norm: float | None = None, every_k: int = 1):
        joint = JointOptimizer(tx, max_norm, every_k)
        super().__init__(model, joint.tx, wrt=wrt)
        self.joint = joint
        tables = tables_of(model)
        check_steady(self.opt_state)
        slots = fresh_slots([table_leaf(v, name) for name, v in tables.items()])
        self.updates = Pending(jnp.zeros((), jnp.int32))
        self.slots = nnx.Dict({name: Slots(table) for name, table in zip(tables, slots, strict=True)})
        self.touched = nnx.Dict()
        self.pending = Pending(None)

    def track_rows(self, model: Any) -> None:
        """Adds a byte a row, in which every update marks the rows it writes, for incremental checkpoints; in place.

        Args:
          model: as given at construction.
        """
        tables = tables_of(model)
        marks = untouched_tables([table_leaf(v, name) for name, v in tables.items()])
        self.touched = nnx.Dict({name: Marks(touched) for name, touched in zip(tables, marks, strict=True)})

    def update(self, model: Any, grads: Any, /, **extra: Any) -> None:
        """Steps the model in place.

        Args:
          model: as given at construction.
          grads: from ``embax.nnx.value_and_grad``, or ``embax.nnx.row_gradients``.
          extra: for optax transformations that want more, such as ``value=``.

        Raises:
          KeyError: a table without a gradient, or a gradient without a table.
          TypeError: gradients of prefetched rows.
        """
        tables = tables_of(model)
        rows, dense_gradients = _split(grads, tables, self.wrt)
        slots = tuple(self.slots[name].get_value() for name in tables)
        marks = tuple(self.touched[name].get_value() for name in tables) if self.touched else None
        dense_state, pending = nnx.as_pure(self.opt_state), self.pending.get_value()
        state = JointState(self.updates.get_value(), dense_state, slots, pending, marks)
        params = nnx.as_pure(nnx.state(model, self.wrt)), [table_leaf(v, name) for name, v in tables.items()]
        dense, stepped, state = self.joint.step(params, (dense_gradients, rows), state, **nnx.as_pure(extra))
        nnx.update(model, dense)
        for (name, variable), table, slots in zip(tables.items(), stepped, state.slots, strict=True):
            variable.set_value(table.value)
            self.slots[name].set_value(slots)
        for name, touched in zip(tables, state.touched or (), strict=False):
            self.touched[name].set_value(touched)
        nnx.update(self.opt_state, nnx.state(state.dense))
        self.updates.set_value(state.step)
        self.pending.set_value(state.pending)
        self.step[...] += 1


def tables_of(model: Any) -> dict[str, Table]:
    """Returns the tables of a model by their names, in the order in which an optimizer has them."""
    return {table_name(path, v): v for path, v in nnx.to_flat_state(nnx.state(model, Table))}


def _split(grads: Any, tables: Any, wrt: Any) -> tuple[list, Any]:
    """Returns (row gradients in the order of ``tables``, dense gradients)."""
    rows, dense = {}, []
    for path, variable in nnx.to_flat_state(grads):
        if isinstance(variable, TableGradient):
            rows[variable.get_metadata("table_name")] = variable.row_gradients
        elif isinstance(variable, PrefetchedValues):
            raise TypeError(
                f'table "{variable.get_metadata("table_name")}": the gradient is that of prefetched rows; pass '
                "embax.nnx.row_gradients(small, gradients)"
            )
        else:
            dense.append((path, variable))
    if set(rows) != set(tables):
        raise KeyError(
            f"the model has tables {sorted(tables)}, and the gradients are of tables {sorted(rows)}; differentiate the "
            "same model with embax.nnx.value_and_grad"
        )
    return [rows[name] for name in tables], nnx.as_pure(nnx.state(nnx.from_flat_state(dense), wrt))
