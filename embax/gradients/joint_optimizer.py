"""One optimizer call for a whole model: optax for the dense parameters, each table's own optimizer for its rows."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from embax.gradients.accumulation import Pending, accumulate, emitted, start
from embax.gradients.doors import path_name
from embax.gradients.norms import clip_by_global_norm
from embax.gradients.table import Prefetched, Table
from embax.row_gradients import RowGradients, check_rows
from embax.table_state import TableState, init_slots
from embax.touched import untouched_rows
from embax.update import apply_at_home, apply_rows


class JointState(NamedTuple):
    """The state of a JointOptimizer.

    Attributes:
      step: int32, updates made: what schedules and bias corrections of the tables are computed from.
      dense: the optax state of the parameters that are not tables.
      slots: the tables' slot variables, in the order in which the tables stand in the parameters; those of layers
        ``[L, V, D]`` are ``[L * V, D]``.
      pending: what ``every_k`` accumulates, else None.
      touched: which rows of each table were written, where ``JointOptimizer.track`` asked for it, else None.
    """

    step: Any
    dense: Any
    slots: tuple
    pending: Pending | None
    touched: tuple | None = None

    def table_arrays(self) -> list[Any]:
        """Returns the slot variables, for ``check_step``."""
        return jax.tree.leaves(self.slots)


@dataclasses.dataclass(frozen=True)
class JointOptimizer:
    """Steps a pytree of parameters in which some leaves are ``embax.Table``: one call for all of them.

    Args:
      tx: an optax transformation for everything that is not a table (None where there is nothing else). An
        ``optax.MultiSteps`` of a fixed number of steps sets ``every_k``.
      max_norm: the global norm to which all gradients together, dense and rows, are scaled down, as
        ``optax.clip_by_global_norm`` would with dense ones; None for no clipping.
      every_k: gradients of this many calls are averaged before one update is made of them. Rows are kept as rows: the
        memory is that of ``every_k`` batches.

    >>> import jax.numpy as jnp, optax, embax
    >>> params = {"word": embax.Table(jnp.ones((4, 2)), embax.SGD(0.5)), "scale": jnp.float32(1)}
    >>> optimizer = embax.JointOptimizer(optax.sgd(0.5))
    >>> state = optimizer.init(params)
    >>> loss = lambda params: (params["word"][jnp.array([3, 3])] * params["scale"]).sum()
    >>> value, gradients = embax.value_and_grad(loss)(params)
    >>> params, state = optimizer.update(params, gradients, state)
    >>> params["word"].value[:, 0].tolist(), params["scale"].tolist()
    ([1.0, 1.0, 1.0, 0.0], -1.0)
    """

    tx: Any = None
    max_norm: float | None = None
    every_k: int = 1

    def __post_init__(self):
        if self.tx is not None and not (hasattr(self.tx, "init") and hasattr(self.tx, "update")):
            raise TypeError(f"JointOptimizer: tx={self.tx!r} has no init and update; pass an optax transformation")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"JointOptimizer: max_norm={self.max_norm!r} must be greater than 0, or None")
        if hasattr(self.tx, "inner_opt") and hasattr(self.tx, "has_updated"):
            steps = _multi_steps(self.tx)
            if self.every_k not in (1, steps):
                raise ValueError(f"JointOptimizer: every_k={self.every_k}, and tx is an optax.MultiSteps of {steps}")
            object.__setattr__(self, "every_k", steps)
            object.__setattr__(self, "tx", self.tx.inner_opt)  # type: ignore
        if not isinstance(self.every_k, int) or isinstance(self.every_k, bool) or self.every_k < 1:
            raise ValueError(f"JointOptimizer: every_k={self.every_k!r} must be an integer of at least 1")

    def init(self, params: Any, like: Any = None) -> JointState:
        """Returns the state for ``params``.

        Args:
          params: a pytree of arrays and Tables.
          like: gradients, or their shapes (``jax.eval_shape``), to make room for with ``every_k``; without it the first
            update makes room, and changes the structure of the state.
        """
        tables, dense = split(params)
        if self.tx is None and jax.tree.leaves(dense):
            raise ValueError(
                f"JointOptimizer: tx is None, and there are {len(jax.tree.leaves(dense))} dense parameters beside the "
                "tables; pass an optax transformation for them"
            )
        state = () if self.tx is None else self.tx.init(dense)
        check_steady(state)
        pending = None
        if self.every_k > 1 and like is not None:
            pending = start(self.every_k, *_split_gradients(params, like))
        return JointState(jnp.zeros((), jnp.int32), state, fresh_slots(tables), pending)

    def update(self, params: Any, gradients: Any, state: JointState, **extra: Any) -> tuple[Any, JointState]:
        """Returns parameters and state after one step; nothing as large as a table is made.

        Args:
          params: as given to ``init``.
          gradients: from ``embax.value_and_grad``: RowGradients where the tables stand.
          state: from ``init`` or ``update``.
          extra: for optax transformations that want more, such as ``value=``.

        Raises:
          TypeError: a table's gradient that is no RowGradients.
          ValueError: gradients of another structure, or of another table.
        """
        tables, dense = split(params)
        rows, dense_gradients = _split_gradients(params, gradients)
        dense, tables, state = self.step((dense, tables), (dense_gradients, rows), state, **extra)
        return merge(dense, tables, params), state

    def step(self, params: tuple, gradients: tuple, state: JointState, **extra: Any) -> tuple[Any, list, JointState]:
        """Returns (dense parameters, tables, state): ``update`` for parameters and gradients taken apart.

        Args:
          params: (dense parameters, list of Tables).
          gradients: (dense gradients, list of RowGradients).
          state: from ``init`` or before.
          extra: as for ``update``.
        """
        (dense, tables), (dense_gradients, rows) = params, gradients
        for table, gradient in zip(tables, rows, strict=True):
            _check_gradient(table, gradient)
        ready = None
        if self.every_k > 1:
            pending = accumulate(self.every_k, state.pending, rows, dense_gradients)
            ready, rows, means = emitted(self.every_k, pending)
            dense_gradients = jax.tree.map(lambda mean, g: mean.astype(g.dtype), means, dense_gradients)
            state = state._replace(pending=pending)
        if self.max_norm is not None:
            rows, dense_gradients = clip_by_global_norm((rows, dense_gradients), self.max_norm)
        dense, dense_state = self._dense(dense, dense_gradients, state.dense, ready, extra)
        new, states = [], []
        marks = state.touched or (None,) * len(tables)
        for table, slots, touched, gradient in zip(tables, state.slots, marks, rows, strict=True):
            stepped = apply_to(table, TableState(_flat(table.value), slots, touched), gradient, state.step)
            new.append(table.with_value(stepped.table.reshape(table.shape)))
            states.append(stepped)
        count = jnp.int32(1) if ready is None else ready.astype(jnp.int32)
        touched = None if state.touched is None else tuple(stepped.touched for stepped in states)
        slots = tuple(stepped.slots for stepped in states)
        return dense, new, state._replace(step=state.step + count, dense=dense_state, slots=slots, touched=touched)

    def track(self, params: Any, state: JointState) -> JointState:
        """Returns a state with a byte a row, in which every step marks the rows it writes; see ``embax.track``.

        Args:
          params: as given to ``init``.
          state: of them.

        >>> import jax.numpy as jnp, embax
        >>> params, optimizer = embax.Table(jnp.ones((4, 2)), embax.SGD(0.5)), embax.JointOptimizer()
        >>> state = optimizer.track(params, optimizer.init(params))
        >>> value, gradient = embax.value_and_grad(lambda table: table[jnp.array([3, 3])].sum())(params)
        >>> optimizer.update(params, gradient, state)[1].touched[0].rows.tolist()
        [0, 0, 0, 1]
        """
        return state._replace(touched=untouched_tables(split(params)[0]))

    def _dense(self, dense: Any, gradients: Any, state: Any, ready: Any, extra: Any) -> tuple[Any, Any]:
        """Returns the dense parameters and their optax state after one update, made only if ``ready``."""
        if self.tx is None:
            return dense, state
        import optax

        def step(dense, gradients, state):
            changes, state = optax.with_extra_args_support(self.tx).update(gradients, state, dense, **extra)
            return optax.apply_updates(dense, changes), state

        if ready is None:
            return step(dense, gradients, state)
        return jax.lax.cond(ready, step, lambda dense, _, state: (dense, state), dense, gradients, state)


def fresh_slots(tables: list[Table]) -> tuple:
    """Returns the slot variables of ``tables`` at the start."""
    return tuple(
        init_slots(table.optimizer, _flat(table.value)).slots if table.home is None else table.home.fresh_slots()
        for table in tables
    )


def untouched_tables(tables: list[Table]) -> tuple:
    """Returns that no row of ``tables`` was written yet."""
    return tuple(
        untouched_rows(math.prod(table.shape[:-1])) if table.home is None else table.home.untouched()
        for table in tables
    )


def is_a_table(leaf: Any) -> bool:
    """Returns whether ``leaf`` is a Table."""
    return isinstance(leaf, Table)


def split(params: Any) -> tuple[list[Table], Any]:
    """Returns the tables of ``params``, and ``params`` with None in their places."""
    leaves, structure = jax.tree.flatten_with_path(params, is_leaf=is_a_table)
    tables = [leaf.with_value(leaf.value, path_name(path)) for path, leaf in leaves if is_a_table(leaf)]
    return tables, jax.tree.unflatten(structure, [None if is_a_table(leaf) else leaf for _, leaf in leaves])


def merge(dense: Any, tables: list[Table], params: Any) -> Any:
    """Returns ``params`` with its tables and the rest replaced: the inverse of ``split``."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_a_table)
    others, remaining = iter(jax.tree.leaves(dense)), iter(tables)
    new = [leaf.with_value(next(remaining).value) if is_a_table(leaf) else next(others) for leaf in leaves]
    return jax.tree.unflatten(structure, new)


def _split_gradients(params: Any, gradients: Any) -> tuple[list[RowGradients], Any]:
    leaves, structure = jax.tree.flatten_with_path(params, is_leaf=is_a_table)
    try:
        parts = structure.flatten_up_to(gradients)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"JointOptimizer: the gradients must have the structure of the parameters, {structure}, as "
            f"embax.value_and_grad returns them; {error}"
        ) from None
    rows = []
    for index, ((path, leaf), part) in enumerate(zip(leaves, parts, strict=True)):
        if is_a_table(leaf):
            if isinstance(part, Prefetched):
                name = leaf.name or path_name(path)
                raise TypeError(
                    f'table "{name}": the gradient is that of prefetched rows; pass prefetched.row_gradients(gradient)'
                )
            rows.append(part)
            parts[index] = None
    return rows, jax.tree.unflatten(structure, parts)


def apply_to(table: Table, state: TableState, gradient: RowGradients, step: Any) -> TableState:
    """Returns a table's state after one step on the rows of ``gradient``, wherever the table lies."""
    if table.home is None:
        return apply_rows(table.optimizer, state, gradient, step)
    return apply_at_home(table.home, state, gradient, step)


def _check_gradient(table: Table, gradient: RowGradients) -> None:
    check_rows(gradient, f'table "{table.name}"')
    shape = (math.prod(table.shape[:-1]), table.shape[-1])
    if shape != (gradient.vocabulary_size, gradient.values.shape[-1]):
        raise ValueError(
            f'table "{table.name}" {list(shape)}: the gradient is of a table '
            f"{[gradient.vocabulary_size, gradient.values.shape[-1]]}; pass that of this table"
        )


def _flat(value: Any) -> Any:
    return jnp.reshape(value, (-1, value.shape[-1]))


def _multi_steps(tx: Any) -> int:
    """Returns the fixed number of steps of an optax.MultiSteps; raises for what cannot be followed."""
    schedule = getattr(tx, "_every_k_schedule", None)
    steps = {int(schedule(step)) for step in (0, 1, 7, 100, 10_000, 1_000_000)} if schedule else set()
    skips = getattr(getattr(tx, "_should_skip_update_fn", None), "__qualname__", "")
    if len(steps) != 1 or not getattr(tx, "_use_grad_mean", False) or not skips.startswith("MultiSteps."):
        raise ValueError(
            "JointOptimizer: this optax.MultiSteps has a schedule, a sum instead of a mean, or a rule to skip updates, "
            "which rows cannot follow; pass the inner transformation and every_k="
        )
    return steps.pop()


# States of transformations that hold updates back, which the tables would not know of.
_HOLDING_BACK = {
    "MultiStepsState": "MultiSteps",
    "ApplyEvery": "apply_every",
    "ApplyIfFiniteState": "apply_if_finite",
    "ConditionallyTransformState": "conditionally_transform",
}


def check_steady(state: Any) -> None:
    """Raises for the state of an optax transformation that would update when the tables do not, or the reverse."""
    found = []
    jax.tree.map(lambda node: None, state, is_leaf=lambda node: found.append(type(node).__name__) is not None)
    for name in found:
        if name in _HOLDING_BACK:
            raise ValueError(
                f"JointOptimizer: tx contains an optax.{_HOLDING_BACK[name]}, and the tables would not wait for it; "
                "pass the transformation inside of it, and every_k= to accumulate"
            )
