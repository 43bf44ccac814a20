"""``embax inspect``, ``export`` and ``predict``: what they make of a run with columns of every kind."""

import datetime as dt
import decimal
import gzip
import json
import shutil

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the train extra")
pytest.importorskip("grain", reason="needs the train extra")
pytest.importorskip("typer", reason="needs the train extra")

import pyarrow.csv as csv  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import verbs  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402

from embax.cli.export import _file_names  # noqa: E402

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eight_devices")]
ROWS = 600
LONG = "long " * 30
NAMES = ("a b/c.d", 'quo"te', "日本", "weight", "weight/flag", "table", "embedding", LONG, "flag")


def _some(rng, values, missing=0.0):
    return pa.array([values[i] for i in rng.integers(0, len(values), ROWS)], mask=rng.random(ROWS) < missing)


def every_kind():
    rng = np.random.default_rng(1)
    texts = ["ant", "bee", "dög", ""]
    columns = {name: _some(rng, texts, 0.1) for name in NAMES[:-1]}
    columns |= {
        "flag": _some(rng, [True, False], 0.1),
        "small": pa.array(rng.integers(-2, 2, ROWS), pa.int8()),
        "large": pa.array(rng.integers(2**63, 2**63 + 3, ROWS, np.uint64)),
        "dictionary": _some(rng, texts).dictionary_encode(),
        "large text": _some(rng, texts).cast(pa.large_string()),
        "day": _some(rng, [dt.date(2020, 1, d) for d in (1, 2, 3)], 0.1),
        "cents": _some(rng, [decimal.Decimal("1.50"), decimal.Decimal("2.25")], 0.1),
        "price": pa.array(rng.normal(5, 2, ROWS), mask=rng.random(ROWS) < 0.2),
        "count": rng.integers(0, 9, ROWS),
        "bag": pa.array(
            [None if n == 3 else [texts[i] for i in rng.integers(0, 4, n)] for n in rng.integers(0, 4, ROWS)]
        ),
        "large bag": pa.array(
            [[None if i == 0 else int(i) for i in rng.integers(0, 6, n)] for n in rng.integers(0, 3, ROWS)],
            pa.large_list(pa.int64()),
        ),
        "bag of dictionary": pa.array(
            [["x"], ["y", "x"], []] * (ROWS // 3), pa.list_(pa.dictionary(pa.int32(), pa.string()))
        ),
        "at": pa.array(np.arange(ROWS), pa.timestamp("ms")),
        "label": (np.asarray(rng.random(ROWS)) < 0.4),
    }
    return pa.table(columns)


OPTIONS = ("--label", "label", "--time", "at", "--categorical", "day", "--numeric", "count", "--wide", "table,flag")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return verbs.written(tmp_path_factory.mktemp("data") / "d.parquet", every_kind())


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    code, _, err = verbs.embax("train", data, "--output", output, *verbs.SMALL, *OPTIONS, "--epochs", 1)
    assert (code, err) == (0, [])
    return output


def document(run):
    return json.loads((run / "run.json").read_text("utf-8"))


def test_columns_of_every_kind(run):
    columns = document(run)["columns"]
    assert set(columns["bags"]) == {"bag", "large bag", "bag of dictionary"}
    assert set(columns["numeric"]) == {"price", "cents", "count"}
    assert set(NAMES) < set(columns["categorical"]) and columns["wide"] == ["table", "flag"]
    tables = {table["name"]: table for table in document(run)["tables"]}
    assert {name.split("/", 1)[1] for name in tables} == {*columns["categorical"], *columns["bags"]}
    assert all(table["column"] == name.split("/", 1)[1] for name, table in tables.items())
    assert "embedding/table" not in tables and tables["weight/day"]["rows"] == 4 and tables["weight/flag"]["rows"] == 3
    assert tables["weight/weight/flag"]["rows"] == 5


def test_predictions_are_the_scores_of_the_test(run, data, tmp_path):
    """Whatever else the file has, and without a label."""
    code, out, err = verbs.embax("predict", run, data, tmp_path / "new" / "p.parquet")
    assert (code, err) == (0, []) and "600 rows, by step 8" in out
    found, table = pq.read_table(tmp_path / "new" / "p.parquet"), pq.read_table(data)
    assert found.drop_columns("score").equals(table) and found["score"].type == pa.float32()
    scores = found["score"].to_numpy()
    test = verbs.measures(run)["test", 8]
    last = np.arange(ROWS) >= ROWS - document(run)["rows"]["test"]
    assert roc_auc_score(table["label"].to_numpy()[last], scores[last]) == pytest.approx(test["auc"], abs=1e-9)
    order = np.random.default_rng(0).permutation(ROWS)
    other = table.take(order).drop_columns(["label", "at"]).append_column("more", pa.array(np.arange(ROWS)))
    verbs.written(tmp_path / "o.parquet", other, 37)
    assert verbs.embax("predict", run, tmp_path / "o.parquet", tmp_path / "q.parquet")[0] == 0
    np.testing.assert_allclose(pq.read_table(tmp_path / "q.parquet")["score"].to_numpy(), scores[order], rtol=1e-6)
    assert list(tmp_path.glob("**/*.unfinished")) == []


def test_what_training_did_not_know_counts_as_missing(run, data, tmp_path):
    table = pq.read_table(data).slice(0, 50)
    place = table.column_names.index
    for value in ("never seen", None):
        own = table.set_column(place("weight"), "weight", pa.array([value] * 50, pa.string()))
        own = own.set_column(place("bag"), "bag", pa.array([[value]] * 50, pa.list_(pa.string())))
        verbs.written(tmp_path / f"{value}.parquet", own)
        assert verbs.embax("predict", run, tmp_path / f"{value}.parquet", tmp_path / f"p{value}.parquet")[0] == 0
    one, other = (pq.read_table(tmp_path / f"p{value}.parquet")["score"] for value in ("never seen", None))
    assert one.equals(other)
    own = table.set_column(place("price"), "price", pa.nulls(50, pa.float64()))
    assert verbs.embax("predict", run, verbs.written(tmp_path / "n.parquet", own), tmp_path / "n2.parquet")[0] == 0
    assert np.isfinite(pq.read_table(tmp_path / "n2.parquet")["score"].to_numpy()).all()


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t: t.drop_columns("日本"), 'column "日本" is missing, which the model was trained with'),
        (lambda t: t.append_column("score", t["price"]), 'there is a column "score" already; rename or drop it'),
        (
            lambda t: t.set_column(t.column_names.index("price"), "price", t["日本"]),
            'column "price" is string, and must be',
        ),
        (
            lambda t: t.set_column(t.column_names.index("small"), "small", t["日本"]),
            'column "small" is string, and training',
        ),
        (
            lambda t: t.set_column(t.column_names.index("bag"), "bag", t["日本"]),
            'column "bag" is string, and training had',
        ),
        (lambda t: t.set_column(t.column_names.index("small"), "small", t["bag"]), "and training had single values"),
        (lambda t: t.slice(0, 0), "there are columns, and no rows"),
    ],
)
def test_files_that_do_not_fit_are_one_line(run, data, tmp_path, change, text):
    path = verbs.written(tmp_path / "x.parquet", change(pq.read_table(data)))
    code, out, err = verbs.embax("predict", run, path, tmp_path / "p.parquet")
    assert (code, out, len(err)) == (2, "", 1) and text in err[0] and str(path) in err[0]
    assert [own.name for own in tmp_path.iterdir()] == ["x.parquet"]


@pytest.mark.parametrize(
    "args, text",
    [
        (("inspect", "nowhere"), "nowhere is no folder of a run: there is no run.json; `embax train` makes one"),
        (("inspect",), "name the folder of a run, or give --backend"),
        (("inspect", "RUN", "--column", "weight"), "--column and --value belong together"),
        (("inspect", "RUN", "--column", "z", "--value", "x"), '--column "z" has no embeddings; there are '),
        (("inspect", "RUN", "--column", "table", "--value", "x"), '--column "table" has no embeddings; there are '),
        (
            ("inspect", "RUN", "--column", "weight", "--value", "x"),
            '"x": training met no such value in column "weight"',
        ),
        (("inspect", "RUN", "--column", "small", "--value", "x"), '"x": training met no such value in column "small"'),
        (("inspect", "RUN", "--column", "small", "--value", "1", "--step", "3"), "has not step 3; there are 8"),
        (("export", "RUN", "TO", "--format", "csv"), "--format 'csv' must be one of parquet, npy, safetensors"),
        (("export", "RUN", "TO", "--table", "z"), "--table 'z': there is no such table; there are "),
        (("export", "RUN", "TO", "--step", "3"), "has not step 3; there are 8"),
        (("export", "RUN", "/dev/null"), "/dev/null: File exists"),
        (("predict", "RUN", "nowhere.parquet", "TO"), "nowhere.parquet: there is no such file"),
        (("predict", "RUN", "DATA", "TO", "--step", "3"), "step 3"),
        (("predict", "RUN", "DATA", "TO", "--top", "3"), "--top is for --task retrieval --model mf"),
        (("predict", "RUN", "DATA", "/dev/null/p.parquet"), "/dev/null"),
        (("predict", "RUN", "DATA", "RUN"), "must be a file whose name ends in .parquet"),
        (("predict", "RUN", "DATA", "p.csv"), "TO p.csv must be a file whose name ends in .parquet"),
    ],
)
def test_what_will_not_do_is_one_line(run, data, tmp_path, args, text):
    own = {"RUN": run, "DATA": data, "TO": tmp_path / "to.parquet"}
    code, _, err = verbs.embax(*(own.get(arg, arg) for arg in args))
    assert (code, len(err)) == (2, 1) and text in err[0], err
    assert not (tmp_path / "to.parquet").exists()


@pytest.mark.parametrize(
    "content, text",
    [
        ("", "run.json cannot be read"),
        ("{}", "run.json is of format None, and this embax reads 1; use the embax that wrote it"),
        ('{"format": 1, "task": "click"}', 'run.json has no "model"; it may be damaged: train anew'),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, data, content, text):
    (tmp_path / "run.json").write_text(content)
    for args in (
        ("inspect", tmp_path),
        ("export", tmp_path, tmp_path),
        ("predict", tmp_path, data, tmp_path / "x.parquet"),
    ):
        code, _, err = verbs.embax(*args)
        assert (code, len(err)) == (2, 1) and text in err[0]


def test_a_damaged_checkpoint_is_one_line(run, data, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8" / "tables")
    for args in (("export", tmp_path / "run", tmp_path), ("predict", tmp_path / "run", data, tmp_path / "x.parquet")):
        code, _, err = verbs.embax(*args)
        assert (code, len(err)) == (2, 1) and "checkpoints/8" in err[0]


def test_inspect_shows_the_run(run):
    code, out, err = verbs.embax("inspect", run)
    assert (code, err) == (0, [])
    assert "click, dlrm, finished" in out and "(540 train, 60 test rows)" in out and "checkpoints: 8" in out
    assert all(table["name"] in out for table in document(run)["tables"]) and "split: test, step: 8, auc 0." in out
    code, out, _ = verbs.embax("inspect", "--backend")
    assert code == 0 and out.startswith("backend: ")
    assert "  cuda: off: the default JAX backend is cpu\n  reference: plain XLA, on every platform" in out


def test_half_a_line_of_a_run_that_was_killed_is_no_fault(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "evaluation", "auc"')
    code, out, _ = verbs.embax("inspect", tmp_path / "run")
    assert code == 0 and "split: test, step: 8, auc 0." in out


def test_inspect_shows_neighbours(run, tmp_path):
    from embax.data.vocabulary import load_all

    assert verbs.embax("export", run, tmp_path, "--format", "npy", "--table", "embedding/weight")[0] == 0
    rows = np.load(tmp_path / "embedding.weight.npy")
    known = load_all(run / "vocabularies")["weight"]
    code, out, err = verbs.embax("inspect", run, "--column", "weight", "--value", "dög", "--count", 2)
    assert (code, err) == (0, [])
    head, *found = out.splitlines()
    own = known.row("dög")
    assert head == f'weight "dög" ({known.counts[own - 1]} rows of training), nearest by cosine:'
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    wanted = [row for row in np.argsort(-(unit @ unit[own])) if row not in (0, own)][:2]
    shown = [
        f"{(unit @ unit[own])[row]:>8.4f}  {known.value(row)}  ({known.counts[row - 1]})" for row in map(int, wanted)
    ]
    assert found == shown
    for column, value in (("day", "2020-01-02"), ("flag/x", ""), ("bag", "bee"), ("small", "-2"), ("weight/flag", "")):
        code, _, err = verbs.embax("inspect", run, "--column", column, "--value", value)
        assert code == (2 if column == "flag/x" else 0), err


def test_exports_are_the_rows_of_the_checkpoint(run, tmp_path):
    from safetensors.numpy import load_file

    from embax.data.vocabulary import load_all

    for kind in ("parquet", "npy", "safetensors"):
        code, out, err = verbs.embax("export", run, tmp_path / kind, "--format", kind)
        assert (code, err) == (0, []) and len(out.splitlines()) == len(document(run)["tables"])
    _, state, _ = _opened(run)
    known = load_all(run / "vocabularies")
    names = _file_names(table["name"] for table in document(run)["tables"])
    for table in document(run)["tables"]:
        name, values = names[table["name"]], known[table["column"]].values.to_pylist()
        found = pq.read_table(tmp_path / "parquet" / f"{name}.parquet")
        assert found["id"].to_pylist() == list(range(table["rows"])) and found["value"].to_pylist() == [None, *values]
        rows = np.array(found["embedding"].to_pylist(), np.float32)
        assert rows.shape == (table["rows"], table["dim"])
        np.testing.assert_array_equal(rows, state[table["name"]]["table"])
        np.testing.assert_array_equal(rows, np.load(tmp_path / "npy" / f"{name}.npy"))
        tensors = load_file(tmp_path / "safetensors" / f"{name}.safetensors")
        assert set(tensors) == {"table", "accumulator"}
        np.testing.assert_array_equal(rows, tensors["table"])
        beside = pq.read_table(tmp_path / "npy" / f"{name}.values.parquet")
        assert beside["value"].to_pylist() == [None, *values]


def _opened(run):
    """Returns the trainer, the tables as arrays by name, and the parameters of a run."""
    import jax

    import embax
    from embax.checkpoint import Checkpoints
    from embax.tasks.run_folder import RunFolder
    from embax.tasks.work import opened

    with jax.numpy_dtype_promotion("standard"):
        own, state, _ = opened(RunFolder(run))
    with Checkpoints(run / "checkpoints") as checkpoints:
        found = checkpoints.restore(own.trainer.plan)
    return own.trainer, embax.to_arrays(own.trainer.plan, found.tables), state.params


def test_files_of_exports_have_names_of_their_own():
    names = ["weight/a/b", "weight/a.b", "weight/A.b", "weight/" + "x" * 300, "weight/" + "x" * 301, "weight/日" * 99]
    found = _file_names(names)
    assert list(found) == names and found["weight/a/b"] == "weight.a.b"
    assert len({name.casefold() for name in found.values()}) == len(names)
    assert all("/" not in name and len(name.encode()) < 220 for name in found.values())


@pytest.fixture(scope="module")
def table():
    return verbs.agreeing(600).append_column("price", pa.array(np.random.default_rng(3).normal(0, 1, 600)))


def _as(kind, table, folder):
    """Writes a table as files of a kind, and returns what names them."""
    folder.mkdir()
    if kind == "csv":
        csv.write_csv(table, folder / "d.csv")
        return folder / "d.csv"
    if kind == "csv.gz":
        csv.write_csv(table, folder / "d.csv")
        (folder / "d.csv.gz").write_bytes(gzip.compress((folder / "d.csv").read_bytes()))
        return folder / "d.csv.gz"
    if kind == "tsv":
        csv.write_csv(table, folder / "d.tsv", csv.WriteOptions(delimiter="\t"))
        return folder / "d.tsv"
    for number in range(3):
        verbs.written(folder / f"{number}.parquet", table.slice(200 * number, 200))
    return folder if kind == "folder" else folder / "*.parquet"


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "folder", "glob"])
def test_data_of_every_form_are_the_same_rows(table, tmp_path, kind):
    from embax.data.files import Files

    path = _as(kind, table, tmp_path / "data")
    found = Files(path, tmp_path / "made")
    rows = pa.concat_tables([found.read(group) for group in found.groups])
    assert rows.select(["a", "b", "price"]).equals(table.select(["a", "b", "price"])) and found.rows == 600
    if kind in ("csv", "csv.gz", "tsv"):
        assert found.groups[0].path == str(path)  # errors name what the user has


def test_a_csv_trains_and_is_predicted_as_parquet_is(table, tmp_path):
    path = _as("csv", table, tmp_path / "data")
    whole = verbs.written(tmp_path / "d.parquet", table, 600)
    verbs.trained(path, tmp_path / "one")
    verbs.trained(whole, tmp_path / "other")
    assert verbs.bits(tmp_path / "one", tmp_path / "x") == verbs.bits(tmp_path / "other", tmp_path / "y")
    for number, own in enumerate((path, whole)):
        assert verbs.embax("predict", tmp_path / "one", own, tmp_path / f"{number}.parquet")[0] == 0
    one, other = (pq.read_table(tmp_path / f"{number}.parquet") for number in (0, 1))
    assert one["score"].equals(other["score"])


def test_files_of_one_name_and_size_are_not_taken_for_each_other(tmp_path):
    import os

    from embax.data.files import Files

    for folder, value in (("one", "x"), ("other", "z")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.csv").write_text(f"a,y\n{value},1\n")
        os.utime(tmp_path / folder / "d.csv", (0, 0))
    found = [Files(tmp_path / folder / "d.csv", tmp_path / "made") for folder in ("one", "other")]
    assert [one.read(one.groups[0])["a"].to_pylist() for one in found] == [["x"], ["z"]]
    assert not [path for path in (tmp_path / "made").iterdir() if path.name.startswith(".")]


def test_a_model_of_bags_alone(tmp_path):
    table = verbs.agreeing(600)
    bags = pa.array([[a, f"n{b}"] for a, b in zip(table["a"].to_pylist(), table["b"].to_pylist(), strict=True)])
    path = verbs.written(tmp_path / "d.parquet", pa.table({"bag": bags, "y": table["y"]}))
    found = verbs.trained(path, tmp_path / "run")
    assert found["columns"]["bags"] == ["bag"] and found["status"] == "finished"


def test_a_csv_is_read_by_the_types_of_training(tmp_path):
    """Codes of digits alone are texts if training's were; an empty text is missing."""
    rows = [f"{zip_},{n},{int(zip_ == '0A1')}" for n, zip_ in enumerate(["0A1", "007", "", "7"] * 100)]
    (tmp_path / "d.csv").write_text("\n".join(["zip,n,y", *rows]))
    verbs.trained(tmp_path / "d.csv", tmp_path / "run", "--numeric", "n")
    values = pq.read_table(tmp_path / "run" / "vocabularies" / "0.parquet")["value"].to_pylist()
    assert set(values) == {"0A1", "007", "7"}
    for name, codes in (("later", ["007", "7"]), ("all", ["007", "7", "0A1"])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["zip,n", *(f"{code},5" for code in codes)]))
        code, _, err = verbs.embax("predict", tmp_path / "run", tmp_path / f"{name}.csv", tmp_path / f"{name}.parquet")
        assert (code, err) == (0, [])
    later, whole = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("later", "all"))
    assert later["zip"].to_pylist() == ["007", "7"]
    assert later["score"].to_pylist() == whole["score"].to_pylist()[:2]


def test_codes_that_are_named_categories_keep_their_zeros(tmp_path):
    (tmp_path / "d.csv").write_text(
        "\n".join(["zip,y", *(f"{z},{i % 2}" for i, z in enumerate(["007", "07", "7"] * 60))])
    )
    verbs.trained(tmp_path / "d.csv", tmp_path / "run", "--categorical", "zip")
    values = pq.read_table(tmp_path / "run" / "vocabularies" / "0.parquet")["value"].to_pylist()
    assert sorted(values) == ["007", "07", "7"]
