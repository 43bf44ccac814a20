"""The examples run, and learn."""

import importlib.util
from pathlib import Path

import jax
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
