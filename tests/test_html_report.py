"""The page of a run: its content is parsed out of the HTML that was written for made-up run folders."""

import html.parser
import json
import re
import time

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from embax.tasks import html_charts, html_report  # noqa: E402

ROLES = {"label": "click", "categorical": [f"c{i}" for i in range(16)], "bags": ["tags", "history"], "numeric": ["age"]}
VOID = ("meta", "br", "hr", "img", "link", "input")


def click(tables=18, lines=120, evaluations=5, test=True, **document):
    """Returns the documents of a run of a click model: ``run.json`` and the lines of ``metrics.jsonl``."""
    rng = np.random.default_rng(0)
    names = [*ROLES["categorical"], *ROLES["bags"]] if tables == 18 else [f"c{i}" for i in range(tables)]
    sizes = [int(10 ** rng.uniform(0.5, 6.2)) for _ in names]
    run = {
        "format": 1,
        "embax": "0.2.0",
        "jax": "0.10.2",
        "backend": "cpu",
        "backend_reason": "the native kernels are there and all tables are on CPU devices",
        "devices": 1,
        "task": "click",
        "model": "dlrm",
        "data": "ratings.parquet",
        "command": "embax train ratings.parquet --label click --output runs/first --epochs 2",
        "settings": {"epochs": 2, "batch_size": 2048, "dense_units": [64, 32], "time": None, "baseline": True},
        "columns": {**ROLES, "categorical": [n for n in names if n not in ROLES["bags"]], "wide": []},
        "rows": {"train": 1_200_000, "validation": 150_000, "test": 270_000},
        "positive": 0.4137,
        "tables": [_table(name, size) for name, size in zip(names, sizes, strict=True)],
        "status": "finished",
        "seconds": 3725.4,
    } | document
    steps = np.arange(1, lines + 1) * 10
    losses = 0.47 + 0.25 * np.exp(-steps / 150) + rng.normal(0, 0.012, lines)
    rates = 181_000 + rng.normal(0, 9_000, lines)
    metrics = [_train(*line) for line in zip(steps, losses, losses + 0.02, rates, strict=True)]
    for number in range(evaluations):
        metrics.append(_evaluation("validation", int(steps[-1] * (number + 1) / evaluations), 0.85 + 0.002 * number))
    if test:
        metrics.append(_evaluation("test", int(steps[-1]), 0.8596))
    metrics.append({"kind": "timing", "parts": {"reading columns": 310.2, "compilation": 2.04, "steps": 2904.0}})
    metrics.append({"kind": "tables", "tables": [_touched(rng, table) for table in run["tables"]]})
    return run, metrics


def _table(column, rows):
    spec = {"column": column, "rows": rows, "dim": 16, "dtype": "float32", "optimizer": "Adagrad"}
    return {"name": f"embedding/{column}", **spec, "bytes": rows * 128}


def _touched(rng, table):
    touched = max(1, int(0.9 * table["rows"]))
    counts, edges = np.histogram(rng.gamma(9, 0.1, min(touched, 5000)), 20)
    hottest = [[f"value {i}", 20311 - 900 * i, 1.93 - i / 20] for i in range(10)]
    line = {"touched": touched, "norms": {"edges": edges.tolist(), "counts": counts.tolist()}, "hottest": hottest}
    return line | {key: table[key] for key in ("name", "column", "rows", "dim")}


def _train(step, loss, baseline=None, rate=181_000.0):
    line = {"kind": "train", "step": int(step), "epoch": step / 600, "samples": int(step) * 2048, "loss": float(loss)}
    line |= {"samples_per_second": float(rate), "seconds": step / 80}
    return line if baseline is None else line | {"baseline_loss": float(baseline)}


def _evaluation(split, step, auc, **other):
    line = {"kind": "evaluation", "split": split, "step": step, "epoch": step / 600, "auc": auc, "logloss": 0.4709}
    return line | {"baseline": "logistic regression", "baseline_auc": 0.8557, "baseline_logloss": 0.4756} | other


def retrieval():
    """Returns a retrieval run: interrupted, its baseline better by one metric, not evaluated on a test split."""
    run, metrics = click(tables=2, lines=40, evaluations=0, test=False, task="retrieval", model="two-tower")
    run |= {"columns": {"user": "user_id", "item": "title"}, "command": "embax train a.csv --user u"}
    run |= {"status": "interrupted", "positive": None}
    for step, recall in ((100, 0.021), (200, 0.0305), (400, 0.0411)):
        line = {"kind": "evaluation", "split": "validation", "step": step, "epoch": 1.0, "recall@20": recall}
        line |= {"ndcg@20": recall / 2, "baseline": "most popular items"}
        metrics.append(line | {"baseline_recall@20": 0.0333, "baseline_ndcg@20": 0.0222})
    return run, metrics


def write(folder, run, metrics=()):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


class Page(html.parser.HTMLParser):
    """The texts of elements by id, every element's attributes, and whether the elements are nested well."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.open, self.texts, self.attributes, self.ids, self.tags = [], {}, [], [], []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]
        self.ids += [found["id"]] if "id" in found else []
        name = found.get("id") or (f"metric:{found['data-metric']}" if "data-metric" in found else None)
        if tag not in VOID:
            self.open.append((tag, name))

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *each) for each in attributes]
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self.open:
            if name and data.strip():
                self.texts[name] = f"{self.texts.get(name, '')} {' '.join(data.split())}".strip()


def page(folder, run, metrics=()):
    return Page(html_report.write_report(write(folder, run, metrics)))


def test_a_click_run(tmp_path):
    got = page(tmp_path / "run", *click())
    sections = ["result", "status", "curves", "loss", "metric-0", "metric-1", "throughput"]
    sections += ["timings", "data", "tables", "settings", "environment"]
    assert [name for name in got.ids if name in sections] == sections
    assert (
        got.source.index("<h1>ratings.parquet</h1>")
        < got.source.index("Task click, model dlrm")
        < got.source.index("result")
    )
    assert "Result on the test split" in got.texts["result"]
    assert got.texts["metric:auc"] == (
        "AUC (higher is better) 0.8596 logistic regression: 0.8557 +0.0039, better than the baseline"
    )
    assert "0.4709 logistic regression: 0.4756 −0.0047, better than" in got.texts["metric:logloss"]
    assert "finished after 1 h 2 min, step 1,200, epoch 2, 2,457,600 samples" in got.texts["status"]
    assert "resume" not in got.ids and "became" not in got.texts["status"]
    assert "train loss, mean of 5" in got.texts["loss"] and "baseline, mean of 5" in got.texts["loss"]
    assert "logistic regression, validation" in got.texts["metric-0"] and "test" in got.texts["metric-0"]
    assert "samples per second" in got.texts["throughput"] and "200k" in got.texts["throughput"]
    assert "reading columns 310.2 s 9.6 %" in got.texts["timings"] and "all 3,216.2 s" in got.texts["timings"]
    assert "train 1,200,000 validation 150,000 test 270,000" in got.texts["data"] and "41.4 %" in got.texts["positive"]
    assert "categorical (16) c0, c1," in got.texts["data"] and "wide" not in got.texts["data"]
    assert "dense_units 64, 32 time – baseline true" in got.texts["settings"]
    assert "jax 0.10.2 backend cpu why this backend the native kernels" in got.texts["environment"]
    assert got.tags.count("details") == 18 and "value 9 12,211 1.4800" in got.texts["tables"]
    assert got.tags.count("svg") == 4 + 18


def test_sizes_and_shares_of_tables(tmp_path):
    run, metrics = click(tables=1, lines=1, evaluations=0)
    run["tables"][0] |= {"rows": 1234, "bytes": 157952}
    metrics[-1]["tables"][0] |= {"rows": 1234, "touched": 1101}
    texts = page(tmp_path / "run", run, metrics).texts
    assert "embedding/c0 c0 1,234 16 float32 Adagrad 154.2 KiB 1,101 89.2 %" in texts["tables"]


def test_norms_that_cannot_be_drawn(tmp_path):
    run, metrics = click(tables=6, lines=1)
    edges = [[0, 1, 1], [0, 1, 2], [1, 1, 1], [0, None, 2], [0, 2, 1], [0, 1]]
    for table, own in zip(metrics[-1]["tables"], edges, strict=True):
        table["norms"] = {"edges": own, "counts": [3, 4]}
    metrics[-1]["tables"][1] |= {"touched": 0, "hottest": None}
    got = page(tmp_path / "run", run, metrics)
    assert got.tags.count("svg") == 2 + 1  # metrics and the first table
    assert got.texts["tables"].count("Its norms are not known.") == 4
    assert got.texts["tables"].count("No row was touched.") == 1


def test_an_interrupted_retrieval_run(tmp_path):
    got = page(tmp_path / "run", *retrieval())
    assert "Result on the validation split" in got.texts["result"]
    assert "After step 400, epoch 1. There is no evaluation on a test split." in got.texts["result"]
    assert "recall@20" in got.texts["metric:recall@20"] and "0.0411" in got.texts["metric:recall@20"]
    assert "+0.0078, better than the baseline" in got.texts["metric:recall@20"]
    assert "−0.0017, worse than the baseline" in got.texts["metric:ndcg@20"]
    assert got.texts["resume"] == "embax train a.csv --user u --resume"
    assert "user user_id item title" in got.texts["data"] and "positive" not in got.ids
    assert "most popular items, validation" in got.texts["metric-0"]


@pytest.mark.parametrize("metrics", [[], [_train(10, 0.5)], [{"kind": "timing", "parts": {}}, {"kind": "later"}]])
def test_a_run_that_has_hardly_begun(tmp_path, metrics):
    got = page(tmp_path / "run", {"format": 1, "status": "running", "command": "embax train x --resume"}, metrics)
    assert [name for name in got.ids if not name.startswith("resume")] == ["result", "status", "environment"]
    assert "No evaluation yet" in got.texts["result"] and "svg" not in got.tags
    assert (
        got.texts["resume"] == "embax train x --resume" and "running when this page was written" in got.texts["status"]
    )
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "no line of training yet" in Page(html_report.write_report(tmp_path / "run")).texts["status"]


def test_parts_that_are_missing_leave_their_sections_out(tmp_path):
    run, metrics = click(test=False, evaluations=1)
    metrics = [line for line in metrics if line["kind"] in ("train", "evaluation")]
    for line in metrics:
        for key in [key for key in line if key.startswith("baseline")]:
            del line[key]
    got = page(tmp_path / "run", run, metrics)
    assert {"timings", "metric-0"}.isdisjoint(got.ids) and "baseline" not in got.texts["result"] + got.texts["loss"]
    assert "details" not in got.tags and "embedding/c0 c0" in got.texts["tables"]


def test_texts_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>$x$\"'&日本\ud800"
    run, metrics = click(tables=2, data=evil, task=evil, model=evil, command=evil, status=evil, backend_reason=evil)
    run |= {"settings": {evil: [evil]}, "columns": {evil: [evil]}, "rows": {evil: 1}}
    run["tables"][0] |= {"name": evil, "column": evil}
    metrics[-1]["tables"][0] |= {"name": evil, "hottest": [[evil, 1, 1.0], [None, 2, 2.0], [["a", 7], 3, 3.0]]}
    metrics[-2]["parts"] = {evil: 1.0}
    for line in metrics:
        if line["kind"] == "evaluation":
            line |= {"split": evil, "baseline": evil, evil: line["step"] / 7}
    got = page(tmp_path / "run", run, metrics)
    assert "script" not in got.tags and "<script" not in got.source
    shown = evil.replace("\ud800", "?")
    for place in ("result", "status", "metric-0", "timings", "data", "tables", "settings", "environment"):
        assert shown in got.texts[place], place
    assert "none or not known" in got.texts["tables"] and "a, 7" in got.texts["tables"]
    assert all(shown not in value for tag, _, value in got.attributes if tag in ("svg", "path", "g", "text"))


def test_nothing_is_loaded_and_the_same_run_is_the_same_page(tmp_path):
    run, metrics = click(tables=3)
    got = page(tmp_path / "run", run, metrics)
    assert not {"script", "link", "img", "iframe", "image"} & set(got.tags)
    for _, name, value in got.attributes:
        if name.split(":")[-1] in ("src", "href"):
            assert value.startswith("#")
        assert name.startswith("xmlns") or not re.search(r"https?://|//", value or ""), (name, value)
    assert not re.search(r"https?://|@import|@font-face|url\((?!#)", got.source)
    assert len(got.ids) == len(set(got.ids)), "an id of one chart could hide that of another"
    assert page(tmp_path / "other", run, metrics).source == page(tmp_path / "run", run, metrics).source == got.source
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "report.html", "run.json"]


def test_the_users_own_matplotlib_style_changes_nothing(tmp_path):
    import matplotlib

    run, metrics = click(tables=1)
    first = page(tmp_path / "run", run, metrics).source
    with matplotlib.rc_context({"lines.color": "red", "svg.fonttype": "path", "font.size": 30}):
        assert page(tmp_path / "run", run, metrics).source == first
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (float("nan"), "The loss became NaN at step 30."),
        (None, "NaN at step 30"),
        (-float("inf"), "infinite at step 30"),
    ],
)
def test_losses_that_are_no_numbers(tmp_path, loss, text):
    metrics = [_train(step, 0.5 + step / 1000) for step in (10, 20)] + [_train(30, 0.1) | {"loss": loss}]
    metrics.append(_evaluation("test", 30, float("nan"), note="slow", rows=7))
    got = page(tmp_path / "run", {"format": 1}, metrics)
    assert text in got.texts["status"] and "loss" in got.ids
    assert [name for name in got.texts if name.startswith("metric:")] == ["metric:auc", "metric:logloss"]
    assert "NaN" in got.texts["metric:auc"] and "baseline" not in got.texts["metric:auc"]
    got = page(tmp_path / "run", {"format": 1}, metrics[2:])
    assert text in got.texts["status"] and "loss" not in got.ids


def test_losses_that_explode_do_not_break_the_axes(tmp_path):
    metrics = [_train(step, loss) for step, loss in enumerate([0.5] * 40 + [1e30, 1e99, 1e308], 1)]
    got = page(tmp_path / "run", {"format": 1}, [*metrics, _train(44, 0.5) | {"loss": 10**400}])
    assert "loss" in got.ids and "The loss became infinite at step 44" in got.texts["status"]


@pytest.mark.parametrize(
    ("auc", "text"),
    [(0.85490, "−0.0008, worse than"), (0.8557, "±0.0000, the same as"), (0.85573, "+3e-05, better than")],
)
def test_small_differences(tmp_path, auc, text):
    assert text in page(tmp_path / "run", {"format": 1}, [_evaluation("test", 1, auc)]).texts["metric:auc"]


def test_of_lines_of_one_step_the_later_counts(tmp_path):
    metrics = [_train(10, 0.9), _train(20, 0.8), _train(30, 0.7), _evaluation("test", 30, 0.5), _train(20, 0.25)]
    run = html_report.read_run(write(tmp_path / "run", {"format": 1}, metrics + [_evaluation("test", 30, 0.75)]))
    assert [(line["step"], line["loss"]) for line in run.train] == [(10, 0.9), (20, 0.25), (30, 0.7)]
    assert [line["auc"] for line in run.evaluations] == [0.75]


def test_a_last_line_that_is_cut_off_is_ignored(tmp_path):
    folder = write(tmp_path / "run", {"format": 1}, [_train(10, 0.5)])
    whole = json.dumps(_train(20, 0.25) | {"kind": "train", "note": "é"}, ensure_ascii=False).encode()
    for cut in (1, len(whole) // 2, len(whole) - 1, len(whole) - 3):
        (folder / "metrics.jsonl").write_bytes(json.dumps(_train(10, 0.5)).encode() + b"\n" + whole[:cut])
        assert len(html_report.read_run(folder).train) == 1
    (folder / "metrics.jsonl").write_bytes(whole)
    assert len(html_report.read_run(folder).train) == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"kind": "tr', "not JSON .*; delete the line"),
        ("[1]", "must be a JSON object; delete the line"),
        ('{"kind": "train", "loss": 1}', '"step" of a "train" line must be of type int'),
        ('{"kind": "evaluation", "step": 1}', '"split" of a "evaluation" line must be of type str'),
        ('{"kind": "tables", "tables": [1]}', 'each of "tables" must be an object with a "name"'),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, text):
    folder = write(tmp_path / "run", {"format": 1})
    (folder / "metrics.jsonl").write_text('{"kind": "later"}\n' + line + '\n{"kind": "later"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: " + text):
        html_report.write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"run\.json: no such file or directory; name the folder that `embax train --output` wrote"),
        ('{\n"format": 1,\n', r"run\.json, line 3: not JSON .*; restore the file or train again"),
        ("\ud800", r"run\.json, line 1: not JSON"),
        ("[]", r"run\.json: format is None, and this embax reads 1"),
        ('{"format": 2}', r"run\.json: format is 2, and this embax reads 1; use the embax that wrote it"),
        ('{"format": 1, "rows": []}', r'run\.json: "rows" must be of type dict; restore'),
        ('{"format": 1, "tables": [{}]}', r'run\.json: each of "tables" must be an object with a "name"'),
    ],
)
def test_a_run_document_that_cannot_be_read_is_named(tmp_path, content, text):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=text):
        html_report.write_report(tmp_path)


def test_a_long_run_of_many_tables_makes_a_small_page(tmp_path):
    run, metrics = click(tables=200, lines=100_000)
    write(tmp_path / "run", run, metrics)
    start = time.process_time()
    got = Page(html_report.write_report(tmp_path / "run"))
    assert time.process_time() - start < 20  # a few seconds on an idle core
    assert len(got.source) < 3_000_000 and got.tags.count("details") == html_report.DETAILED
    assert "Of the 60 largest tables; 140 smaller ones are left out." in got.texts["left-out"]
    assert f"<summary>{max(run['tables'], key=lambda table: table['bytes'])['name']} " in got.source
    assert "of 100,000 logged values the extremes in each of 400 runs are drawn" in got.texts["loss"]


def test_thinned_curves_keep_their_extremes():
    x = np.arange(100_001.0)
    y = np.random.default_rng(1).normal(size=x.size)
    y[[777, 50_123]] = 99, -99
    thin_x, thin_y = html_charts.thinned(x, y)
    assert len(thin_x) <= 2 * html_charts.BINS + 2 and (np.diff(thin_x) > 0).all()
    assert {777.0, 50_123.0, 0.0, 100_000.0} <= set(thin_x) and (thin_y == y[thin_x.astype(int)]).all()
    assert (html_charts.thinned(x[:800], y[:800])[1] == y[:800]).all()


def test_smooth_curves_are_means_and_forget_far_points():
    x = np.arange(4000.0)
    y = np.where(x == 5, 1e30, 0.5)
    middle, mean, window = html_charts.smoothed(x, y)
    assert window == 100 and middle[0] == 49.5 and middle[1] == 74.5
    assert mean[0] == pytest.approx(1e28) and (mean[1:] == 0.5).all()


def test_far_points_do_not_flatten_a_curve():
    y = np.linspace(1.0, 0.5, 1000)
    y[500] = 1e9
    curve = html_charts.Curve("", np.arange(1000.0), y, look="thin")
    svg = html_charts.curves("a", [curve], "loss")
    assert ">1.0</text>" in svg and ">2.0</text>" in svg and "G</text>" not in svg
    tame = html_charts.curves("a", [html_charts.Curve("", curve.x, np.minimum(y, 1.2), look="thin")], "loss")
    assert ">1.2</text>" in tame and ">2.0</text>" not in tame


def test_ticks():
    values = (0, 0.25, 1200, 40_000, 2.5e6, -3e9, 1e30)
    assert [html_charts.compact(n) for n in values] == ["0", "0.25", "1200", "40k", "2.5M", "−3G", "1e+30"]


def test_numbers_for_people():
    sizes = [html_report.size(n) for n in (0, 999, 1024, 5 * 1024**3, None)]
    assert sizes == ["0 B", "999 B", "1.0 KiB", "5.0 GiB", "–"]
    assert [html_report.duration(n) for n in (12.34, 245, 7800, "x")] == ["12.3 s", "4 min 5 s", "2 h 10 min", "–"]
    assert [html_report.fixed(n) for n in (0.5, 0, 0.000123, None)] == ["0.5000", "0.0000", "0.000123", "NaN"]
