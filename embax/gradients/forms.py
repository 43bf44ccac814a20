"""The two forms of a lookup: rows by number (``Take``), and a plan's pooled activations (``Pool``).

A form is the static part of a lookup primitive. It gathers, follows vmap, moves to the coordinates of a root table, and
says which row each of its gradients belongs to.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from embax import kernels
from embax.id_batch import StackIds
from embax.kernels import reference
from embax.planning import StackPlan


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """How a lookup reads its table. ``name`` is the table's, for errors."""

    name: str

    @property
    @abc.abstractmethod
    def has_gains(self) -> bool:
        """Whether the last operand is gains, in which the activations are linear."""

    @abc.abstractmethod
    def gather(self, table: jax.Array, *operands: jax.Array) -> jax.Array:
        """Returns the activations."""

    def token(self, activations: jax.Array) -> jax.Array:
        """Returns one activation: what needs it comes after the lookup."""
        return jnp.ravel(activations)[:1]

    @abc.abstractmethod
    def gains_cotangent(self, table: jax.Array, *operands_and_cotangent: jax.Array) -> jax.Array:
        """Returns the cotangent of the gains; operands without the gains, then the activations' cotangent."""

    @abc.abstractmethod
    def batched(self, size: int, operands: tuple, dims: tuple) -> tuple["Form", jax.Array, list, int]:
        """Returns form, table, operands of ``size`` such lookups at once, and the batch dimension of the result."""

    @abc.abstractmethod
    def located(self, shape: tuple[int, ...], offset: Any, total: int, operands: list) -> tuple["Form", list]:
        """Returns the same lookup in a root table ``[total, D]``, where a table of ``shape`` begins at ``offset``."""

    @abc.abstractmethod
    def occurrences(self, operands: list) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Returns ``(rows, samples, gains)`` of a located lookup.

        ``rows`` are int32 rows of the root. Row i gets the gradient of activation i; where ``samples`` is given,
        that of activation ``samples[i]`` of its batch, times ``gains[i]`` where gains are given.
        """


@dataclasses.dataclass(frozen=True)
class Take(Form):
    """Rows of ``[b..., V, D]`` at int32 rows ``[b..., ...]``, V meaning none: NaN. ``batch`` counts the b."""

    batch: int = 0

    @property
    def has_gains(self) -> bool:
        return False

    def gather(self, table, rows):
        if self.batch:
            shape = table.shape
            rows = self._flat(shape, rows)
            table = table.reshape(-1, shape[-1])
        found = kernels.get(kernels.choose().name).take(table, rows.reshape(-1))
        return found.reshape(*rows.shape, table.shape[-1])

    def gains_cotangent(self, table, *operands_and_cotangent):
        raise NotImplementedError("a take has no gains")

    def batched(self, size, operands, dims):
        (table, rows), (table_dim, rows_dim) = operands, dims
        if table_dim is None:
            # More rows of the same table; its own batch dimensions stay in front.
            return self, table, [jnp.moveaxis(rows, rows_dim, self.batch)], self.batch
        if rows_dim is None:
            rows = jnp.broadcast_to(rows, (size, *rows.shape))
        else:
            rows = jnp.moveaxis(rows, rows_dim, 0)
        table = jnp.moveaxis(table, table_dim, 0) if table_dim else table
        return dataclasses.replace(self, batch=self.batch + 1), table, [rows], 0

    def located(self, shape, offset, total, operands):
        local = math.prod(shape[:-1])
        rows = self._flat(shape, operands[0])
        return dataclasses.replace(self, batch=0), [jnp.where(rows < local, rows + offset, total)]

    def occurrences(self, operands):
        return operands[0], None, None

    def _flat(self, shape: tuple[int, ...], rows: jax.Array) -> jax.Array:
        """Returns rows of the table seen as ``[prod(b) * V, D]``."""
        size, local = shape[-2], math.prod(shape[:-1])
        first = jnp.arange(local // size, dtype=jnp.int32).reshape(shape[:-2]) * size
        first = first.reshape(first.shape + (1,) * (rows.ndim - first.ndim))
        present = (rows >= 0) & (rows < size)
        return jnp.where(present, rows + first, local)


@dataclasses.dataclass(frozen=True)
class Pool(Form):
    """The activations of a stack: ids, offsets and gains as in ``StackIds``, each behind ``batch`` dimensions."""

    stack: StackPlan
    backend: str
    samples: tuple[int, ...]
    valencies: tuple[int | None, ...]
    gained: bool
    batch: int = 0

    @property
    def has_gains(self) -> bool:
        return self.gained

    def gather(self, table, *operands):
        def one(ids, offsets, gains=None):
            # XLA sees through the slices that take this apart again.
            ids = self._ids(ids, offsets, gains)
            return jnp.concatenate(kernels.get(self.backend).gather_pool(self.stack, table, ids))

        return self._mapped(one)(*operands)

    def gains_cotangent(self, table, *operands_and_cotangent):
        def one(ids, offsets, cotangent):
            # The derivative of an activation with respect to a gain is the row that was looked up.
            ids = self._ids(ids, offsets, None)
            return kernels.get(self.backend).row_products(self.stack, table, ids, cotangent.astype(jnp.float32))

        return self._mapped(one)(*operands_and_cotangent)

    def batched(self, size, operands, dims):
        table, *rest = operands
        if dims[0] is not None:
            raise NotImplementedError(
                f'table "{self.name}": vmap over the tables of a FeatureEmbed is not supported; give every table a '
                "name of its own in one FeatureEmbed, or use an Embed"
            )
        moved = [
            jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
            for x, d in zip(rest, dims[1:], strict=True)
        ]
        return dataclasses.replace(self, batch=self.batch + 1), table, moved, 0

    def located(self, shape, offset, total, operands):
        ids, *rest = operands
        present = (ids >= 0) & (ids < self.stack.rows)
        stack = dataclasses.replace(self.stack, rows=total)
        return dataclasses.replace(self, stack=stack), [jnp.where(present, ids + offset, total), *rest]

    def occurrences(self, operands):
        def one(ids, offsets, gains=None):
            ids = self._ids(ids, offsets, gains)
            return reference.present_rows(self.stack, ids), reference.sample_of_ids(ids)

        rows, samples = self._mapped(one)(*operands)
        return rows, samples, operands[2] if self.gained else None

    def _ids(self, ids, offsets, gains) -> StackIds:
        return StackIds(ids, offsets, gains, self.samples, self.valencies)

    def _mapped(self, function):
        for _ in range(self.batch):
            function = jax.vmap(function)
        return function
