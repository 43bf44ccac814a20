"""What the transform battery tests: losses behind every transformation, and what differentiating them comes to.

A case says what is expected of three ways to differentiate its loss: ``embax.value_and_grad``; ``embax.prefetch`` and
the plain gradient; the plain gradient alone. ``tests/test_transforms.py`` asserts it, and the table of
``docs/transforms.md`` is made of it: ``python -m tests.transform_cases`` prints the table.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import embax

VOCABULARY, DIM, LAYERS = 8, 2, 2
# Repeated, negative, and out of range on both sides.
IDS = np.array([[3, -1, 3], [0, 9, -8], [5, 8, -9], [7, 3, 5]], np.int32)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What differentiating a loss comes to: ``cell`` in the table; of an error, its type and words in its message."""

    cell: str
    error: type[Exception] | None = None
    words: tuple[str, ...] = ()


def _refused(cell: str, *words: str) -> Outcome:
    return Outcome(cell, embax.SparseGradientError, words)


RIGHT = Outcome("right")
PLAIN = _refused("error", "plain jax.grad", "embax.value_and_grad", "embax.prefetch(model, ids)")
WHOLE = _refused("error: the whole table", "whole table", "candidates", "stop_gradient", "optimizer= out")
ABSENT = _refused("error: the whole table", "only the prefetched rows are here", "candidates")
INSIDE = _refused("error: prefetch", "embax.value_and_grad cannot follow", "embax.prefetch(model, ids)")
COPIES = _refused("error: look up before the `cond`", "vmap of a cond", "embax.prefetch(model, ids)")
LOOP = _refused("error: while_loop", "while_loop", "no reverse mode", "scan")
# What is no matter of tables: JAX says it of dense arrays too.
JAX_LOOP = Outcome(
    "JAX's error: while_loop", ValueError, ("Reverse-mode differentiation does not work for", "while_loop")
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss and what is expected of it.

    Attributes:
      name: the row of the table.
      framework: "jax", "nnx" or "linen".
      problem: returns what is differentiated, an object with ``run(way)``.
      sparse, prefetched, plain: what each of the ways comes to.
      eager: whether it is tried outside of jit too, where it is right; errors always are.
    """

    name: str
    framework: str
    problem: Callable[[], Any]
    sparse: Outcome = RIGHT
    prefetched: Outcome = RIGHT
    plain: Outcome = PLAIN
    eager: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseTable:
    """A plain array that is looked up as a table: the truth."""

    value: Any

    def __getitem__(self, ids):
        return jnp.take(self.value, ids, axis=0)

    def whole(self):
        return self.value


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss over a pytree of parameters.

    Attributes:
      loss: ``loss(params, *args)``.
      params: with embax Tables.
      args: of the loss.
      dense: returns (loss, params) without embax; None for the same loss over DenseTables.
      ids: what is prefetched, given args; None for the first of the args, for every table.
      has_aux: whether the loss returns a pair.
      outer: from ``gradient(params, *args)``, as differentiation returns it, to the function that is compared.
      warm: whether the loss is called before, so that what is jitted in it is in JAX's caches.
    """

    loss: Callable
    params: Any
    args: tuple
    dense: Callable | None = None
    ids: Callable | None = None
    has_aux: bool = False
    outer: Callable = lambda gradient: gradient
    warm: bool = False

    def run(self, way: str, jit: bool) -> Any:
        """Returns value and gradients, row gradients made dense."""
        loss, params = self.loss, self.params
        if way == "dense":
            loss, params = self.dense() if self.dense else (loss, jax.tree.map(_dense, params, is_leaf=is_table))
        elif way == "plain":
            params = jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_table), self._named())
        if self.warm:
            loss(params, *self.args)
        gradient = self.outer(getattr(self, f"_{way}")(loss))

        def compared(params, args):
            return jax.tree.map(densified, gradient(params, *args), is_leaf=is_compared)

        return (compiled(compared) if jit else compared)(params, self.args)

    def names(self) -> list[str]:
        """Returns the names of the tables."""
        leaves = jax.tree.leaves_with_path(self.params, is_leaf=is_table)
        return [t.name or jax.tree_util.keystr(p, simple=True, separator="/") for p, t in leaves if is_table(t)]

    def _named(self) -> list:
        """Returns the leaves, tables named by their paths: a plain gradient has no other way to know."""
        leaves, names = jax.tree.leaves(self.params, is_leaf=is_table), iter(self.names())
        return [leaf.with_value(leaf.value, next(names)) if is_table(leaf) else leaf for leaf in leaves]

    def _dense(self, loss):
        return jax.value_and_grad(loss, has_aux=self.has_aux)

    def _plain(self, loss):
        return jax.value_and_grad(loss, has_aux=self.has_aux)

    def _sparse(self, loss):
        return embax.value_and_grad(loss, has_aux=self.has_aux)

    def _prefetched(self, loss):
        def gradient(params, *args):
            ids = self.ids(*args) if self.ids else args[0]
            small = embax.prefetch(params, dict.fromkeys(self.names(), ids))
            value, gradients = jax.value_and_grad(loss, has_aux=self.has_aux, allow_int=True)(small, *args)
            leaves, structure = jax.tree.flatten(small, is_leaf=is_prefetched)
            rows = [
                leaf.row_gradients(g) if is_prefetched(leaf) else g
                for leaf, g in zip(leaves, structure.flatten_up_to(gradients), strict=True)
            ]
            return value, jax.tree.unflatten(structure, rows)

        return gradient


def compiled(function: Callable) -> Callable:
    """Returns ``jax.jit(function)``, compiled in less time: there are hundreds of small programs."""
    options: dict = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11):
        options["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(function, compiler_options=options)


def is_table(leaf: Any) -> bool:
    return isinstance(leaf, embax.Table)


def is_prefetched(leaf: Any) -> bool:
    return isinstance(leaf, embax.Prefetched)


def is_rows(leaf: Any) -> bool:
    return isinstance(leaf, embax.RowGradients)


def is_compared(leaf: Any) -> bool:
    return isinstance(leaf, (embax.Table, embax.RowGradients, DenseTable))


def densified(leaf: Any) -> Any:
    """Returns a table, or a table's gradient in any form, as a dense array."""
    if is_rows(leaf):
        function = embax.RowGradients.to_dense
        for _ in range(leaf.rows.ndim - 1):
            function = jax.vmap(function)
        return function(leaf)
    return leaf.value if is_compared(leaf) else leaf


def _dense(leaf: Any) -> Any:
    return DenseTable(leaf.value) if is_table(leaf) else leaf


def all_cases() -> list[Case]:
    """Returns every case."""
    from tests.transform_cases_jax import JAX
    from tests.transform_cases_linen import LINEN
    from tests.transform_cases_nnx import NNX
    from tests.transform_cases_outer import OUTER

    return [*JAX, *OUTER, *NNX, *LINEN]


def markdown() -> str:
    """Returns the table of docs/transforms.md."""
    ways = ("sparse", "prefetched", "plain")
    rows = [("", "`embax.value_and_grad`", "`prefetch`, plain gradient", "plain gradient"), ("---",) * 4]
    for case in all_cases():
        cells = [getattr(case, way).cell for way in ways]
        rows.append((f"{TITLES[case.framework]}: {case.name}", *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


TITLES = {"jax": "JAX", "nnx": "NNX", "linen": "Linen"}


if __name__ == "__main__":
    print(markdown(), end="")
