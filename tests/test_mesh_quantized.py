"""Tables in 8 and 4 bits on a mesh look up as the same tables do on one device; and whose rows are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, line_of, table_spec
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import embax
from embax import kernels, quantized

pytestmark = pytest.mark.usefixtures("eight_devices")

DIM, SAMPLES = 20, 16  # 5 columns on each of 4 devices: 4 bits fill half a byte up
LEVELS = embax.QuantizationConfig(min_value=-1.0, max_value=1.0, num_buckets=9)
OPTIMIZER = embax.SGD(0.1)


def _mesh(shape, axis_type=AxisType.Auto):
    return jax.make_mesh(shape, ("d", "m"), axis_types=(axis_type, axis_type))


MESHES = {
    "four": lambda exchange: embax.Devices(line_of(4), exchange=exchange),
    "explicit": lambda exchange: embax.Devices(_mesh((2, 2), AxisType.Explicit), exchange=exchange),
    "apart": lambda exchange: embax.Devices(_mesh((4, 2)), batch_axes="d", table_axes="m", exchange=exchange),
    "tables_on_both": lambda exchange: embax.Devices(_mesh((2, 2)), "d", ("m", "d"), exchange),
    "batch_on_both": lambda exchange: embax.Devices(_mesh((2, 4)), ("m", "d"), "m", exchange),
}


def _plan(levels=None, **settings):
    a = table_spec("a", 101, DIM, OPTIMIZER, "mean", quantization_config=levels)
    b = table_spec("b", 37, DIM, OPTIMIZER, "sqrtn", quantization_config=levels)
    features = [feature(a, "pooled", (None, 4)), feature(b, "sequence", (None, 3), (None, 3, DIM))]
    return embax.plan(features, **settings)


@functools.cache
def _arrays():
    """Returns tables; some rows of "a" are not finite, in columns of one device only, or span too much."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(rows, DIM)).astype(np.float32) for rows in (101, 37))
    a[5, 3], a[6, 17], a[7, 0], a[7, 19], a[8] = np.nan, np.inf, 3e38, -3e38, 0.1
    return {"a": {"table": a}, "b": {"table": b}}


def _run(plan, bits):
    """Returns the rows, the activations, and the gradients of the weights."""
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, 101, (SAMPLES, 4)), rng.integers(0, 37, (SAMPLES, 3))]
    ids[0][:2] = [[5, 6, 7, 8], [8, 8, 8, 8]]
    weights = [rng.uniform(0.1, 2, part.shape).astype(np.float32) for part in ids]
    target = rng.normal(size=DIM).astype(np.float32)

    @jax.jit
    def run(served, weights):
        def loss(weights):
            activations = embax.lookup(plan, served, embax.preprocess_traced(plan, ids, weights))[0]
            return sum((part @ target).sum() for part in activations), activations

        gradients, activations = jax.grad(loss, has_aux=True)(weights)
        return activations, gradients

    served = embax.quantize_tables(plan, embax.from_arrays(plan, _arrays()), bits)
    return served["a_b"].table, *jax.tree.map(np.asarray, run(served, weights))


@functools.cache
def _alone(backend, bits, levels):
    return _run(_plan(levels, backend=backend), bits)


CASES = [
    ("row", "four", "cpu", "route", 8),
    ("row", "explicit", "cpu", "gather", 4),
    ("row", "tables_on_both", "reference", "gather", 4),
    ("table", "apart", "cpu", "gather", 4),
    ("table", "explicit", "reference", "gather", 8),
    ("column", "explicit", "cpu", "gather", 4),
    ("column", "tables_on_both", "reference", "gather", 8),
    ("column", "batch_on_both", "cpu", "gather", 8),
    ("replicated", "four", "reference", "gather", 4),
    ("replicated", "explicit", "cpu", "gather", 8),
]


@pytest.mark.parametrize(("placement", "mesh", "backend", "exchange", "bits"), CASES)
def test_as_one_device(placement, mesh, backend, exchange, bits):
    if why_not := kernels.get(backend).unavailable():
        pytest.skip(f"backend {backend}: {why_not}")
    levels = LEVELS if (backend, bits) == ("cpu", 8) else None
    plan = _plan(levels, backend=backend, mesh=MESHES[mesh](exchange), placement=placement)
    rows, activations, gradients = _run(plan, bits)
    alone, wanted, wanted_gradients = _alone(backend, bits, levels)
    assert np.isnan(wanted[0][0]).all() and np.isnan(wanted[0]).mean() < 0.5
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close if placement == "row" else np.testing.assert_array_equal, activations, wanted)
    jax.tree.map(close, gradients, wanted_gradients)
    devices, stack = plan.devices, plan.stacks[0]
    spec = {"column": P(None, devices.table_axes), "replicated": P()}.get(placement, P(devices.table_axes))
    assert rows.data.dtype == jnp.uint8 and rows.data.sharding.is_equivalent_to(devices.sharding(spec), 2)
    assert rows.shape == (stack.stored_rows, DIM) and alone.shape == (138, DIM)


@pytest.mark.parametrize(("placement", "mesh"), [("row", "explicit"), ("column", "explicit"), ("column", "four")])
def test_whole_rows_of_a_mesh(placement, mesh):
    plan = _plan(mesh=MESHES[mesh]("gather"), placement=placement)
    tables = embax.from_arrays(plan, _arrays())
    rows = embax.quantize_tables(plan, tables, 4)["a_b"].table
    ids = np.array([0, 50, -1, 1000])
    whole = jax.jit(lambda rows: (rows.dequantize(), embax.take(rows, ids)))
    wanted = whole(embax.quantize_rows(np.asarray(tables["a_b"].table), 4))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), whole(rows), wanted)


def test_inside_of_a_shard_map():
    plan = _plan(mesh=line_of(4), placement="column")
    batch = embax.preprocess(plan, [np.full((4, 4), 1), np.full((4, 3), 2)])
    tables = embax.from_arrays(plan, _arrays())

    def local(tables, batch):
        return embax.lookup(plan, embax.quantize_tables(plan, tables), batch)[0]

    found = jax.jit(jax.shard_map(local, mesh=plan.devices.mesh, in_specs=(P(None, "x"), P("x")), out_specs=P("x")))
    wanted = embax.lookup(plan, embax.quantize_tables(plan, tables), batch)[0]
    jax.tree.map(np.testing.assert_array_equal, found(tables, batch), wanted)


@pytest.mark.parametrize("placement", ["row", "table", "column"])
def test_nobody_has_the_whole_table(placement, monkeypatch):
    monkeypatch.setattr(quantized, "BLOCK_NUMBERS", 1 << 10)
    rows, dim, shards = 40_000, 8, 4
    plan = embax.plan(feature(table_spec("a", rows, dim), inputs=(None, 2)), mesh=line_of(shards), placement=placement)
    stack = plan.stacks[0]
    tables = embax.from_arrays(plan, {"a": {"table": np.ones((rows, dim), np.float32)}})
    batch = embax.preprocess(plan, np.zeros((8, 2), int))
    quantize = jax.jit(embax.quantize_tables, static_argnums=0).lower(plan, tables).compile()
    lookup = jax.jit(embax.lookup, static_argnums=0).lower(plan, quantize(tables), batch).compile()
    own = stack.local_rows * (stack.local_dim + 8)
    # The zeros that a loop begins with, and blocks.
    assert quantize.memory_analysis().temp_size_in_bytes < own + 100_000
    assert lookup.memory_analysis().temp_size_in_bytes < 100_000 < own
    assert "all-gather" not in quantize.as_text()


@pytest.mark.parametrize(("made", "used"), [("replicated", "row"), ("row", "column"), ("column", None), (None, "row")])
def test_rows_of_another_plan(made, used):
    plans = {
        name: embax.plan(
            feature(table_spec("a", 16, 8), inputs=(None, 3)),
            **({} if name is None else {"mesh": line_of(4), "placement": name}),
        )
        for name in (made, used)
    }
    served = embax.quantize_tables(plans[made], embax.init(plans[made], jax.random.key(0)))
    batch = embax.preprocess(plans[used], np.zeros((4, 3), int))
    with pytest.raises(ValueError, match=r'stack "a": the table lies .* by embax.from_arrays.*, and quantize those'):
        embax.lookup(plans[used], served, batch)
    if "column" in (made, used):  # an array of the host does not say how it lies, but how its rows are cut
        text = r"quantized in parts of \d columns, and a device of the plan has \d; quantize the tables of this plan"
        with pytest.raises(ValueError, match=text):
            embax.lookup(plans[used], jax.tree.map(np.asarray, served), batch)
