"""A train step in three parts, cut at its lookups and updates: what ``auto_pipelining`` runs of three batches at once.

As JAX traced it, t being the tables in the carry, w all else in it and x the batch::

    a = lookup(x, t)                   lookup part
    g, w, result = dense(a, x, w)      dense part, with all that the update is told (``values``)
    t = update(g, x, t)                update part

Tables are the ``EmbeddingVariables`` of the carry. An update is a ``shard_map`` that reads tables and gives tables of
the new carry, a lookup any other one that reads tables; nothing else may read them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from embax.sparsecore.matmul import EmbeddingVariables

CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
THROUGH = ("sharding_constraint", "reshard", "copy", "copy_p")  # one array in, the same one out


class Part(NamedTuple):
    """Equations of a train step, what they read that is made elsewhere, and what is wanted of them."""

    equations: list[Any]
    inputs: list[Any]
    outputs: list[Any]


class TrainStep:
    """A train step, traced and cut.

    Args:
      function: ``(carry, *args) -> (new carry, *results)``.
      carry: the types of its arrays, as ``jax.typeof`` has them.
      args: likewise.

    Raises:
      ValueError: a step that gives no carry first, has no lookup or no update, or cannot be cut there.

    Attributes:
      carry: the structure of the carry.
      results: the structure of what is given out beside it.
    """

    def __init__(self, function: Callable, carry: Any, args: Sequence[Any]):
        self.name = getattr(function, "__name__", "train_step")
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(carry, *args)
        self.carry, self.results = jax.tree.structure(carry), self._checked(carry, shapes)
        names = _table_names(carry)
        if not any(names):
            raise ValueError(
                f"{self._who}: there are no EmbeddingVariables in its carry; keep tables there as "
                "init_embedding_variables or a SparseCoreEmbed layer gives them"
            )
        invars = list(traced.jaxpr.invars)
        self.carry_vars, self.arg_vars = invars[: len(names)], invars[len(names) :]
        flat = Flat({var: name for var, name in zip(self.carry_vars, names, strict=True) if name})
        outputs = flat.add(traced, invars)
        self.whole, self.consts, self.equations, self.tables = traced.jaxpr, flat.consts, flat.equations, flat.tables
        self.is_table = [bool(name) for name in names]
        self._cut(outputs[: len(names)], outputs[len(names) :])

    @property
    def _who(self) -> str:
        return f"auto_pipelining of {self.name!r}"

    def _checked(self, carry: Any, shapes: Any) -> Any:
        """Returns the structure of the results."""
        if not isinstance(shapes, tuple) or not shapes or hasattr(shapes, "_fields"):
            raise ValueError(
                f"{self._who}: the train step returns {type(shapes).__name__}; return a tuple, the new carry first"
            )
        if jax.tree.structure(shapes[0]) != jax.tree.structure(carry):
            raise ValueError(
                f"{self._who}: the new carry has the structure {jax.tree.structure(shapes[0])}, and the carry "
                f"{jax.tree.structure(carry)}; return the new carry first, in the structure of the old one"
            )
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(carry)[0]]
        for path, old, new in zip(paths, jax.tree.leaves(carry), jax.tree.leaves(shapes[0]), strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"{self._who}: carry{path} is {old.dtype}{list(old.shape)}, and {new.dtype}{list(new.shape)} in "
                    "the new carry; it must keep its shape and dtype"
                )
        return jax.tree.structure(tuple(shapes[1:]))

    def _cut(self, new_carry: list[Any], results: list[Any]) -> None:
        made = {var: equation for equation in self.equations for var in equation.outvars}
        updates = self._updates(new_carry, made)
        lookups = self._lookups(updates)
        for equation in self.equations:  # what is done to updated tables after the update belongs to it
            if equation.primitive.name in THROUGH and any(v in self.updated for v in _variables(equation.invars)):
                self.updated.update(equation.outvars)
                updates.add(id(equation))
        passing = {id(e) for e in self.equations if self._passes(e)}
        tables = [var for var, is_table in zip(new_carry, self.is_table, strict=True) if is_table]
        self.update_part = self._part(tables, lambda e: id(e) in updates | passing)
        self.values = [v for v in self.update_part.inputs if v not in self.tables and v not in self.consts]
        dense = [var for var, is_table in zip(new_carry, self.is_table, strict=True) if not is_table]
        apart = updates | lookups | passing
        self.dense_part = self._part([*self.values, *dense, *results], lambda e: id(e) not in apart, effects=True)
        self._check_dense()
        self.activations = [v for v in self.dense_part.inputs if v in made]
        self.lookup_part = self._part(self.activations, lambda e: id(e) not in updates)
        self._check_lookups([e for e in self.lookup_part.equations if id(e) in lookups], lookups | updates | passing)

    def _updates(self, new_carry: list[Any], made: dict) -> set[int]:
        """Returns the updates, and notes what they give."""
        found, self.updated = set(), set()
        names = [self.tables.get(var) for var in self.carry_vars]
        for var, name in zip(new_carry, names, strict=True):
            if name is None:
                continue
            while var in made and made[var].primitive.name in THROUGH:
                var = made[var].invars[0]
            if isinstance(var, core.Var) and var in self.tables:
                continue  # as it was
            equation = made.get(var) if isinstance(var, core.Var) else None
            if equation is None or equation.primitive.name != "shard_map" or not self._reads(equation):
                what = "nothing" if equation is None else f"`{equation.primitive.name}`"
                raise ValueError(
                    f"{self._who}: the new carry{name} comes from {what}, and not from a shard_map that reads the old "
                    "one; look every table up once, update it once, inside of jax.shard_map, and change nothing after"
                )
            found.add(id(equation))
            self.updated.update(equation.outvars)
        if not found:
            raise ValueError(f"{self._who}: no table is updated; return the updated tables in the new carry")
        return found

    def _lookups(self, updates: set[int]) -> set[int]:
        """Returns the lookups."""
        found = set()
        for equation in self.equations:
            names = self._reads(equation)
            if not names or id(equation) in updates or self._passes(equation):
                continue
            if equation.primitive.name != "shard_map":
                raise ValueError(
                    f"{self._who}: carry{names[0]} is read by `{equation.primitive.name}`; only a lookup and an update "
                    "may read tables, each inside of a jax.shard_map of its own (a mesh of one device will do), not "
                    "inside of cond, while or scan"
                )
            found.add(id(equation))
        return found

    def _check_dense(self) -> None:
        for var in self.dense_part.inputs:
            if var in self.updated:
                raise ValueError(
                    f"{self._who}: something beside the new carry is made of updated tables, which in a pipeline are "
                    "not there yet; read them from the carry between steps"
                )
            if var in self.tables:
                raise ValueError(
                    f"{self._who}: carry{self.tables[var]} is given out beside its place in the new carry; read it "
                    "from the carry between steps"
                )
        if not any(var in equation.outvars for var in self.dense_part.inputs for equation in self.equations):
            raise ValueError(
                f"{self._who}: no lookup is used: no shard_map reads the carry's tables for the dense part; call "
                "tpu_sparse_dense_matmul inside of jax.shard_map, or a SparseCoreEmbed layer"
            )

    def _check_lookups(self, lookups: list[Any], marked: set[int]) -> None:
        paths = dict(zip(self.carry_vars, jax.tree_util.tree_flatten_with_path(self._numbered())[0], strict=True))
        for lookup in lookups:
            own = self._part(
                [v for v in _variables(lookup.invars) if v not in self.tables], lambda e: id(e) not in marked
            )
            for var in own.inputs:
                if var in self.updated or any(var in other.outvars for other in lookups):
                    raise ValueError(
                        f"{self._who}: the lookup of carry{self._reads(lookup)[0]} depends on another lookup or update "
                        "of the same step; all lookups of a step must be ready at once: feed them from the batch"
                    )
                if var in paths:
                    raise ValueError(
                        f"{self._who}: the lookup of carry{self._reads(lookup)[0]} depends on "
                        f"carry{jax.tree_util.keystr(paths[var][0])}, which is not that old yet when the batch is "
                        "looked up; pass it with the batch"
                    )

    def _numbered(self) -> Any:
        return jax.tree.unflatten(self.carry, range(len(self.carry_vars)))

    def _passes(self, equation: Any) -> bool:
        return equation.primitive.name in THROUGH and bool(self._reads(equation))

    def _reads(self, equation: Any) -> list[str]:
        """Returns the names of the tables that an equation reads."""
        return [self.tables[var] for var in _variables(equation.invars) if var in self.tables]

    def _part(self, wanted: Sequence[Any], belongs: Callable, effects: bool = False) -> Part:
        """Returns what ``wanted`` needs of the equations that belong; ``effects`` with those that have any, too."""
        needed, taken = dict.fromkeys(_variables(wanted)), []
        for equation in reversed(self.equations):
            if belongs(equation) and ((effects and equation.effects) or any(v in needed for v in equation.outvars)):
                taken.append(equation)
                needed.update(dict.fromkeys(_variables(equation.invars)))
        made = {var for equation in taken for var in equation.outvars}
        return Part(taken[::-1], [var for var in needed if var not in made], list(wanted))

    def _run(self, part: Part, known: dict[Any, Any]) -> list[Any]:
        known = {**self.consts, **known}
        effects = frozenset().union(*(equation.effects for equation in part.equations))
        program = self.whole.replace(
            constvars=[], invars=part.inputs, outvars=part.outputs, eqns=part.equations, effects=effects
        )
        return core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))(*(known[var] for var in part.inputs))

    def lookup(self, carry: Any, args: Any) -> list[Any]:
        """Returns the activations of a batch."""
        return self._run(self.lookup_part, self._known(carry, args))

    def dense(self, activations: list[Any], carry: Any, args: Any) -> tuple[list[Any], Any, tuple]:
        """Returns (what the update of this batch is told, the carry with its tables as they were, the results)."""
        known = self._known(carry, args)
        made = iter(self._run(self.dense_part, {**known, **dict(zip(self.activations, activations, strict=True))}))
        values = [next(made) for _ in self.values]
        old = [known[var] for var in self.carry_vars]
        new = [leaf if is_table else next(made) for leaf, is_table in zip(old, self.is_table, strict=True)]
        return values, jax.tree.unflatten(self.carry, new), jax.tree.unflatten(self.results, list(made))

    def update(self, values: list[Any], carry: Any) -> Any:
        """Returns the carry with its tables updated."""
        leaves = jax.tree.leaves(carry)
        known = {**dict(zip(self.carry_vars, leaves, strict=True)), **dict(zip(self.values, values, strict=True))}
        made = iter(self._run(self.update_part, known))
        new = [next(made) if is_table else leaf for leaf, is_table in zip(leaves, self.is_table, strict=True)]
        return jax.tree.unflatten(self.carry, new)

    def no_results(self) -> tuple:
        """Returns results of which none is there yet: None everywhere."""
        return jax.tree.unflatten(self.results, [None] * self.results.num_leaves)

    def _known(self, carry: Any, args: Any) -> dict[Any, Any]:
        leaves = [*jax.tree.leaves(carry), *jax.tree.leaves(args)]
        return dict(zip([*self.carry_vars, *self.arg_vars], leaves, strict=True))


class Flat:
    """Equations in one list: calls that read tables are written out, every variable is made once.

    Args:
      tables: names of the variables that hold tables.
    """

    def __init__(self, tables: dict[Any, str]):
        self.tables, self.equations, self.consts = tables, [], {}

    def add(self, closed: Any, arguments: Sequence[Any]) -> list[Any]:
        """Appends a program's equations, for these arguments; returns what its outputs are called."""
        names = dict(zip(closed.jaxpr.invars, arguments, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            names[var] = core.Var(var.aval)
            self.consts[names[var]] = value

        def name(var: Any) -> Any:
            return names[var] if isinstance(var, core.Var) else var

        for equation in closed.jaxpr.eqns:
            inputs = [name(var) for var in equation.invars]
            held = [self.tables[var] for var in _variables(inputs) if var in self.tables]
            if held and equation.primitive.name in CALLS:
                outputs = self.add(_body(equation), inputs)
            else:
                outputs = [core.Var(var.aval) for var in equation.outvars]
                self.equations.append(equation.replace(invars=inputs, outvars=outputs))
                if held and equation.primitive.name in THROUGH:
                    self.tables[outputs[0]] = held[0]
            names.update(zip(equation.outvars, outputs, strict=True))
        return [name(var) for var in closed.jaxpr.outvars]


def _body(equation: Any) -> Any:
    body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return body if hasattr(body, "consts") and hasattr(body, "jaxpr") else core.ClosedJaxpr(body, ())


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def _table_names(carry: Any) -> list[str]:
    """Returns the path of each leaf that is a table's or a slot variable's; nothing for the others."""
    found = []
    for path, node in jax.tree_util.tree_flatten_with_path(carry, is_leaf=_is_variables)[0]:
        parts = jax.tree_util.tree_flatten_with_path(node)[0]
        found += [jax.tree_util.keystr((*path, *own)) if _is_variables(node) else "" for own, _ in parts]
    return found


def _is_variables(node: Any) -> bool:
    return isinstance(node, EmbeddingVariables)
