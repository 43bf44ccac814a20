"""Law: a step marks the rows that it writes, and no other; what it writes is the same with marks and without."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import OPTIMIZERS
from flax import nnx
from helpers import feature, line_of, table_spec
from jax.sharding import PartitionSpec as P

import embax
import embax.linen
import embax.nnx
from embax.sharded_tables import in_order, touched_spec

ROWS = {"a": 300, "b": 40}


def _plan(optimizer, backend=None, mesh=None, dtype="float32", **settings):
    tables = [table_spec(name, rows, 8, optimizer, dtype=dtype) for name, rows in ROWS.items()]
    return embax.plan(
        [feature(table, f"of_{table.name}", padding_id=-1) for table in tables], backend=backend, mesh=mesh, **settings
    )


def _ids(seed):
    rng = np.random.default_rng(seed)
    # Absent ids, ids that occur often, and rows that nobody names.
    return [rng.integers(-1, rows // 2, (16, 3)).astype(np.int32) for rows in ROWS.values()]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(plan, tables, batch):
    activations, residuals = embax.lookup(plan, tables, batch)
    return embax.update(plan, tables, residuals, [jnp.cos(part) for part in activations], step=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step_by_gradients(plan, tables, batch):
    activations, residuals = embax.lookup(plan, tables, batch)
    gradients = embax.row_gradients(plan, residuals, [jnp.cos(part) for part in activations])
    return embax.apply_row_gradients(plan, tables, gradients, step=0)


def _marks(plan, tables):
    found = {}
    for stack in plan.stacks:
        rows = tables[stack.name].touched.rows[:, None]
        if plan.devices is not None:
            rows = in_order(stack, plan.devices, P(*touched_spec(stack, plan.devices), None), rows)
        for table in stack.tables:
            found[table.name] = np.asarray(rows)[table.row_offset : table.row_offset + table.vocabulary_size, 0]
    return found


def _check(plan, step=_step):
    fresh = embax.init(plan, jax.random.key(0))
    before = jax.tree.map(np.asarray, embax.to_arrays(plan, fresh))
    tracked, plain = embax.track(plan, fresh), jax.tree.map(jnp.copy, fresh)
    wanted = {name: np.zeros(rows, np.uint8) for name, rows in ROWS.items()}
    for seed in range(2):
        ids = _ids(seed)
        batch = embax.preprocess(plan, ids)
        tracked, plain = step(plan, tracked, batch), step(plan, plain, batch)
        for name, own in zip(ROWS, ids, strict=True):
            wanted[name][own[own >= 0]] = 1
    jax.tree.map(np.testing.assert_array_equal, _marks(plan, tracked), wanted)
    after = jax.tree.map(np.asarray, embax.to_arrays(plan, tracked))
    jax.tree.map(np.testing.assert_array_equal, after, jax.tree.map(np.asarray, embax.to_arrays(plan, plain)))
    for name, marks in wanted.items():
        for part, values in after[name].items():
            changed = (values != before[name][part]).any(axis=1)
            assert not (changed & (marks == 0)).any()
    assert (after["a"]["table"] != before["a"]["table"]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sgd_modified", "adagrad", "rowwise_adagrad", "optax", "custom"])
def test_one_device(backend, name, dtype):
    _check(_plan(OPTIMIZERS[name].make(), backend, dtype=dtype))


@pytest.mark.parametrize("step", [_step, _step_by_gradients])
@pytest.mark.parametrize("placement", ["row", "column", "table", "replicated", "route"])
def test_mesh(backend, placement, step, eight_devices):
    del eight_devices
    mesh, exchange = line_of(4), "route" if placement == "route" else "gather"
    mesh = embax.Devices(mesh, exchange=exchange)
    placement = "row" if placement == "route" else placement
    for optimizer in (embax.Adagrad(0.1), embax.RowwiseAdagrad(0.1)):
        _check(_plan(optimizer, backend, mesh, placement=placement), step)


def test_nothing_is_copied(backend):
    plan = _plan(embax.Adagrad(0.1), backend)
    tables = embax.track(plan, embax.init(plan, jax.random.key(0)))
    batch = embax.preprocess(plan, _ids(0))
    assert embax.check_step(functools.partial(_step, plan), tables, batch, donate_argnums=0).ok
    text = _step.lower(plan, tables, batch).compile().as_text()
    (rows,) = {state.touched.rows.shape[0] for state in tables.values()}
    assert f"u8[{rows}]" in text and not re.search(rf"u8\[{rows}\]\S* (copy|add|select|or)\(", text)


@pytest.mark.parametrize("devices", [1, 4])
def test_nnx(devices, eight_devices):
    del eight_devices
    mesh = line_of(devices) if devices > 1 else None
    model = embax.nnx.Embed(40, 8, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(0), **({"mesh": mesh} if mesh else {}))
    optimizer = embax.nnx.Optimizer(model, optax.sgd(0.1), every_k=2)
    optimizer.track_rows(model)

    @nnx.jit
    def step(model, optimizer, ids):
        _, gradients = embax.nnx.value_and_grad(lambda model: jnp.sin(model(ids)).sum())(model)
        optimizer.update(model, gradients)

    step(model, optimizer, jnp.array([3, 5, 3, 7]))
    (name,) = optimizer.touched
    assert optimizer.touched[name].get_value().rows.sum() == 0  # half of what is accumulated: nothing was written yet
    step(model, optimizer, jnp.array([30, 5, 3, 39]))
    rows = optimizer.touched[name].get_value().rows
    stored = jnp.array([3, 5, 7, 30, 39])
    if devices > 1:
        stored = model.embedding.get_metadata("home").stored_numbers(stored)
    assert sorted(np.flatnonzero(rows).tolist()) == sorted(stored.tolist())


def test_linen():
    layer = embax.linen.Embed(6, 2, optimizer=embax.SGD(1.0))
    ids = jnp.array([3, 3, 1])
    params = layer.init(jax.random.key(0), ids)["params"]
    state = embax.linen.TrainState.create(apply_fn=layer.apply, params=params, tx=optax.sgd(1.0)).track_rows()
    _, grads = embax.linen.value_and_grad(lambda params: state.apply_fn({"params": params}, ids).sum())(state.params)
    state = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(state, grads)
    assert state.touched[0].rows.tolist() == [0, 1, 0, 1, 0, 0]


def test_mistakes():
    plan, other = _plan(embax.SGD(0.1)), _plan(embax.SGD(0.1), mesh=line_of(8))
    tables = embax.track(plan, embax.init(plan, jax.random.key(0)))
    wrong = {name: s._replace(touched=s.touched._replace(rows=s.touched.rows[1:])) for name, s in tables.items()}
    _, residuals = embax.lookup(plan, tables, embax.preprocess(plan, _ids(0)))
    with pytest.raises(ValueError, match=r"rows are tracked, and the stack has .* pass the tables that embax.track"):
        embax.update(plan, wrong, residuals, [jnp.ones((16, 8))] * 2, step=0)
    with pytest.raises(ValueError, match="pass the tables that init made for this plan|the table lies on its devices"):
        embax.track(other, tables)
