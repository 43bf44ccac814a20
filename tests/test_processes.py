"""Two processes of 4 devices each do what one process of 8 does, bit for bit, and do not outlive each other."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import process_worker as worker
import pytest

import embax

ROOT = Path(__file__).parent.parent
COUNT, PATIENCE = 2, 140
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


class Processes:
    """Worker processes of one act; none is left when the block ends."""

    def __init__(self, act, folder):
        port = free_port()
        self.logs = [folder / f"log{rank}" for rank in range(COUNT)]
        self.outs = [folder / f"out{rank}.npz" for rank in range(COUNT)]
        settings = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        settings["PYTHONPATH"] = os.pathsep.join([str(ROOT), settings.get("PYTHONPATH", "")])
        self.processes = []
        for rank, (log, out) in enumerate(zip(self.logs, self.outs, strict=True)):
            command = [sys.executable, "-u", worker.__file__, rank, COUNT, port, out, act]
            with log.open("wb") as file:
                started = subprocess.Popen(
                    [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=settings
                )
            self.processes.append(started)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def log(self, rank):
        return self.logs[rank].read_text(errors="replace")

    def wait(self, rank, patience=PATIENCE):
        """Returns the exit status of a process; AssertionError with what it said unless it ends in time."""
        try:
            return self.processes[rank].wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {rank} is there after {patience} s:\n{self.log(rank)}") from None

    def wait_for(self, rank, text, times):
        """Waits until a process has said ``text`` that often."""
        end = time.monotonic() + PATIENCE
        while self.log(rank).count(text) < times:
            assert self.processes[rank].poll() is None and time.monotonic() < end, self.log(rank)
            time.sleep(0.05)


def free_port():
    try:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            return found.getsockname()[1]
    except OSError as error:
        pytest.skip(f"processes cannot talk to each other here: {error}")


@pytest.fixture(autouse=True)
def eight_devices():
    if len(jax.devices()) != 8:
        pytest.skip(f"needs 8 CPU devices, and there are {len(jax.devices())}")
    yield
    jax.clear_caches()


def test_two_processes_are_one(tmp_path):
    with Processes("train_cases", tmp_path) as two:
        one = {case: _train(case) for case in worker.runnable()}  # in the meantime
        for rank in range(COUNT):
            assert two.wait(rank) == 0, two.log(rank)
        found = [dict(np.load(out)) for out in two.outs]
        print(two.log(0))
    for case, (tables, activations) in one.items():
        for name, values in tables.items():
            for own in found:
                np.testing.assert_array_equal(own[f"{case} tables {name}"], values, err_msg=f"{case} {name}")
        for name, values in activations.items():
            _check_activations(case, name, [own[f"{case} activations {name}"] for own in found], values)
    _check_agreements(*found)


def test_checkpoints_of_two_processes(tmp_path):
    """Saved by one process, loaded, trained and saved again by two in every case, loaded by one device."""
    pytest.importorskip("orbax.checkpoint")
    from embax.checkpoint import Checkpoints

    plan = worker.plan_of("across")
    tables, alone = embax.track(plan, worker.given(plan)), embax.plan(worker.features())
    with Checkpoints(tmp_path / "steps", keep=None) as checkpoints:
        checkpoints.save(0, plan, tables, dense=worker.dense(plan, 1.5), data={"epoch": 0})
    with Processes("save_and_load", tmp_path) as two:
        for rank in range(COUNT):
            assert two.wait(rank) == 0, two.log(rank)
    with Checkpoints(tmp_path / "steps", keep=None) as checkpoints:
        cases = len(worker.runnable())
        assert checkpoints.steps() == list(range(2 * cases + 1))
        for case in range(cases):
            whole, changed = (
                checkpoints.restore(alone, dense=worker.dense(plan, 0.0), step=2 * case + more) for more in (1, 2)
            )
            np.testing.assert_array_equal(changed.dense["w"], [1.5] * 3)
            wanted = worker.flat(embax.to_arrays(alone, whole.tables))
            for name, values in worker.flat(embax.to_arrays(alone, changed.tables)).items():
                np.testing.assert_array_equal(values, wanted[name], err_msg=name)
    document = json.loads((tmp_path / "steps" / str(2 * cases) / "embax" / "embax.json").read_text())["checkpoint"]
    assert len(document["deltas"]) == cases
    assert any(name.startswith("tables/delta.0/") and "/1/c/" in name for name in document["files"])


def _train(case):
    """Returns tables and activations of one process, after holding the tables against those of one device."""
    plan = worker.plan_of(case)
    tables, activations = worker.train(plan, worker.fresh(plan, case))
    alone = embax.plan(worker.features())
    wanted, _ = worker.train(alone, worker.fresh(alone, case))
    for name, values in wanted.items():
        np.testing.assert_allclose(tables[name], values, **TOLERANCE, err_msg=f"{case} {name}")
    return tables, activations


def _check_activations(case, name, parts, wanted):
    if case == "across":  # every process has all samples
        for part in parts:
            np.testing.assert_array_equal(part, wanted, err_msg=f"{case} {name}")
        return
    joined = np.concatenate(parts)
    if case == "gather" and not name.endswith("user"):
        # psum_scatter adds up a sample's 8 partial sums device after device within one process, and in another order
        # between processes (gloo). Of 2 of them, as in "across", there is only one order.
        np.testing.assert_allclose(joined, wanted, rtol=1e-6, atol=1e-6, err_msg=f"{case} {name}")
    else:
        np.testing.assert_array_equal(joined, wanted, err_msg=f"{case} {name}")


def _check_agreements(first, last):
    """Of batches that are not alike: see ``worker.agreements``."""
    assert first["ids"] > 2 * last["ids"]
    assert first["capacity"].tolist() == last["capacity"].tolist()
    for own, samples in ((first, 16), (last, 14)):
        assert own["one has fewer"].item() == (
            f'feature "history": this process brings {samples} samples, and the processes from 14 to 16; each must '
            "bring the same number: fill the batch up with empty samples"
        )
        for name, samples, stack in (("all have an odd number", (14, 14), "item"), ("rectangles only", (14,), "item")):
            wanted = (
                f'stack "{stack}": this process brings {samples} samples for 4 shards; with several processes each '
                "must bring a multiple of its shards: fill the batch up with empty samples"
            )
            assert own[name].item() == (wanted if name != "rectangles only" or own is last else "")
        assert own["alone"].tolist() == [14, 14]
        assert own["declared"].tolist() == [8, 30 + 4 * 3]
    plan = embax.plan({"shown": worker.features()["shown"]})
    ids = {"shown": worker.ids(0, 0, 1)["shown"]}
    wanted = embax.lookup(plan, worker.given(plan), embax.preprocess(plan, ids))[0]["shown"]
    np.testing.assert_allclose(np.concatenate([first["traced"], last["traced"]]), wanted, **TOLERANCE)


@pytest.mark.parametrize("victim", range(COUNT))
def test_no_process_outlives_another(victim, tmp_path):
    """Process 0 coordinates: without it the others end at once, without another one when its heartbeat is missed."""
    survivor = 1 - victim
    with Processes("train_on", tmp_path) as two:
        two.wait_for(survivor, "step", 2)
        two.processes[victim].send_signal(signal.SIGKILL)
        at = time.monotonic()
        status = two.wait(survivor, patience=60)
        print(f"process {survivor} ended after {time.monotonic() - at:.1f} s")
        text = two.log(survivor)
    assert status != 0
    assert "another task died" in text or "Gloo" in text, text


def test_an_error_in_one_process_ends_all(tmp_path):
    with Processes("raise_in_one", tmp_path) as two:
        assert two.wait(COUNT - 1) != 0
        assert two.wait(0, patience=30) != 0
        assert 'ValueError: table "item": id 101 >= vocabulary_size 101' in two.log(COUNT - 1)
