"""The lookup as one primitive: what JAX's own transformations see of a table with an optimizer.

JAX cannot return a sparse cotangent, so nothing here computes one. A lookup is a primitive for two reasons: it stands
in a traced loss wherever the loss put it, where ``embax.value_and_grad`` finds it (``embax.gradients.walk``); and a
plain ``jax.grad`` that reaches a table meets the rule below, which raises instead of making a gradient of the table's
size, or none.

Operands are ``table, sentinel, *what the form needs``. The sentinel is a float32 scalar that is differentiated wherever
the dense parameters of its model are: it tells on a ``jax.grad`` for which the table itself is a constant.
"""

import functools
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from embax.gradients.forms import Form


class SparseGradientError(TypeError):
    """A derivative that a table with an optimizer of its own cannot have there; the message names the way out."""


def lookup(form: Form, table: jax.Array, sentinel: jax.Array, *operands: jax.Array) -> jax.Array:
    """Returns ``form.gather(table, *operands)``, in a form that ``embax.value_and_grad`` finds."""
    return lookup_p.bind(table, sentinel, *operands, form=form)


def whole(name: str, table: jax.Array, sentinel: jax.Array) -> jax.Array:
    """Returns ``table``, for uses of all its rows that no gradient may flow through."""
    return whole_p.bind(table, sentinel, name=name)


def no_dense_gradient(name: str, shape: tuple[int, ...]) -> SparseGradientError:
    """Returns the error for a plain derivative with respect to a table."""
    return SparseGradientError(
        f'table "{name}" {list(shape)}: a plain jax.grad (nnx.grad, value_and_grad) reached it, and its optimizer '
        "takes row gradients, which those cannot return. Differentiate the loss with embax.value_and_grad (with "
        "embax.nnx.value_and_grad, embax.linen.value_and_grad in Flax), or look up in embax.prefetch(model, ids) "
        "instead of the model. It must stay the embax.Table that init made, not a bare array. To train it densely "
        "leave optimizer= out"
    )


lookup_p = Primitive("embax_lookup")
whole_p = Primitive("embax_whole_table")


def _gather(table, sentinel, *operands, form):
    del sentinel
    return form.gather(table, *operands)


def _identity(table, sentinel, *, name):
    del sentinel, name
    return table


@lookup_p.def_impl
def _lookup_now(*operands, form):
    return _jitted_gather(form)(*operands)


@functools.lru_cache(maxsize=1024)
def _jitted_gather(form):
    return jax.jit(functools.partial(_gather, form=form))


@whole_p.def_impl
def _whole_now(table, sentinel, *, name):
    return table


@lookup_p.def_abstract_eval
def _lookup_shape(*avals, form):
    # Traced, not computed by hand: the result then says what its gather says about shardings and manual axes.
    return jax.make_jaxpr(functools.partial(_gather, form=form))(*avals).out_avals[0]


@whole_p.def_abstract_eval
def _whole_shape(table, sentinel, *, name):
    return table


mlir.register_lowering(lookup_p, mlir.lower_fun(_gather, multiple_results=False))
mlir.register_lowering(whole_p, mlir.lower_fun(_identity, multiple_results=False))


def _lookup_jvp(primals, tangents, *, form):
    table, sentinel, *operands = primals
    if any(not isinstance(tangent, ad.Zero) for tangent in tangents[:2]):
        raise no_dense_gradient(form.name, table.shape)
    out = lookup_p.bind(*primals, form=form)
    gains = tangents[-1]
    if not form.has_gains or isinstance(gains, ad.Zero):
        return out, ad.Zero.from_primal_value(out)  # type: ignore
    # The activations are linear in the gains.
    return out, lookup_p.bind(table, sentinel, *operands[:-1], gains, form=form)


def _lookup_transpose(cotangent, table, sentinel, *operands, form):
    gains = None if isinstance(cotangent, ad.Zero) else form.gains_cotangent(table, *operands[:-1], cotangent)
    return [None] * (1 + len(operands)) + [gains]


def _whole_jvp(primals, tangents, *, name):
    if any(not isinstance(tangent, ad.Zero) for tangent in tangents):
        raise whole_table(name, primals[0].shape, "attend")
    out = whole_p.bind(*primals, name=name)
    return out, ad.Zero.from_primal_value(out)  # type: ignore


def whole_table(name: str, shape: tuple[int, ...], use: str) -> SparseGradientError:
    """Returns the error for a loss that uses more of a table than lookups."""
    return SparseGradientError(
        f'table "{name}" {list(shape)}: the loss uses the whole table in {use}, and its gradient would be as large as '
        "the table. Use the rows you need (attend(query, candidates=ids), a lookup); cast activations, not the table; "
        "put jax.lax.stop_gradient around the table where no gradient is wanted; or leave optimizer= out to train it "
        "densely"
    )


ad.primitive_jvps[lookup_p] = _lookup_jvp
ad.primitive_transposes[lookup_p] = _lookup_transpose
ad.primitive_jvps[whole_p] = _whole_jvp


def _first(array: Any, dim: Any) -> Any:
    """Returns ``array`` without its batch dimension: the first of what is the same throughout."""
    return array if dim is None else jax.lax.index_in_dim(array, 0, dim, keepdims=False)


def _lookup_batching(operands, dims, *, form):
    table, sentinel, *rest = operands
    sentinel = _first(sentinel, dims[1])
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    form, table, rest, out_dim = form.batched(size, (table, *rest), (dims[0], *dims[2:]))
    return lookup_p.bind(table, sentinel, *rest, form=form), out_dim


def _whole_batching(operands, dims, *, name):
    table, sentinel = operands
    return whole_p.bind(table, _first(sentinel, dims[1]), name=name), dims[0]


batching.primitive_batchers[lookup_p] = _lookup_batching
batching.primitive_batchers[whole_p] = _whole_batching
