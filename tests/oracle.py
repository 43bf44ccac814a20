# SPDX-License-Identifier: Apache-2.0
"""The independent definition of embax: NumPy float64, plain loops, no embax and no jax.

Every backend is tested against this file, so it is written to be read next to the formulas, not to be fast.
A table is `[V, D]`; a slot is `[V, D]`, or `[V, 1]` where it is row-wise; a sample is a list of ids.

>>> pool([[1.0, 2.0], [3.0, 4.0]], [[0, 1, 1], []], None, "sum").tolist()
[[7.0, 10.0], [0.0, 0.0]]
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Slots = dict[str, Array]
Samples = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]] | None
Quantization = tuple[float, float, int] | None
Step = int | None
Result = tuple[Array, Slots]

COMBINERS = ("sum", "mean", "sqrtn")


def _f64(values: ArrayLike) -> Array:
    return np.array(values, dtype=np.float64)  # always a copy: no function here writes to its arguments


# ---- samples ----------------------------------------------------------------------------------------------


def dense_samples(
    ids: ArrayLike, padding_id: int | None = None, weights: ArrayLike | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """Samples and weights of a padded `[B, n]` array. Padding is absence: no weight, no touched row."""
    ids = np.asarray(ids)
    weights = np.ones(ids.shape) if weights is None else _f64(weights)
    samples, kept = [], []
    for id_row, weight_row in zip(ids, weights, strict=True):
        keep = [i for i, id_ in enumerate(id_row) if padding_id is None or id_ != padding_id]
        samples.append([operator.index(id_row[i]) for i in keep])
        kept.append([float(weight_row[i]) for i in keep])
    return samples, kept


def ragged_samples(values: ArrayLike, offsets: ArrayLike) -> list[list[Any]]:
    """Sample s of a CSR pair is `values[offsets[s]:offsets[s + 1]]`; works for ids and for weights."""
    values, offsets = np.asarray(values), np.asarray(offsets)
    return [values[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def _weights_or_ones(samples: Samples, weights: Weights) -> list[list[float]]:
    if weights is None:
        return [[1.0] * len(ids) for ids in samples]
    assert [len(w) for w in weights] == [len(ids) for ids in samples], "one weight per id"
    return [[float(w) for w in sample_weights] for sample_weights in weights]


def _row(id_: int, num_rows: int | None = None) -> int:
    """The row of an id. A negative, too large or non-integer id is an error, never another row."""
    row = operator.index(id_)
    if row < 0 or (num_rows is not None and row >= num_rows):
        raise IndexError(f"id {row} is outside [0, {num_rows})")
    return row


# ---- lookup -----------------------------------------------------------------------------------------------


def _divisor(combiner: str, weights: Sequence[float]) -> float:
    """What a sample's weights are divided by: sum 1, mean sum(w), sqrtn sqrt(sum(w^2))."""
    if combiner == "sum":
        return 1.0
    if combiner == "mean":
        return float(sum(weights))
    if combiner == "sqrtn":
        return float(np.sqrt(sum(w * w for w in weights)))
    raise ValueError(f"combiner {combiner!r} is not one of {COMBINERS}")


def gains(combiner: str, weights: Sequence[float]) -> list[float]:
    """Gains of ONE sample: w / divisor, and 0 where the divisor is 0.

    >>> gains("sqrtn", [3.0, 4.0])
    [0.6, 0.8]
    """
    divisor = _divisor(combiner, weights)
    return [w / divisor if divisor != 0 else 0.0 for w in map(float, weights)]


def quantize(row: ArrayLike, quantization: Quantization) -> Array:
    """Each number clipped to [min, max], then moved to the nearest of `num_buckets` evenly spaced levels.

    The levels include min and max; a number half-way goes to the even level.
    """
    row = _f64(row)
    if quantization is None:
        return row
    low, high, num_buckets = quantization
    spacing = (high - low) / (num_buckets - 1)
    return low + np.round((np.clip(row, low, high) - low) / spacing) * spacing


def pool(
    table: ArrayLike, samples: Samples, weights: Weights, combiner: str, quantization: Quantization = None
) -> Array:
    """A sample's activation = sum over its occurrences of gain x (quantized) row; an empty sample gives 0."""
    table = _f64(table)
    activations = np.zeros((len(samples), table.shape[1]))
    for s, (ids, sample_weights) in enumerate(zip(samples, _weights_or_ones(samples, weights), strict=True)):
        for id_, gain in zip(ids, gains(combiner, sample_weights), strict=True):
            activations[s] += gain * quantize(table[_row(id_, len(table))], quantization)
    return activations


# ---- gradients --------------------------------------------------------------------------------------------


def row_gradients(
    samples: Samples, weights: Weights, combiner: str, activation_gradients: ArrayLike
) -> dict[int, Array]:
    """Row -> sum over all its occurrences of gain x the sample's activation gradient.

    The keys are the touched rows: an id of gain 0 is an occurrence. Quantization passes gradients through.
    """
    activation_gradients = _f64(activation_gradients)
    sums: dict[int, Array] = {}
    for s, (ids, sample_weights) in enumerate(zip(samples, _weights_or_ones(samples, weights), strict=True)):
        for id_, gain in zip(ids, gains(combiner, sample_weights), strict=True):
            contribution = gain * activation_gradients[s]
            sums[_row(id_)] = sums.get(_row(id_), np.zeros_like(contribution)) + contribution
    return sums


def weight_gradients(
    table: ArrayLike, samples: Samples, weights: Weights, combiner: str, activation_gradients: ArrayLike
) -> list[list[float]]:
    """d loss / d weight of each occurrence, through the divisor too; 0 where the divisor is 0.

    With c_i = row_i . gradient and N the divisor: sum c_j; mean c_j/N - sum_i(c_i w_i)/N^2;
    sqrtn c_j/N - w_j sum_i(c_i w_i)/N^3.
    """
    table, activation_gradients = _f64(table), _f64(activation_gradients)
    result = []
    for s, (ids, w) in enumerate(zip(samples, _weights_or_ones(samples, weights), strict=True)):
        c = [float(np.dot(table[_row(id_, len(table))], activation_gradients[s])) for id_ in ids]
        n = _divisor(combiner, w)
        weighted = sum(c_i * w_i for c_i, w_i in zip(c, w, strict=True))
        if combiner == "sum":
            result.append(c)
        elif n == 0:
            result.append([0.0] * len(ids))
        elif combiner == "mean":
            result.append([c_j / n - weighted / n**2 for c_j in c])
        else:
            result.append([c_j / n - w_j * weighted / n**3 for c_j, w_j in zip(c, w, strict=True)])
    return result


# ---- optimizers: one step of one row ----------------------------------------------------------------------
# (row [D], gradient [D], slots {name: [D] or [1]}, step, **hyperparameters) -> (new row, new slots)


def sgd(row: Array, gradient: Array, slots: Slots, step: Step, *, learning_rate: float = 0.001) -> Result:
    """w -= lr g."""
    del slots, step
    return row - learning_rate * gradient, {}


def adagrad(row: Array, gradient: Array, slots: Slots, step: Step, *, learning_rate: float = 0.001) -> Result:
    """a += g^2; w -= lr g / sqrt(a): no epsilon."""
    del step
    a = slots["accumulator"] + gradient**2
    return row - learning_rate * gradient / np.sqrt(a), {"accumulator": a}


def rowwise_adagrad(row: Array, gradient: Array, slots: Slots, step: Step, *, learning_rate: float = 0.001) -> Result:
    """a += mean(g^2), one number a row; w -= lr g / sqrt(a)."""
    del step
    a = slots["accumulator"] + np.mean(gradient**2)
    return row - learning_rate * gradient / np.sqrt(a), {"accumulator": a}


def adagrad_momentum(
    row: Array,
    gradient: Array,
    slots: Slots,
    step: Step,
    *,
    learning_rate: float = 0.001,
    momentum: float = 0.9,
    beta2: float = 1.0,
    epsilon: float = 1e-10,
    exponent: float = 2.0,
    use_nesterov: bool = False,
) -> Result:
    """a += g^2, or a decaying mean where beta2 != 1; s = g (a + eps)^(-1/exponent); m = k m + s."""
    del step
    a = slots["accumulator"]
    a = a + gradient**2 if beta2 == 1 else beta2 * a + (1 - beta2) * gradient**2
    scaled = gradient * (a + epsilon) ** (-1 / exponent)
    m = momentum * slots["momentum"] + scaled
    move = momentum * m + scaled if use_nesterov else m
    return row - learning_rate * move, {"accumulator": a, "momentum": m}


def adam(
    row: Array,
    gradient: Array,
    slots: Slots,
    step: Step,
    *,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
) -> Result:
    """Adam at t = step + 1, both bias corrections folded into the rate and the epsilon (step None is 0)."""
    t = (0 if step is None else step) + 1
    correction = np.sqrt(1 - beta_2**t)
    alpha = learning_rate * correction / (1 - beta_1**t)
    m = slots["momentum"] + (1 - beta_1) * (gradient - slots["momentum"])
    v = slots["velocity"] + (1 - beta_2) * (gradient**2 - slots["velocity"])
    return row - alpha * m / (np.sqrt(v) + epsilon * correction), {"momentum": m, "velocity": v}


def laprop(
    row: Array,
    gradient: Array,
    slots: Slots,
    step: Step,
    *,
    learning_rate: float = 0.001,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-30,
) -> Result:
    """nu = d nu + (1-d)(g^2 + eps); mu = b1 mu + sqrt(1-b1^2) g / sqrt(nu); w -= lr mu.

    d = b2 (1-b2^step) / (1-b2^(step+1)) makes nu the bias-corrected mean; without a step d = b2.
    """
    d = b2 if step is None else b2 * (1 - b2**step) / (1 - b2 ** (step + 1))
    nu = d * slots["nu"] + (1 - d) * (gradient**2 + eps)
    mu = b1 * slots["mu"] + np.sqrt(1 - b1**2) * gradient / np.sqrt(nu)
    return row - learning_rate * mu, {"mu": mu, "nu": nu}


def ftrl(
    row: Array,
    gradient: Array,
    slots: Slots,
    step: Step,
    *,
    learning_rate: float = 0.01,
    learning_rate_power: float = -0.5,
    l1_regularization_strength: float = 0.0,
    l2_regularization_strength: float = 0.0,
    beta: float = 0.0,
    multiply_linear_by_learning_rate: bool = False,
) -> Result:
    """The row is a function of the linear slot z; `multiply...` keeps lr z in the slot instead of z."""
    del step
    lr, l1, l2 = learning_rate, l1_regularization_strength, l2_regularization_strength
    n = slots["accumulator"] + gradient**2
    p, p0 = n**-learning_rate_power, slots["accumulator"] ** -learning_rate_power
    if multiply_linear_by_learning_rate:
        z = slots["linear"] + lr * gradient - (p - p0) * row
        bound, denominator = l1 * lr, p + 2 * lr * l2 + beta
    else:
        z = slots["linear"] + gradient - (p - p0) / lr * row
        bound, denominator = l1, (p + beta) / lr + 2 * l2
    numerator = -z if l1 == 0 else np.clip(z, -bound, bound) - z
    return numerator / denominator, {"accumulator": n, "linear": z}


def f2a(
    row: Array,
    gradient: Array,
    slots: Slots,
    step: Step,
    *,
    learning_rate: float = 0.01,
    rho: float = 0.5,
    l1_regularization_strength: float = 0.0,
    l2_regularization_strength: float = 0.0,
    max_lr_multiplier: float = 1e6,
) -> Result:
    """Adagrad whose rate grows with (global step / this row's own step count)^rho, up to a cap."""
    local_step = slots["local_step"] + 1
    boost = np.minimum((max(0 if step is None else step, 1) / local_step) ** rho, max_lr_multiplier)
    a = slots["accumulator"] + gradient**2
    decay = l1_regularization_strength * np.sign(row) + l2_regularization_strength * row
    new_row = row - learning_rate * (boost * gradient / np.sqrt(a) + decay)
    return new_row, {"accumulator": a, "local_step": local_step}


class Optimizer(NamedTuple):
    """A row function, its default hyperparameters, its slots' initial values, and which are row-wise."""

    function: Callable[..., Result]
    defaults: dict[str, Any]
    slots: dict[str, float]
    row_wise: dict[str, bool]


def _optimizer(function: Callable[..., Result], slots: dict[str, float], row_wise: str = "") -> Optimizer:
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return Optimizer(function, defaults, slots, {name: name == row_wise for name in slots})


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": _optimizer(sgd, {}),
    "adagrad": _optimizer(adagrad, {"accumulator": 0.1}),
    "rowwise_adagrad": _optimizer(rowwise_adagrad, {"accumulator": 0.1}, row_wise="accumulator"),
    "adagrad_momentum": _optimizer(adagrad_momentum, {"accumulator": 0.1, "momentum": 0.0}),
    "adam": _optimizer(adam, {"momentum": 0.0, "velocity": 0.0}),
    "laprop": _optimizer(laprop, {"mu": 0.0, "nu": 0.0}),
    "ftrl": _optimizer(ftrl, {"accumulator": 0.1, "linear": 0.0}),
    "f2a": _optimizer(f2a, {"accumulator": 0.1, "local_step": 0.0}, row_wise="local_step"),
}


def initial_slots(name: str, num_rows: int, dim: int, **initial_values: float) -> Slots:
    """Slots of a whole table: `[V, D]`, or `[V, 1]` where row-wise; keywords replace initial values."""
    optimizer = OPTIMIZERS[name]
    assert set(initial_values) <= set(optimizer.slots), f"{name} has slots {list(optimizer.slots)}"
    values = {**optimizer.slots, **initial_values}
    return {s: np.full((num_rows, 1 if optimizer.row_wise[s] else dim), float(v)) for s, v in values.items()}


# ---- updates ----------------------------------------------------------------------------------------------


def step_row(
    name: str,
    row: ArrayLike,
    gradient: ArrayLike,
    slots: Slots,
    step: Step = None,
    hyper: dict[str, Any] | None = None,
    *,
    row_clip_norm: float | None = None,
    l2_weight_decay: float = 0.0,
    decoupled_weight_decay: float = 0.0,
) -> Result:
    """Clip the gradient's norm, add l2 w, take the optimizer's step, subtract lr x decoupled x OLD row."""
    row, g = _f64(row), _f64(gradient)
    hyper = {**OPTIMIZERS[name].defaults, **(hyper or {})}
    norm = float(np.sqrt(np.sum(g**2)))
    if row_clip_norm is not None and norm > row_clip_norm:
        g = g * (row_clip_norm / norm)
    g = g + l2_weight_decay * row
    old_slots = {slot: _f64(value) for slot, value in slots.items()}
    new_row, new_slots = OPTIMIZERS[name].function(row, g, old_slots, step, **hyper)
    return new_row - hyper["learning_rate"] * decoupled_weight_decay * row, new_slots


def apply_row_gradients(
    table: ArrayLike, slots: Slots, gradients: dict[int, Array], name: str, **step_options: Any
) -> Result:
    """One step per row of `gradients`, in copies; every other row and its slots keep their bits."""
    table, slots = _f64(table), {slot: _f64(value) for slot, value in slots.items()}
    for row, gradient in gradients.items():
        row = _row(row, len(table))
        row_slots = {slot: value[row] for slot, value in slots.items()}
        table[row], new_slots = step_row(name, table[row], gradient, row_slots, **step_options)
        for slot, value in new_slots.items():
            slots[slot][row] = value
    return table, slots


def update(
    table: ArrayLike,
    slots: Slots,
    samples: Samples,
    weights: Weights,
    combiner: str,
    activation_gradients: ArrayLike,
    name: str,
    **step_options: Any,
) -> Result:
    """Law 1: sum the gain-weighted gradients of every occurrence, one step per touched row, no other change.

    Several features of one table: concatenate their samples. `step_options` are those of `step_row`
    (`step`, `hyper`, `row_clip_norm`, `l2_weight_decay`, `decoupled_weight_decay`).
    """
    gradients = row_gradients(samples, weights, combiner, activation_gradients)
    return apply_row_gradients(table, slots, gradients, name, **step_options)
