"""The GPU benchmark, tried on a CPU at a thousandth of its size: what it writes, and what it notices."""

import argparse
import json
import zipfile

import jax
import numpy as np
import pytest

pytest.importorskip("optax", reason="needs the test extra")

from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import cases, checks, children, dense, install, measure, report  # noqa: E402
from embax import kernels  # noqa: E402
from embax.kernels import reference  # noqa: E402

TINY = ["--scale", "0.001", "--seconds", "60", "--one-process", "--frameworks", "jax", "--dims", "4"]


@pytest.fixture(autouse=True)
def _as_in_a_benchmark(monkeypatch):
    """Promotion as users have it, which optax needs; two turns, short ones."""
    monkeypatch.setattr(measure, "TURNS", 2)
    monkeypatch.setattr(measure, "CHUNK_SECONDS", 0.001)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def best_only(monkeypatch):
    """The backend of this machine's choice alone, to compile less; returns its name as a contender."""
    best = kernels.choose().name
    monkeypatch.setattr(kernels, "REGISTRY", {best: kernels.REGISTRY[best]})
    return f"embax {best}"


@pytest.fixture
def reference_only(monkeypatch):
    """The reference alone; programs that were compiled before are forgotten, for a test changes what they do."""
    monkeypatch.setattr(kernels, "REGISTRY", {"reference": kernels.REGISTRY["reference"]})
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def small_jobs(monkeypatch):
    """Jobs of every kind that compile fast, in place of the cases."""
    found = [
        cases.Job("a", "sgd", (90, 70), 8, 16, pooled=False),
        cases.Job("c", "rowwise", (60, 50, 3), 8, 8, 3, unroll=2),
        cases.Job("e", "rowwise", (80, 3), 8, 16, dtype="bfloat16"),
    ]
    monkeypatch.setattr(cases, "jobs", lambda named, scale: [job for job in found if job.case in named])


def _found(folder):
    (path,) = folder.glob("gpu-*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_what_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checks, "NAMES", {"adam": "adam"})
    assert command.main([*TINY, "--cases", "a", "--only", "*-adam", "--results", str(tmp_path)]) == 0
    found, text = _found(tmp_path)
    backends = [name for name in kernels.REGISTRY if kernels.get(name).unavailable() is None]
    assert found["check"] == {"counts": {b: {"right": 2, "wrong": 0, "left out": 0} for b in backends}, "wrong": []}
    assert found["bandwidth"]["bytes_per_second"] > 0 and found["machine"]["chosen"] and found["scale"] == 0.001
    (row,) = found["rows"]
    assert (row["job"], row["rows"], row["ids"]) == ("a-float32-128-adam", 16780, 1050)
    _check_times(row, [*(f"embax {name}" for name in backends), measure.DENSE])
    assert [one["met"] for one in found["targets"]] == [None] * 2
    assert "| a: adam float32 x 128 | step |" in text and "no figures of the cases" in text
    assert text in capsys.readouterr().out


def _check_times(row, names):
    assert set(names) == {name for name, result in row["contenders"].items() if "error" not in result}
    for name in names:
        result = row["contenders"][name]
        assert name == measure.DENSE or result["rows_checked"] > 30
        for what in cases.PASSES:
            times = result[what]
            assert 0 < times["min"] <= times["median"] and len(times["ms"]) == 2
            assert report.share(row, what, times["median"], 1e9) > 0


def test_bags_programs_of_several_steps_and_sampled_rows(tmp_path, monkeypatch, small_jobs, best_only):
    monkeypatch.setattr(checks, "NAMES", {})
    assert command.main([*TINY, "--cases", "c", "--big", "--results", str(tmp_path)]) == 0
    found, _ = _found(tmp_path)
    for row in found["rows"]:
        _check_times(row, [best_only])
        assert "row-wise" in row["contenders"][measure.DENSE]["error"]
    assert [row["unroll"] for row in found["rows"]] == [2, 1]
    (path,) = tmp_path.glob(f"gpu-*-rows-{best_only.replace(' ', '-')}.npz")
    with np.load(path) as arrays:
        assert arrays["t00_before_0"].shape == arrays["t00_after_0"].shape == (len(arrays["t00_rows"]), 8)
        assert (arrays["t01_before_1"] < arrays["t01_after_1"]).any()  # squares were added up


def test_bytes_by_hand():
    job = cases.Job("x", "rowwise", (100, 50), dim=4, batch=8, valency=3, dtype="bfloat16")
    moved = job.must_move(10)
    # 48 ids of 4 bytes, 10 rows of 8, 16 activations of 8; 16 gradients, 10 rows and slots of 4, read and written.
    assert moved == {"forward": 192 + 80 + 128, "update": 128 + 2 * 10 * 12, "step": 400 + 368}
    assert job.state_bytes == 150 * 12
    adam = cases.Job("x", "adam", (100,), dim=4, batch=8)
    assert adam.must_move(5)["update"] == 8 * 16 + 2 * 5 * (16 + 32)


def test_the_cases_are_those_that_were_published():
    assert sum(cases.CRITEO) == 204_184_588
    job = next(job for job in cases.jobs("a", 1.0))
    ids = cases.power_law(np.random.default_rng(0), job.tables[0], (job.batch,))
    assert ids.min() >= 0 and ids.max() < job.tables[0] and ids.dtype == np.int32
    assert np.unique(ids).size * 10 == pytest.approx(350_280, rel=0.01)
    small = cases.power_law(np.random.default_rng(0), 3, (1000,))
    assert set(small.tolist()) == {0, 1, 2}


def test_a_wrong_backend_is_noticed(tmp_path, monkeypatch, reference_only, small_jobs):
    right = reference.step_rows

    def wrong(optimizer, state, rows, gradients, hyper):
        return right(optimizer, state, rows, gradients * 1.001, hyper)

    monkeypatch.setattr(reference, "step_rows", wrong)
    monkeypatch.setattr(checks, "NAMES", {"sgd": "sgd"})
    arguments = [*TINY, "--cases", "a", "--results", str(tmp_path)]
    assert command.main(arguments) == 1
    found, text = _found(tmp_path)
    assert "rows of bags" in found["check"]["wrong"][0] and not found["rows"] and "wrong" in text
    monkeypatch.setattr(checks, "NAMES", {})
    assert command.main([*arguments, "--no-check"]) == 0
    found, _ = _found(tmp_path)
    contenders = found["rows"][0]["contenders"]
    assert "rows of table 0" in contenders["embax reference"]["error"]
    assert contenders[measure.DENSE]["step"]["median"] > 0


def test_who_runs_out_of_memory_stops_nobody(tmp_path, monkeypatch, small_jobs, best_only):
    def too_large(self, what, index):
        for leaf in jax.tree.leaves(self.shared.tables):
            leaf.delete()  # as a donated call that fails may leave them
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand so on")

    monkeypatch.setattr(dense.Dense, "run", too_large)
    monkeypatch.setattr(checks, "NAMES", {})
    assert command.main([*TINY, "--cases", "a,c", "--results", str(tmp_path)]) == 0
    found, text = _found(tmp_path)
    for row in found["rows"]:
        assert row["contenders"][best_only]["step"]["median"] > 0
    error = found["rows"][0]["contenders"][measure.DENSE]["error"]
    assert error == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert len(found["rows"]) == 2 and "Out of memory" in text


def test_a_worker_that_dies_is_followed_by_another(monkeypatch):
    jobs = cases.jobs("a", 0.001)[:2]
    asked = []

    def events(request, seconds):
        asked.append(request)
        for job in request.jobs:
            yield {"event": "begin", "job": job.name, "contender": "embax cuda"}
            if job is jobs[1] and not request.excluded:
                yield {"event": "ended", "code": -11}
                return
            yield {"event": "row", "job": job.name}
        yield {"event": "ended", "code": 0}

    monkeypatch.setattr(children, "events", events)
    request = measure.Request("jax", ["machine"], jobs, 9)
    said = list(children.persistent(request, children.time.monotonic() + 9))
    assert [one["job"] for one in said if one["event"] == "row"] == [job.name for job in jobs]
    (died,) = [one for one in said if one["event"] == "died"]
    assert died["contender"] == "embax cuda" and "-11" in died["error"]
    assert len(asked) == 2 and asked[1].excluded == {jobs[1].name: ["embax cuda"]} and asked[1].jobs == jobs[1:]


def test_what_has_no_time_is_said(tmp_path):
    request = measure.Request("jax", [], cases.jobs("a,b", 0.001), 0.0)
    said = list(measure.run(request))
    assert len(said) == 7 and {one["event"] for one in said} == {"left out"}


def test_requests_travel_as_text():
    request = measure.Request("torch", [], cases.jobs("d", 0.001), 5.0, checked={"dims": [4]})
    assert measure.Request.read(json.loads(json.dumps(measure.dataclasses.asdict(request)))) == request


def test_targets_are_judged_on_their_card():
    row = {"case": "a", "optimizer": "sgd", "dtype": "float32", "dim": 128, "bytes": {"step": 1.6e9}}
    row["contenders"] = {report.CUDA: {"step": {"median": 0.6}}}
    assert [one["met"] for one in report.targets([row], "NVIDIA H200", 4e12)] == [True, True]
    assert [one["met"] for one in report.targets([row], "NVIDIA H100", 4.8e12)] == [None, False]
    plain = {**row, "case": "b", "contenders": {**row["contenders"], report.PLAIN: {"step": {"median": 3.1}}}}
    assert [one["met"] for one in report.targets([plain], "", None)] == [True]
    assert [one["met"] for one in report.targets([{**plain, "scaled": True}], "", None)] == [None]


def test_no_card(tmp_path):
    options = argparse.Namespace(scale=1.0, no_check=True)
    with pytest.raises(command.NoCard, match="no GPU"):
        command.Findings(options).add({"event": "machine", "platform": "cpu", "backends": {}})


def test_a_wheel_is_unpacked(tmp_path, monkeypatch):
    wheel = tmp_path / "embax-0.1.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("embax/__init__.py", "")
        archive.writestr("embax/kernels/_native/libembax_cuda.so", "")
    monkeypatch.setattr(install, "SITE", tmp_path / "site")
    monkeypatch.setenv(install.VARIABLE, "")
    monkeypatch.setattr("sys.path", list(install.sys.path))
    assert install.value(install.unpack(wheel)) == 2
    (tmp_path / "plain" / "embax").mkdir(parents=True)
    assert install.value(tmp_path / "plain") == 0
    monkeypatch.setattr(install, "ROOT", tmp_path / "plain")
    assert install.choose() == tmp_path / "site" and install.sys.path[0] == str(tmp_path / "site")


def test_what_is_missing_to_build(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "SITE", tmp_path / "site")
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"missing cmake, a C\+\+ compiler, ninja or make"):
        install.build()
