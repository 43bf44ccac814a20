"""The second door: gather the rows of a batch first, then use any JAX transformation at all.

``prefetch`` reads the distinct rows of every table that the ids name, once. What it returns is a small dense array in
the table's place; a loss over it is an ordinary JAX function, to be differentiated by ``jax.grad``, ``nnx.grad`` or a
trainer that does so. ``embax.value_and_grad`` accepts it too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from embax.exchange.one_stack import Home
from embax.gradients.doors import is_table, path_name
from embax.gradients.table import Prefetched, Table
from embax.id_batch import IdBatch
from embax.kernels.reference import after
from embax.take import rows_of


def prefetch(tree: Any, ids: Any) -> Any:
    """Returns ``tree`` with its tables replaced by the rows that ``ids`` name, each once: ``embax.Prefetched``.

    Args:
      tree: any pytree with ``embax.Table`` leaves.
      ids: every id that the loss will look up: ``{table name: ids}``, ids an array, or a pytree of arrays, as given to
        the lookups; an IdBatch; or, for a single table, its ids. Tables left out stay as they are. A table without a
        name goes by its path, such as "encoder/word". Layers ``[L, V, D]`` are all prefetched with the same ids.

    Raises:
      KeyError: ids for a table that the tree does not have.
      ValueError: ids that are not integers, or ids without a table's name for several tables.

    >>> import jax, jax.numpy as jnp, embax
    >>> params = {"word": embax.Table(jnp.arange(8.0).reshape(4, 2), embax.Adagrad(0.1))}
    >>> ids = jnp.array([[3, 0], [3, 3]])
    >>> small = embax.prefetch(params, {"word": ids})
    >>> small["word"].rows.tolist(), small["word"].values.shape
    ([0, 3, 4, 4], (4, 2))
    >>> gradients = jax.grad(lambda small: small["word"][ids].sum(), allow_int=True)(small)
    >>> small["word"].row_gradients(gradients["word"]).values.tolist()
    [[1.0, 1.0], [3.0, 3.0], [0.0, 0.0], [0.0, 0.0]]
    """
    leaves, structure = jax.tree.flatten_with_path(tree, is_leaf=is_table)
    tables = {leaf.name or path_name(path): leaf for path, leaf in leaves if isinstance(leaf, Table)}
    by_name = ids_by_table(ids, list(tables))
    made = {name: prefetch_table(name, tables[name], by_name[name]) for name in by_name}
    new = [made.get(leaf.name or path_name(path), leaf) if isinstance(leaf, Table) else leaf for path, leaf in leaves]
    return jax.tree.unflatten(structure, new)


def prefetch_table(name: str, table: Table, ids: Any) -> Prefetched:
    """Returns the distinct rows of one table that are among ``ids``, a pytree of integer arrays."""
    size, width = table.shape[-2:]
    if table.home is not None:
        return _prefetched_home(name, table, table.home, jax.tree.leaves(ids))
    parts = [rows_of(part, size).reshape(-1) for part in jax.tree.leaves(ids)]
    rows = distinct(jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.int32), size)
    flat = table.value.reshape(-1, size, width)
    # Rows that are none are zeros, not NaN: they have no part in norms.
    values = jnp.stack([jnp.take(layer, rows, axis=0, mode="fill", fill_value=0) for layer in flat])
    layers = table.shape[:-2]
    # An update by these rows must come after this read, or XLA copies the table.
    rows = jnp.broadcast_to(after(rows, values), (*layers, *rows.shape))
    return Prefetched(rows, values.reshape(*rows.shape, width), size, name)


def _prefetched_home(name: str, table: Table, home: Home, ids: list) -> Prefetched:
    """Returns the distinct rows of a table on a mesh, on every device."""
    size, total = table.shape[0], home.stack.rows
    parts = [home.stored_numbers(rows_of(part, total)).reshape(-1) for part in ids]
    rows = jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.int32)
    rows = home.everywhere(lambda rows: distinct(rows, size), rows)
    values = home.rows_at(table.value, rows)
    return Prefetched(after(rows, values), values, size, name, home)


def distinct(rows: jax.Array, size: int) -> jax.Array:
    """Returns the distinct int32 ``rows`` below ``size``, rising, filled up with ``size``; not more than ``size``.

    >>> distinct(jnp.array([5, 3, 6, 6, 3, 7]), 7).tolist()
    [3, 5, 6, 7, 7, 7]
    """
    count = rows.shape[0]
    capacity = min(count, size)
    rows = jnp.sort(rows)
    first = jnp.append(True, rows[1:] != rows[:-1])[:count] & (rows < size)
    place = jnp.where(first, jnp.cumsum(first, dtype=jnp.int32) - 1, capacity)
    return jnp.full(capacity, size, jnp.int32).at[place].set(rows, mode="drop", unique_indices=True)


def ids_by_table(ids: Any, names: list[str]) -> dict[str, Any]:
    """Returns ``{table name: ids}`` of what was given to a prefetch, for tables of these names."""
    if isinstance(ids, IdBatch):
        # Beyond the last offset nothing is looked up; such places may hold any row, and prefetching it does no harm.
        ids = {name: stack.ids for name, stack in ids.stacks.items()}
    if not isinstance(ids, Mapping):
        if len(names) != 1:
            raise ValueError(
                f"prefetch: there are {len(names)} tables ({', '.join(names)}); give the ids by table, "
                '{"table": ids, ...}'
            )
        ids = {names[0]: ids}
    return {_resolved(name, names): wanted for name, wanted in ids.items()}


def _resolved(name: str, names: list[str]) -> str:
    """Returns the one table called ``name``, or whose path ends with it."""
    found = [known for known in names if known == name] or [known for known in names if known.endswith("/" + name)]
    if len(found) != 1:
        raise KeyError(
            f"prefetch: ids are given for table {name!r}, which {len(found)} tables are called; there are "
            f"{', '.join(map(repr, names))}"
        )
    return found[0]
