"""``value_and_grad``: a loss over any pytree in which some leaves are tables; their gradients come as rows."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax import kernels
from embax.gradients.primitive import SparseGradientError
from embax.gradients.rules import RULES
from embax.gradients.table import Prefetched, Table
from embax.gradients.walk import Record, Root, TableRef, Walk
from embax.kernels.reference import after
from embax.row_gradients import RowGradients
from embax.sorted_rows import varying_with


def is_table(leaf: Any) -> bool:
    """Returns whether ``leaf`` is a Table or Prefetched: a leaf of a tree of parameters, not a part of it."""
    return isinstance(leaf, (Table, Prefetched))


def value_and_grad(fun: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable:
    """Returns a function that gives the value of ``fun`` and its gradient, tables' gradients as RowGradients.

    As ``jax.value_and_grad``, but every ``embax.Table`` in the differentiated arguments gets ``RowGradients`` at the
    cost of its lookups, not of its size; ``embax.Prefetched`` too. All other leaves get what JAX gives. Lookups are
    found wherever they are: behind jit, checkpoint, vmap, scan (over layers too), cond, shard_map and pmap. A
    use of a table that has no row gradients raises, with the way out: nothing is left out silently.

    Args:
      fun: returns a scalar, or ``(scalar, aux)``. It is traced, as under ``jax.jit``.
      argnums: which arguments to differentiate: an int, or a sequence of ints.
      has_aux: whether ``fun`` returns ``(scalar, aux)``.

    Raises:
      SparseGradientError: a table is used as a whole, or inside of what cannot be looked into (a custom derivative, a
        shard_map that splits it); named with the way out.

    >>> import jax.numpy as jnp, embax
    >>> params = {"word": embax.Table(jnp.ones((4, 2)), embax.Adagrad(0.1)), "scale": jnp.float32(1)}
    >>> loss = lambda params, ids: (params["word"][ids] * params["scale"]).sum()
    >>> value, gradients = embax.value_and_grad(loss)(params, jnp.array([[3, 0], [3, 3]]))
    >>> gradients["word"].rows.tolist(), gradients["word"].values[:, 0].tolist(), gradients["scale"].tolist()
    ([0, 3, 4, 4], [1.0, 3.0, 0.0, 0.0], 8.0)
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def with_gradients(*args, **kwargs):
        for number in numbers:
            if not -len(args) <= number < len(args):
                raise ValueError(
                    f"value_and_grad: argnums={argnums} names argument {number} of {len(args)}; pass what is "
                    "differentiated by position"
                )
        leaves, structure = jax.tree.flatten_with_path(tuple(args[n] for n in numbers), is_leaf=is_table)

        def call(leaves):
            filled = list(args)
            for number, value in zip(numbers, jax.tree.unflatten(structure, leaves), strict=True):
                filled[number] = value
            out = fun(*filled, **kwargs)
            if has_aux and not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(f"value_and_grad: has_aux=True, and the loss returned {type(out).__name__}, not a pair")
            return out if has_aux else (out, None)

        value, aux, gradients = differentiate(call, [_named(path, leaf) for path, leaf in leaves])
        gradients = jax.tree.unflatten(structure, gradients)
        return (value, aux) if has_aux else value, gradients[0] if isinstance(argnums, int) else gradients

    return with_gradients


def differentiate(call: Callable, leaves: list) -> tuple[Any, Any, list]:
    """Returns ``(value, aux, gradients)`` of ``call(leaves)``, which returns ``(value, aux)``.

    Args:
      call: takes leaves like these.
      leaves: Tables, Prefetched, and arrays.
    """
    tables = [leaf for leaf in leaves if isinstance(leaf, Table)]
    dense = [_differentiated(leaf) for leaf in leaves if not isinstance(leaf, Table)]

    def filled(dense, values):
        dense, values = iter(dense), iter(values)
        return [_with_value(leaf, next(values if isinstance(leaf, Table) else dense)) for leaf in leaves]

    values = [table.value for table in tables]
    jaxpr, out = jax.make_jaxpr(lambda dense, values: call(filled(dense, values)), return_shape=True)(dense, values)
    structure = jax.tree.structure(out)
    walk = Walk(tuple(Root(table.name or "unnamed", _flat(table)) for table in tables), RULES)
    refs = [TableRef(index, tuple(table.shape)) for index, table in enumerate(tables)]
    dense_leaves, dense_structure = jax.tree.flatten(dense)

    def read(dense_leaves, taps):
        outs, records = walk.run(jaxpr, [*dense_leaves, *refs], taps)
        outs = [walk.array(value) if isinstance(value, TableRef) else value for value in outs]
        value, aux = jax.tree.unflatten(structure, outs)
        return value, (aux, records)

    def loss(dense, taps):
        return read(jax.tree.leaves(dense), taps)

    measured = jax.eval_shape(lambda leaves: read(leaves, None)[1][1], dense_leaves)
    taps = jax.tree.map(_tap, measured, is_leaf=_is_record)
    dense = jax.tree.unflatten(dense_structure, dense_leaves)
    try:
        (value, (aux, records)), (dense, taps) = jax.value_and_grad(loss, (0, 1), has_aux=True)(dense, taps)
    except ValueError as error:
        loops = [r for r in jax.tree.leaves(measured, is_leaf=_is_record) if not r.rows.size]
        if "while_loop" in str(error) and loops:
            raise _in_while_loop(tables[loops[0].root]) from error
        raise
    summed = [_row_gradients(index, table, records, taps) for index, table in enumerate(tables)]
    dense, summed = iter(dense), iter(summed)
    return value, aux, [next(summed) if isinstance(leaf, Table) else _gradient(leaf, next(dense)) for leaf in leaves]


def _named(path: Any, leaf: Any) -> Any:
    """Returns ``leaf``, a table without a name called by its path; the argument number is left out."""
    if not isinstance(leaf, Table) or leaf.name:
        return leaf
    return leaf.with_value(leaf.value, path_name(path[1:]) or "table")


def path_name(path: Any) -> str:
    """Returns the name of a table at ``path``: its keys joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _differentiated(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, Prefetched) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, Table):
        return leaf.with_value(value)
    if isinstance(leaf, Prefetched):
        return dataclasses.replace(leaf, values=value)
    return value


def _gradient(leaf: Any, gradient: Any) -> Any:
    return leaf.row_gradients(gradient) if isinstance(leaf, Prefetched) else gradient


def _flat(table: Table) -> jax.Array:
    return jnp.reshape(table.value, (-1, table.shape[-1]))


def _is_record(node: Any) -> bool:
    return isinstance(node, Record)


def _tap(record: Record) -> jax.Array:
    like = record.activations
    # Along Explicit mesh axes the sharding is part of the type that a cotangent must have.
    zeros = jax.lax.full(like.shape, 0, like.dtype, sharding=getattr(like, "sharding", None))
    return varying_with(zeros, like)


def _row_gradients(index: int, table: Table, records: Any, taps: Any) -> RowGradients:
    """Returns the sum over every lookup of one table."""
    total, width = math.prod(table.shape[:-1]), table.shape[-1]
    pairs = zip(jax.tree.leaves(records, is_leaf=_is_record), jax.tree.leaves(taps), strict=True)
    found = [(r, c.reshape(-1, width)) for r, c in pairs if r.root == index and r.rows.size and c.size]
    sum_rows = functools.partial(_summed, table.home)
    if not found:
        return sum_rows(jnp.zeros(0, jnp.int32), jnp.zeros((0, width), jnp.float32), None, None, total)
    rows, places, first = [], [], 0
    for record, cotangent in found:
        # The rows need the token, so that an update in place comes after the lookup.
        rows.append(after(record.rows.reshape(-1), record.token))
        places.append(_activation_of(record, first, cotangent.shape[0]))
        first += cotangent.shape[0]
    pooled = any(record.samples is not None for record, _ in found)
    place = jnp.concatenate(places) if pooled else None
    gains, cotangent = _joined([record.gains for record, _ in found], rows), jnp.concatenate([c for _, c in found])
    return sum_rows(jnp.concatenate(rows), cotangent, place, gains, total)


def _summed(home: Any, rows: jax.Array, values: jax.Array, samples: Any, gains: Any, total: int) -> RowGradients:
    """Returns the row gradients of occurrences; of a table on a mesh on every device."""
    sum_rows = kernels.get(kernels.choose().name).sum_rows
    if home is None:
        return sum_rows(rows, values, samples, gains, total)

    def everywhere(rows, values, samples, gains):
        made = sum_rows(rows, values, samples, gains, total)
        return made.rows, made.values

    unique, sums = home.everywhere(everywhere, rows, values, samples, gains)
    return RowGradients(unique, sums, total)


def _activation_of(record: Record, first: int, count: int) -> jax.Array:
    """Returns which activation has the gradient of each of a record's rows: of ``count``, counted from ``first``."""
    if record.samples is None:
        return first + jnp.arange(count, dtype=jnp.int32)
    # Leading axes are those of vmap and scan, whose every entry has samples of its own.
    batches = record.samples.size // record.samples.shape[-1]
    begins = first + jnp.arange(batches, dtype=jnp.int32)[:, None] * (count // batches)
    return (record.samples.reshape(batches, -1) + begins).reshape(-1)


def _joined(gains: list, rows: list) -> jax.Array | None:
    if all(gain is None for gain in gains):
        return None
    parts = [jnp.ones(r.shape, jnp.float32) if g is None else g.reshape(-1) for g, r in zip(gains, rows, strict=True)]
    return jnp.concatenate(parts)


def _in_while_loop(table: Table) -> SparseGradientError:
    return SparseGradientError(
        f'table "{table.name}" {list(table.shape)}: it is looked up inside of a while_loop (or a fori_loop of unknown '
        "length) whose result the loss depends on, and JAX has no reverse mode through those; use scan, or a fori_loop "
        "of known length"
    )
