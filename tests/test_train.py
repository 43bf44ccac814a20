"""``embax train``: what it refuses, what it promises: the same bits, from one go or from several."""

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the train extra")
pytest.importorskip("grain", reason="needs the train extra")
pytest.importorskip("typer", reason="needs the train extra")

import verbs  # noqa: E402

import embax  # noqa: E402
from embax.data.loader import batches  # noqa: E402
from embax.data.split import TRAIN  # noqa: E402
from embax.tasks import html_report, loop, work  # noqa: E402
from embax.tasks.prepare import prepare  # noqa: E402
from embax.tasks.run_folder import RunFolder  # noqa: E402
from embax.tasks.settings import Settings  # noqa: E402
from embax.tasks.training import train_step  # noqa: E402

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eight_devices")]
ROWS = 60


class Reached(Exception):
    """Training would begin."""


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args):
        raise Reached

    monkeypatch.setattr(work, "_trained", refuse)


def plain(**columns):
    """A table that trains; columns are added or replaced, None takes one away."""
    own = {"a": [f"v{i % 5}" for i in range(ROWS)], "b": np.arange(ROWS) % 3, "y": np.arange(ROWS) % 2} | columns
    return pa.table({name: values for name, values in own.items() if values is not None})


def with_one(value, others, row=41):
    """A column of others with one value."""
    return [value if i == row else others for i in range(ROWS)]


TABLES = {
    "text label": (plain(y=["0", "1"] * 30), 'column "y" is string, and a label must be 0 and 1'),
    "label 2": (plain(y=with_one(2, 1)), 'column "y", row 41: the label is 2, and must be 0 or 1; mend it'),
    "null label": (plain(y=with_one(None, 1)), 'column "y", row 41: the label is missing, and must be 0 or 1'),
    "large label": (plain(y=with_one(2**60 + 1, 1)), 'column "y", row 41: the label is 1.15292e+18'),
    "labels alike": (plain(y=[0] * ROWS), "are 0; there is nothing to tell apart"),
    "null type": (plain(c=pa.nulls(ROWS)), 'column "c" is null, neither a category nor a number; --ignore c leaves'),
    "all null": (plain(c=pa.nulls(ROWS, pa.string())), 'column "c" has no value in any training row; --ignore c'),
    "null lists": (plain(c=pa.nulls(ROWS, pa.list_(pa.int64()))), 'column "c" has no value in any training row'),
    "empty lists": (plain(c=pa.array([[]] * ROWS, pa.list_(pa.int64()))), 'column "c" has no value in any training'),
    "struct": (plain(c=[{"q": 1}] * ROWS), "neither a category nor a number; --ignore c leaves it out"),
    "lists of floats": (plain(c=[[1.5]] * ROWS), "a list must be of strings or integers: --ignore c leaves it out"),
    "infinite": (plain(c=with_one(float("-inf"), 1.0)), 'column "c", row 41: the number is -inf; mend it'),
    "one row": (plain().slice(0, 1), "of 1 rows none is for test; bring more rows"),
    "long name": (plain(**{"x" * 300: ["q"] * ROWS}), "its name on disk would have"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_will_not_do_is_one_line(no_training, tmp_path, name):
    table, text = TABLES[name]
    path, run = verbs.written(tmp_path / "d.parquet", table, 25), tmp_path / "run"
    options = ("--label", "y", "--output", run, "--batch-size", 8)
    code, out, err = verbs.embax("train", path, *options)
    assert (code, out, len(err)) == (2, "", 1) and text in err[0], err
    assert name == "long name" or str(path) in err[0]
    assert not (run / "run.json").exists()
    with pytest.raises(Reached):  # and the next attempt finds nothing in its way
        verbs.embax("train", verbs.written(path, plain()), *options)


OPTIONS = [
    (("--label", "z"), 'there is no column "z" (--label); there are a, b, y, t'),
    (("--categorical", "z"), 'there is no column "z" (--categorical)'),
    (("--numeric", "z"), 'there is no column "z" (--numeric)'),
    (("--numeric", "a"), 'column "a" is string, which is no number; leave it out of --numeric'),
    (("--ignore", "z"), 'there is no column "z" (--ignore)'),
    (("--wide", "z"), '--wide names "z", which is no column of categories'),
    (("--wide", "a,b,t"), "--wide names all columns of categories, and --model dlrm needs one with embeddings"),
    (("--time", "z"), 'there is no column "z" (--time)'),
    (("--user", "a"), "--user and --item are for --task retrieval"),
    (("--time", "t", "--test-from", "99"), 'no row has "t" of 99 (--test-from) or later; they go from 0 to 59: choose'),
    (("--time", "t", "--test-from", "0"), 'every row has "t" of 0 (--test-from) or later'),
    (("--time", "t", "--test-from", "soon"), "--test-from 'soon' is no value of column \"t\", which is int64"),
    (("--test-from", "5"), "--test-from needs --time"),
    (("--time", "t", "--test-from", "5", "--test", "x"), "--test-from and --test exclude each other"),
    (("--test", "nowhere.parquet"), "nowhere.parquet: there is no such file"),
    (("--batch-size", "4096"), "--batch-size 4096 is more than the 56 training rows of 2 epochs; give less"),
    (("--devices", "3"), "--devices 3 must be 1, 2, 4, 8 and so on, and divide --batch-size 8"),
    (("--devices", "16", "--batch-size", "16"), "--devices 16: there are"),
    (("--hidden", "0"), "--hidden 0 must be a list of whole numbers from 1"),
    (("--hidden", "64,x"), "--hidden 64,x must be a list of whole numbers"),
    (("--hidden", "", "--model", "dcn"), "--hidden is empty: --model dcn needs one width or more"),
    (("--learning-rate", "nan"), "--learning-rate nan must be a number"),
    (("--seed", "99999999999"), "--seed 99999999999 must be 0 to 4294967295"),
    (("--seeds", "0,x"), "--seeds '0,x' must be different whole numbers from 0, separated by commas, like 0,1,2"),
    (("--seeds", "1,1"), "--seeds '1,1' must be different whole numbers"),
    (("--seeds", "0", "--seed", "1"), "--seed and --seeds exclude each other"),
    (("--model", "mf"), "--model 'mf' must be one of dlrm, dcn, logistic"),
    (("--optimizer", "x"), "--optimizer 'x' must be one of sgd, adagrad,"),
    (("--test-fraction", "0.5", "--validation-fraction", "0.5"), "together leave no row to train on"),
    (("--limit-rows", "1"), "none is for test; bring more rows"),
    (("--epochs", "0"), "--epochs 0 must be 1 or more"),
    (("--epochs", "x"), "Invalid value for '--epochs'"),
    (("--epoch", "1"), "No such option: --epoch"),
    (("--resume",), "is no folder of a run: there is no run.json; `embax train` makes one"),
    (("--resume", "--overwrite"), "--resume and --overwrite exclude each other"),
    (("--config", "nowhere.toml"), "nowhere.toml cannot be read: No such file or directory"),
    (("--output", "/dev/null"), "--output /dev/null cannot be made a folder: File exists"),
    (("--output", "/dev/null/x"), "--output /dev/null/x cannot be made a folder: Not a directory"),
]


@pytest.mark.parametrize("options, text", OPTIONS, ids=lambda own: " ".join(own) if isinstance(own, tuple) else "")
def test_options_that_will_not_do_are_one_line(no_training, tmp_path, options, text):
    path = verbs.written(tmp_path / "d.parquet", plain(t=np.arange(ROWS)))
    begin = ("--label", "y", "--output", tmp_path / "run", "--batch-size", 8)
    code, out, err = verbs.embax("train", path, *begin, *options)
    assert (code, out, len(err)) == (2, "", 1) and text in err[0], err


@pytest.mark.parametrize(
    "content, text",
    [
        ("epochz = 3", "there is no setting 'epochz'; did you mean 'epochs'?"),
        ("epochs = 'x'", "epochs = 'x' must be a whole number"),
        ("epochs = true", "epochs = True must be a whole number"),
        ("a b", "c.toml is not TOML: Expected '=' after a key"),
        ("[a]\nb = 1", "there is no setting 'a'"),
        ("hidden = [1.5]", "hidden = [1.5] must be a list of whole numbers"),
        ("categorical = [1]", "categorical = [1] must be a list of names"),
        ("label = ['a']", "label = ['a'] must be text"),
        ("l2 = inf", "l2 = inf must be a number"),
        ("\udcff", "c.toml is not TOML: 'utf-8' codec can't decode"),
    ],
)
def test_a_file_of_settings_that_will_not_do_is_one_line(tmp_path, content, text):
    (tmp_path / "c.toml").write_text(content, "utf-8", "surrogateescape")
    code, _, err = verbs.embax("train", "d.parquet", "--config", tmp_path / "c.toml", "--output", tmp_path / "run")
    assert (code, len(err)) == (2, 1) and f"{tmp_path}/c.toml" in err[0] and text in err[0], err


def test_a_file_of_settings_counts_where_the_command_is_silent(no_training, monkeypatch, tmp_path):
    path = verbs.written(tmp_path / "d.parquet", plain())
    (tmp_path / "c.toml").write_text('label = "y"\nbatch-size = 16\nhidden = [3, 2]\nepochs = 7\n')
    with pytest.raises(Reached):
        verbs.embax("train", path, "--config", tmp_path / "c.toml", "--epochs", 3, "--output", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (found["batch_size"], found["hidden"], found["epochs"], found["label"]) == (16, [3, 2], 3, "y")


TIMES = {
    "numbers": (np.arange(ROWS), "50"),
    "uint64": (pa.array(np.arange(ROWS), pa.uint64()), "50"),
    "texts": ([f"{i:03}" for i in range(ROWS)], "050"),
    "dates": ([dt.date(2020, 1, 1) + dt.timedelta(i) for i in range(ROWS)], "2020-02-20"),
    "stamps": (pa.array(np.arange(ROWS) * 1001, pa.timestamp("ns")), "1970-01-01 00:00:00.00005005"),
    "zones": (pa.array(np.arange(ROWS), pa.timestamp("us", "Europe/Paris")), "1970-01-01 00:00:00.00005Z"),
    "dictionary": (pa.array([f"{i:03}" for i in range(ROWS)]).dictionary_encode(), "050"),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_of_every_type_part_the_rows_alike(no_training, tmp_path, name):
    """By share or from a time on; the record has it such that the run can go on."""
    values, first = TIMES[name]
    path = verbs.written(tmp_path / "d.parquet", plain(t=values), 25)
    for number, options in enumerate((("--test-from", first), ("--test-fraction", 1 / 6))):
        run = tmp_path / f"run{number}"
        begin = ("train", path, "--label", "y", "--output", run, "--batch-size", 8, "--time", "t", *options)
        with pytest.raises(Reached):
            verbs.embax(*begin)
        assert json.loads((run / "run.json").read_text())["rows"] == {"train": 50, "validation": 0, "test": 10}
        with pytest.raises(Reached):
            verbs.embax(*begin, "--resume")
        from embax.tasks.prepare import again
        from embax.tasks.run_folder import RunFolder

        folder = RunFolder(run)
        found = again(folder.settings(), folder)
        parts = [found.split.parts(found.files.read(group), group) for group in found.files.groups]
        assert np.concatenate(parts).tolist() == [0] * 50 + [2] * 10


@pytest.mark.parametrize(
    "values", [[True] * ROWS, [[1]] * ROWS, pa.array([1] * ROWS, pa.duration("s")), with_one(None, 1), [1] * ROWS]
)
def test_a_time_that_will_not_do_is_one_line(no_training, tmp_path, values):
    path = verbs.written(tmp_path / "d.parquet", plain(t=values))
    code, _, err = verbs.embax("train", path, "--label", "y", "--output", tmp_path / "run", "--time", "t")
    assert (code, len(err)) == (2, 1) and 'column "t"' in err[0] and str(path) in err[0]


def test_what_is_wrong_with_other_test_files_is_said_before_training(no_training, tmp_path):
    path = verbs.written(tmp_path / "d.parquet", plain())
    for other, text in (
        (plain(b=["s"] * ROWS), 'column "b" is string, and training had int64'),
        (plain(y=with_one(5, 1)), 'column "y", row 41: the label is 5'),
        (plain(b=None), 'column "b" is missing, which'),
    ):
        test = verbs.written(tmp_path / "test.parquet", other)
        code, _, err = verbs.embax(
            "train", path, "--label", "y", "--output", tmp_path / "run", "--test", test, "--batch-size", 8
        )
        assert (code, len(err)) == (2, 1) and f"{test}: {text}" in err[0], err


# What follows trains.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    table = verbs.agreeing(700)
    table = table.append_column("day", pa.array([dt.date(2020, 1, 1) + dt.timedelta(i // 7) for i in range(700)]))
    return verbs.written(folder / "d.parquet", table)


GO = ("--epochs", 2, "--time", "day", "--test-fraction", 0.1, "--validation-fraction", 0.1)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run in one go: 8 + 9 steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    document = verbs.trained(data, output, *GO)
    assert document["status"] == "finished" and document["rows"] == {"train": 560, "validation": 70, "test": 70}
    return output


def is_as(output, whole, tmp_path):
    """The same checkpoint and the same measures as those of the run in one go."""
    assert verbs.bits(output, tmp_path / "one") == verbs.bits(whole, tmp_path / "other")
    assert verbs.measures(output) == verbs.measures(whole)
    tables = [line["tables"] for line in (verbs.lines(output, "tables")[-1], verbs.lines(whole, "tables")[-1])]
    assert tables[0] == tables[1]


def complete(output):
    """Whatever a run leaves, whole or not."""
    assert list((output / "tensorboard").glob("events.*"))
    assert (output / "report.html").read_text("utf-8").rstrip().endswith("</html>")
    assert verbs.lines(output)[-1]["kind"] == "timing"


def test_a_run_leaves_what_was_agreed(whole):
    complete(whole)
    kinds = [line["kind"] for line in verbs.lines(whole)]
    assert kinds.count("evaluation") == 3 and kinds.count("tables") == 1 and "train" in kinds
    assert list(verbs.measures(whole)) == [("validation", 9), ("validation", 17), ("test", 17)]
    assert all(0 <= line["auc"] <= 1 for line in verbs.lines(whole, "evaluation"))
    for line in verbs.lines(whole, "train"):
        assert line["samples"] == 64 * line["step"] and line["loss"] > 0


@pytest.mark.parametrize("options", [("--ahead", 0), pytest.param(("--workers", 2), marks=pytest.mark.nightly)])
def test_how_data_are_read_changes_no_bit(data, whole, tmp_path, options):
    verbs.trained(data, tmp_path / "run", *GO, *options)
    is_as(tmp_path / "run", whole, tmp_path)


def test_seeds_are_runs_of_their_own(data, whole, tmp_path):
    code, out, err = verbs.embax(
        "train", data, "--label", "y", "--output", tmp_path, *verbs.SMALL, *GO, "--seeds", "0,5"
    )
    assert (code, err) == (0, [])
    is_as(tmp_path / "seed-0", whole, tmp_path)
    assert verbs.bits(tmp_path / "seed-0", tmp_path / "x") != verbs.bits(tmp_path / "seed-5", tmp_path / "x")
    head, *rows = out.splitlines()[1:]
    assert head.split() == ["seed", "auc", "logloss", "baseline_auc", "baseline_logloss", "seconds"]
    assert [row.split()[0] for row in rows] == ["0", "5", "mean"]
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 5]
    assert found["mean"]["auc"] == pytest.approx(np.mean([run["auc"] for run in found["runs"]]))
    assert rows[2].split()[1] == f"{found['mean']['auc']:.4f}"
    assert found["runs"][0]["auc"] == verbs.measures(whole)["test", 17]["auc"]


def interrupt(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100):
        time.sleep(0.01)  # where the signal is handled


def at_step(monkeypatch, step, what):
    real = loop.Meter.seen

    def seen(self, at, losses, bar):
        real(self, at, losses, bar)
        if at == step:
            what()

    monkeypatch.setattr(loop.Meter, "seen", seen)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.nightly), 12])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(data, whole, monkeypatch, tmp_path, step):
    args = ("train", data, "--label", "y", "--output", tmp_path / "run", *verbs.SMALL, *GO)
    with monkeypatch.context() as patched:
        at_step(patched, step, interrupt)
        code, out, err = verbs.embax(*args)
    assert code == 130 and out.endswith("interrupted; the same command with --resume goes on\n")
    assert err == ["embax: stopping after this step, and saving; once more to stop at once"]
    complete(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    code, _, err = verbs.embax(*args)
    assert code == 2 and "has the checkpoints of a run; --resume goes on with it" in err[0]
    # What was said at the beginning need not be said again.
    code, _, err = verbs.embax("train", data, "--output", tmp_path / "run", "--resume")
    assert (code, err) == (0, [])
    is_as(tmp_path / "run", whole, tmp_path)
    complete(tmp_path / "run")


@pytest.mark.parametrize("when", ["reading", "tables", "test"])
def test_a_run_that_was_stopped_outside_of_its_steps(data, whole, monkeypatch, tmp_path, when):
    args = ("train", data, "--label", "y", "--output", tmp_path / "run", *verbs.SMALL, *GO)
    with monkeypatch.context() as patched:
        if when == "reading":
            patched.setattr(work, "prepare", interrupt)
        elif when == "tables":
            begin = work.Trainer.init
            patched.setattr(work.Trainer, "init", lambda *own: [interrupt(), begin(*own)][1])
        else:
            real = work.Work.evaluated
            patched.setattr(work.Work, "evaluated", lambda *own: interrupt() if own[-1] == "test" else real(*own))
        code, out, err = verbs.embax(*args)
    assert code == 130
    if when == "reading":
        assert err == ["embax: interrupted before the first step; the same command does it again"]
        assert not (tmp_path / "run" / "run.json").exists()
        return
    assert out.endswith("interrupted; the same command with --resume goes on\n")
    assert [line[:15] for line in err] == ["embax: stopping"] * (when == "tables")
    complete(tmp_path / "run")
    code, _, err = verbs.embax(*args, "--resume")
    assert (code, err) == (0, [])
    is_as(tmp_path / "run", whole, tmp_path)


class Died(BaseException):
    """As abrupt as it gets in one process."""


@pytest.mark.parametrize(
    "step, options",
    [
        pytest.param(5, (), marks=pytest.mark.nightly),
        (13, ()),
        pytest.param(13, ("--workers", 2), marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_died_goes_on_from_its_last_checkpoint(data, whole, monkeypatch, tmp_path, step, options):
    args = ("train", data, "--label", "y", "--output", tmp_path / "run", *verbs.SMALL, *GO, *options)

    def die():
        raise Died

    with monkeypatch.context() as patched:
        at_step(patched, step, die)
        with pytest.raises(Died):
            verbs.embax(*args)
    code, _, err = verbs.embax(*args, "--resume")
    assert (code, err) == (0, [])
    is_as(tmp_path / "run", whole, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_that_is_killed_leaves_a_run_that_goes_on(data, tmp_path, workers):
    program = [sys.executable, "-c", "from embax.cli import main; main()"]
    args = [
        "train",
        data,
        "--label",
        "y",
        "--ignore",
        "day",
        *verbs.SMALL,
        "--epochs",
        40,
        "--workers",
        workers,
        "--output",
    ]
    one, other = ([*program, *map(str, args), str(tmp_path / name)] for name in ("one", "other"))
    subprocess.run(one, check=True, timeout=300, capture_output=True)
    with subprocess.Popen(other, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list((tmp_path / "other").glob("checkpoints/[0-9]*/commit_success.txt")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    subprocess.run([*other, "--resume"], check=True, timeout=300, capture_output=True)
    is_as(tmp_path / "other", tmp_path / "one", tmp_path)


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run of one epoch that is asked to go on in many ways."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, interrupt)
        assert verbs.embax("train", data, "--label", "y", "--output", output, *verbs.SMALL, *GO)[0] == 130
    return output


@pytest.mark.parametrize(
    "options, text",
    [
        (("--batch-size", 32), "--batch-size was 64 when"),
        (("--model", "dcn"), "--model was 'dlrm' when"),
        (("--seed", 1), "--seed was 0 when"),
        (("--ignore", "b"), "--ignore was () when"),
    ],
)
def test_a_run_goes_on_with_its_own_settings(data, stopped, options, text):
    before = (stopped / "metrics.jsonl").read_bytes()
    code, _, err = verbs.embax("train", data, "--output", stopped, "--resume", *options)
    assert (code, len(err)) == (2, 1) and text in err[0] and "leave it out" in err[0]
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_with_its_own_data(data, stopped, tmp_path):
    table = verbs.agreeing(700, seed=7)
    other = verbs.written(tmp_path / "d.parquet", table.append_column("day", pa.array([dt.date(2020, 1, 1)] * 700)))
    code, _, err = verbs.embax("train", other, "--output", stopped, "--resume")
    assert (code, len(err)) == (2, 1) and "its files have other rows than those that" in err[0]


def test_a_run_goes_on_on_other_devices(data, stopped, whole, tmp_path):
    """And from a folder that was moved, with data that were moved."""
    import shutil

    run = tmp_path / "moved"
    shutil.copytree(stopped, run)
    shutil.copy(data, tmp_path / "e.parquet")
    code, _, err = verbs.embax("train", tmp_path / "e.parquet", "--output", run, "--resume", "--devices", 2)
    assert (code, err) == (0, [])
    found, wanted = (verbs.measures(own)["test", 17] for own in (run, whole))
    assert found["auc"] == pytest.approx(wanted["auc"], abs=0.01)
    assert found["logloss"] == pytest.approx(wanted["logloss"], abs=1e-3)


def test_a_run_is_not_lost_by_a_slip(data, whole, tmp_path):
    """Neither the same command again nor --overwrite with data that cannot be read takes anything away."""
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    args = ("--label", "y", "--output", whole, *verbs.SMALL)
    code, _, err = verbs.embax("train", data, *args)
    assert code == 2 and "has the checkpoints of a run" in err[0]
    code, _, err = verbs.embax("train", tmp_path / "no.parquet", *args, "--overwrite")
    assert code == 2 and "there is no such file" in err[0]
    code, _, err = verbs.embax(
        "train", verbs.written(tmp_path / "d.parquet", plain(y=[0] * ROWS)), *args, "--overwrite"
    )
    assert code == 2 and "nothing to tell apart" in err[0]
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_rates_that_are_too_large_are_one_line(tmp_path):
    path = verbs.written(tmp_path / "d.parquet", verbs.agreeing())
    args = ("train", path, "--label", "y", "--output", tmp_path / "run", *verbs.SMALL)
    code, _, err = verbs.embax(*args, "--optimizer", "sgd", "--learning-rate", 1e30, "--weight-rate", 1e30)
    assert (code, len(err)) == (2, 1) and "training has diverged; choose smaller rates" in err[0]
    complete(tmp_path / "run")
    code, _, err = verbs.embax(*args, "--overwrite")
    assert (code, err) == (0, [])


def test_a_report_that_fails_takes_no_training_away(monkeypatch, tmp_path):
    def fail(folder):
        raise ValueError("no such\nluck")

    monkeypatch.setattr(html_report, "write_report", fail)
    path = verbs.written(tmp_path / "d.parquet", verbs.agreeing())
    args = ("--label", "y", "--output", tmp_path / "run", *verbs.SMALL)
    code, out, err = verbs.embax("train", path, *args)
    assert (code, err) == (0, ["embax: report.html was not written: no such luck"]) and "test: auc" in out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    "name",
    [
        "ftrl",
        *(
            pytest.param(n, marks=pytest.mark.nightly)
            for n in ("sgd", "rowwise_adagrad", "adagrad_momentum", "adam", "laprop", "f2a")
        ),
    ],
)
def test_every_optimizer_trains(tmp_path, name):
    path = verbs.written(tmp_path / "d.parquet", verbs.agreeing())
    document = verbs.trained(path, tmp_path / "run", "--optimizer", name)
    assert document["status"] == "finished" and len({table["optimizer"] for table in document["tables"]}) == 1


def test_too_few_values_have_one_row(tmp_path):
    path = verbs.written(tmp_path / "d.parquet", verbs.agreeing(300))
    document = verbs.trained(path, tmp_path / "run", "--min-count", 10_000, "--test-fraction", 0)
    assert {table["rows"] for table in document["tables"]} == {1}
    complete(tmp_path / "run")


@pytest.mark.parametrize("task", ["click", "retrieval"])
def test_a_step_works_on_no_whole_table(tmp_path, task):
    """The compiled program of the step itself: rows are read and written in place, nothing is as large as a table."""
    count = 20_000
    table = pa.table({"u": np.arange(count) % 5000, "i": np.arange(count) * 7 % 5000, "y": np.arange(count) % 2})
    path = str(verbs.written(tmp_path / "d.parquet", table, 10_000))
    roles = {"label": "y"} if task == "click" else {"user": ("u",), "item": ("i",)}
    given = Settings(path, task=task, batch_size=16, negatives=16, **roles).of_task()
    own = work.Work(given, prepare(given, RunFolder(tmp_path)))
    data = batches(*own.prepared.encode(TRAIN, shuffled=True), 16)
    rows = next(iter(data if own.draw is None else data.seed(0).random_map(own.draw)))
    with jax.numpy_dtype_promotion("standard"):
        arguments = own.trainer, own.trainer.init(0), own.trainer.batch(rows), jax.random.key(0)
        assert "touches rows only" in str(embax.check_step(train_step, *arguments))
