"""What the walk does where a table is handed to a lookup, or to a program within the program.

A rule takes the walk, the equation, its operands (TableRefs among them) and its part of the taps, and returns the
outputs and its part of the records. Operands that are TableRefs are hidden from JAX and put back inside of the body,
which JAX's own function makes a program of again: its derivative, its batching and its compilation are JAX's.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.extend.core import primitives as jax_primitives
from jax.sharding import PartitionSpec

from embax.gradients.forms import Form
from embax.gradients.primitive import SparseGradientError, lookup_p, whole_p, whole_table
from embax.gradients.walk import Hidden, Record, TableRef, Walk, bind, use_of


def _lookup(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    ref, _, *operands = values
    rows = walk.roots[ref.root].rows
    form, operands = eqn.params["form"].located(ref.shape, ref.offset, rows.shape[0], operands)
    if walk.tick is not None:
        return [_ticked(form.gather(rows, *operands), walk.tick)], []
    activations: Any = form.gather(rows, *operands) if tap is None else _tapped(form, rows, tap, operands)
    token = form.token(activations).astype(jnp.float32)
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


def _otherwise(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    """All rows are used: computed as it is, for what no gradient flows through; where one does, it raises.

    One scalar stands for the tap; a derivative that reaches it is one with respect to the whole table.
    """
    ref = next(value for value in values if isinstance(value, TableRef))
    refused = walk.refused(eqn, ref)
    if refused is not None:
        raise refused
    tick = _tick(walk, tap)
    arrays = [
        _guarded((walk.name(v), v.shape, use_of(eqn)), walk.array(v), tick) if isinstance(v, TableRef) else v
        for v in values
    ]
    # attend's own mark has done its work here.
    outs = arrays[:1] if eqn.primitive is whole_p else bind(eqn, arrays)
    return outs, _tick_record(walk, ref, tick, tap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(use: tuple, array: jax.Array, tick: jax.Array) -> jax.Array:
    return array


def _guarded_forward(use, array, tick):
    return array.value, None


def _guarded_backward(use, kept, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None
    raise whole_table(*use)


_guarded.defvjp(_guarded_forward, _guarded_backward, symbolic_zeros=True)


def _tick(walk: Walk, tap: Any) -> Any:
    if walk.tick is not None:
        return walk.tick
    return jnp.float32(0) if tap is None else tap


def _tick_record(walk: Walk, ref: TableRef, tick: Any, tap: Any) -> Any:
    """Returns the record of a use that has no rows, only a tick; none inside of a loop, whose tick has one already."""
    if walk.tick is not None:
        return []
    nothing = jnp.zeros(0, jnp.int32)
    return Record(nothing, None, None, jnp.zeros(1, jnp.float32), tick if tap is None else None, ref.root)


def _stop_gradient(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    return [walk.array(values[0])], []


def _jit(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    return walk.run(eqn.params["jaxpr"], values, tap)


def _checkpoint(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    hidden, jaxpr = Hidden(values), _closed(eqn.params["jaxpr"])
    outer: list[Hidden] = []

    def body(arrays, tap):
        outs, records = walk.run(jaxpr, hidden.fill(arrays), tap)
        outer.append(Hidden(outs))
        return outer[-1].arrays, records

    wrapped = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    arrays, records = wrapped(hidden.arrays, tap)
    return outer[-1].fill(arrays), records


def _scan(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    params = eqn.params
    consts, carry, xs = _split_scan(params, values)
    length, jaxpr = params["length"], params["jaxpr"]
    carried, scanned = Hidden(carry), Hidden(xs)
    layout: list[Hidden] = []

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
        layout.append(Hidden(origins))
        return Hidden(carry_out).arrays, (Hidden(ys).arrays, records)

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
    hidden, branches = Hidden(operands), eqn.params["branches"]
    layouts: dict[int, Hidden] = {}

    def branch(number, arrays, tap):
        outs, records = walk.run(branches[number], hidden.fill(arrays), tap)
        layouts[number] = Hidden(outs)
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
    carried = Hidden(carry)
    ref = next(value for value in values if isinstance(value, TableRef))
    # No reverse mode, hence no tap for each lookup: one scalar stands for all, and JAX complains if it matters.
    tick = _tick(walk, tap)
    loop = dataclasses.replace(walk, tick=tick)

    def cond(arrays):
        return loop.run(params["cond_jaxpr"], [*cond_consts, *carried.fill(arrays)], None)[0][0]

    def body(arrays):
        outs, _ = loop.run(params["body_jaxpr"], [*body_consts, *carried.fill(arrays)], None)
        for before, after in zip(carry, outs, strict=True):
            if isinstance(before, TableRef) and not before.same(after):
                raise _moved(walk, before, "while")
        return Hidden(outs).arrays

    final = jax.lax.while_loop(cond, body, carried.arrays)
    return carried.fill(final), _tick_record(walk, ref, tick, tap)


def _shard_map(walk: Walk, eqn: Any, values: list, tap: Any) -> tuple[list, Any]:
    """Tables are whole on every device; records and taps of the devices stand in a leading axis, one after another."""
    params, hidden, whole = eqn.params, Hidden(values), PartitionSpec()
    _check_replicated(walk, values, params["in_specs"])
    axes = tuple(name for name in params["mesh"].axis_names if name in params["newly_manual_axes"])
    in_specs = [spec for v, spec in zip(values, params["in_specs"], strict=True) if not isinstance(v, TableRef)]
    refs = [value for value in values if isinstance(value, TableRef)]
    rows = {ref.root: walk.roots[ref.root].rows for ref in refs}
    offsets = [jnp.asarray(ref.offset, jnp.int32) for ref in refs]
    seen: list[tuple[Hidden, Any]] = []

    def body(arrays, rows, offsets, tap):
        roots = tuple(
            dataclasses.replace(root, rows=rows[n]) if n in rows else root for n, root in enumerate(walk.roots)
        )
        inner = [dataclasses.replace(ref, offset=offset) for ref, offset in zip(refs, offsets, strict=True)]
        remaining = iter(inner)
        places = [next(remaining) if isinstance(value, TableRef) else value for value in values]
        inside = dataclasses.replace(walk, roots=roots)
        taps = jax.tree.map(lambda leaf: leaf[0], tap)
        outs, records = inside.run(_closed(params["jaxpr"]), hidden.fill(arrays, places), taps)
        outer = dict(zip(map(id, inner), refs, strict=True))
        specs = jax.tree.map(lambda r: _device_axes(r, axes, params["check_vma"]), records, is_leaf=_is_record)
        seen.append((Hidden([outer.get(id(out), out) for out in outs]), specs))
        return Hidden(outs).arrays, jax.tree.map(lambda leaf: leaf[None], records)

    def probe(*operands):
        body(*operands, tap=None)
        return jnp.float32(0)

    settings: Any = {"mesh": params["mesh"], "axis_names": set(axes), "check_vma": params["check_vma"]}
    operands = (hidden.arrays, rows, offsets)
    jax.eval_shape(jax.shard_map(probe, in_specs=(in_specs, whole, whole), out_specs=whole, **settings), *operands)
    layout, specs = seen[-1]
    out_specs = [s for v, s in zip(layout.values, params["out_specs"], strict=True) if not isinstance(v, TableRef)]
    mapped = jax.shard_map(
        body,
        in_specs=(in_specs, whole, whole, None if tap is None else specs),
        out_specs=(out_specs, specs),
        **settings,
    )
    arrays, records = mapped(*operands, tap)
    return layout.fill(arrays), records


def _check_replicated(walk: Walk, values: list, specs: Any) -> None:
    for value, spec in zip(values, specs, strict=True):
        if isinstance(value, TableRef) and any(part is not None for part in spec):
            raise SparseGradientError(
                f'table "{walk.name(value)}" {list(value.shape)}: shard_map splits it by {spec}, and a table that is '
                "looked up inside of the loss must be whole on every device: in_specs=PartitionSpec() for it"
            )


def _device_axes(record: Record, axes: tuple[str, ...], checked: bool) -> PartitionSpec:
    """Returns the leading axis of a record: over the devices that looked up ids of their own."""
    if checked:  # what is the same on all devices along an axis is one lookup
        varying = jax.typeof(record.token).manual_axis_type.varying
        axes = tuple(name for name in axes if name in varying)
    return PartitionSpec(axes) if axes else PartitionSpec()


def _is_record(node: Any) -> bool:
    return isinstance(node, Record)


def _moved(walk: Walk, ref: TableRef, primitive: str) -> SparseGradientError:
    return SparseGradientError(
        f'table "{walk.name(ref)}" {list(ref.shape)}: {primitive} changes or copies it from one iteration or branch to '
        "the next; a table may be looked up there, and handed on as it is"
    )


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


RULES = {
    lookup_p.name: _lookup,
    jax_primitives.stop_gradient_p.name: _stop_gradient,
    jax_primitives.jit_p.name: _jit,
    jax_primitives.remat_p.name: _checkpoint,
    jax_primitives.scan_p.name: _scan,
    jax_primitives.cond_p.name: _cond,
    jax_primitives.while_p.name: _while,
    "otherwise": _otherwise,
    "shard_map": _shard_map,  # pmap too, which is one
}
