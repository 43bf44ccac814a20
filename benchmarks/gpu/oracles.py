"""The project's float64 oracle, and how near a float32 or bfloat16 result has to come to it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

NAMES = {"sgd": "sgd", "rowwise": "rowwise_adagrad", "adagrad": "adagrad", "adam": "adam"}
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


class Wrong(AssertionError):
    """A result that is not what the oracle says."""


def load() -> ModuleType:
    """Returns tests/oracle.py of this checkout."""
    if "oracle" in sys.modules:
        return sys.modules["oracle"]
    path = Path(__file__).parents[2] / "tests" / "oracle.py"
    spec = importlib.util.spec_from_file_location("oracle", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


def close(actual: np.ndarray, wanted: np.ndarray, dtype: str, scale: Any, what: str, slack: Any = 0.0) -> None:
    """Raises Wrong unless numbers agree up to a few units of rounding at the size of what was combined, and slack."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    bound = 2 * EPSILON[dtype] * np.abs(wanted) + 64 * EPSILON["float32"] * scale + 1e-7 + slack
    off = np.abs(actual - wanted)
    if not (off <= bound).all():  # NaN is never within
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(off), np.inf, off - bound)), off.shape)
        raise Wrong(f"{what}: {actual[at]:.7g} at {tuple(map(int, at))} instead of {wanted[at]:.7g}")
