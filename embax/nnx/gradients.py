"""The two doors for NNX models: ``value_and_grad`` and ``prefetch``."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from embax.gradients.doors import differentiate, is_table
from embax.gradients.prefetch import ids_by_table, prefetch_table
from embax.gradients.table import Prefetched
from embax.gradients.table import Table as TableLeaf
from embax.nnx.variables import PrefetchedRows, PrefetchedValues, Table, TableGradient, table_leaf, with_value


def value_and_grad(fun: Callable | None = None, *, argnums: Any = 0, has_aux: bool = False) -> Callable:
    """Returns a function that gives the value of ``fun`` and its gradient, as ``nnx.value_and_grad``.

    Every ``embax.nnx.Table`` in a differentiated argument gets RowGradients, at the cost of its lookups. The gradient
    is an ``nnx.State`` with those of the parameters, and for tables an ``embax.nnx.TableGradient``, whose
    ``row_gradients`` are the rows: ``embax.nnx.Optimizer`` takes it. Variables that ``fun`` changes (batch statistics,
    random counters) are changed in the model.

    Args:
      fun: takes modules and arrays, returns a scalar, or ``(scalar, aux)``. It is traced, as under ``nnx.jit``. Left
        out, the result is a decorator.
      argnums: an int or ``nnx.DiffState`` (the filter is for the parameters; tables are always differentiated), or a
        sequence of these.
      has_aux: whether ``fun`` returns ``(scalar, aux)``; aux is a pytree of arrays.

    Raises:
      SparseGradientError: as ``embax.value_and_grad``.

    >>> import jax.numpy as jnp, embax, embax.nnx
    >>> from flax import nnx
    >>> layer = embax.nnx.Embed(6, 2, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(0))
    >>> loss, gradients = embax.nnx.value_and_grad(lambda layer, ids: layer(ids).sum())(layer, jnp.array([3, 3, 1]))
    >>> gradients.embedding.row_gradients.values.tolist()
    [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]
    """
    if fun is None:
        return functools.partial(value_and_grad, argnums=argnums, has_aux=has_aux)
    wanted = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    filters = {w.argnum if isinstance(w, nnx.DiffState) else w: getattr(w, "filter", nnx.Param) for w in wanted}

    def with_gradients(*args, **kwargs):
        for number in filters:
            if not -len(args) <= number < len(args):
                raise ValueError(
                    f"value_and_grad: argnums={argnums} names argument {number} of {len(args)}; pass what is "
                    "differentiated by position"
                )
        by_place = {number % len(args): chosen for number, chosen in filters.items()}
        out, gradients = _differentiated(fun, by_place, has_aux, args, kwargs)
        return out, gradients if isinstance(argnums, (tuple, list)) else gradients[0]

    return with_gradients


def _differentiated(fun: Callable, filters: dict, has_aux: bool, args: tuple, kwargs: dict) -> tuple[Any, tuple]:
    """Returns (what ``fun`` returned, gradients of the arguments in ``filters``)."""
    nodes = {n: arg for n, arg in enumerate(args) if _has_variables(arg)}
    _check_no_sharing(nodes, filters)
    chosen = nnx.Any(*(_in_argument(n, nnx.Any(filters[n], Table)) for n in filters))
    graph, state, rest = nnx.split(nodes, chosen, ...)
    flat = nnx.to_flat_state(state)
    leaves = [table_leaf(v, table_name(path[1:], v)) if isinstance(v, Table) else v.get_value() for path, v in flat]
    # Arguments without variables are differentiated as the pytrees that they are.
    plain = {n: jax.tree.flatten(args[n], is_leaf=is_table) for n in filters if n not in nodes}

    def call(leaves):
        remaining = iter(leaves)
        variables = [(path, with_value(v, _value(next(remaining)))) for path, v in flat]
        # New Variables, of the trace that is on: those of the caller cannot be changed in here.
        others = [(path, with_value(v, v.get_raw_value())) for path, v in nnx.to_flat_state(rest)]
        merged = nnx.merge(graph, nnx.from_flat_state([*variables, *others])) if nodes else {}
        for n, (parts, structure) in plain.items():
            merged[n] = jax.tree.unflatten(structure, [next(remaining) for _ in parts])
        out = fun(*(merged.get(n, arg) for n, arg in enumerate(args)), **kwargs)
        value, aux = out if has_aux else (out, None)
        after = {n: merged[n] for n in nodes}
        return value, (aux, nnx.as_pure(nnx.state(after, nnx.Not(Table))))

    everything = [*leaves, *(leaf for parts, _ in plain.values() for leaf in parts)]
    value, (aux, changed), gradients = differentiate(call, everything)
    _check_nothing_new(nodes, changed)
    nnx.update(nodes, changed)
    of_plain = iter(gradients[len(flat) :])
    by_path = [(p, _gradient(p, v, g)) for (p, v), g in zip(flat, gradients, strict=False)]
    found = {
        n: jax.tree.unflatten(structure, [next(of_plain) for _ in parts]) for n, (parts, structure) in plain.items()
    }
    found |= {n: _of_argument(n, args[n], by_path) for n in filters if n in nodes}
    return (value, aux) if has_aux else value, tuple(found[n] for n in filters)


def prefetch(model: Any, ids: Any) -> Any:
    """Returns a model like ``model`` whose tables hold only the rows that ``ids`` name, as ordinary small parameters.

    Every other Variable is shared with ``model``. A loss over it may use any transformation, and ``nnx.value_and_grad``
    (or a trainer that calls it) differentiates it; ``row_gradients(small, gradients)`` then makes of the gradients what
    ``embax.nnx.Optimizer`` takes for ``model``.

    Args:
      model: an NNX module.
      ids: every id that the loss will look up, by table: ``{"encoder/embedding": ids}``, ids a pytree of arrays; for a
        single table its ids; an IdBatch for a model with one FeatureEmbed.

    Raises:
      KeyError: ids for a table that the model does not have.

    >>> import jax.numpy as jnp, embax, embax.nnx
    >>> from flax import nnx
    >>> layer = embax.nnx.Embed(6, 2, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(0))
    >>> ids = jnp.array([3, 3, 1])
    >>> small = embax.nnx.prefetch(layer, ids)
    >>> loss, gradients = nnx.value_and_grad(lambda layer: layer(ids).sum())(small)
    >>> embax.nnx.row_gradients(small, gradients).embedding.row_gradients.rows.tolist()
    [1, 3, 6]
    """
    small = nnx.clone(model, variables=False)
    places = {}
    for path, module in nnx.iter_modules(small):
        for key, variable in getattr(module, "owned_tables", dict)().items():
            places[table_name((*path, *key), variable)] = (module, key, variable)
    for name, wanted in ids_by_table(ids, list(places)).items():
        module, key, variable = places[name]
        made = prefetch_table(name, table_leaf(variable, name), wanted)
        rows = PrefetchedRows(made.rows, vocabulary_size=made.vocabulary_size, table_name=name, home=made.home)
        module.set_prefetched(key, PrefetchedValues(made.values, table_name=name), rows)
    return small


def row_gradients(small: Any, gradients: Any) -> Any:
    """Returns ``gradients``, an ``nnx.State`` of a prefetched model, with those of its tables as RowGradients.

    Args:
      small: from ``prefetch``.
      gradients: from ``nnx.grad`` or ``nnx.value_and_grad`` over it.
    """
    found = {v.get_metadata("table_name"): v for _, v in nnx.to_flat_state(nnx.state(small, PrefetchedRows))}

    def converted(variable):
        if not isinstance(variable, PrefetchedValues):
            return variable
        name = variable.get_metadata("table_name")
        rows = found[name]
        table = Prefetched(rows.get_value(), None, rows.get_metadata("vocabulary_size"), name)
        return TableGradient(table.row_gradients(variable.get_value()), table_name=name)

    return nnx.from_flat_state([(path, converted(v)) for path, v in nnx.to_flat_state(gradients)])


def table_name(path: Any, variable: Any) -> str:
    """Returns the name of the table at ``path`` of a model: its own, or the path."""
    return variable.get_metadata("table_name", None) or "/".join(map(str, path))


def _has_variables(arg: Any) -> bool:
    if isinstance(arg, (jax.Array, str, bytes, int, float, type(None))):
        return False
    return any(isinstance(node, nnx.Variable) for _, node in nnx.iter_graph(arg))


def _check_no_sharing(nodes: dict, filters: dict) -> None:
    """Raises for a Variable in two arguments of which one is differentiated: neither would have its gradient."""
    seen: dict[int, tuple] = {}
    for number, arg in nodes.items():
        for path, node in nnx.iter_graph(arg):
            if not isinstance(node, nnx.Variable):
                continue
            other, first = seen.setdefault(id(node), (number, path))
            if other != number and (other in filters or number in filters):
                names = ["/".join(map(str, (f"argument {n}", *p))) for n, p in ((other, first), (number, path))]
                raise ValueError(
                    f"value_and_grad: {names[0]} and {names[1]} are one variable, and its gradient cannot be that of "
                    "two arguments; pass the model once"
                )


def _check_nothing_new(nodes: dict, changed: Any) -> None:
    known = {path for path, _ in nnx.to_flat_state(nnx.state(nodes))}
    new = ["/".join(map(str, path[1:])) for path, _ in nnx.to_flat_state(changed) if path not in known]
    if new:
        raise NotImplementedError(
            f"value_and_grad: the loss makes new variables ({', '.join(new)}), as sow does; return the values as aux"
        )


def _in_argument(number: int, chosen: Any) -> Any:
    predicate = nnx.filterlib.to_predicate(chosen)
    return lambda path, value: bool(path) and path[0] == number and predicate(path[1:], value)


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, TableLeaf) else leaf


def _of_argument(number: int, model: Any, gradients: list) -> Any:
    """Returns the State of one argument's gradients."""
    state = nnx.from_flat_state([(path[1:], v) for path, v in gradients if path[0] == number])
    return row_gradients(model, state) if any(isinstance(v, PrefetchedValues) for _, v in gradients) else state


def _gradient(path: Any, variable: Any, gradient: Any) -> Any:
    if isinstance(variable, Table):
        return TableGradient(gradient, table_name=table_name(path[1:], variable))
    return with_value(variable, gradient)
