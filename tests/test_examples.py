"""The examples run, and learn."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_equinox_model_learns():
    pytest.importorskip("equinox", reason="the example needs equinox")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a reader runs it
        losses = load("equinox_model").train(steps=60)
    assert losses[0] == pytest.approx(1.386, abs=0.1)  # four classes, nothing known
    assert losses[-1] < 0.1


@pytest.mark.parametrize("script", ["by_primitives", "by_linen", "by_nnx"])
def test_the_next_word(script, tmp_path, monkeypatch, eight_devices):
    """One device and four learn the same, and four go on where one has stopped."""
    pytest.importorskip("orbax.checkpoint", reason="the example saves by Orbax")
    monkeypatch.syspath_prepend(EXAMPLES / "shakespeare")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train = load(f"shakespeare/{script}").train
        whole = train(devices=4, steps=240)
        begun = train(devices=1, steps=220, save=tmp_path / "saved")
        ended = train(devices=4, steps=20, restore=tmp_path / "saved")
    assert whole[0] == pytest.approx(5.7, abs=0.3)  # of 300 words, and worse than nothing known
    assert sum(ended) / 20 < 0.01
    np.testing.assert_allclose(whole, begun + ended, rtol=1e-2)
