"""Lookups in tables on a mesh: the pooled activations of a stack, and the rows of a table of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from embax.exchange.one_stack import Home
from embax.gradients.forms import Form
from embax.id_batch import StackIds
from embax.kernels import reference


@dataclasses.dataclass(frozen=True)
class MeshPool(Form):
    """The activations ``[shards, samples, D]`` of a stack: ids, offsets and gains lead with the shards of the batch."""

    home: Home
    backend: str
    samples: tuple[int, ...]
    valencies: tuple[int | None, ...]
    gained: bool

    @property
    def has_gains(self) -> bool:
        return self.gained

    def gather(self, table, *operands):
        ids, offsets, *gains = operands
        batch = StackIds(ids, offsets, gains[0] if gains else None, self.samples, self.valencies)
        return self.home.lookup(self.backend, table, batch)

    def token(self, activations):
        return self.home.token(activations)

    def gains_cotangent(self, table, *operands_and_cotangent):
        ids, offsets, cotangent = operands_and_cotangent
        batch = StackIds(ids, offsets, None, self.samples, self.valencies)
        return self.home.gain_products(self.backend, table, batch, cotangent)

    def batched(self, size, operands, dims):
        raise NotImplementedError(
            f'table "{self.name}": vmap over lookups in a table on a mesh is not supported; give the ids another '
            "dimension: a feature with positions, or a larger batch"
        )

    def located(self, shape, offset, total, operands):
        return _alone(self, shape, total, operands)

    def occurrences(self, operands):
        ids, offsets, *gains = operands

        def one(ids, offsets):
            own = StackIds(ids, offsets, None, self.samples, self.valencies)
            return reference.present_rows(self.home.stack, own), reference.sample_of_ids(own)

        rows, samples = jax.vmap(one)(ids, offsets)
        first = sum(self.samples) * jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
        weights: Any = gains[0].reshape(-1) if gains else None
        return self.home.stored_numbers(rows).reshape(-1), (samples + first).reshape(-1), weights


@dataclasses.dataclass(frozen=True)
class MeshTake(Form):
    """Rows at int32 rows of any shape of a table of its own on a mesh; those outside of it are NaN."""

    home: Home
    backend: str

    @property
    def has_gains(self) -> bool:
        return False

    def gather(self, table, rows):
        return self.home.take(self.backend, table, rows)

    def token(self, activations):
        return self.home.taken_token(activations)

    def gains_cotangent(self, table, *operands_and_cotangent):
        raise NotImplementedError("a take has no gains")

    def batched(self, size, operands, dims):
        (table, rows), (table_dim, rows_dim) = operands, dims
        if table_dim is not None:
            raise NotImplementedError(
                f'table "{self.name}": vmap over tables on a mesh is not supported; name each table, or give the '
                "tables to one device"
            )
        return self, table, [jnp.moveaxis(rows, rows_dim, 0)], 0

    def located(self, shape, offset, total, operands):
        return _alone(self, shape, total, operands)

    def occurrences(self, operands):
        return self.home.stored_numbers(operands[0]), None, None


def _alone(form: Form, shape: tuple[int, ...], total: int, operands: list) -> tuple[Form, list]:
    if shape[0] != total:
        raise NotImplementedError(f'table "{form.name}": layers of tables cannot lie on a mesh; name each table')
    return form, operands
