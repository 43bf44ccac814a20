"""Checkpoints of ``embax.linen.TrainState``."""

from collections.abc import Mapping
from typing import Any

from embax.checkpoint.checkpoints import Checkpoints, Restored
from embax.checkpoint.held import Held
from embax.checkpoint.loading import Choice
from embax.checkpoint.trees import flat, own_table, pending_of
from embax.gradients.joint_optimizer import merge, split
from embax.gradients.table import Table
from embax.planning import Plan
from embax.table_state import TableState


def save(
    checkpoints: Checkpoints, step: int, state: Any, *, plans: Mapping[str, Plan] | Plan | None = None, data: Any = None
) -> Any:
    """Saves a ``TrainState``: tables with their slot variables, parameters, optax's state, counts.

    Returns the state to go on with: that which is given; where it tracks rows, none is marked as written since.

    Args:
      checkpoints: where to.
      step: of training.
      state: may be donated as soon as this returns.
      plans: the plan of the FeatureEmbed layer, or of each by its path in ``params``, such as ``{"encoder": plan}``.
        Tables of Embed layers need none.
      data: of JSON, as for ``Checkpoints.save``.

    >>> import tempfile, jax, jax.numpy as jnp, optax, embax, embax.checkpoint, embax.linen
    >>> import embax.checkpoint.linen
    >>> layer = embax.linen.Embed(6, 2, optimizer=embax.SGD(0.1))
    >>> params = layer.init(jax.random.key(0), jnp.array([3]))["params"]
    >>> state = embax.linen.TrainState.create(apply_fn=layer.apply, params=params, tx=optax.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as folder, embax.checkpoint.Checkpoints(folder) as checkpoints:
    ...     state = embax.checkpoint.linen.save(checkpoints, 7, state)
    ...     state, found = embax.checkpoint.linen.restore(checkpoints, state)
    >>> found.step
    7
    """
    tables, dense = _parts(state, plans)
    return _marked(state, checkpoints.save_held(step, tables, dense, data))


def restore(
    checkpoints: Checkpoints,
    state: Any,
    *,
    plans: Mapping[str, Plan] | Plan | None = None,
    step: int | None = None,
    **choice: Any,
) -> tuple[Any, Restored]:
    """Returns a state like ``state`` with what was saved, and what else was in it.

    Args:
      checkpoints: where from.
      state: made as the saved one, on any devices; rows of a vocabulary that has grown are its own. Of shapes
        (``jax.eval_shape``) nothing need be in memory twice.
      plans: as for ``save``.
      step: None for the newest.
      choice: as for ``Checkpoints.restore``, but serving.

    Raises:
      CheckpointError: no such step, a damaged one, or one that does not fit.
    """
    wanted, dense = _parts(state, plans)
    if state.pending is None:
        tables, params = split(state.params)
        dense["pending"] = pending_of(checkpoints.dense_forms(step), "pending/", tables, params)
    if choice.get("track"):
        raise TypeError("restore: track=True is for plans; pass state.track_rows()")
    if choice.get("serving"):
        raise TypeError(
            "restore: a TrainState has slot variables; for serving load a plan's tables by Checkpoints.restore"
        )
    found = checkpoints.restore_held(step, wanted, dense, Choice(**choice))
    restored = found.dense
    tables = [
        table.with_value(loaded.table.reshape(table.shape))
        for table, loaded in zip(split(state.params)[0], found.tables, strict=True)
    ]
    params = merge(restored["params"], tables, state.params)
    rest = {name: restored[name] for name in ("step", "opt_state", "updates", "pending")}
    new = state.replace(params=params, slots=tuple(loaded.slots for loaded in found.tables), **rest)
    return _marked(new, found.tables), Restored(found.step, None, None, found.data)


def _marked(state: Any, tables: list[TableState]) -> Any:
    return state if state.touched is None else state.replace(touched=tuple(table.touched for table in tables))


def _parts(state: Any, plans: Any) -> tuple[list[tuple[Held, TableState]], dict[str, Any]]:
    tables, params = split(state.params)
    layers = {(table.name or "").rpartition("/")[0] for table in tables}
    for layer in plans if isinstance(plans, Mapping) else ():
        if layer not in layers:
            raise ValueError(f'plans names layer "{layer}", and the tables are in {sorted(layers)}; name one of these')
    held = []
    marks = state.touched or (None,) * len(tables)
    for table, slots, touched in zip(tables, state.slots, marks, strict=True):
        held.append((_held(table, plans), TableState(flat(table.value), slots, touched)))
    names = ("step", "opt_state", "updates", "pending")
    return held, {"params": params, **{name: getattr(state, name) for name in names}}


def _held(table: Table, plans: Any) -> Held:
    name = table.name or "table"
    layer, _, stack_name = name.rpartition("/")
    plan = plans.get(layer) if isinstance(plans, Mapping) else plans
    if plan is None:
        return own_table(name, table)
    for stack in plan.stacks:
        if stack.name == stack_name and table.shape == (stack.stored_rows, stack.embedding_dim):
            return Held(stack, plan.devices, f"{layer}/" if layer else "")
    return own_table(name, table)
