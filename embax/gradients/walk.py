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
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core import primitives as jax_primitives

from embax.gradients.forms import Form
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
    """A reading of one loss: the followed tables, and ``tick`` inside of loops that have no reverse mode."""

    roots: tuple[Root, ...]
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
        for eqn in jaxpr.jaxpr.eqns:
            values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            if any(isinstance(value, TableRef) for value in values):
                rule = _RULES.get(eqn.primitive)
                if rule is None:
                    raise self._refused(eqn, values)
                outs, record = rule(self, eqn, values, None if taps is None else next(remaining))
                records.append(record)
            else:
                outs = _bind(eqn, values)
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

    def _refused(self, eqn: Any, values: list) -> SparseGradientError:
        ref = next(value for value in values if isinstance(value, TableRef))
        primitive = eqn.primitive.name
        if eqn.primitive is whole_p:
            return whole_table(self.name(ref), ref.shape, "attend")
        if any(hasattr(p, "eqns") or hasattr(p, "jaxpr") for p in eqn.params.values()):
            return SparseGradientError(
                f'table "{self.name(ref)}" {list(ref.shape)}: it is looked up inside of {primitive}, into which '
                "embax.value_and_grad cannot follow it. Gather its rows before: embax.prefetch(model, ids) makes a "
                "model whose lookups work everywhere"
            )
        return whole_table(self.name(ref), ref.shape, f'an operation "{primitive}"')


def _bind(eqn: Any, values: list) -> list:
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _lookup(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    ref, _, *operands = values
    if not isinstance(ref, TableRef):
        raise walk._refused(eqn, values)
    rows = walk.roots[ref.root].rows
    form, operands = eqn.params["form"].located(ref.shape, ref.offset, rows.shape[0], operands)
    if walk.tick is not None:
        return [_ticked(form.gather(rows, *operands), walk.tick)], []
    activations: Any = form.gather(rows, *operands) if tap is None else _tapped(form, rows, tap, operands)
    token = jnp.ravel(activations)[:1].astype(jnp.float32)
    places, samples, gains = form.occurrences(operands)
    return [activations], Record(places, samples, gains, token, activations if tap is None else None, ref.root)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(form: Form, rows: jax.Array, tap: jax.Array, operands: list) -> jax.Array:
    return form.gather(rows, *operands)


def _tapped_forward(form, rows, tap, operands):
    wants_gains = form.has_gains and operands[-1].perturbed
    rows, operands = rows.value, [x.value for x in operands]
    return form.gather(rows, *operands), (rows, operands) if wants_gains else None


def _tapped_backward(form, kept, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    if kept is None:
        return None, cotangent, None
    rows, operands = kept
    nothing = [None] * (len(operands) - 1)
    return None, cotangent, [*nothing, form.gains_cotangent(rows, *operands[:-1], cotangent)]


_tapped.defvjp(_tapped_forward, _tapped_backward, symbolic_zeros=True)


@jax.custom_jvp
def _ticked(activations: jax.Array, tick: jax.Array) -> jax.Array:
    """Returns ``activations``, differentiable where ``tick`` is: so JAX itself says that a loop has no reverse mode."""
    return activations


@_ticked.defjvp
def _ticked_jvp(primals, tangents):
    activations, _ = primals
    tangent, tick = tangents
    return activations, tangent + (0 * tick).astype(activations.dtype)


def _whole(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    raise walk._refused(eqn, values)


def _stop_gradient(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    return [walk.array(values[0])], []


def _jit(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    return walk.run(eqn.params["jaxpr"], values, tap)


def _checkpoint(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    hidden, jaxpr = _Hidden(values), _closed(eqn.params["jaxpr"])
    outer: list[_Hidden] = []

    def body(arrays, tap):
        outs, records = walk.run(jaxpr, hidden.fill(arrays), tap)
        outer.append(_Hidden(outs))
        return outer[-1].arrays, records

    wrapped = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    arrays, records = wrapped(hidden.arrays, tap)
    return outer[-1].fill(arrays), records


def _scan(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    params = eqn.params
    consts, carry, xs = _split_scan(params, values)
    length, jaxpr = params["length"], params["jaxpr"]
    carried, scanned = _Hidden(carry), _Hidden(xs)
    layout: list[_Hidden] = []

    def body(arrays, x):
        index, x_arrays, tap = x
        slices = [_layer(walk, ref, length, index) if isinstance(ref, TableRef) else None for ref in xs]
        x_values = scanned.fill(x_arrays, slices)
        outs, records = walk.run(jaxpr, [*consts, *carried.fill(arrays), *x_values], tap)
        carry_out, ys = outs[: len(carry)], outs[len(carry) :]
        for before, after in zip(carry, carry_out, strict=True):
            if isinstance(before, TableRef) != isinstance(after, TableRef) or (
                isinstance(before, TableRef) and not before.same(after)
            ):
                raise _moved(walk, before if isinstance(before, TableRef) else after, "scan")
        origins = [next((r for r, s in zip(xs, slices, strict=True) if s is not None and s.same(y)), y) for y in ys]
        if any(y is o for y, o in zip(ys, origins, strict=True) if isinstance(y, TableRef)):
            raise _moved(walk, next(y for y in ys if isinstance(y, TableRef)), "scan")
        layout.append(_Hidden(origins))
        return _Hidden(carry_out).arrays, (_Hidden(ys).arrays, records)

    indices = jnp.arange(length, dtype=jnp.int32)
    unroll = params["unroll"]
    extra: dict = {"_split_transpose": True} if params.get("_split_transpose") else {}
    final, (stacked, records) = jax.lax.scan(
        body, carried.arrays, (indices, scanned.arrays, tap), length, params["reverse"], unroll, **extra
    )
    return carried.fill(final) + layout[-1].fill(stacked), records


def _layer(walk: Walk, ref: TableRef, length: int, index: jax.Array) -> TableRef:
    """Returns the table of iteration ``index`` of a scan over a table with a leading axis."""
    if len(ref.shape) < 3 or ref.shape[0] != length:
        raise whole_table(walk.name(ref), ref.shape, "a scan over its rows")
    return TableRef(ref.root, ref.shape[1:], ref.offset + index * math.prod(ref.shape[1:-1]))


def _cond(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    index, *operands = values
    hidden, branches = _Hidden(operands), eqn.params["branches"]
    layouts: dict[int, _Hidden] = {}

    def branch(number, arrays, tap):
        outs, records = walk.run(branches[number], hidden.fill(arrays), tap)
        layouts[number] = _Hidden(outs)
        return layouts[number].arrays, records

    taps = [None] * len(branches) if tap is None else tap
    sizes = [jax.eval_shape(functools.partial(branch, n), hidden.arrays, t)[1] for n, t in enumerate(taps)]

    def padded(number, arrays, taps):
        outs, records = branch(number, arrays, taps[number])
        return outs, [records if n == number else _absent(walk, size) for n, size in enumerate(sizes)]

    outs, records = jax.lax.switch(
        index, [functools.partial(padded, n) for n in range(len(branches))], hidden.arrays, taps
    )
    for other in layouts.values():
        for mine, theirs in zip(layouts[0].values, other.values, strict=True):
            if isinstance(mine, TableRef) != isinstance(theirs, TableRef) or (
                isinstance(mine, TableRef) and not mine.same(theirs)
            ):
                raise _moved(walk, mine if isinstance(mine, TableRef) else theirs, "cond")
    return layouts[0].fill(outs), records


def _absent(walk: Walk, records: Any) -> Any:
    """Returns records of these shapes in which nothing was read: those of a branch that is not taken."""

    def empty(record: Record) -> Record:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), record)
        rows = jnp.full(record.rows.shape, walk.roots[record.root].rows.shape[0], jnp.int32)
        return dataclasses.replace(zeros, rows=rows)

    return jax.tree.map(empty, records, is_leaf=lambda x: isinstance(x, Record))


def _while(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    params = eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = values[:first], values[first:second], values[second:]
    carried = _Hidden(carry)
    ref = next(value for value in values if isinstance(value, TableRef))
    # No reverse mode, hence no tap for each lookup: one scalar stands for all, and JAX complains if it matters.
    tick = jnp.float32(0) if tap is None else tap
    loop = dataclasses.replace(walk, tick=tick if walk.tick is None else walk.tick)

    def cond(arrays):
        return loop.run(params["cond_jaxpr"], [*cond_consts, *carried.fill(arrays)], None)[0][0]

    def body(arrays):
        outs, _ = loop.run(params["body_jaxpr"], [*body_consts, *carried.fill(arrays)], None)
        for before, after in zip(carry, outs, strict=True):
            if isinstance(before, TableRef) and not before.same(after):
                raise _moved(walk, before, "while")
        return _Hidden(outs).arrays

    final = jax.lax.while_loop(cond, body, carried.arrays)
    nothing = jnp.zeros(0, jnp.int32)
    record = Record(nothing, None, None, jnp.zeros(1, jnp.float32), tick if tap is None else None, ref.root)
    return carried.fill(final), record if walk.tick is None else []


def _moved(walk: Walk, ref: TableRef, primitive: str) -> SparseGradientError:
    return SparseGradientError(
        f'table "{walk.name(ref)}" {list(ref.shape)}: {primitive} changes or copies it from one iteration or branch to '
        "the next; a table may be looked up there, and handed on as it is"
    )


class _Hidden:
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


def _closed(jaxpr: Any) -> Any:
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())


def _split_scan(params: Any, values: list) -> tuple[list, list, list]:
    """Returns (constants, carry, scanned-over) of a scan's operands."""
    if "ft_in" in params:  # jax 0.11 and later
        sizes = [len(part) for part in params["ft_in"].unpack()]
    else:
        sizes = [params["num_consts"], params["num_carry"]]
        sizes.append(len(values) - sum(sizes))
    remaining = iter(values)
    consts, carry, xs = (list(itertools.islice(remaining, size)) for size in sizes)
    return consts, carry, xs


_RULES = {
    lookup_p: _lookup,
    whole_p: _whole,
    jax_primitives.stop_gradient_p: _stop_gradient,
    jax_primitives.jit_p: _jit,
    jax_primitives.remat_p: _checkpoint,
    jax_primitives.scan_p: _scan,
    jax_primitives.cond_p: _cond,
    jax_primitives.while_p: _while,
}
