"""lookup and update around the battery: quantization, activation dtypes, stacks, shared tables, mismatches."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import feature, table_spec

import embax


def _tables(plan, seed=0):
    return embax.init(plan, jax.random.key(seed))


@pytest.mark.parametrize(("combiner", "buckets"), [("sum", 2), ("mean", 16), ("sqrtn", 256)])
@pytest.mark.parametrize("ragged", [False, True])
def test_quantized_rows(combiner, buckets, ragged, backend):
    config = embax.QuantizationConfig(min_value=-1.0, max_value=1.5, num_buckets=buckets)
    table = table_spec(combiner=combiner, quantization_config=config)
    plan = embax.plan(feature(table, inputs=(None,) if ragged else (None, 3)), backend=backend)
    tables, ids = _tables(plan), np.random.default_rng(0).integers(0, 50, (9, 3))
    batch = embax.preprocess(plan, ids.tolist() if ragged else ids)
    activations, residuals = embax.lookup(plan, tables, batch)
    rows = np.asarray(tables["item"].table)
    wanted = oracle.pool(rows, ids.tolist(), None, combiner, config.as_tuple())
    np.testing.assert_allclose(activations, wanted, rtol=1e-5, atol=1e-5)
    # The gradient passes straight through: the update is that of the same activations unquantized.
    plain = embax.plan(feature(table_spec(combiner=combiner), inputs=(None,) if ragged else (None, 3)), backend=backend)
    _, plain_residuals = embax.lookup(plain, tables, batch)
    one = embax.update(plan, tables, residuals, activations, 0)
    two = embax.update(plain, tables, plain_residuals, activations, 0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), one, two)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activation_dtype(dtype, backend):
    table = table_spec(dtype="bfloat16", combiner="mean")
    plan = embax.plan(feature(table), activation_dtype=dtype, backend=backend)
    tables = _tables(plan)
    activations, residuals = embax.lookup(plan, tables, embax.preprocess(plan, np.array([[1, 2, 3]])))
    wanted = np.asarray(tables["item"].table, np.float64)[[1, 2, 3]].mean(0)
    assert activations.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(activations[0], np.float64), wanted, atol=2e-2 if dtype == "bfloat16" else 2e-3
    )
    after = embax.update(plan, tables, residuals, activations, 0)
    assert after["item"].table.dtype == jnp.bfloat16


def test_stacks_do_not_change_results(backend):
    rng, results = np.random.default_rng(0), []
    ids = {"a": rng.integers(0, 50, (8, 3)), "b": [[1], [], [2, 2], [0], [], [7], [7], [8]], "c": rng.integers(0, 9, 8)}
    gradients = {k: jnp.asarray(rng.normal(size=(8, 4)), jnp.float32) for k in ids}
    for stacks in ("auto", "none", {"left": ["a", "c"]}, {"one": ["c", "b", "a"]}):
        features = {
            "a": feature(table_spec("a", combiner="mean"), "a", (8, 3)),
            "b": feature(table_spec("b", rows=9, combiner="sqrtn"), "b", (8,)),
            "c": feature(table_spec("c", rows=9), "c", (8,)),
        }
        plan = embax.plan(features, stacks=stacks, backend=backend)
        tables = _tables(plan)
        activations, residuals = embax.lookup(plan, tables, embax.preprocess(plan, ids))
        results.append((activations, embax.to_arrays(plan, embax.update(plan, tables, residuals, gradients, 0))))
    for other in results[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), results[0], other)


def test_two_features_of_one_table_take_one_step(backend):
    table = table_spec(optimizer=embax.Adagrad(0.5), dim=2)
    features = [feature(table, "one", (None,)), feature(table, "two", (None,))]
    plan = embax.plan(features, backend=backend)
    tables = _tables(plan)
    ids = [[[1, 2], [1]], [[2], [1, 1]]]
    gradients = [jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[10.0, 20.0], [30.0, 40.0]])]
    _, residuals = embax.lookup(plan, tables, embax.preprocess(plan, ids))
    after = embax.update(plan, tables, residuals, gradients, 0)["item"]
    before = {k: np.asarray(v) for k, v in embax.to_arrays(plan, tables)["item"].items()}
    wanted, slots = oracle.update(
        before["table"],
        {"accumulator": before["accumulator"]},
        ids[0] + ids[1],
        None,
        "sum",
        np.concatenate(gradients),
        "adagrad",
        hyper={"learning_rate": 0.5},
    )
    np.testing.assert_allclose(after.table, wanted, rtol=1e-5)
    np.testing.assert_allclose(after.slots.accumulator, slots["accumulator"], rtol=1e-5)


def test_weights_are_differentiable_inside_jit(backend):
    plan = embax.plan(feature(table_spec(combiner="mean")), backend=backend)
    tables, ids = _tables(plan), jnp.array([[1, 2, 3], [4, 4, 5]])
    rng = np.random.default_rng(0)
    weights, target = rng.uniform(0.5, 2, (2, 3)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)

    @jax.jit
    def loss(weights):
        return (embax.lookup(plan, tables, embax.preprocess_traced(plan, ids, weights))[0] * target).sum()

    rows = np.asarray(tables["item"].table)
    wanted = oracle.weight_gradients(rows, ids.tolist(), weights.tolist(), "mean", target)
    np.testing.assert_allclose(jax.grad(loss)(weights), np.asarray(wanted), rtol=1e-4, atol=1e-5)


def test_tables_go_to_arrays_and_back():
    features = [
        feature(table_spec("a", rows=7, optimizer=embax.F2A(0.1)), "fa"),
        feature(table_spec("b", rows=9, optimizer=embax.F2A(0.1)), "fb"),
    ]
    plan = embax.plan(features)
    tables = _tables(plan)
    again = embax.from_arrays(embax.plan(features, stacks="none"), embax.to_arrays(plan, tables))
    assert np.array_equal(again["b"].table, tables["a_b"].table[7:])
    whole = embax.from_arrays(plan, embax.to_arrays(plan, tables))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, tables))
    fresh = embax.from_arrays(plan, {"a": {"table": np.zeros((7, 4))}, "b": {"table": np.ones((9, 4))}})
    assert fresh["a_b"].slots.local_step.shape == (16, 1) and float(fresh["a_b"].slots.accumulator[0, 0]) == np.float32(
        0.1
    )


def test_arrays_outlive_donation_and_numpy_files(tmp_path):
    plan = embax.plan(feature(table_spec(dtype="bfloat16")))
    tables = _tables(plan)
    arrays = embax.to_arrays(plan, tables)["item"]
    np.savez(tmp_path / "item.npz", **arrays)
    before = np.asarray(arrays["table"])
    jax.jit(lambda t: jax.tree.map(jnp.zeros_like, t), donate_argnums=0)(tables)
    assert np.array_equal(arrays["table"], before)
    with np.load(tmp_path / "item.npz") as stored:
        again = embax.from_arrays(plan, {"item": dict(stored)})
    assert np.array_equal(again["item"].table, before) and again["item"].table.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match='from_arrays: table "item" is given as a ndarray; give {"table": array}'):
        embax.from_arrays(plan, {"item": before})


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"a": {}}, r'from_arrays: table "a" has parts \[\]; it takes "table" and of its optimizer'),
        ({"a": {"table": np.zeros((2, 4))}}, r'table of table "a" has shape \(2, 4\); it must be \(7, 4\)'),
        ({"b": {}}, r"the plan has tables \['a'\], and arrays are given for \['b'\]"),
        ({"a": {"table": np.zeros((7, 4)), "velocity": 0}}, r"parts \['table', 'velocity'\]"),
    ],
)
def test_arrays_that_do_not_fit(arrays, text):
    plan = embax.plan(feature(table_spec("a", rows=7), "fa"))
    with pytest.raises(ValueError, match=text):
        embax.from_arrays(plan, arrays)


def test_what_does_not_belong_together_is_named():
    plan = embax.plan({"x": feature(table_spec(), "x")})
    other = embax.plan({"y": feature(table_spec("user", rows=7), "y")})
    tables, batch = _tables(plan), embax.preprocess(plan, {"x": np.zeros((2, 3), int)})
    activations, residuals = embax.lookup(plan, tables, batch)
    with pytest.raises(ValueError, match=r"the plan has stacks \['user'\], and the tables given are \['item'\]"):
        embax.lookup(other, tables, batch)
    with pytest.raises(ValueError, match=r"the plan has stacks \['user'\], and the batch has \['item'\]"):
        embax.lookup(other, _tables(other), batch)
    with pytest.raises(TypeError, match="a dict is not an IdBatch; pass what preprocess returned"):
        embax.lookup(plan, tables, {})
    with pytest.raises(TypeError, match="a dict is not the Residuals that lookup returned"):
        embax.update(plan, tables, {}, activations)
    with pytest.raises(ValueError, match=r"activation gradients must have the structure of the features given to plan"):
        embax.update(plan, tables, residuals, activations["x"])
    with pytest.raises(
        ValueError, match=r'feature "x": the activation gradient is float32\(3, 4\); it must be floating'
    ):
        embax.update(plan, tables, residuals, {"x": jnp.ones((3, 4))})
    smaller = {"item": embax.TableState(tables["item"].table[:-1], tables["item"].slots)}
    with pytest.raises(ValueError, match=r'stack "item": the table has shape \(49, 4\), and the plan says \(50, 4\)'):
        embax.lookup(plan, smaller, batch)
    schedule = embax.plan({"x": feature(table_spec(optimizer=embax.SGD(lambda s: 0.1)), "x")})
    with pytest.raises(ValueError, match="learning_rate is a callable of the step, and step is None; pass step="):
        embax.update(schedule, _tables(schedule), residuals, activations)


def test_backends_are_chosen_by_name_environment_and_availability(monkeypatch):
    from embax import kernels

    monkeypatch.setenv("EMBAX_BACKEND", "reference")
    assert kernels.choose() == ("reference", "forced by EMBAX_BACKEND")
    assert kernels.choose("reference").reason == "named in the plan"
    monkeypatch.setenv("EMBAX_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match=r"backend 'gpu' \(forced by EMBAX_BACKEND\) does not exist; there are cpu, cuda, reference"
    ):
        kernels.choose()
    monkeypatch.delenv("EMBAX_BACKEND")
    monkeypatch.setattr(kernels.get("cpu"), "unavailable", lambda: "switched off")
    assert kernels.choose() == ("reference", "not cpu: switched off; not cuda: the default JAX backend is cpu")
    with pytest.raises(ValueError, match=r"backend 'cpu' \(named in the plan\) cannot run here: switched off"):
        kernels.choose("cpu")


@pytest.mark.parametrize("ragged", [False, True])
def test_all_of_it_under_x64(ragged):
    with jax.enable_x64(True):
        table = table_spec(combiner="mean", optimizer=embax.Adam(0.1))
        plan = embax.plan(feature(table, inputs=(None,) if ragged else (None, 3)))
        ids = [[1, 2, 2**33], [4, 4, 49]]
        with pytest.raises(ValueError, match="id 8589934592 >= vocabulary_size 50"):
            embax.preprocess(plan, ids if ragged else np.array(ids))
        ids[0][2] = 3
        tables = _tables(plan)
        batch = embax.preprocess(plan, ids if ragged else np.array(ids))
        activations, residuals = embax.lookup(plan, tables, batch)
        assert activations.dtype == jnp.float32
        after = embax.update(plan, tables, residuals, activations, 3)
        merged = embax.row_gradients(plan, residuals, activations)["item"]
        applied = embax.apply_row_gradients(plan, tables, {"item": merged}, 3)
        np.testing.assert_allclose(applied["item"].table, after["item"].table, rtol=1e-5)
        assert (merged + merged).count() == 5 and after["item"].table.dtype == jnp.float32
        traced = jax.jit(lambda i: embax.preprocess_traced(plan, i))
        if not ragged:
            wide = traced(jnp.array([[1, 2, 2**33], [4, 4, 49]]))
            assert wide.statistics.out_of_range.tolist() == [[1]]
            assert np.array_equal(embax.lookup(plan, tables, traced(jnp.array(ids)))[0], activations)


def test_lookup_needs_no_slots_and_update_does():
    plan = embax.plan(feature(table_spec()))
    tables, batch = _tables(plan), embax.preprocess(plan, np.zeros((2, 3), int))
    served = {"item": embax.TableState(tables["item"].table, ())}
    activations, residuals = embax.lookup(plan, served, batch)
    with pytest.raises(ValueError, match='stack "item": the slot variables given are not those of Adagrad'):
        embax.update(plan, served, residuals, activations)
    with pytest.raises(TypeError, match=r"the tables must be \{stack: TableState\}"):
        embax.lookup(plan, tables["item"], batch)
    with pytest.raises(TypeError, match=r"gradients are of type RowGradients; give \{stack: RowGradients\}"):
        embax.apply_row_gradients(plan, tables, embax.row_gradients(plan, residuals, activations)["item"])


def test_a_rate_of_no_argument_is_asked_at_every_eager_step():
    rate = [0.5]
    table = table_spec(optimizer=embax.SGD(lambda: rate[0]), initializer=jax.nn.initializers.zeros)
    plan = embax.plan(feature(table))
    tables, ones = _tables(plan), jnp.ones((1, 4))
    _, residuals = embax.lookup(plan, tables, embax.preprocess(plan, np.array([[1, 2, 3]])))
    first = embax.update(plan, tables, residuals, ones)
    rate[0] = 0.25
    second = embax.update(plan, tables, residuals, ones)
    assert float(first["item"].table[1, 0]) == -0.5 and float(second["item"].table[1, 0]) == -0.25
