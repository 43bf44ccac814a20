"""The command that times a step of given tables: what it refuses, what it writes, that a wrong contender is noticed."""

import collections
import json

import jax
import numpy as np
import pytest

typer = pytest.importorskip("typer", reason="needs the train extra")
optax = pytest.importorskip("optax", reason="needs the train extra")

from typer.testing import CliRunner  # noqa: E402

import embax  # noqa: E402
from embax import kernels  # noqa: E402
from embax.cli import bench as command  # noqa: E402
from embax.cli.errors import CommandError  # noqa: E402
from embax.cli.plan import OPTIMIZERS  # noqa: E402
from embax.tasks import bench as task  # noqa: E402

FEW = {"batch_size": 16, "turns": 1}
ONE_TABLE = {
    "tables": {"item": {"vocabulary_size": 300, "embedding_dim": 4}},
    "features": {"bag": {"table": "item"}, "one": {"table": "item", "valency": 1}},
}
# Every form of feature, every combiner.
FORMS = {
    "tables": {
        name: {"vocabulary_size": 90, "embedding_dim": dim, "combiner": name, "optimizer": "sgd"}
        for name, dim in (("sum", 4), ("mean", 4), ("sqrtn", 3))
    },
    "features": {
        **{f"lists_{table}": {"table": table} for table in ("sum", "mean", "sqrtn")},
        **{f"rectangle_{table}": {"table": table, "valency": 3} for table in ("mean", "sqrtn")},
        "sequence": {"table": "sum", "positions": 2},
        "pooled": {"table": "mean", "positions": 2, "valency": 3},
    },
}


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def best_only(monkeypatch):
    """The backend of this machine's choice alone, to compile less; returns its name as a contender."""
    best = kernels.choose().name
    monkeypatch.setattr(kernels, "REGISTRY", {best: kernels.REGISTRY[best]})
    return f"embax {best}"


def _written(tmp_path, spec):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))
    return path


def _features(tmp_path, spec):
    return command.read_spec(_written(tmp_path, spec))


def test_what_is_shown_and_written(tmp_path, capsys):
    target = tmp_path / "figures.json"
    command.bench(_written(tmp_path, ONE_TABLE), 16, 2, 3, 1.0, 4.0, target)
    shown, found = capsys.readouterr().out, json.loads(target.read_text())
    backends = [name for name in kernels.REGISTRY if kernels.get(name).unavailable() is None]
    names = [*(f"embax {name}" for name in backends), task.DENSE]
    assert list(found["contenders"]) == names
    for name, figures in found["contenders"].items():
        assert all(value > 0 for value in figures.values())
        assert figures["step_ms_min"] <= figures["step_ms_median"]
        assert figures["samples_per_second"] == pytest.approx(16e3 / figures["step_ms_median"])
        assert figures["bytes"] == 2 * 300 * 4 * 4
        assert f"\n{name} " in shown
    assert found["contenders"][task.DENSE]["times_faster_than_peer"] == 1
    assert (found["batch_size"], found["turns"], found["seed"], found["exponent"]) == (16, 2, 3, 1.0)
    assert found["max_bytes"] == 4e9 and found["lists"] == ["bag"]
    assert found["ids_a_step"] == 16 + 36 + 8 + 7 + 6 + 5 + 4 + 3 + 2
    assert found["tables"]["item"] == {
        "vocabulary_size": 300,
        "embedding_dim": 4,
        "dtype": "float32",
        "combiner": "sum",
        "optimizer": "Adagrad",
        "peer": "optax.adagrad with eps=0",
        "compared": True,
    }
    assert 0 < found["rows_compared"] <= 300 and "item: Adagrad beside optax.adagrad with eps=0\n" in shown
    assert "touched rows agree with the peer's" in shown and "bag: 0 to 8 ids a sample" in shown


def test_options(tmp_path, best_only):
    app = typer.Typer()
    app.command()(command.bench)
    target, spec = tmp_path / "f.json", str(_written(tmp_path, ONE_TABLE))
    options = ["--batch-size", "4", "--turns", "1", "--seed", "5", "--exponent", "0", "--max-memory", "1e-4"]
    assert CliRunner().invoke(app, [spec, *options, "--json", str(target)], catch_exceptions=False).exit_code == 0
    found = json.loads(target.read_text())
    assert (found["batch_size"], found["seed"], found["exponent"], found["max_bytes"]) == (4, 5, 0, 1e5)
    assert CliRunner().invoke(app, ["--turns", "0"]).exit_code == 2


def test_the_default_is_as_large_as_it_says():
    stacks = embax.plan(command.default_features()).stacks
    assert sum(map(task._stack_bytes, stacks)) == pytest.approx(186e6, rel=0.01)
    assert "186 MB" in command.bench.__doc__ and "186 MB" in command.default_features.__doc__


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_agrees_or_is_said_to_differ(tmp_path, optimizer, best_only):
    spec = {
        "tables": {"item": {"vocabulary_size": 40, "embedding_dim": 4, "optimizer": optimizer}},
        "features": {"x": {"table": "item", "valency": 3}},
    }
    features = _features(tmp_path, spec)
    measured = task.run(features, task.Settings(**FEW))
    peer = task.peer_of(measured.plan.stacks[0])
    assert peer.same == (measured.rows_compared > 0) != ("the nearest" in peer.text)
    if optimizer == "rowwise_adagrad":  # were it called the same, it would be noticed
        task_peers = {**task.PEERS, embax.RowwiseAdagrad: peer._replace(same=True)}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(task.BenchError, match="disagree"):
            patch.setattr(task, "PEERS", task_peers)
            task.run(features, task.Settings(**FEW))


def test_every_form_and_combiner_agrees(tmp_path, best_only):
    measured = task.run(_features(tmp_path, FORMS), task.Settings(**FEW))
    assert measured.rows_compared > 100


def test_narrow_tables_are_not_compared_with_the_peer(tmp_path, best_only):
    tables = {"item": {"vocabulary_size": 40, "embedding_dim": 4, "optimizer": "sgd", "dtype": "float16"}}
    spec = {"tables": tables, "features": {"x": {"table": "item", "valency": 1}}}
    measured = task.run(_features(tmp_path, spec), task.Settings(**FEW))
    assert measured.rows_compared == 0 and len(measured.contenders) == 2
    assert "its gradients and slots are float16, embax's float32" in task.peer_of(measured.plan.stacks[0]).text


def _other_rate(monkeypatch):
    peer = task.Peer(lambda o: optax.adagrad(1.01 * o.learning_rate, 0.1, eps=0.0), True, "wrong")
    monkeypatch.setitem(task.PEERS, embax.Adagrad, peer)


def _other_ids(monkeypatch):
    monkeypatch.setattr(
        task, "_dense_ids", lambda feature, ids, good=task._dense_ids: (good(feature, ids)[0] // 2, None)
    )


def _other_gains(monkeypatch):
    monkeypatch.setattr(task, "_gain", lambda combiner, count: np.ones_like(count, float) * 1.5)


@pytest.mark.parametrize("broken", [_other_rate, _other_ids, _other_gains])
def test_a_wrong_peer_is_noticed(tmp_path, monkeypatch, broken, best_only):
    broken(monkeypatch)
    text = r"spec.json: embax \w+ and dense \+ optax disagree: .* against .*; nothing was timed"
    with pytest.raises(CommandError, match=text):
        command.bench(_written(tmp_path, ONE_TABLE), 16, 1, 0, 1.0, 4.0, None)


def test_a_row_that_is_not_a_number_is_noticed(tmp_path):
    rows = np.ones((2, 3), np.float32)
    good, bad = (
        task.Contender(name, 0, given, list, lambda *_: None, lambda state, table, ids: state)
        for name, given in (("a", rows), ("b", np.where(rows > 0, np.nan, 0)))
    )
    with pytest.raises(task.BenchError, match=r'a and b disagree: table "item", row 5, column 0, .* \(2 of 2 touched'):
        task._compare(good, bad, "item", np.array([5, 7]), rows, 1e-7)
    task._compare(good, good, "item", np.array([5, 7]), rows, 1e-7)


def test_who_does_not_fit_is_left_out(tmp_path, capsys, best_only):
    target = tmp_path / "f.json"
    # 9,600 bytes of tables and slots; the peer needs 4,800 more for its gradients.
    command.bench(_written(tmp_path, ONE_TABLE), 16, 1, 0, 1.0, 2e-5, target)
    found, shown = json.loads(target.read_text()), capsys.readouterr().out
    assert list(found["contenders"]) == [best_only]
    assert found["contenders"][best_only]["times_faster_than_peer"] is None
    reason = (
        "its tables, slots and dense gradients take 1.44e-05 GB beside 9.6e-06 GB of others, and --max-memory is 2e-05"
    )
    assert found["left_out"][task.DENSE].startswith(reason) and f"{task.DENSE} is left out: {reason}" in shown
    assert found["rows_compared"] == 0 and "agree" not in shown
    command.bench(_written(tmp_path, ONE_TABLE), 16, 1, 0, 1.0, 2.41e-5, target)
    assert list(json.loads(target.read_text())["contenders"]) == [best_only, task.DENSE]


def test_a_backend_that_cannot_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.get("cpu"), "unavailable", lambda: "no compiler")
    contenders, left_out = task._contenders(_features(tmp_path, ONE_TABLE), task.Settings(**FEW))
    assert left_out == {"embax cpu": "no compiler", "embax cuda": "the default JAX backend is cpu"}
    assert [c.name for c in contenders] == ["embax reference", task.DENSE]


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        (
            ONE_TABLE,
            {"max_memory": 1e-6},
            "the tables and slots take 9.6e-06 GB, and --max-memory is 1e-06 GB; raise it",
        ),
        (ONE_TABLE, {"exponent": float("nan")}, "--exponent nan must be a finite number"),
        (ONE_TABLE, {"max_memory": float("inf")}, "--max-memory inf must be a finite number"),
        (ONE_TABLE, {"json_path": "nowhere/f.json"}, "--json .*: there is no folder .*nowhere; make it"),
        (ONE_TABLE, {"json_path": "."}, "--json .* is a folder; name a file"),
        ({"tables": {}, "features": {}}, {}, "spec.json: plan: there are no features"),
        ({"tables": {}}, {}, 'must be {"tables": '),
        ({**ONE_TABLE, "tables": {"item": {"vocabulary_size": 10**9, "embedding_dim": 64}}}, {}, "take 512 GB, and"),
    ],
)
def test_refusals(tmp_path, spec, options, text):
    options = {"seed": 0, "exponent": 1.0, "max_memory": 4.0, "json_path": None, **FEW, **options}
    if options["json_path"] is not None:
        options["json_path"] = tmp_path / options["json_path"]
    with pytest.raises(CommandError, match=text):
        command.bench(_written(tmp_path, spec), **options)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5, 60.0])
@pytest.mark.parametrize("rows", [1, 2, 997, 2**31 - 2])
def test_ids_follow_the_law(rows, exponent):
    ids = task.zipf_ids(rows, (20000,), exponent, np.random.default_rng(0))
    assert ids.dtype == np.int32 and 0 <= ids.min() and ids.max() < rows
    if rows == 997 and exponent < 2:
        counts = np.array([count for _, count in collections.Counter(ids.tolist()).most_common()])
        # The share of the first is that of the power law's integral from 1 to 2.
        edges = np.log([1, 2, 998]) if exponent == 1 else np.array([1.0, 2.0, 998.0]) ** (1 - exponent)
        share = (edges[1] - edges[0]) / (edges[2] - edges[0])
        assert counts[0] / 20000 == pytest.approx(share, rel=0.1, abs=2e-3)
    again = task.zipf_ids(rows, (20000,), exponent, np.random.default_rng(0))
    np.testing.assert_array_equal(ids, again)
