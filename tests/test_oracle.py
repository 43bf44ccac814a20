# SPDX-License-Identifier: Apache-2.0
"""The oracle against facts from outside it: numbers worked out by hand, finite differences, and optax."""

import ast
import copy
import math
import pathlib

import jax
import numpy as np
import optax
import oracle
import pytest

pytestmark = pytest.mark.once

ROW, GRADIENT = np.array([1.0, -2.0, 0.5]), np.array([0.25, -1.5, 3.0])
SAMPLES = [[0, 2, 2], [], [1], [3, 0, 1, 3]]
WEIGHTS = [[1.0, 2.0, 0.5], [], [3.0], [0.5, -1.0, 2.0, 1.5]]
MODIFIERS = {"row_clip_norm": 0.5, "l2_weight_decay": 0.1, "decoupled_weight_decay": 0.2}


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _step(name, row, gradient, slots, step=None, **hyper):
    """One number of a row in, one number of the new row and each slot out."""
    slots = {k: np.array([v], float) for k, v in slots.items()}
    row, slots = oracle.step_row(name, [row], [gradient], slots, step, hyper)
    return float(row[0]), {k: float(v[0]) for k, v in slots.items()}


def test_oracle_imports_numpy_and_the_standard_library_only():
    tree = ast.parse(pathlib.Path(oracle.__file__).read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert froms | names == {
        "collections.abc", "typing", "numpy.typing", "inspect", "itertools", "operator", "numpy"
    }  # fmt: skip


# ---- lookup -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combiner", "weights", "expected"),
    [
        ("sum", [1, 2, 5], [1, 2, 5]),
        ("mean", [1, 2, 5], [1 / 8, 2 / 8, 5 / 8]),
        ("sqrtn", [3, 4], [0.6, 0.8]),
        ("mean", [1, 1, 1, 1], [0.25] * 4),
        ("sqrtn", [1, 1, 1, 1], [0.5] * 4),
        ("mean", [1, -1], [0, 0]),  # zero total
        ("mean", [0, 0], [0, 0]),
        ("sqrtn", [0, 0], [0, 0]),
        ("sqrtn", [1, -1], [math.sqrt(0.5), -math.sqrt(0.5)]),
        ("mean", [], []),
    ],
)
def test_gains_by_hand(combiner, weights, expected):
    assert oracle.gains(combiner, weights) == pytest.approx(expected, rel=1e-15)


def test_unknown_combiner_is_an_error():
    with pytest.raises(ValueError, match="'Mean' is not one of"):
        oracle.gains("Mean", [1.0])


def test_pool_by_hand():
    table = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    samples = [[0, 2, 2], [], [1]]
    np.testing.assert_array_equal(oracle.pool(table, samples, None, "sum"), [[11, 14], [0, 0], [3, 4]])
    np.testing.assert_allclose(oracle.pool(table, samples, None, "mean"), [[11 / 3, 14 / 3], [0, 0], [3, 4]])
    root = math.sqrt(3)
    np.testing.assert_allclose(oracle.pool(table, samples, None, "sqrtn"), [[11 / root, 14 / root], [0, 0], [3, 4]])
    weights = [[2, 1, 1], [], [-1]]  # mean: (2 [1,2] + 2 [5,6]) / 4, and -[3,4] / -1
    np.testing.assert_allclose(oracle.pool(table, samples, weights, "mean"), [[3, 4], [0, 0], [3, 4]])


@pytest.mark.parametrize(("bad", "error"), [(-1, IndexError), (4, IndexError), (1.5, TypeError)])
def test_an_id_that_is_no_row_is_an_error(bad, error):
    with pytest.raises(error):
        oracle.pool(np.zeros((4, 2)), [[bad]], None, "sum")
    with pytest.raises(error):
        oracle.update(np.zeros((4, 2)), {}, [[bad]], None, "sum", np.zeros((1, 2)), "sgd")


def test_quantize_by_hand():
    # 5 levels of [-1, 1]: -1, -.5, 0, .5, 1. The ties -.75, -.25, .25, .75 are at .5, 1.5, 2.5, 3.5 spacings.
    row = [-7.0, -0.75, -0.7, -0.25, 0.1, 0.25, 0.3, 0.75, 1.0, 7.0]
    expected = [-1.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    np.testing.assert_array_equal(oracle.quantize(row, (-1.0, 1.0, 5)), expected)
    np.testing.assert_array_equal(oracle.quantize([0.2, 0.9], (0.0, 1.0, 2)), [0.0, 1.0])
    np.testing.assert_array_equal(oracle.quantize(row, None), row)
    np.testing.assert_array_equal(
        oracle.pool([[0.2], [0.9], [3.0]], [[0, 1, 2, 2]], None, "sum", (0.0, 1.0, 2)), [[3.0]]
    )  # each row is rounded before, not after, combining


def test_dense_and_ragged_samples():
    samples, weights = oracle.dense_samples([[5, -1, 5], [-1, -1, -1]], -1, [[0.5, 9.0, 0.0], [1, 1, 1]])
    assert samples == [[5, 5], []]
    assert weights == [[0.5, 0.0], []]
    assert oracle.dense_samples([[5, 0]]) == ([[5, 0]], [[1.0, 1.0]])
    assert oracle.ragged_samples(np.array([4, 2, 2]), [0, 1, 1, 3]) == [[4], [], [2, 2]]


# ---- gradients --------------------------------------------------------------------------------------------


def test_row_gradients_by_hand():
    gradients = oracle.row_gradients([[0, 2, 2], [2], []], None, "mean", [[3.0, 6.0], [10.0, 20.0], [7.0, 7.0]])
    assert list(gradients) == [0, 2]
    np.testing.assert_allclose(gradients[0], [1, 2])
    np.testing.assert_allclose(gradients[2], [12, 24])  # 1/3 twice, then 1


def test_an_id_of_gain_zero_is_an_occurrence_and_padding_is_not():
    gradients = oracle.row_gradients([[1, 3]], [[0.0, 2.0]], "sum", [[1.0, 1.0]])
    assert {row: g.tolist() for row, g in gradients.items()} == {1: [0.0, 0.0], 3: [2.0, 2.0]}
    samples, weights = oracle.dense_samples([[1, 3]], 1)
    assert list(oracle.row_gradients(samples, weights, "sum", [[1.0, 1.0]])) == [3]


def _differences(function, x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences: error of order h^2."""
    result = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += h
        down[index] -= h
        result[index] = (function(up) - function(down)) / (2 * h)
    return result


@pytest.mark.parametrize("combiner", oracle.COMBINERS)
def test_gradients_are_finite_differences_of_pool(combiner):
    table, cotangent = _random(0, 5, 3), _random(1, 4, 3)

    def loss(table, flat_weights):
        weights = oracle.ragged_samples(flat_weights, [0, 3, 3, 4, 8])
        return float(np.sum(oracle.pool(table, SAMPLES, weights, combiner) * cotangent))

    flat = np.concatenate(WEIGHTS)
    by_row = oracle.row_gradients(SAMPLES, WEIGHTS, combiner, cotangent)
    dense = np.array([by_row.get(row, np.zeros(3)) for row in range(5)])
    np.testing.assert_allclose(dense, _differences(lambda t: loss(t, flat), table), rtol=1e-8, atol=1e-9)
    by_weight = np.concatenate(oracle.weight_gradients(table, SAMPLES, WEIGHTS, combiner, cotangent))
    np.testing.assert_allclose(by_weight, _differences(lambda w: loss(table, w), flat), rtol=1e-7, atol=1e-9)


def test_weight_gradients_by_hand():
    # Rows 2 and 10, weights 3 and 1, gradient 1: mean is 4, and its slopes are (2-4)/4, (10-4)/4.
    assert oracle.weight_gradients([[2.0], [10.0]], [[0, 1]], [[3, 1]], "mean", [[1.0]]) == [[-0.5, 1.5]]
    # Rows 1 and 2, weights 3 and 4: c/5 - w 11/125.
    [slopes] = oracle.weight_gradients([[1.0], [2.0]], [[0, 1]], [[3, 4]], "sqrtn", [[1.0]])
    assert slopes == pytest.approx([0.2 - 33 / 125, 0.4 - 44 / 125])
    assert oracle.weight_gradients([[1.0], [2.0]], [[0, 1]], [[1, -1]], "mean", [[1.0]]) == [[0.0, 0.0]]


# ---- optimizers by hand -----------------------------------------------------------------------------------


def test_sgd_by_hand():
    assert _step("sgd", 1.0, 0.5, {}, learning_rate=0.1) == (pytest.approx(0.95), {})


def test_adagrad_by_hand():
    row, slots = _step("adagrad", 1.0, 4.0, {"accumulator": 9.0}, learning_rate=0.1)
    assert (row, slots) == (pytest.approx(1 - 0.1 * 4 / 5), {"accumulator": 25.0})


def test_rowwise_adagrad_by_hand():
    slots = {"accumulator": np.array([4.0])}  # the mean of 9 and 1 is 5: the root of 4 + 5 is 3
    row, slots = oracle.step_row("rowwise_adagrad", [1.0, 1.0], [3.0, -1.0], slots, hyper={"learning_rate": 0.3})
    np.testing.assert_allclose(row, [0.7, 1.1])
    np.testing.assert_array_equal(slots["accumulator"], [9.0])


@pytest.mark.parametrize(
    ("hyper", "row", "accumulator", "momentum"),
    [
        # a = 5 + 4 = 9; s = 2 / sqrt(9 + 7) = .5; m = .25 + .5 = .75; nesterov .1875 + .5
        ({}, 1 - 0.075, 9.0, 0.75),
        ({"use_nesterov": True}, 1 - 0.06875, 9.0, 0.75),
        ({"exponent": 4.0}, 1 - 0.125, 9.0, 1.25),  # s = 2 / 16^(1/4)
        ({"beta2": 0.5, "epsilon": 4.5}, 1 - 0.1 * (0.25 + 2 / 3), 4.5, 0.25 + 2 / 3),  # a = 2.5 + 2
    ],
)
def test_adagrad_momentum_by_hand(hyper, row, accumulator, momentum):
    hyper = {"learning_rate": 0.1, "momentum": 0.25, "epsilon": 7.0, **hyper}
    got_row, slots = _step("adagrad_momentum", 1.0, 2.0, {"accumulator": 5.0, "momentum": 1.0}, **hyper)
    assert got_row == pytest.approx(row)
    assert slots == pytest.approx({"accumulator": accumulator, "momentum": momentum})


def test_adam_by_hand():
    hyper = {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 2.0}
    # t = 1: m = 1, v = 1, alpha = .1 * .5 / .5, e = 2 * .5
    row, slots = _step("adam", 1.0, 2.0, {"momentum": 0.0, "velocity": 0.0}, 0, **hyper)
    assert (row, slots) == (pytest.approx(0.95), {"momentum": 1.0, "velocity": 1.0})
    assert _step("adam", 1.0, 2.0, {"momentum": 0.0, "velocity": 0.0}, None, **hyper)[0] == row
    # t = 2: m = 1 + .5 * 3, v = 1 + .25 * 15, 1 - b2^2 = 7/16, 1 - b1^2 = 3/4
    root = math.sqrt(7) / 4
    row, slots = _step("adam", row, 4.0, slots, 1, **hyper)
    assert slots == {"momentum": 2.5, "velocity": 4.75}
    assert row == pytest.approx(0.95 - 0.1 * root / 0.75 * 2.5 / (math.sqrt(4.75) + 2 * root))


def test_laprop_by_hand():
    hyper = {"learning_rate": 0.5, "b1": 0.6, "b2": 0.5, "eps": 7.0}  # sqrt(1 - b1^2) = .8
    # step 0: d = 0, nu = 9 + 7 = 16, mu = .8 * 3/4
    row, slots = _step("laprop", 2.0, 3.0, {"mu": 0.0, "nu": 123.0}, 0, **hyper)
    assert (row, slots) == (pytest.approx(1.7), pytest.approx({"mu": 0.6, "nu": 16.0}))
    # step 1: d = .5 * .5 / .75 = 1/3, nu = 16/3 + 2/3 (9 + 7) = 16, mu = .36 + .6
    row, slots = _step("laprop", row, 3.0, slots, 1, **hyper)
    assert (row, slots) == (pytest.approx(1.7 - 0.48), pytest.approx({"mu": 0.96, "nu": 16.0}))
    # no step: d = b2, nu = .5 * 4 + .5 * 16 = 10
    row, slots = _step("laprop", 0.0, 3.0, {"mu": 1.0, "nu": 4.0}, None, **hyper)
    assert slots == pytest.approx({"mu": 0.6 + 2.4 / math.sqrt(10), "nu": 10.0})


def test_laprop_nu_is_the_bias_corrected_mean_of_squares():
    gradients, slots, b2 = _random(2, 6), {"mu": 0.0, "nu": 0.0}, 0.95
    for step, g in enumerate(gradients):
        slots = _step("laprop", 0.0, g, slots, step, b2=b2)[1]
    raw = sum((1 - b2) * b2 ** (5 - i) * g**2 for i, g in enumerate(gradients))
    assert slots["nu"] == pytest.approx(raw / (1 - b2**6), rel=1e-13)


@pytest.mark.parametrize(
    ("hyper", "row", "linear"),
    [
        # n = 9 + 16 = 25, p = 5, p0 = 3, z = 1 + 4 - 2/.5 * 1 = 1
        ({}, -1 / 10, 1.0),
        ({"beta": 1.0, "l2_regularization_strength": 0.5}, -1 / 13, 1.0),
        ({"l1_regularization_strength": 0.25}, -0.75 / 10, 1.0),
        ({"l1_regularization_strength": 2.0}, 0.0, 1.0),
        # power -1: p = 25, p0 = 9, z = 5 - 16/.5
        ({"learning_rate_power": -1.0}, 27 / 50, -27.0),
        # the slot keeps lr z: 1 + 2 - 2 * 1 = 1, bound .5 * .5, denominator 5 + 2 * .5 * .5 + 1
        (
            {
                "multiply_linear_by_learning_rate": True,
                "l1_regularization_strength": 0.5,
                "l2_regularization_strength": 0.5,
                "beta": 1.0,
            },
            -0.75 / 6.5,
            1.0,
        ),
    ],
)
def test_ftrl_by_hand(hyper, row, linear):
    got_row, slots = _step("ftrl", 1.0, 4.0, {"accumulator": 9.0, "linear": 1.0}, learning_rate=0.5, **hyper)
    assert got_row == pytest.approx(row)
    assert slots == pytest.approx({"accumulator": 25.0, "linear": linear})


def test_ftrl_without_regularization_is_adagrad_when_the_linear_slot_agrees_with_the_row():
    row, lr = ROW, 0.3
    slots = {"accumulator": np.full(3, 0.1), "linear": -np.sqrt(0.1) / lr * row}
    plain, plain_slots = row, {"accumulator": np.full(3, 0.1)}
    for g in _random(3, 5, 3):
        row, slots = oracle.step_row("ftrl", row, g, slots, hyper={"learning_rate": lr})
        plain, plain_slots = oracle.step_row("adagrad", plain, g, plain_slots, hyper={"learning_rate": lr})
    np.testing.assert_allclose(row, plain, rtol=1e-12)


def test_ftrl_multiply_linear_only_changes_the_units_of_the_slot():
    hyper = {
        "learning_rate": 0.3,
        "l1_regularization_strength": 0.2,
        "l2_regularization_strength": 0.1,
        "beta": 0.5,
    }
    one = two = ROW
    slots = {"accumulator": np.full(3, 0.1), "linear": np.array([1.0, -2.0, 0.5])}
    scaled = {"accumulator": slots["accumulator"], "linear": 0.3 * slots["linear"]}
    for g in _random(4, 5, 3):
        one, slots = oracle.step_row("ftrl", one, g, slots, hyper=hyper)
        multiplied = {**hyper, "multiply_linear_by_learning_rate": True}
        two, scaled = oracle.step_row("ftrl", two, g, scaled, hyper=multiplied)
    np.testing.assert_allclose(one, two, rtol=1e-12)
    np.testing.assert_allclose(0.3 * slots["linear"], scaled["linear"], rtol=1e-12)


@pytest.mark.parametrize(
    ("step", "cap", "row"),
    [
        # a = 9 + 16 = 25, s = 1, decay = .1 * 1 + .05 * 2 = .2
        (9, 1e6, 2 - 0.5 * (3 * 0.8 + 0.2)),
        (9, 2.0, 2 - 0.5 * (2 * 0.8 + 0.2)),
        (0, 1e6, 2 - 0.5 * (0.8 + 0.2)),
        (None, 1e6, 2 - 0.5 * (0.8 + 0.2)),
    ],
)
def test_f2a_by_hand(step, cap, row):
    hyper = {"learning_rate": 0.5, "l1_regularization_strength": 0.1, "l2_regularization_strength": 0.05}
    slots = {"accumulator": 9.0, "local_step": 0.0}
    got_row, slots = _step("f2a", 2.0, 4.0, slots, step, max_lr_multiplier=cap, **hyper)
    assert got_row == pytest.approx(row)
    assert slots == {"accumulator": 25.0, "local_step": 1.0}
    assert _step("f2a", -2.0, 4.0, slots, step, rho=0.0, **hyper)[0] == pytest.approx(
        -2 - 0.5 * (4 / math.sqrt(41) - 0.2)
    )  # the decay goes by the row's sign, not the gradient's


# ---- optimizers against optax -----------------------------------------------------------------------------
# optax's adam divides m / (1-b1^t) by sqrt(v / (1-b2^t)) + eps. Times sqrt(1-b2^t) above and below, that is
# lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v) + eps sqrt(1-b2^t)): the oracle's formula exactly, for any eps.


@pytest.mark.parametrize(
    ("name", "hyper", "transformation"),
    [
        ("sgd", {}, optax.sgd(0.1)),
        ("adam", {}, optax.adam(0.1, 0.9, 0.999, eps=1e-8)),
        ("adam", {"beta_1": 0.5, "beta_2": 0.7, "epsilon": 0.3}, optax.adam(0.1, 0.5, 0.7, eps=0.3)),
        ("adagrad", {}, optax.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0)),
        *(
            (
                "adagrad_momentum",
                {"momentum": 0.7, "epsilon": 0.2, "use_nesterov": nesterov},
                optax.chain(optax.scale_by_rss(0.1, eps=0.2), optax.trace(0.7, nesterov=nesterov), optax.scale(-0.1)),
            )
            for nesterov in (False, True)
        ),
    ],
)
def test_optax_takes_the_same_steps(name, hyper, transformation):
    slots = {k: v[0] for k, v in oracle.initial_slots(name, 1, 3).items()}
    row = ROW
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jax.numpy.asarray(ROW)
        state = transformation.init(params)
        for step, gradient in enumerate(_random(5, 7, 3)):
            row, slots = oracle.step_row(name, row, gradient, slots, step, {"learning_rate": 0.1, **hyper})
            updates, state = transformation.update(jax.numpy.asarray(gradient), state, params)
            params = optax.apply_updates(params, updates)
            assert params.dtype == np.float64
            np.testing.assert_allclose(row, np.asarray(params), rtol=1e-12)


# ---- laws of every optimizer ------------------------------------------------------------------------------


def _row_slots(name: str) -> dict[str, np.ndarray]:
    return {k: v[0] + 0.5 for k, v in oracle.initial_slots(name, 1, 3).items()}


def test_the_table_of_optimizers_is_the_specification():
    initial = {name: optimizer.slots for name, optimizer in oracle.OPTIMIZERS.items()}
    assert initial == {
        "sgd": {},
        "adagrad": {"accumulator": 0.1},
        "rowwise_adagrad": {"accumulator": 0.1},
        "adagrad_momentum": {"accumulator": 0.1, "momentum": 0.0},
        "adam": {"momentum": 0.0, "velocity": 0.0},
        "laprop": {"mu": 0.0, "nu": 0.0},
        "ftrl": {"accumulator": 0.1, "linear": 0.0},
        "f2a": {"accumulator": 0.1, "local_step": 0.0},
    }
    row_wise = [(n, s) for n, o in oracle.OPTIMIZERS.items() for s, flag in o.row_wise.items() if flag]
    assert row_wise == [("rowwise_adagrad", "accumulator"), ("f2a", "local_step")]
    rates = {name: optimizer.defaults["learning_rate"] for name, optimizer in oracle.OPTIMIZERS.items()}
    assert {name for name, rate in rates.items() if rate == 0.01} == {"ftrl", "f2a"}
    assert {name for name, rate in rates.items() if rate == 0.001} == set(rates) - {"ftrl", "f2a"}


@pytest.mark.parametrize("name", oracle.OPTIMIZERS)
@pytest.mark.parametrize("step", [None, 0, 3])
def test_a_step_keeps_shapes_and_arguments(name, step):
    row, gradient, slots = ROW.copy(), GRADIENT.copy(), _row_slots(name)
    before = copy.deepcopy((row, gradient, slots))
    new_row, new_slots = oracle.OPTIMIZERS[name].function(row, gradient, slots, step)
    assert new_row.shape == (3,)
    assert {k: v.shape for k, v in new_slots.items()} == {k: v.shape for k, v in slots.items()}
    assert all(np.all(np.isfinite(x)) for x in (new_row, *new_slots.values()))
    new_row[:], gradient_after = 0, gradient
    np.testing.assert_equal((row, gradient_after, slots), before)


@pytest.mark.parametrize("name", ["adagrad", "adagrad_momentum", "adam", "laprop", "ftrl", "sgd", "f2a"])
def test_element_wise_optimizers_treat_numbers_alone(name):
    slots = _row_slots(name)
    whole = oracle.step_row(name, ROW, GRADIENT, slots, 3)[0]
    for i in range(3):
        one = {k: v[i : i + 1] if len(v) == 3 else v for k, v in slots.items()}
        np.testing.assert_array_equal(oracle.step_row(name, ROW[[i]], GRADIENT[[i]], one, 3)[0], whole[[i]])


def test_unknown_hyperparameter_is_an_error():
    with pytest.raises(TypeError, match="epsilon"):
        oracle.step_row("sgd", ROW, GRADIENT, {}, hyper={"epsilon": 1.0})


# ---- modifiers --------------------------------------------------------------------------------------------


def test_modifiers_by_hand():
    # g = [3, 4] of norm 5, clipped to 1: [.6, .8]; + .5 w: [1.1, 1.8]; lr .1; then - .1 * 2 * w.
    row, _ = oracle.step_row(
        "sgd", [1.0, 2.0], [3.0, 4.0], {}, hyper={"learning_rate": 0.1},
        row_clip_norm=1.0, l2_weight_decay=0.5, decoupled_weight_decay=2.0,
    )  # fmt: skip
    np.testing.assert_allclose(row, [1 - 0.11 - 0.2, 2 - 0.18 - 0.4])


def test_clipping_leaves_small_and_zero_gradients_alone():
    for gradient in (GRADIENT, np.zeros(3)):
        plain, _ = oracle.step_row("sgd", ROW, gradient, {})
        clipped, _ = oracle.step_row("sgd", ROW, gradient, {}, row_clip_norm=np.linalg.norm(GRADIENT) * 1.01)
        np.testing.assert_array_equal(plain, clipped)
    np.testing.assert_array_equal(oracle.step_row("sgd", ROW, GRADIENT, {}, row_clip_norm=0.0)[0], ROW)


@pytest.mark.parametrize("name", oracle.OPTIMIZERS)
def test_modifiers_compose_around_every_optimizer(name):
    slots, lr = _row_slots(name), oracle.OPTIMIZERS[name].defaults["learning_rate"]
    clipped = GRADIENT * 0.5 / np.linalg.norm(GRADIENT)
    expected, expected_slots = oracle.step_row(name, ROW, clipped + 0.1 * ROW, slots, 3)
    got, got_slots = oracle.step_row(name, ROW, GRADIENT, slots, 3, **MODIFIERS)
    np.testing.assert_allclose(got, expected - lr * 0.2 * ROW, rtol=1e-14)
    for slot in slots:
        np.testing.assert_allclose(got_slots[slot], expected_slots[slot], rtol=1e-14)


# ---- law 1 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", oracle.OPTIMIZERS)
@pytest.mark.parametrize("combiner", oracle.COMBINERS)
@pytest.mark.parametrize("modifiers", [{}, MODIFIERS], ids=["plain", "modified"])
def test_update_is_one_step_per_touched_row_and_nothing_else(name, combiner, modifiers):
    table, cotangent, slots = _random(6, 6, 3), _random(7, 4, 3), oracle.initial_slots(name, 6, 3)
    before = copy.deepcopy((table, slots))
    new_table, new_slots = oracle.update(table, slots, SAMPLES, WEIGHTS, combiner, cotangent, name, step=2, **modifiers)
    np.testing.assert_equal((table, slots), before)
    gradient = np.zeros((6, 3))
    for s, ids in enumerate(SAMPLES):
        w = np.array(WEIGHTS[s])
        divisor = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.linalg.norm(w)}[combiner]
        np.add.at(gradient, np.array(ids, int), np.outer(w / divisor, cotangent[s]) if len(w) else 0.0)
    for row in range(6):
        old = {slot: value[row] for slot, value in slots.items()}
        if row in (4, 5):
            expected, expected_slots = table[row], old
        else:
            expected, expected_slots = oracle.step_row(name, table[row], gradient[row], old, 2, **modifiers)
        check = np.testing.assert_array_equal if row in (4, 5) else np.testing.assert_allclose
        check(new_table[row], expected)
        for slot in slots:
            check(new_slots[slot][row], expected_slots[slot])


def test_an_id_of_gain_zero_lets_adam_move_its_row():
    table, slots = np.ones((3, 2)), oracle.initial_slots("adam", 3, 2, momentum=0.5, velocity=0.25)
    new_table, new_slots = oracle.update(table, slots, [[1]], [[0.0]], "sum", [[9.0, 9.0]], "adam", step=0)
    assert (new_table[1] < 1).all()
    np.testing.assert_allclose(new_slots["momentum"], [[0.5, 0.5], [0.45, 0.45], [0.5, 0.5]])
    np.testing.assert_array_equal(new_table[[0, 2]], 1.0)


def test_an_empty_batch_moves_nothing():
    table, slots = _random(8, 3, 2), oracle.initial_slots("f2a", 3, 2)
    assert slots["local_step"].shape == (3, 1)
    result = oracle.update(table, slots, [[], []], None, "mean", np.ones((2, 2)), "f2a", **MODIFIERS)
    np.testing.assert_equal(result, (table, slots))
