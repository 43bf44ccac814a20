"""Laws 1 and 2 on a mesh: whatever the tables, ids, placement and mesh, the step is that of the float64 oracle."""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from battery import OPTIMIZERS as BATTERY
from helpers import feature, line_of, table_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import embax
from embax import kernels

# Every example compiles programs of its own.
EXAMPLES = int(os.environ.get("EMBAX_EXAMPLES", "6"))
_seen = itertools.count(1)
PLACEMENTS = ("row", "table", "column", "replicated")
# Those of the battery whose slot variables have the oracle's names; each is made once, so that programs are shared.
OPTIMIZERS = {
    name: (case.make(), case) for name, case in BATTERY.items() if name not in ("custom", "optax", "adagrad_callable")
}


pytestmark = pytest.mark.usefixtures("eight_devices")


def _grid(batch_axes, table_axes, axis_type=AxisType.Auto):
    return embax.Devices(jax.make_mesh((2, 2), ("d", "m"), axis_types=(axis_type,) * 2), batch_axes, table_axes)


MESHES = {
    "one": lambda: line_of(1),
    "two": lambda: line_of(2),
    "three": lambda: line_of(3),
    "apart": lambda: _grid("d", "m"),
    "both": lambda: _grid("d", ("m", "d"), AxisType.Explicit),
    "copies": lambda: _grid(("m", "d"), "m"),
    "eight": lambda: line_of(8),
}


@st.composite
def cases(draw):
    """Returns tables, features on them, ids as lists, and where everything lies."""
    names = [f"t{i}" for i in range(draw(st.integers(1, 3)))]
    mesh = draw(st.sampled_from(sorted(MESHES)))
    # Three devices do not divide any of these dimensions, and eight only one of them.
    places = st.sampled_from([place for place in PLACEMENTS if mesh != "three" or place != "column"])
    dims = st.sampled_from([8] if mesh == "eight" else [4, 8])
    rows = {name: draw(st.integers(1, 20)) for name in names}
    features = {f"f_{name}": name for name in names}
    if draw(st.booleans()):
        features["f_shared"] = names[0]
    samples = draw(st.integers(1, 7))
    return {
        "rows": rows,
        "dims": {name: draw(dims) for name in names},
        "combiners": {name: draw(st.sampled_from(oracle.COMBINERS)) for name in names},
        "features": features,
        "dense": {name: draw(st.booleans()) for name in features},
        "ids": {name: draw(_ids(rows[table], samples)) for name, table in features.items()},
        "placement": {name: draw(places) for name in names},
        "mesh": mesh,
        "optimizer": draw(st.sampled_from(sorted(OPTIMIZERS))),
        "seed": draw(st.integers(0, 999)),
    }


def _ids(rows, samples):
    """Returns up to three ids a sample; some are of no row, and in some batches one is hot."""
    anything = st.integers(-2, rows + 1)
    one = st.one_of(anything, st.just(0))
    return st.lists(st.lists(one, max_size=3), min_size=samples, max_size=samples)


def _plan(case, **where):
    optimizer = OPTIMIZERS[case["optimizer"]][0]
    tables = {
        name: table_spec(name, rows, case["dims"][name], optimizer, case["combiners"][name])
        for name, rows in case["rows"].items()
    }
    features = {
        name: feature(tables[table], name, (None, 3) if case["dense"][name] else (None,), out_of_range="drop")
        for name, table in case["features"].items()
    }
    return embax.plan(features, **where)


def _given(case, name):
    """Returns a feature's ids as they are given to preprocess: dense ids are filled up with an id of no row."""
    ids = case["ids"][name]
    return np.array([sample + [-1] * (3 - len(sample)) for sample in ids]) if case["dense"][name] else ids


def _check(case, backend):
    rng = np.random.default_rng(case["seed"])
    arrays = {
        name: {"table": rng.normal(size=(rows, case["dims"][name])).astype(np.float32)}
        for name, rows in case["rows"].items()
    }
    plan = _plan(case, mesh=MESHES[case["mesh"]](), placement=case["placement"], backend=backend)
    samples = {name: [[i for i in sample if 0 <= i < case["rows"][table]] for sample in case["ids"][name]]
               for name, table in case["features"].items()}  # fmt: skip
    shapes = {name: (len(samples[name]), case["dims"][table]) for name, table in case["features"].items()}
    gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(tables, batch, gradients):
        activations, residuals = embax.lookup(plan, tables, batch)
        return activations, embax.update(plan, tables, residuals, gradients, jnp.int32(0))

    batch = embax.preprocess(plan, {name: _given(case, name) for name in case["features"]})
    tables = embax.from_arrays(plan, arrays)
    start = jax.tree.map(np.asarray, embax.to_arrays(plan, tables))
    activations, tables = step(tables, batch, gradients)
    after = jax.tree.map(np.asarray, embax.to_arrays(plan, tables))

    for name, table in case["features"].items():
        wanted = oracle.pool(arrays[table]["table"], samples[name], None, case["combiners"][table])
        np.testing.assert_allclose(activations[name], wanted, rtol=2e-5, atol=2e-5, err_msg=name)
    for table, found in after.items():
        _check_table(case, table, start[table], found, samples, gradients)


def _check_table(case, table, before, after, samples, gradients):
    of = OPTIMIZERS[case["optimizer"]][1]
    features = [name for name, of in case["features"].items() if of == table]
    bags = [bag for name in features for bag in samples[name]]
    stacked = np.concatenate([gradients[name] for name in features])
    slots = {name: value for name, value in before.items() if name != "table"}
    wanted, wanted_slots = oracle.update(
        before["table"], slots, bags, None, case["combiners"][table], stacked, of.oracle_name,
        step=0, hyper=of.hyper(0), **of.modifiers,
    )  # fmt: skip
    untouched = sorted(set(range(case["rows"][table])) - {i for bag in bags for i in bag})
    for name, value in {"table": wanted, **wanted_slots}.items():
        np.testing.assert_array_equal(after[name][untouched], before[name][untouched], err_msg=f"{table} {name}")
        np.testing.assert_allclose(after[name], value, rtol=2e-5, atol=2e-5, err_msg=f"{table} {name}")


_NO_IDS = {
    "rows": {"t0": 1, "t1": 20},
    "dims": {"t0": 4, "t1": 4},
    "combiners": {"t0": "mean", "t1": "sqrtn"},
    "features": {"f_t0": "t0", "f_t1": "t1"},
    "dense": {"f_t0": False, "f_t1": True},
    "ids": {"f_t0": [[], []], "f_t1": [[], [19, 19, 19]]},
    "placement": {"t0": "row", "t1": "row"},
    "mesh": "three",
    "optimizer": "adagrad",
    "seed": 0,
}


@settings(max_examples=EXAMPLES)
@given(case=cases())
@example(case=_NO_IDS)
def test_a_step_on_a_mesh_is_the_oracles(case):
    if next(_seen) % 16 == 0:
        jax.clear_caches()  # too many programs use up the process's memory maps
    _check(case, "reference" if case["seed"] % 4 == 0 or kernels.get("cpu").unavailable() else "cpu")
