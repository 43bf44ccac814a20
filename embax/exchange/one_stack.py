"""One stack on its devices, for tables that models hold: what the doors to row gradients need.

Row gradients of such a table have the row numbers of the stored array, and every device has all of them: a model's
gradients are clipped, accumulated and averaged as one thing. Each device steps its own rows of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from embax import kernels, sharded_tables
from embax.exchange import over_mesh
from embax.exchange.shards import Here, local_stack, owners, pooled, together
from embax.id_batch import StackIds
from embax.placement import Devices
from embax.planning import FeaturePlan, StackPlan
from embax.row_gradients import RowGradients
from embax.table_state import TableState
from embax.touched import Touched, untouched


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a table lives: its stack and the devices."""

    stack: StackPlan
    devices: Devices

    def lookup(self, backend: str, table: jax.Array, ids: StackIds) -> jax.Array:
        """Returns the activations ``[shards, samples, embedding_dim]`` of all features together."""

        def local(table, ids):
            return over_mesh.looked_up(self.stack, self.devices, backend, table, ids.shard(0))[None]

        samples = self.devices.batch_spec()
        return over_mesh.mapped(self.devices, local, (self.table_spec(), samples), samples)(table, ids)

    def take(self, backend: str, table: jax.Array, rows: jax.Array) -> jax.Array:
        """Returns the rows of the stack at int32 ``rows`` of any shape, NaN for absent ones.

        A leading dimension that the shards of the batch divide is split as the batch is; else the result is whole on
        every device.
        """

        def local(table, rows):
            count = rows.size
            offsets, flat = jnp.arange(count + 1, dtype=jnp.int32), rows.reshape(-1)
            found = over_mesh.looked_up(
                self.stack, self.devices, backend, table, StackIds(flat, offsets, None, (count,), (1,))
            )
            present = ((flat >= 0) & (flat < self.stack.rows))[:, None]
            found = jnp.where(present, found, jnp.asarray(jnp.nan, found.dtype))
            return found.reshape(*rows.shape, found.shape[-1])

        samples, shards = self.devices.batch_spec(), 1 if self.devices.inside() else self.devices.batch_shards
        run = over_mesh.mapped(self.devices, local, (self.table_spec(), samples), samples)
        if self._even(rows.shape):
            return run(table, rows)
        flat = jnp.pad(self.whole(rows).reshape(-1), (0, -rows.size % shards), constant_values=self.stack.rows)
        return self.whole(run(table, flat))[: rows.size].reshape(*rows.shape, self.stack.embedding_dim)

    def taken_token(self, activations: jax.Array) -> jax.Array:
        """Returns one of the activations that ``take`` gave, on every device."""
        if not self._even(activations.shape):
            return activations.ravel()[:1]
        return self.token(activations)

    def inner_products(self, query: jax.Array, table: jax.Array) -> jax.Array:
        """Returns products ``[..., rows]`` of queries ``[..., embedding_dim]`` with every row.

        They are split over the devices of the table by row, where those divide the rows; else whole. Queries stay split
        along axes along which tables are copies.
        """
        stack, devices = self.stack, self.devices
        if devices.inside():
            raise NotImplementedError(
                f'table "{stack.name}": inner products with all rows of a table on a mesh are made outside of shard_map'
            )
        if stack.placement == "replicated":
            return jnp.dot(query, table.T)

        def local(query, table):
            if stack.placement != "column":
                return jnp.dot(query, table.T)
            first = jax.lax.axis_index(devices.table_axes) * stack.local_dim
            own = jax.lax.dynamic_slice_in_dim(query, first, stack.local_dim, query.ndim - 1)
            products = jnp.dot(own, table.T)
            if not divided:
                return jax.lax.psum(products, devices.table_axes)
            return jax.lax.psum_scatter(products, devices.table_axes, scatter_dimension=query.ndim - 1, tiled=True)

        divided = stack.placement != "column" or stack.rows % stack.shards == 0
        copies = (
            devices.copies_axes if query.ndim > 1 and query.shape[0] % devices.size(devices.copies_axes) == 0 else ()
        )
        lead = (copies or None, *[None] * (query.ndim - 2)) if query.ndim > 1 else ()
        spec = P(*lead, devices.table_axes if divided else None)
        products = over_mesh.mapped(devices, local, (P(*lead), self.table_spec()), spec)(query, table)
        if stack.rows == stack.stored_rows:
            return products
        return (devices.whole(products) if devices.explicit else products)[..., : stack.rows]

    def check(self, shape: tuple[int, ...], name: str | None) -> None:
        """Raises ValueError unless ``shape`` is that of the stored rows where the caller stands."""
        stack = self.stack
        inside = self.devices.inside()
        wanted = (stack.local_rows, stack.local_dim) if inside else (stack.stored_rows, stack.embedding_dim)
        if tuple(shape) != wanted:
            raise ValueError(
                f'table "{name}": the value has shape {list(shape)}, and on {self!r} {list(wanted)} are stored; it is '
                "of another mesh or of one device: carry it over by embax.Table(...).off_mesh() and on_mesh, or load a "
                "checkpoint"
            )

    def __repr__(self) -> str:
        axes = dict(self.devices.mesh.shape)
        return f'Home("{self.stack.placement}" over {axes}, {self.stack.rows} x {self.stack.embedding_dim})'

    def named(self, token: jax.Array) -> jax.Array:
        """Returns a scalar that names the mesh to a jit which has no other argument on it."""
        if self.devices.inside() or self.devices.explicit:
            return token
        return jax.lax.with_sharding_constraint(token, self.devices.sharding(P()))

    def whole(self, array: jax.Array) -> jax.Array:
        """Returns ``array`` whole on every device; as it is inside of a shard_map."""
        return array if self.devices.inside() else self.devices.whole(array)

    def _even(self, shape: tuple[int, ...]) -> bool:
        """Returns whether the shards of the batch divide the leading dimension."""
        divided = bool(shape) and math.prod(shape) > 0 and shape[0] % self.devices.batch_shards == 0
        return self.devices.inside() or divided

    def lookup_among(self, backend: str, values: jax.Array, ids: StackIds) -> jax.Array:
        """Returns ``lookup`` in a small table that every device has whole; differentiable in values and gains."""
        gains, ids = ids.gains, dataclasses.replace(ids, gains=None)
        if gains is not None and self.devices.explicit:
            gains = jax.sharding.reshard(gains, self.devices.sharding(self.devices.batch_spec()))
        return _among(self, backend, values, gains, ids)

    def token(self, activations: jax.Array) -> jax.Array:
        """Returns one activation of each shard, on every device."""
        spec = self.devices.batch_spec()
        own = over_mesh.mapped(self.devices, lambda part: part.ravel()[:1], (spec,), spec)(activations)
        return self.devices.whole(own)[:1]

    def gain_products(self, backend: str, table: jax.Array, ids: StackIds, cotangent: jax.Array) -> jax.Array:
        """Returns the derivatives of the gains, ``[shards, capacity]``, from those of ``lookup``."""

        def local(table, ids, cotangent):
            exchange = over_mesh.exchange_of(self.stack)
            own = ids.shard(0), cotangent[0].astype(jnp.float32)
            return exchange.gain_products(Here(self.stack, self.devices, backend), table, *own)[None]

        samples = self.devices.batch_spec()
        run = over_mesh.mapped(self.devices, local, (self.table_spec(), samples, samples), samples)
        return run(table, ids, cotangent)

    def by_feature(self, activations: jax.Array, features: Sequence[FeaturePlan], ids: StackIds) -> list[jax.Array]:
        """Returns each feature's part of ``lookup``, without samples that only fill up."""

        def local(whole):
            return over_mesh.by_feature(features, whole[0], ids.samples)

        spec = self.devices.batch_spec()
        parts = over_mesh.mapped(self.devices, local, (spec,), spec)(activations)
        if ids.totals is None:
            return list(parts)
        counts = [n // feature.samples_per_row for n, feature in zip(ids.totals, features, strict=True)]
        return [over_mesh.cut(self.devices, part, count) for part, count in zip(parts, counts, strict=True)]

    def stored_numbers(self, rows: jax.Array) -> jax.Array:
        """Returns the rows of the stored array that hold int32 ``rows`` of the stack, ``stored_rows`` for none."""
        if not self.stack.by_rows:
            return jnp.where((rows >= 0) & (rows < self.stack.rows), rows, self.stack.stored_rows)
        owner, local = owners(self.stack, rows)
        present = owner < self.stack.shards
        return jnp.where(present, owner * self.stack.local_rows + local, self.stack.stored_rows)

    def rows_at(self, table: jax.Array, rows: jax.Array) -> jax.Array:
        """Returns the stored ``rows`` ``[n]`` on every device, zeros where there is none."""
        stack, axes = self.stack, self.devices.table_axes

        def local(table, rows):
            own = over_mesh.rows_here(stack, self.devices, rows)
            found = jnp.take(table, own, axis=0, mode="fill", fill_value=0)
            if stack.placement == "column":
                return jax.lax.all_gather(found, axes, axis=1, tiled=True)
            return found if stack.placement == "replicated" else jax.lax.psum(found, axes)

        return over_mesh.mapped(self.devices, local, (self.table_spec(), P()), P())(table, rows)

    def everywhere(self, function: Callable, *arrays: Any) -> Any:
        """Returns ``function(*arrays)``, computed on every device from whole arrays."""
        return over_mesh.mapped(self.devices, function, (P(),) * len(arrays), P())(*arrays)

    def fresh_slots(self) -> Any:
        """Returns the initial slot variables."""
        return sharded_tables.fresh_slots(self.stack, self.devices)

    def untouched(self) -> Touched:
        """Returns that no row was written yet."""
        return untouched(self.stack, self.devices)

    def apply(self, backend: str, state: TableState, gradient: RowGradients, hyper: Any) -> TableState:
        """Returns the state after one step on the rows of ``gradient``, which every device has."""
        stack, devices = self.stack, self.devices

        def local(state, rows, values, hyper):
            if stack.placement == "column":
                first = jax.lax.axis_index(devices.table_axes) * stack.local_dim
                values = jax.lax.dynamic_slice_in_dim(values, first, stack.local_dim, 1)
            gradient = RowGradients(rows, values, stack.stored_rows)
            return over_mesh.applied(Here(stack, devices, backend), state, gradient, hyper)

        spec = over_mesh.state_spec(stack, devices, state)
        run = over_mesh.mapped(devices, local, (spec, P(), P(), P()), spec)
        return run(state, gradient.rows, gradient.values, hyper)

    def table_spec(self) -> P:
        """Returns how the rows are split."""
        return sharded_tables.table_spec(self.stack, self.devices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _among(home: Home, backend: str, values: jax.Array, gains: Any, ids: StackIds) -> jax.Array:
    stack = _small(home, values)

    def local(values, gains, ids):
        ids = dataclasses.replace(ids, gains=gains)
        return pooled(backend, stack, values, together(ids.shard(0)))[None]

    samples = home.devices.batch_spec()
    return over_mesh.mapped(home.devices, local, (P(), samples, samples), samples)(values, gains, ids)


def _among_forward(home, backend, values, gains, ids):
    return _among(home, backend, values, gains, ids), (values, gains, ids)


def _among_backward(home, backend, kept, cotangent):
    values, gains, ids = kept
    stack, kernel = _small(home, values), kernels.get(backend)

    def local(values, gains, ids, cotangent):
        own = together(dataclasses.replace(ids, gains=gains).shard(0))
        made = kernel.row_gradients(stack, own, cotangent[0, :1, :1], (cotangent[0],)).to_dense()
        products = None
        if gains is not None:
            ungained = dataclasses.replace(own, gains=None)
            products = kernel.row_products(stack, values, ungained, cotangent[0].astype(jnp.float32))[None]
        return jax.lax.psum(made, home.devices.batch_axes), products

    samples = home.devices.batch_spec()
    run = over_mesh.mapped(home.devices, local, (P(), samples, samples, samples), (P(), samples))
    dense, products = run(values, gains, ids, cotangent)
    return dense.astype(values.dtype), products, None


_among.defvjp(_among_forward, _among_backward)


def _small(home: Home, values: Any) -> StackPlan:
    return dataclasses.replace(local_stack(home.stack), rows=values.shape[0], embedding_dim=values.shape[1])
