"""Retrieval: what models of users and items learn, how rankings are measured, what is recommended."""

import json
import math

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the train extra")
pytest.importorskip("grain", reason="needs the train extra")
pytest.importorskip("typer", reason="needs the train extra")

import pyarrow.parquet as pq  # noqa: E402
import verbs  # noqa: E402
from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from embax.data.files import DataError  # noqa: E402
from embax.tasks import ranking  # noqa: E402

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eight_devices")]
GROUPS, USERS, ITEMS = 4, 80, 48


def _tasted(rows=2400, seed=0):
    """Users of a group take items of that group, none more popular than another."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, USERS, rows)
    items = rng.integers(0, ITEMS // GROUPS, rows) * GROUPS + users % GROUPS
    table = {"user": [f"u{i}" for i in users], "item": items, "kind": [f"k{i % GROUPS}" for i in items]}
    table["tags"] = [[f"t{i % GROUPS}", f"s{i % 3}"] for i in items]
    return pa.table(table | {"group": users % GROUPS, "when": np.arange(rows)})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return verbs.written(tmp_path_factory.mktemp("data") / "d.parquet", _tasted(), 500)


SMALL = ("--task", "retrieval", "--embedding-dim", 8, "--hidden", 8, "--batch-size", 128, "--negatives", 32)
RATE = ("--learning-rate", 0.02, "--test-fraction", 0.05)


def _train(data, output, *options):
    code, out, err = verbs.embax("train", data, "--output", output, *SMALL, *RATE, *options)
    assert (code, err) == (0, []), err
    return out


@pytest.fixture(scope="module")
def factors(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("factors") / "run"
    _train(data, output, "--user", "user", "--item", "item", "--epochs", 6)
    return output


def test_factors_find_more_than_what_is_popular(factors):
    (test,) = verbs.lines(factors, "evaluation")
    assert test["baseline"] == "most popular items"
    assert test["recall@20"] > test["baseline_recall@20"] + 0.1 and test["ndcg@20"] > test["baseline_ndcg@20"] + 0.05
    found = json.loads((factors / "run.json").read_text())
    assert {table["name"]: table["rows"] for table in found["tables"]} == {"user": USERS + 1, "item": ITEMS + 1}
    assert (factors / "report.html").exists() and verbs.lines(factors, "tables")


def test_towers_find_more_than_what_is_popular(data, tmp_path):
    sides = ("--user", "user,group", "--item", "item,kind,tags", "--categorical", "group")
    _train(data, tmp_path / "run", "--model", "two-tower", *sides, "--epochs", 6)
    (test,) = verbs.lines(tmp_path / "run", "evaluation")
    assert test["recall@20"] > test["baseline_recall@20"] + 0.1
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {table["name"] for table in found["tables"]} == {"user", "group", "item", "kind", "tags"}
    code, _, err = verbs.embax("predict", tmp_path / "run", data, tmp_path / "p.parquet")
    assert (code, err) == (0, [])
    scores = pq.read_table(tmp_path / "p.parquet")["score"].to_numpy()
    assert len(scores) == 2400 and np.isfinite(scores).all()
    code, _, err = verbs.embax("predict", tmp_path / "run", data, tmp_path / "t.parquet", "--top", 3)
    assert code == 2 and "--top is for --task retrieval --model mf" in err[0]


@pytest.mark.parametrize("loss", ["bpr", pytest.param("ccl", marks=pytest.mark.nightly)])
def test_every_loss_trains(data, tmp_path, loss):
    _train(data, tmp_path / "run", "--user", "user", "--item", "item", "--epochs", 1, "--loss", loss)
    assert all(math.isfinite(line["loss"]) for line in verbs.lines(tmp_path / "run", "train"))


def test_recommendations_are_the_best_scores(factors, data, tmp_path):
    table = pq.read_table(data).slice(0, 30)
    items = list(range(ITEMS))
    pairs = pa.table({"user": np.repeat(table["user"].to_numpy(), ITEMS), "item": items * 30})
    pairs = verbs.written(tmp_path / "pairs.parquet", pairs, 2000)
    assert verbs.embax("predict", factors, pairs, tmp_path / "scores.parquet")[0] == 0
    scores = pq.read_table(tmp_path / "scores.parquet")["score"].to_numpy().reshape(30, ITEMS)
    users = verbs.written(tmp_path / "users.parquet", table.select(["when", "user"]), 7)
    for count in (1, 5, 500):
        code, _, err = verbs.embax("predict", factors, users, tmp_path / "top.parquet", "--top", count)
        assert (code, err) == (0, [])
        found = pq.read_table(tmp_path / "top.parquet")
        assert found.column_names == ["when", "user", "items", "scores"]
        best = np.array(found["items"].to_pylist())
        assert best.shape == (30, min(count, ITEMS)) and all(len(set(row)) == len(row) for row in best)
        shown = np.array(found["scores"].to_pylist())
        np.testing.assert_allclose(shown, -np.sort(-scores, axis=1)[:, :count], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(scores, best, axis=1), shown, atol=1e-5)
    again = pq.read_table(tmp_path / "top.parquet")
    code, _, err = verbs.embax("predict", factors, tmp_path / "top.parquet", tmp_path / "x.parquet", "--top", 1)
    assert code == 2 and 'there is a column "items" already; rename or drop it' in err[0] and again.num_rows == 30


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(factors, data, monkeypatch, tmp_path):
    """The negatives, too, are drawn as they would have been."""
    import os
    import signal

    from embax.tasks import loop

    real = loop.Meter.seen

    def seen(self, step, losses, bar):
        real(self, step, losses, bar)
        if step == 50:
            os.kill(os.getpid(), signal.SIGINT)

    args = ("train", data, "--output", tmp_path / "run", *SMALL, *RATE, "--user", "user", "--item", "item")
    with monkeypatch.context() as patched:
        patched.setattr(loop.Meter, "seen", seen)
        assert verbs.embax(*args, "--epochs", 6)[0] == 130
    code, _, err = verbs.embax("train", data, "--output", tmp_path / "run", "--resume")
    assert (code, err) == (0, [])
    assert verbs.bits(tmp_path / "run", tmp_path / "one") == verbs.bits(factors, tmp_path / "other")
    assert verbs.measures(tmp_path / "run") == verbs.measures(factors)


@pytest.mark.parametrize(
    "options, text",
    [
        (("--user", "user"), "--user and --item are missing"),
        (("--user", "z", "--item", "item"), 'there is no column "z" (--user)'),
        (("--user", "user", "--item", "z"), 'there is no column "z" (--item)'),
        (("--user", "user", "--item", "user"), 'column "user" is the key of --user and of --item; name two'),
        (("--user", "user", "--item", "item", "--label", "kind"), "--label is for --task click"),
        (("--user", "tags", "--item", "item"), 'column "tags" is list<element: string>, and a key must be one value'),
        (("--user", "user", "--item", "item", "--min-count", 10_000), 'no value of column "item" comes 10000 times'),
        (("--user", "user", "--item", "item", "--loss", "x"), "--loss 'x' must be one of softmax, bpr, ccl"),
        (("--user", "user", "--item", "item", "--model", "dlrm"), "--model 'dlrm' must be one of mf, two-tower"),
        (
            ("--user", "user", "--item", "item,weight", "--model", "two-tower"),
            'column "weight" is a number, and --user and --item take categories alone',
        ),
    ],
)
def test_options_that_will_not_do_are_one_line(tmp_path, options, text):
    table = _tasted(400).append_column("weight", pa.array(np.linspace(0, 1, 400)))
    path = verbs.written(tmp_path / "d.parquet", table)
    code, out, err = verbs.embax("train", path, "--output", tmp_path / "run", *SMALL, *options)
    assert (code, out, len(err)) == (2, "", 1) and text in err[0], err


# Rankings, against plain Python.

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=30)


def slow(rank, known, test, k):
    """Recall@k and NDCG@k of rankings, user by user; what is known is not asked for."""
    assume(set(test) - set(known))
    recalls, ndcgs = [], []
    for user in range(6):
        wanted = {item for own, item in test if own == user and (own, item) not in known}
        if not wanted:
            continue
        shown = [item for item in rank[user] if (user, item) not in known][:k]
        hits = [place for place, item in enumerate(shown, 1) if item in wanted]
        recalls.append(len(hits) / len(wanted))
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(wanted)) + 1))
        ndcgs.append(sum(1 / math.log2(place + 1) for place in hits) / ideal)
    return {f"recall@{k}": np.mean(recalls), f"ndcg@{k}": np.mean(ndcgs)}


def taken(pairs):
    users, items = (np.array([pair[i] for pair in pairs], np.int32) for i in (0, 1))
    return ranking.Taken.of(users, items, 6)


@settings(max_examples=60, deadline=None)
@given(PAIRS, PAIRS.filter(bool), st.integers(1, 12), st.randoms(use_true_random=False))
def test_measures_of_rankings(known, test, k, random):
    orders = [random.sample(range(1, 10), 9) for _ in range(6)]

    def rank(users, out):
        banned = set(zip(out[0].tolist(), out[1].tolist(), strict=True))
        # None is what fills a ranking up.
        rows = [[i for i in orders[user] if (n, i) not in banned] + [-1] * 12 for n, user in enumerate(users)]
        return np.array([row[:k] for row in rows])

    wanted = slow(orders, set(known), test, k)
    assert ranking.ranked(rank, taken(known), taken(test), k) == pytest.approx(wanted)


@settings(max_examples=60, deadline=None)
@given(PAIRS, PAIRS.filter(bool), st.integers(1, 5))
def test_the_most_popular_items_are_those_with_the_first_numbers(known, test, k):
    wanted = slow([list(range(1, 10))] * 6, set(known), test, k)
    assert ranking.ranked(ranking.most_popular(9, k), taken(known), taken(test), k) == pytest.approx(wanted)


def test_nobody_has_anything_to_be_found():
    with pytest.raises(DataError, match="there is nothing to rank for: no user of training has a further item"):
        ranking.ranked(ranking.most_popular(9), taken([(1, 2)]), taken([(1, 2)]))


def test_a_test_of_users_that_training_never_met(tmp_path):
    table = pa.table({"user": ["a"] * 50 + ["b"] * 50 + ["c"] * 20, "item": np.arange(120) % 7, "t": np.arange(120)})
    path = verbs.written(tmp_path / "d.parquet", table)
    options = ("--user", "user", "--item", "item", "--time", "t", "--test-from", "100", "--batch-size", 32)
    code, _, err = verbs.embax("train", path, "--output", tmp_path / "run", *SMALL, *options, "--epochs", 1)
    assert code == 2 and len(err) == 1 and "there is nothing to rank for" in err[0]


def test_fewer_items_than_places(tmp_path):
    table = pa.table({"user": [f"u{i % 9}" for i in range(135)], "item": np.arange(135) // 9})
    path = verbs.written(tmp_path / "d.parquet", table)
    options = ("--user", "user", "--item", "item", "--batch-size", 32, "--epochs", 1)
    code, _, err = verbs.embax("train", path, "--output", tmp_path / "run", *SMALL, *options)
    assert (code, err) == (0, [])


def test_items_without_a_row_are_asked_for_and_not_found(tmp_path):
    """Every ranking has all items that are left, so that each user's known one is found, and the three new are not."""
    users, when = np.repeat(np.arange(40), 10), np.tile(np.arange(10), 40)
    items = np.where(when < 7, (when + users) % 8, 1000 + 10 * users + when)
    path = verbs.written(tmp_path / "d.parquet", pa.table({"user": users, "item": items, "t": when}))
    options = ("--user", "user", "--item", "item", "--time", "t", "--test-from", "6", "--batch-size", 32, "--epochs", 1)
    code, _, err = verbs.embax("train", path, "--output", tmp_path / "run", *SMALL, *options)
    assert (code, err) == (0, [])
    (found,) = verbs.lines(tmp_path / "run", "evaluation")
    assert found["recall@20"] == found["baseline_recall@20"] == 0.25


def test_users_that_training_did_not_know_get_no_items(tmp_path, data):
    _train(data, tmp_path / "run", "--user", "user", "--item", "item", "--epochs", 1)
    path = verbs.written(tmp_path / "new.parquet", pa.table({"user": ["u1", "nobody", None, "u2"]}))
    code, _, err = verbs.embax("predict", tmp_path / "run", path, tmp_path / "p.parquet", "--top", 3)
    assert (code, err) == (0, [])
    found = pq.read_table(tmp_path / "p.parquet")
    assert [len(items) for items in found["items"].to_pylist()] == [3, 0, 0, 3]
    assert [len(scores) for scores in found["scores"].to_pylist()] == [3, 0, 0, 3]


def test_a_run_is_not_thrown_away_for_one_that_cannot_be(tmp_path, data):
    _train(data, tmp_path / "run", "--user", "user", "--item", "item", "--epochs", 1)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    options = ("--user", "user", "--item", "item", "--test", data, "--overwrite")  # what is tested is known
    code, _, err = verbs.embax("train", data, "--output", tmp_path / "run", *SMALL, *options)
    assert code == 2 and len(err) == 1 and "there is nothing to rank for" in err[0]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before != []
