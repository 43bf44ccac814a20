"""The dense part of a model as arrays by name, and tables that have no plan."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax.checkpoint.errors import CheckpointError
from embax.checkpoint.held import Held
from embax.gradients.accumulation import Pending
from embax.gradients.table import Table
from embax.planning import StackPlan, TablePlan
from embax.row_gradients import RowGradients


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by their paths.

    >>> sorted(named_leaves({"layer": {"kernel": 1.0, "bias": None}, "steps": (3,)}))
    ['layer/kernel', 'steps/0']
    """
    leaves, _ = jax.tree.flatten_with_path(tree)
    named = {}
    for path, leaf in leaves:
        name = _name(path)
        if name in named:
            raise ValueError(f'dense: two arrays would be called "{name}" in a checkpoint; rename a key')
        named[name] = _array(name, leaf)
    return named


def with_leaves(tree: Any, leaves: dict[str, Any]) -> Any:
    """Returns a pytree like ``tree`` with the leaves of these names: the inverse of ``named_leaves``."""
    paths, structure = jax.tree.flatten_with_path(tree)
    return jax.tree.unflatten(structure, [leaves[_name(path)] for path, _ in paths])


def check_forms(folder: Any, stored: dict[str, dict], wanted: dict[str, Any], partial: bool) -> None:
    """Raises CheckpointError unless the dense part of a checkpoint has the arrays that are wanted, and no others.

    Args:
      folder: of the dense part.
      stored: ``forms_of`` it.
      wanted: arrays by name.
      partial: whether it may have others.
    """
    shapes = forms_of(wanted)
    found = [f"{name} is not in it" for name in shapes if name not in stored]
    found += [f"{name} is not asked for" for name in stored if name not in shapes and not partial]
    both = [name for name in shapes if name in stored]
    found += [f"{n} was {_shown(stored[n])} and is {_shown(shapes[n])}" for n in both if stored[n] != shapes[n]]
    if found:
        lines = "\n  ".join(found[:10] + (["..."] if len(found) > 10 else []))
        raise CheckpointError(
            f"{folder}: the dense part is not like the one asked for:\n  {lines}\npass arrays of the structure, shapes "
            "and dtypes that were saved: build the model and its optimizer as they were"
        )


def forms_of(leaves: dict[str, Any]) -> dict[str, dict]:
    """Returns shape and dtype of arrays by their names; the dtype of a key names its generator."""
    return {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()}


def _shown(form: dict) -> str:
    return f"{form['dtype']}{form['shape']}"


def placed_as(array: Any, wanted: Any) -> Any:
    """Returns a loaded array, bound to devices only where ``wanted`` is: free ones go with tables on any mesh."""
    if not isinstance(array, jax.Array) or getattr(wanted, "committed", getattr(wanted, "sharding", None) is not None):
        return array
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(array)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    return jnp.asarray(np.asarray(array))


def pending_of(forms: Mapping[str, dict], prefix: str, tables: Sequence[Any], dense: Any) -> Pending | None:
    """Returns the shapes of gradients that were being accumulated; None where none were, or those of another model.

    Args:
      forms: of the dense part of a checkpoint.
      prefix: of their names.
      tables: of the model, in the order of its optimizer.
      dense: its parameters.
    """
    own = {name.removeprefix(prefix): form for name, form in forms.items() if name.startswith(prefix)}

    def array(name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(own[name]["shape"]), own[name]["dtype"])

    try:
        rows = [
            RowGradients(array(f"rows/{i}/rows"), array(f"rows/{i}/values"), math.prod(table.shape[:-1]))
            for i, table in enumerate(tables)
        ]
        mean = with_leaves(dense, {name: array(f"dense/{name}") for name in named_leaves(dense)})
        return Pending(array("count"), mean, rows)
    except KeyError:
        return None


def flat(table: Any) -> Any:
    """Returns the layers of a table one after another, ``[rows, embedding_dim]``: of an array, or of a shape."""
    shape = (math.prod(table.shape[:-1]), table.shape[-1])
    if isinstance(table, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, table.dtype)
    return table.reshape(shape) if table.ndim > 2 else table


def own_table(name: str, table: Table) -> Held:
    """Returns a table that no plan knows, ``[vocabulary_size, embedding_dim]``; layers are one after another."""
    if table.home is not None and table.home.stack.features:  # of a FeatureEmbed: it knows its tables itself
        return Held(table.home.stack, table.home.devices, name[: name.rfind("/") + 1])
    if table.home is not None:
        stack = table.home.stack
        renamed = tuple(dataclasses.replace(one, name=name) for one in stack.tables)
        return Held(dataclasses.replace(stack, tables=renamed), table.home.devices)
    rows, dtype = math.prod(table.shape[:-1]), np.dtype(table.dtype).name
    return Held(
        StackPlan(
            name=name,
            tables=(TablePlan(name, rows, 0, None, "sum"),),
            features=(),
            rows=rows,
            embedding_dim=table.shape[-1],
            dtype=dtype,
            activation_dtype=dtype,
            optimizer=table.optimizer,
            quantization=None,
        ),
        None,
        layers=math.prod(table.shape[:-2]),
    )


def _name(path: Any) -> str:
    # Orbax joins names by dots: one in a name would make it another one.
    return jax.tree_util.keystr(path, simple=True, separator="/").replace(".", "%2E")


def _array(name: str, leaf: Any) -> Any:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return leaf
    if isinstance(leaf, (bool, int, float, complex)):
        return np.asarray(jnp.asarray(leaf))  # of the dtype that it has in a computation
    raise TypeError(f"dense: {name or 'the leaf'} is a {type(leaf).__name__}, no array or number; leave it out")
