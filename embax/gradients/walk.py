"""Reads a traced loss again, with a tap at every lookup of a followed table.

``walk`` interprets a jaxpr as JAX would, except for the followed tables. Such a table never enters an equation as an
array: it is a ``TableRef``, and each lookup that meets one becomes a gather from the root table whose cotangent goes
to a *tap*, an input of the activations' shape, and a *record* of the rows that were read, which goes out. A table that
jit, checkpoint, scan, cond or while hands to its body is followed inside; in a scan over layers the layer's table is
the root at an offset, taps are scanned over and records stacked. Any other use of a followed table raises: no gradient
is ever lost without a word.

Taps and records have one nested structure: a list with an item for every equation that reads a table.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Literal

from embax.gradients.primitive import SparseGradientError, lookup_p, whole_p, whole_table


@dataclasses.dataclass(frozen=True)
class Root:
    """A followed table: its name for errors, and its rows ``[total, D]``."""

    name: str
    rows: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class TableRef:
    """A followed table where an array would stand: ``shape`` ``[b..., V, D]``, beginning at ``offset`` in the root."""

    root: int
    shape: tuple[int, ...]
    offset: Any = 0

    def same(self, other: Any) -> bool:
        """Returns whether both are the same rows for certain."""
        return (
            isinstance(other, TableRef)
            and self.root == other.root
            and self.shape == other.shape
            and (self.offset is other.offset)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What one lookup read.

    Attributes:
      rows, samples, gains: ``Form.occurrences``; absent rows are the root's total.
      token: one activation, for the order of lookup and update.
      activations: while measuring the activations themselves, whose shapes the taps take; else None.
      root: which table (static).
    """

    rows: Any
    samples: Any
    gains: Any
    token: Any
    activations: Any
    root: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Walk:
    """A reading of one loss: the followed tables, and what to do where an equation meets one.

    Attributes:
      roots: the tables.
      rules: by the name of an equation's primitive: ``embax.gradients.rules``.
      tick: a scalar, inside of loops that have no reverse mode; else None.
    """

    roots: tuple[Root, ...]
    rules: Mapping[str, Callable]
    tick: Any = None

    def run(self, jaxpr: Any, args: list, taps: list | None) -> tuple[list, list]:
        """Returns the values of ``jaxpr`` at ``args`` (arrays and TableRefs), and the records.

        Args:
          jaxpr: closed.
          args: for its inputs.
          taps: in the structure of the records; None to measure, or inside of a while loop.
        """
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        env.update(zip(jaxpr.jaxpr.invars, args, strict=True))
        remaining, records = iter(taps or ()), []
        made_of: dict[Any, tuple] = {}  # arrays computed from a whole table, and how: looked up, they have no rows
        for eqn in jaxpr.jaxpr.eqns:
            values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            if any(isinstance(value, TableRef) for value in values):
                rule = self.rules.get(eqn.primitive.name, self.rules["otherwise"])
                outs, record = rule(self, eqn, values, None if taps is None else next(remaining))
                records.append(record)
                if rule is self.rules["otherwise"]:
                    ref = next(value for value in values if isinstance(value, TableRef))
                    made_of.update((v, (self.name(ref), ref.shape, use_of(eqn))) for v in eqn.outvars)
            else:
                sources = [made_of[v] for v in eqn.invars if not isinstance(v, Literal) and v in made_of]
                if sources and eqn.primitive is lookup_p:
                    raise whole_table(*sources[0])
                made_of.update((v, sources[0]) for v in eqn.outvars if sources)
                outs = bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.jaxpr.outvars], records

    def array(self, ref: TableRef) -> jax.Array:
        """Returns the rows of ``ref`` as an array of its shape."""
        rows = self.roots[ref.root].rows
        count = math.prod(ref.shape[:-1])
        if count != rows.shape[0]:
            rows = jax.lax.dynamic_slice_in_dim(rows, ref.offset, count)
        return rows.reshape(ref.shape)

    def name(self, ref: TableRef) -> str:
        """Returns the table's name."""
        return self.roots[ref.root].name

    def refused(self, eqn: Any, ref: TableRef) -> SparseGradientError | None:
        """Returns the error for an equation into which ``ref`` cannot be followed; None if its rows may be used."""
        primitive = eqn.primitive.name
        if any(hasattr(p, "eqns") or hasattr(p, "jaxpr") for p in eqn.params.values()):
            return SparseGradientError(
                f'table "{self.name(ref)}" {list(ref.shape)}: it is looked up inside of {primitive}, into which '
                "embax.value_and_grad cannot follow it. Gather its rows before: embax.prefetch(model, ids) makes a "
                "model whose lookups work everywhere"
            )
        if primitive in ("broadcast_in_dim", "select_n"):
            return SparseGradientError(
                f'table "{self.name(ref)}" {list(ref.shape)}: "{primitive}" would make copies of it. vmap of a cond '
                "whose condition differs from entry to entry does so: look up before the cond, or in "
                "embax.prefetch(model, ids), whose copies are small"
            )
        return None


def use_of(eqn: Any) -> str:
    """Returns how an equation uses a whole table, in words."""
    return "attend" if eqn.primitive is whole_p else f'an operation "{eqn.primitive.name}"'


def bind(eqn: Any, values: list) -> list:
    """Returns the outputs of an equation at ``values``, as JAX computes them."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


class Hidden:
    """Values with their TableRefs taken out, for JAX functions that take arrays only."""

    def __init__(self, values: list):
        self.values = list(values)
        self.arrays = [value for value in values if not isinstance(value, TableRef)]

    def fill(self, arrays: list, refs: list | None = None) -> list:
        """Returns ``arrays`` with the refs back in their places (or those in ``refs``)."""
        remaining = iter(arrays)
        refs = self.values if refs is None else refs
        return [
            ref if isinstance(value, TableRef) else next(remaining)
            for value, ref in zip(self.values, refs, strict=True)
        ]
