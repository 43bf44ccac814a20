"""Rows of 8 or 4 bits a number, for lookups: each row has a scale and a bias of its own.

Law: ``row = scale * codes + bias`` with ``bias = min(row)``, ``scale = (max(row) - min(row)) / (2**bits - 1)`` and
``codes = round((row - bias) / scale)``, half to even; all in float32. So no number moves by more than half a scale, but
for float32's own rounding, and rows of one repeated number come back exactly. A row that holds a NaN or an infinity, or
spans more than float32 can hold, becomes a row of NaN: it shows up where it is looked up, and nowhere else.

Codes, scale and bias of a row lie together, so that a lookup waits for one place of memory (csrc/quantized.h says how,
and holds the native lookup). The formula is the row-wise uniform one of Guan et al., "Post-training 4-bit quantization
on embedding tables", https://arxiv.org/abs/1911.02079, without a search for the range.

On a mesh each device encodes the rows that it has, and nobody gathers a table. Columns that are split over devices
stand behind a header on each of them, which is that of the whole row: the numbers are those of one device.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax import kernels
from embax.exchange import over_mesh
from embax.id_batch import StackIds
from embax.kernels import calls
from embax.kernels.reference import pool_in_order, present_rows, quantize, sample_of_ids
from embax.placement import Devices
from embax.planning import Plan, StackPlan
from embax.sharded_tables import table_spec
from embax.sorted_rows import varying_axes, varying_with
from embax.specs import TABLE_DTYPES, QuantizationConfig
from embax.table_state import TableState, check_tables
from embax.take import rows_of

HEADER_BYTES = 8
"""Of a row: its scale and its bias, float32 in the byte order of the machine."""
BLOCK_NUMBERS = 1 << 22
"""Numbers quantized at a time: 16 MiB of float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """A table ``[V, embedding_dim]`` in codes of 8 or 4 bits, made by ``quantize_rows``; for lookups only.

    Attributes:
      data: uint8 ``[V, 8 + embedding_dim]``, or ``[V, 8 + ceil(embedding_dim / 2)]`` for 4 bits: of each row the scale
        and the bias (float32), then the codes. Byte i of 4-bit codes holds column i in its lower half and column
        ``ceil(embedding_dim / 2) + i`` in its upper one. Leading axes are tables. Where columns are split over devices
        such a part for each device, one beside the other, all with the scale and the bias of the whole row.
      embedding_dim: numbers in a row, or in each part of one (static).
      bits: 8 or 4 (static).

    >>> import jax.numpy as jnp, embax
    >>> rows = embax.quantize_rows(jnp.array([[0.0, 1.0, 255.0], [7.0, 7.0, 7.0]]))
    >>> rows.shape, rows.nbytes, embax.take(rows, jnp.array([1, 0])).tolist()
    ((2, 3), 22, [[7.0, 7.0, 7.0], [0.0, 1.0, 255.0]])
    """

    data: Any
    embedding_dim: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """``(V, embedding_dim)``, all parts of a row together: the shape of the table that these rows stand for."""
        return (*self.data.shape[:-1], self._parts() * self.embedding_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, scales and biases included."""
        return self.data.size

    def dequantize(self) -> jax.Array:
        """Returns the whole table, float32 ``[V, embedding_dim]``; on a mesh rows stand, and are split, as before."""
        return _decoded(self.data, self.embedding_dim, self.bits)

    def lookup_rows(self, ids: Any, sentinel: Any = None) -> jax.Array:
        """Returns the rows at ``ids``, float32 ``ids.shape + (embedding_dim,)``, as ``embax.take`` means ids.

        Outside of ``[-V, V)`` they are NaN. There is no derivative, so the sentinel is not needed.
        """
        del sentinel
        backend = "reference" if self._parts() > 1 else kernels.choose().name
        return _taken(backend, self, rows_of(ids, self.shape[0]))

    def lookup_pooled(self, stack: StackPlan, backend: str, ids: StackIds, sentinel: Any = None) -> tuple:
        """Returns the activations of each feature of a stack; differentiable with respect to the gains alone."""
        del sentinel
        if self.embedding_dim != stack.embedding_dim:
            raise ValueError(
                f'stack "{stack.name}": the rows were quantized in parts of {self.embedding_dim} columns, and a device '
                f"of the plan has {stack.embedding_dim}; quantize the tables of this plan (embax.quantize_tables)"
            )
        return _pool(stack, backend, (ids.samples, ids.valencies), self, ids.gains, ids.ids, ids.offsets)

    def row_products(self, stack: StackPlan, ids: StackIds, gradients: jax.Array) -> jax.Array:
        """Returns each id's row times its sample's gradient, float32 ``[capacity]``: the derivative of its gain."""
        if not ids.ids.shape[0] or not gradients.shape[0]:
            return jnp.zeros(ids.ids.shape, jnp.float32)
        values = _present(stack, self, present_rows(stack, ids))
        return (values * gradients[sample_of_ids(ids)]).sum(-1)

    def _parts(self) -> int:
        return self.data.shape[-1] // _width(self.embedding_dim, self.bits)


def quantize_rows(table: Any, bits: int = 8) -> QuantizedRows:
    """Returns the rows of ``table`` in codes of 8 or 4 bits, for lookups: ``embax.take(rows, ids)``.

    Done block by block: peak memory is the result and one block. A NumPy array (a mapped file too) is read block by
    block as well. Works inside jit.

    Args:
      table: float32, bfloat16 or float16 ``[V, D]``. A row that holds a NaN or an infinity becomes a row of NaN.
      bits: 8 (D + 8 bytes a row) or 4 (D / 2 + 8 bytes a row).

    Raises:
      ValueError: other bits, or a table of another shape or dtype.
      TypeError: something that is no array, quantized rows among them.

    >>> import jax.numpy as jnp, embax
    >>> table = jnp.array([[-1.0, -0.5, 0.0, 0.5], [0.0, 1.0, 2.0, 15.0]])
    >>> rows = embax.quantize_rows(table, bits=4)
    >>> rows.nbytes, rows.dequantize().round(2).tolist()
    (20, [[-1.0, -0.5, 0.0, 0.5], [0.0, 1.0, 2.0, 15.0]])
    """
    _check(table, bits, "quantize_rows")
    return _quantized(table, bits, None)


def quantize_tables(plan: Plan, tables: Mapping[str, TableState], bits: int = 8) -> dict[str, TableState]:
    """Returns the tables of ``plan`` in codes of 8 or 4 bits, without slots, for ``lookup`` alone.

    The rows of a stack with a QuantizationConfig are rounded to its levels first, as its lookups round them. On a mesh
    each device encodes its own rows, which stay where they are; numbers are those of one device.

    Args:
      plan: what ``embax.plan`` gave.
      tables: ``{stack: TableState}`` from ``init`` or ``update``; they stay as they are.
      bits: 8 or 4.

    Raises:
      ValueError: other bits, or tables of another plan.
      TypeError: tables that are quantized already.

    >>> import jax, embax
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="mean",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.SGD(0.5))
    >>> plan = embax.plan(embax.FeatureSpec(name="x", table_spec=table, input_shape=(None,), output_shape=(None, 2)))
    >>> served = embax.quantize_tables(plan, embax.init(plan, jax.random.key(0)))
    >>> embax.lookup(plan, served, embax.preprocess(plan, [[5, 3, 5], []]))[0].tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    check_tables(plan, tables)
    served = {}
    for stack in plan.stacks:
        table = tables[stack.name].table
        _check(table, bits, f'quantize_tables: stack "{stack.name}"')
        if plan.devices is None:
            rows = _quantized(table, bits, stack.quantization)
        else:
            rows = _quantized_where_held(stack, plan.devices, bits, table)
        served[stack.name] = TableState(rows, ())
    return served


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _quantized_where_held(stack: StackPlan, devices: Devices, bits: int, table: Any) -> QuantizedRows:
    """Returns the rows of a table on a mesh, each device's made there."""
    axes, spec = devices.table_axes if stack.placement == "column" else (), table_spec(stack, devices)

    def local(table):
        return _quantized(table, bits, stack.quantization, axes)

    return over_mesh.mapped(devices, local, (spec,), spec)(table)


# ---- codes ---------------------------------------------------------------------------------------------------------


def _quantized(
    table: Any, bits: int, levels: QuantizationConfig | None, column_axes: tuple[str, ...] = ()
) -> QuantizedRows:
    """Returns the rows of ``table``; inside of a shard_map other columns of them may lie along ``column_axes``."""
    rows, dim = table.shape
    block = min(rows, max(1, BLOCK_NUMBERS // dim))
    data = jnp.zeros((rows, _width(dim, bits)), jnp.uint8)
    form = (block, bits, levels, column_axes)
    if isinstance(data, Tracer) and block:
        table = jnp.asarray(table)

        def body(index, data):
            first = jnp.minimum(index * block, rows - block)
            return _encoded_into(form, data, table, first, first)

        data = jax.lax.fori_loop(0, -(-rows // block), body, varying_with(data, table))
        return QuantizedRows(data, dim, bits)
    for index in range(0, rows, block or 1):
        # The last block reaches back over rows that are done: what comes out for a row depends on the row alone.
        first = min(index, rows - block)
        source, at = (table, first) if isinstance(table, jax.Array) else (table[first : first + block], 0)
        # Waiting keeps the blocks that are under way from piling up.
        data = jax.block_until_ready(_encoded_into(form, data, source, np.int32(first), np.int32(at)))
    return QuantizedRows(data, dim, bits)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _encoded_into(form: tuple, data: jax.Array, source: jax.Array, first: Any, at: Any) -> jax.Array:
    """Returns ``data`` with its rows from ``first`` on made of those of ``source`` from ``at`` on."""
    block, bits, levels, column_axes = form
    rows = jax.lax.dynamic_slice_in_dim(source, at, block).astype(jnp.float32)
    if levels is not None:
        rows = quantize(rows, levels)
    return jax.lax.dynamic_update_slice_in_dim(data, _encoded(rows, bits, column_axes), first, 0)


def _encoded(rows: jax.Array, bits: int, column_axes: tuple[str, ...] = ()) -> jax.Array:
    """Returns float32 rows ``[n, dim]`` as uint8 ``[n, width]``."""
    (low, high), largest = _extremes(rows, column_axes), 2**bits - 1
    finite = jnp.isfinite(high - low)
    scale = jnp.where(finite, (high - low) / largest, jnp.nan)
    bias = jnp.where(finite, low, jnp.nan)
    varies = scale > 0  # not so for NaN either: their codes are 0
    codes = jnp.round((rows - low) / jnp.where(varies, scale, 1.0))
    codes = jnp.where(varies, jnp.clip(codes, 0, largest), 0).astype(jnp.uint8)
    if bits == 4:
        half = (rows.shape[-1] + 1) // 2
        upper = jnp.pad(codes[:, half:], ((0, 0), (0, 2 * half - rows.shape[-1])))
        codes = codes[:, :half] | (upper << 4)
    header = jax.lax.bitcast_convert_type(jnp.concatenate([scale, bias], -1), jnp.uint8)
    return jnp.concatenate([header.reshape(-1, HEADER_BYTES), codes], -1)


def _extremes(rows: jax.Array, column_axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest number of each whole row, ``[n, 1]``; infinities if it holds what is none."""
    # The least of NaN and a number is NaN or the number: in collectives, and in XLA's reductions of large arrays.
    finite = jnp.isfinite(rows).all(-1, keepdims=True)
    low = jnp.where(finite, rows.min(-1, keepdims=True), -jnp.inf)
    high = jnp.where(finite, rows.max(-1, keepdims=True), jnp.inf)
    if not column_axes:
        return low, high
    ends = jax.lax.pmin(jnp.concatenate([low, -high], -1), column_axes)
    return ends[:, :1], -ends[:, 1:]


def _decoded(data: jax.Array, dim: int, bits: int) -> jax.Array:
    """Returns uint8 rows ``[..., parts * width]`` as float32 ``[..., parts * dim]``."""
    leading, width = data.shape[:-1], _width(dim, bits)
    parts = data.shape[-1] // width
    data = data.reshape(*leading, parts, width)
    header = data[..., :HEADER_BYTES].reshape(*data.shape[:-1], 2, HEADER_BYTES // 2)
    numbers = jax.lax.bitcast_convert_type(header, jnp.float32)
    codes = data[..., HEADER_BYTES:]
    if bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], -1)[..., :dim]
    values = numbers[..., :1] * codes.astype(jnp.float32) + numbers[..., 1:]
    return values.reshape(*leading, parts * dim)


def _width(dim: int, bits: int) -> int:
    return HEADER_BYTES + (dim if bits == 8 else (dim + 1) // 2)


def _check(table: Any, bits: int, what: str) -> None:
    if isinstance(bits, bool) or bits not in (8, 4):
        raise ValueError(f"{what}: bits={bits!r} is neither 8 nor 4")
    if isinstance(table, QuantizedRows):
        raise TypeError(f"{what}: the rows are quantized to {table.bits} bits already; pass those they were made from")
    if not hasattr(table, "shape") or not hasattr(table, "dtype"):
        raise TypeError(f"{what}: a {type(table).__name__} is not an array [vocabulary_size, embedding_dim]; pass one")
    if len(table.shape) != 2 or not table.shape[1]:
        raise ValueError(f"{what}: the table has shape {table.shape}; it must be [vocabulary_size, embedding_dim]")
    if np.dtype(table.dtype).name not in TABLE_DTYPES:
        raise ValueError(f"{what}: the table is {table.dtype}, not one of {', '.join(TABLE_DTYPES)}; convert it first")


# ---- lookups -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _taken(backend: str, table: QuantizedRows, rows: jax.Array) -> jax.Array:
    """Returns the rows at int32 ``rows`` of any shape, NaN outside of the table."""
    if backend in NATIVE:
        found = _native(table, calls.Occurrences(rows.reshape(-1)), (rows.size,), jnp.float32)[0]
        return found.reshape(*rows.shape, table.embedding_dim)
    present = (rows >= 0) & (rows < table.shape[0])
    data = jnp.take(table.data, jnp.where(present, rows, 0), axis=0, mode="fill", fill_value=0)
    return jnp.where(present[..., None], _decoded(data, table.embedding_dim, table.bits), jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _pool(stack, backend, form, table, gains, ids, offsets):
    found = StackIds(ids, offsets, gains, *form)
    if backend in NATIVE:
        occurrences = calls.Occurrences(ids, offsets, None, gains)
        return _native(table, occurrences, found.samples, stack.activation_dtype)
    pooled = _pool_reference(stack, table, found).astype(stack.activation_dtype)
    return tuple(jnp.split(pooled, np.cumsum(found.samples)[:-1]))


def _forward(stack, backend, form, table, gains, ids, offsets):
    return _pool(stack, backend, form, table, gains, ids, offsets), (table, gains, ids, offsets)


def _backward(stack, backend, form, kept, cotangents):
    del backend
    table, gains, ids, offsets = kept
    if gains is None:
        return None, None, None, None
    # d activation / d gain is the row that was looked up.
    gradients = jnp.concatenate([part.astype(jnp.float32) for part in cotangents])
    return None, table.row_products(stack, StackIds(ids, offsets, None, *form), gradients), None, None


_pool.defvjp(_forward, _backward)


def _pool_reference(stack: StackPlan, table: QuantizedRows, ids: StackIds) -> jax.Array:
    """Returns the gain-weighted sums of the rows of each sample, float32, chunk by chunk."""
    samples = ids.offsets.shape[0] - 1
    if not samples or not ids.ids.shape[0]:
        return jnp.zeros((samples, stack.embedding_dim), jnp.float32)

    def values_of(rows, gains=None):
        values = _present(stack, table, rows)
        # An absent id adds nothing, whatever its gain: a NaN there does no harm.
        return values if gains is None else jnp.where((rows < stack.rows)[:, None], values * gains[:, None], 0.0)

    return pool_in_order(stack, ids, values_of)


def _present(stack: StackPlan, table: QuantizedRows, rows: jax.Array) -> jax.Array:
    """Returns float32 rows, zeros where there is none."""
    data = jnp.take(table.data, rows, axis=0, mode="clip")
    values = _decoded(data, table.embedding_dim, table.bits)
    return jnp.where((rows < stack.rows)[:, None], values, 0.0)


NATIVE = ("cpu",)
"""The backends whose lookups the native library does; the others do with the reference."""


def _native(table: QuantizedRows, found: calls.Occurrences, sizes: tuple[int, ...], dtype: Any) -> tuple:
    """Returns the sums of each sample's rows in blocks of ``sizes`` samples; without offsets, NaN for absent rows."""
    ids, offsets, _, gains = found.operands()
    operands = varying_with((table.data, ids, offsets, gains))
    shapes: Any = [jax.ShapeDtypeStruct((size, table.embedding_dim), dtype) for size in sizes]
    if varying_axes(operands[0]):
        # Inside of a shard_map results vary along the mesh axes along which operands do.
        likes = shapes
        shapes = jax.eval_shape(lambda: [varying_with(jnp.zeros(x.shape, x.dtype), operands) for x in likes])
    call = jax.ffi.ffi_call("embax_quantized_pool", shapes, vmap_method="sequential")
    return tuple(call(*operands, bits=np.int64(table.bits)))
