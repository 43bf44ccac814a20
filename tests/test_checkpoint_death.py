"""A process that is killed at any moment of a save leaves a step to go on from, to the same bits."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import embax

checkpoint = pytest.importorskip("embax.checkpoint")

HERE = pathlib.Path(__file__).parent


def _worker(folder, mode, steps):
    command = [sys.executable, str(HERE / "checkpoint_worker.py"), str(folder), mode, str(steps)]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})


def _uninterrupted(steps):
    from checkpoint_worker import begin, plan, stepper

    shared = plan()
    (tables, dense), step = begin(shared), stepper(shared)
    for number in range(steps):
        tables, dense = step(tables, dense, number)
        yield jax.tree.map(np.asarray, (embax.to_arrays(shared, tables), dense))


def _same(found, wanted):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(one), other)


@pytest.mark.parametrize(
    ("mode", "deaths"),
    [
        ("asynchronous-incremental", 2),
        pytest.param("asynchronous", 3, marks=pytest.mark.nightly),
        pytest.param("synchronous", 3, marks=pytest.mark.nightly),
        pytest.param("asynchronous", 25, marks=pytest.mark.nightly),
        pytest.param("synchronous", 25, marks=pytest.mark.nightly),
        pytest.param("asynchronous-incremental", 25, marks=pytest.mark.nightly),
        pytest.param("synchronous-incremental", 25, marks=pytest.mark.nightly),
    ],
)
def test_killed_at_any_moment(tmp_path, mode, deaths):
    from checkpoint_worker import begin, plan

    shared, chance, last = plan(), random.Random(deaths), -1
    wanted = {}
    for _ in range(deaths):
        with _worker(tmp_path, mode, 10_000) as worker:
            assert worker.stdout is not None
            assert any(line.startswith("saving") for line in worker.stdout)
            time.sleep(chance.uniform(0, 0.5))
            worker.send_signal(signal.SIGKILL)
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            if not checkpoints.steps():
                assert last == -1  # it died before the first step was whole
                continue
            found = checkpoints.restore(shared, dense=begin(shared)[1])
        assert found.step >= last
        last = found.step
        wanted[last] = (embax.to_arrays(shared, found.tables), found.dense)
    with _worker(tmp_path, mode, last + 3) as worker:
        assert "done" in worker.communicate()[0]
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(shared, dense=begin(shared)[1])
    assert found.step == last + 2
    wanted[found.step] = (embax.to_arrays(shared, found.tables), found.dense)
    for number, state in enumerate(_uninterrupted(last + 3)):
        if number in wanted:
            _same(wanted[number], state)
