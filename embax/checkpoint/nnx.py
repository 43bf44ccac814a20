"""Checkpoints of NNX models and their ``embax.nnx.Optimizer``."""

from typing import Any

import jax
from flax import nnx

from embax.checkpoint.checkpoints import Checkpoints, Restored
from embax.checkpoint.held import Held, held_by
from embax.checkpoint.loading import Choice
from embax.checkpoint.trees import flat, own_table, pending_of
from embax.nnx.feature_embed import FeatureEmbed
from embax.nnx.gradients import table_name
from embax.nnx.optimizer import tables_of
from embax.nnx.variables import Marks, Sentinel, Slots, Table, sentinel, table_leaf
from embax.table_state import TableState


def save(checkpoints: Checkpoints, step: int, model: Any, optimizer: Any = None, *, data: Any = None) -> None:
    """Saves a model with its tables, its optimizer and the slot variables in it.

    Args:
      checkpoints: where to.
      step: of training.
      model: any NNX module; may be donated as soon as this returns. Where the optimizer tracks rows, none of them is
        marked as written since from here on.
      optimizer: an ``embax.nnx.Optimizer`` of it; None for none.
      data: of JSON, as for ``Checkpoints.save``.

    Raises:
      ValueError: a step that is there.

    >>> import tempfile, optax, embax, embax.checkpoint, embax.nnx
    >>> import embax.checkpoint.nnx
    >>> from flax import nnx
    >>> model = embax.nnx.Embed(6, 2, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(0))
    >>> optimizer = embax.nnx.Optimizer(model, optax.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as folder, embax.checkpoint.Checkpoints(folder) as checkpoints:
    ...     embax.checkpoint.nnx.save(checkpoints, 7, model, optimizer)
    ...     found = embax.checkpoint.nnx.restore(checkpoints, model, optimizer)
    >>> found.step
    7
    """
    tables = list(_tables(model))
    wanted = [(held, _state(variable, name, optimizer)) for held, variable, name in tables]
    states = checkpoints.save_held(step, wanted, _dense(model, optimizer), data)
    _put_marks(optimizer, tables, states)


def restore(
    checkpoints: Checkpoints, model: Any, optimizer: Any = None, *, step: int | None = None, **choice: Any
) -> Restored:
    """Puts a step into a model and its optimizer, in place, and returns what else was in it.

    Until all of it is read, model and optimizer stay as they are.

    Args:
      checkpoints: where from.
      model: built as the saved one, on any devices; rows of a vocabulary that has grown stay as they are. Of a model of
        shapes (``nnx.eval_shape``) nothing need be in memory twice.
      optimizer: an ``embax.nnx.Optimizer`` of it; None for none: no slot variables are read then, and the next ``save``
        of ``checkpoints`` writes all rows.
      step: None for the newest.
      choice: as for ``Checkpoints.restore``.

    Raises:
      CheckpointError: no such step, a damaged one, or one that does not fit.
    """
    if choice.get("serving"):
        raise TypeError("restore: serving=True is for a model without an optimizer; leave optimizer out")
    if choice.get("track"):
        raise TypeError("restore: track=True is for plans; call optimizer.track_rows(model) before")
    if optimizer is None:
        choice["serving"] = True
        checkpoints.forget_marks()  # those of an optimizer of this model, if there is one, no longer tell
    tables = list(_tables(model))
    wanted = [(held, _state(variable, name, optimizer)) for held, variable, name in tables]
    dense = _dense(model, optimizer)
    if optimizer is not None and optimizer.pending.get_value() is None:
        leaves = [table_leaf(variable, name) for name, variable in tables_of(model).items()]
        parameters = nnx.as_pure(nnx.state(model, optimizer.wrt))
        pending = pending_of(checkpoints.dense_forms(step), "optimizer/pending/value/", leaves, parameters)
        dense["optimizer"]["pending"] = dense["optimizer"]["pending"].replace(pending)
    found = checkpoints.restore_held(step, wanted, dense, Choice(**choice))
    for (_, variable, name), state in zip(tables, found.tables, strict=True):
        variable.set_value(state.table.reshape(variable.get_value().shape))
        if optimizer is not None:
            optimizer.slots[name].set_value(state.slots)
    _put_marks(optimizer, tables, found.tables)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, Sentinel) and isinstance(variable.get_value(), jax.ShapeDtypeStruct):
            variable.set_value(sentinel().get_value())
    nnx.update(model, found.dense["model"])
    if optimizer is not None:
        nnx.update(optimizer, found.dense["optimizer"])
    return Restored(found.step, None, None, found.data)


def _dense(model: Any, optimizer: Any) -> dict[str, Any]:
    parts = {"model": nnx.state(model, nnx.Not(nnx.Any(Table, Sentinel)))}
    return parts if optimizer is None else {**parts, "optimizer": nnx.state(optimizer, nnx.Not(nnx.Any(Slots, Marks)))}


def _tables(model: Any) -> list[tuple[Held, Table, str]]:
    """Returns the stacks of tables in a model: how they are held, their variable, and its name to the optimizer."""
    found, planned = [], set()
    for path, module in nnx.iter_graph(model):
        if isinstance(module, FeatureEmbed):
            prefix = "".join(f"{part}/" for part in path)
            for held in held_by(module.plan):
                variable = module.tables[held.stack.name]
                planned.add(id(variable))
                name = table_name((*path, "tables", held.stack.name), variable)
                found.append((held._replace(prefix=prefix), variable, name))
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, Table) and id(variable) not in planned:
            name = table_name(path, variable)
            found.append((own_table(name, table_leaf(variable, name)), variable, name))
    return sorted(found, key=lambda item: item[2])


def _state(variable: Table, name: str, optimizer: Any) -> TableState:
    value = variable.get_value()
    rows = flat(value)
    if optimizer is None:
        return TableState(rows, ())
    touched = optimizer.touched[name].get_value() if optimizer.touched else None
    return TableState(rows, optimizer.slots[name].get_value(), touched)


def _put_marks(optimizer: Any, tables: list, states: list[TableState]) -> None:
    if optimizer is not None and optimizer.touched:
        for (_, _, name), state in zip(tables, states, strict=True):
            optimizer.touched[name].set_value(state.touched)
