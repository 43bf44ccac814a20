"""The shapes of one device carry over to a mesh: IdBatch, StackIds and both kernels inside shard_map on 8 devices.

This is not embax's exchange (there is none yet) but the proof that it can be built on these shapes: rows are dealt out
by id mod 8, ids are gathered, partial activations are summed and scattered, and the update stays in place.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, table_spec
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import embax
from embax import kernels
from embax.check_step import _inspect
from embax.id_batch import IdBatch, StackIds

SHARDS, ROWS, DIM, SAMPLES, CAPACITY = 8, 16_384, 8, 32, 1024


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < SHARDS:
        pytest.skip(f"needs {SHARDS} CPU devices, and there are {len(jax.devices())}")
    return Mesh(np.array(jax.devices()[:SHARDS]), ("x",))


def _plan():
    # The bucket of about 640 ids is part of the test; nothing is declared.
    return embax.plan(feature(table_spec(rows=ROWS, dim=DIM), inputs=(None,)), backend="reference")


def _bags(rng):
    return [rng.integers(0, ROWS, n) for n in rng.poisson(20, SHARDS * SAMPLES)]


def _sharded(plan, bags, capacity):
    """Returns an IdBatch whose leaves lead with 8 shards: 32 samples each."""
    parts = [embax.preprocess(plan, bags[i * SAMPLES : (i + 1) * SAMPLES]) for i in range(SHARDS)]

    def grow(leaf, fill):
        return np.pad(leaf, ((0, 0), (0, capacity - leaf.shape[1])), constant_values=fill)

    parts = [
        IdBatch(
            {"item": dataclasses.replace(p.stacks["item"], ids=grow(p.stacks["item"].ids, ROWS))},
            p.statistics,
        )
        for p in parts
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _everyones(ids: StackIds, local_rows: int) -> StackIds:
    """Returns the ids of all shards as one CSR, with this device's rows numbered locally and all others absent."""
    me = jax.lax.axis_index("x")
    own = ids.shard(0)
    capacity = own.ids.shape[0]
    present = (jnp.arange(capacity) < own.offsets[-1]) & (own.ids >= 0) & (own.ids < ROWS)
    every = jax.lax.all_gather(jnp.where(present, own.ids, ROWS), "x")
    mine = (every < ROWS) & (every % SHARDS == me)
    offsets = jax.lax.all_gather(own.offsets[:-1], "x") + capacity * jnp.arange(SHARDS)[:, None]
    return StackIds(
        ids=jnp.where(mine, every // SHARDS, local_rows).reshape(-1),
        offsets=jnp.append(offsets.reshape(-1), SHARDS * capacity).astype(jnp.int32),
        gains=None,
        samples=(SHARDS * SAMPLES,),
        valencies=(None,),
    )


def _step(backend, stack, target, tables, batch):
    kernel = kernels.get(backend)
    local = dataclasses.replace(stack, rows=ROWS // SHARDS)
    ids = _everyones(batch.stacks["item"], local.rows)
    (partial,) = kernel.gather_pool(local, tables.table, ids)
    activations = jax.lax.psum_scatter(partial, "x", tiled=True)
    gradients = jax.lax.all_gather(target, "x", tiled=True)  # of a loss that is linear in the activations
    hyper = (stack.optimizer.modifiers(0), stack.optimizer.hyperparameters(0))
    return kernel.update(local, tables, ids, partial[:1, :1], (gradients,), hyper), activations


@pytest.fixture
def stepper(mesh, backend):
    plan = _plan()
    step = functools.partial(_step, backend, plan.stacks[0])
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("x"), P("x"), P("x")), out_specs=P("x"), check_vma=False)
    return plan, jax.jit(mapped, donate_argnums=1)


def _dealt(mesh, array):
    """Rows in the order of their owners: all of device 0, then all of device 1, ..."""
    order = np.arange(ROWS).reshape(-1, SHARDS).T.ravel()
    return jax.device_put(np.asarray(array)[order], NamedSharding(mesh, P("x"))), order


def test_fifty_ragged_steps(mesh, stepper):
    plan, step = stepper
    single = embax.init(plan, jax.random.key(0))
    dealt, order = zip(*(_dealt(mesh, leaf) for leaf in jax.tree.leaves(single["item"])), strict=True)
    tables = jax.tree.unflatten(jax.tree.structure(single["item"]), dealt)
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(SHARDS * SAMPLES, DIM)), jnp.float32)
    for _ in range(50):
        bags = _bags(rng)
        tables, activations = step(target, tables, _sharded(plan, bags, CAPACITY))
        wanted, residuals = embax.lookup(plan, single, embax.preprocess(plan, bags))
        single = embax.update(plan, single, residuals, target, 0)
        np.testing.assert_allclose(activations, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tables.table, np.asarray(single["item"].table)[order[0]], rtol=1e-4, atol=1e-4)
    assert step._cache_size() <= 2

    before = jax.tree.map(np.asarray, tables)
    empty = jax.tree.map(np.zeros_like, _sharded(plan, bags, CAPACITY))
    tables, activations = step(target, tables, empty)
    assert not activations.any()
    assert jax.tree.all(jax.tree.map(np.array_equal, before, tables))


def test_no_table_shaped_operation(mesh, stepper):
    plan, step = stepper
    tables = jax.tree.map(lambda leaf: _dealt(mesh, leaf)[0], embax.init(plan, jax.random.key(0))["item"])
    bags = _bags(np.random.default_rng(0))
    compiled = step.lower(jnp.ones((SHARDS * SAMPLES, DIM)), tables, _sharded(plan, bags, CAPACITY)).compile()
    found, writes = _inspect(compiled.as_text(), {f"f32[{ROWS // SHARDS},{DIM}]", f"f32[{ROWS},{DIM}]"})
    assert not found and writes == 2
