"""What may be mixed up on a mesh: tables, batches and devices of another plan; narrow ids; weights behind prefetch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import feature, line_of, table_spec
from jax.sharding import AbstractMesh, AxisType, Mesh

import embax
import embax.nnx

ROWS, DIM = 16, 8  # a multiple of the devices: shapes agree whatever the plan


pytestmark = pytest.mark.usefixtures("eight_devices")


def _line():
    return line_of(4)


def _feature(name="item", rows=ROWS, optimizer=None, **settings):
    normal = jax.nn.initializers.normal(1.0)
    return feature(
        table_spec(name, rows, DIM, optimizer, "mean", initializer=normal, **settings), f"of_{name}", (None, 3)
    )


def _plans():
    spec = _feature()
    plans = {p: embax.plan(spec, mesh=_line(), placement=p) for p in ("row", "table", "column", "replicated")}
    return {"alone": embax.plan(spec), **plans}


@pytest.mark.parametrize(
    ("made", "used"),
    [("alone", "row"), ("replicated", "row"), ("row", "replicated"), ("row", "column"), ("row", "alone")],
)
def test_tables_of_another_plan(made, used):
    plans = _plans()
    tables = embax.init(plans[made], jax.random.key(0))
    batch = embax.preprocess(plans[used], np.zeros((4, 3), int))
    with pytest.raises(ValueError, match="stand in another order: carry them over by embax.from_arrays"):
        embax.lookup(plans[used], tables, batch)
    moved = embax.from_arrays(plans[used], embax.to_arrays(plans[made], tables))
    wanted = embax.lookup(plans[made], tables, embax.preprocess(plans[made], np.zeros((4, 3), int)))[0]
    np.testing.assert_allclose(embax.lookup(plans[used], moved, batch)[0], wanted, rtol=2e-5, atol=2e-5)


def test_a_batch_of_another_plan():
    features = [_feature("a", 6), _feature("b", 9)]
    plans = [embax.plan(features, mesh=_line(), placement=placement) for placement in ("row", "replicated")]
    batch = embax.preprocess(plans[1], [np.zeros((4, 3), int)] * 2)
    with pytest.raises(ValueError, match='stack "a_b": the batch was made for tables at other rows of their stack'):
        embax.lookup(plans[0], embax.init(plans[0], jax.random.key(0)), batch)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_prefetch_of_narrow_ids(dtype):
    rows = 40_000 if dtype == "int16" else np.iinfo(dtype).max
    ids = np.random.default_rng(0).integers(0, min(rows, np.iinfo(dtype).max), (4, 3)).astype(dtype)
    layer = embax.nnx.FeatureEmbed({"x": _feature(rows=rows)}, rngs=nnx.Rngs(0), mesh=_line())
    small = embax.nnx.prefetch(layer, {"item": ids})
    np.testing.assert_allclose(small({"x": ids})["x"], layer({"x": ids})["x"], rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="integer"):
        embax.nnx.prefetch(layer, {"item": ids.astype(np.float32)})


def test_weights_behind_prefetch():
    layer = embax.nnx.FeatureEmbed({"x": _feature()}, rngs=nnx.Rngs(0), mesh=_line())
    ids = np.random.default_rng(0).integers(0, ROWS, (4, 3))

    def loss(weights, layer):
        return (layer({"x": ids}, {"x": weights})["x"] ** 2).sum()

    weights = jnp.linspace(0.5, 2.0, 12).reshape(4, 3)
    found = jax.grad(loss)(weights, embax.nnx.prefetch(layer, {"item": ids}))
    np.testing.assert_allclose(found, jax.grad(loss)(weights, layer), rtol=2e-5, atol=2e-5)
    assert np.abs(found).min() > 0


def test_rounding_at_random_differs_between_devices():
    optimizer = embax.SGD(1.0, stochastic_rounding=7)
    ones = jax.nn.initializers.ones
    spec = feature(table_spec("item", 64, DIM, optimizer, initializer=ones, dtype="bfloat16"), "x", (None, 1))
    plan = embax.plan(spec, mesh=_line())
    tables = embax.init(plan, jax.random.key(0))
    _, residuals = embax.lookup(plan, tables, embax.preprocess(plan, np.arange(64)[:, None]))
    gradients = embax.row_gradients(plan, residuals, jnp.full((64, DIM), 1e-3, jnp.float32))
    after = embax.to_arrays(plan, embax.apply_row_gradients(plan, tables, gradients, 0))["item"]["table"]
    first = np.asarray(after, np.float32)[:4]  # the rows that stand first on their devices
    assert len({row.tobytes() for row in first}) > 1


def test_devices_that_are_refused():
    with pytest.raises(TypeError, match="batch_axes=5 must be the name of an axis of the mesh, or several"):
        embax.Devices(_line(), batch_axes=5)
    with pytest.raises(ValueError, match="wire_dtype='foo' must be bfloat16 or float16"):
        embax.Devices(_line(), wire_dtype="foo")
    with pytest.raises(ValueError, match="the mesh has Manual axes"):
        embax.Devices(Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(AxisType.Manual,)))
    plan = embax.plan(_feature(), mesh=AbstractMesh((4,), ("x",)))
    with pytest.raises(ValueError, match="of an AbstractMesh, which has no devices; it is for planning only"):
        embax.init(plan, jax.random.key(0))
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        embax.costs.costs(plan, 0)
