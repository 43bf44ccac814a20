"""What optimizers are as data: defaults, rates, equality, errors, the bridge to optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import embax
from embax.optimizers.base import one_minus_power
from embax.sparsecore.lib.nn import embedding_spec as sc

# The specification's defaults, written out: (class, settings, slots and their initial values, short name).
DEFAULTS = [
    (sc.SGDOptimizerSpec, {"learning_rate": 0.001}, {}, "sgd"),
    (
        sc.AdagradOptimizerSpec,
        {"learning_rate": 0.001, "initial_accumulator_value": 0.1},
        {"accumulator": 0.1},
        "adagrad",
    ),
    (
        sc.AdagradMomentumOptimizerSpec,
        {
            "learning_rate": 0.001,
            "momentum": 0.9,
            "beta2": 1,
            "epsilon": 1e-10,
            "exponent": 2,
            "use_nesterov": False,
        },
        {"accumulator": 0.1, "momentum": 0},
        "adagrad_momentum",
    ),
    (
        sc.AdamOptimizerSpec,
        {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8},
        {"momentum": 0, "velocity": 0},
        "adam",
    ),
    (
        sc.LaPropOptimizerSpec,
        {"learning_rate": 0.001, "b1": 0.9, "b2": 0.95, "eps": 1e-30, "rms_clip_threshold": None},
        {"mu": 0, "nu": 0},
        "laprop",
    ),
    (
        sc.FTRLOptimizerSpec,
        {
            "learning_rate": 0.01,
            "learning_rate_power": -0.5,
            "beta": 0,
            "multiply_linear_by_learning_rate": False,
        },
        {"accumulator": 0.1, "linear": 0},
        "ftrl",
    ),
    (
        sc.F2AOptimizerSpec,
        {"learning_rate": 0.01, "rho": 0.5, "max_lr_multiplier": 1e6},
        {"accumulator": 0.1, "local_step": 0},
        "f2a",
    ),
]


@pytest.mark.parametrize(("cls", "settings", "slots", "short_name"), DEFAULTS)
def test_defaults_of_the_specification(cls, settings, slots, short_name):
    optimizer = cls()
    assert {name: getattr(optimizer, name) for name in settings} == settings
    assert optimizer.short_name() == short_name
    assert optimizer.slot_variables_count() == len(slots)
    container = optimizer.slot_variables_initializers()
    assert type(container) is getattr(sc, cls.__name__ + "SlotVariables") and container._fields == tuple(slots)
    made = [float(f(jax.random.key(0), (1, 1), jnp.float32)[0, 0]) for f in container]
    np.testing.assert_allclose(made, list(slots.values()), rtol=1e-6)
    again = cls.from_float_and_bool_params(optimizer.get_float_params(), optimizer.get_bool_params(), 0.5)
    assert again == dataclasses.replace(optimizer, learning_rate=0.5)
    assert all(isinstance(h, jax.Array) and h.dtype == jnp.float32 for h in optimizer.get_hyperparameters(3))


def test_settings_by_name():
    momentum = embax.AdagradMomentum(0.1, use_nesterov=True, l2_weight_decay=0.5)
    assert momentum.get_bool_params() == {"use_nesterov": True}
    assert momentum.get_float_params() == {
        "l2_weight_decay": 0.5,
        "momentum": 0.9,
        "beta2": 1.0,
        "epsilon": 1e-10,
        "exponent": 2.0,
        "initial_accumulator_value": 0.1,
        "initial_momentum_value": 0.0,
    }


def test_learning_rates():
    assert embax.SGD(0.5).get_learning_rate() == 0.5
    assert embax.SGD(np.float32(0.5)) == embax.SGD(jnp.float32(0.5)) == embax.SGD(0.5)
    assert embax.SGD(lambda: 0.25).get_learning_rate() == 0.25
    assert embax.SGD(lambda step: 0.25 * step).get_learning_rate(4) == 1.0
    assert float(embax.SGD(optax.linear_schedule(1.0, 0.0, 10)).get_learning_rate(5)) == 0.5
    with pytest.raises(ValueError, match="SGD: learning_rate is a callable of the step, and step is None; pass step="):
        embax.SGD(lambda step: step).get_learning_rate(None)
    with pytest.raises(ValueError, match="SGD: learning_rate takes 2 arguments; it must be a number"):
        embax.SGD(lambda a, b: 1.0)
    for bad in ("fast", None, float("nan"), True):
        with pytest.raises(ValueError, match=r"SGD: learning_rate=.* must be a finite number or a callable"):
            embax.SGD(bad)
    with pytest.raises(RuntimeError, match="the learning rate 'warmup' was a callable when it was stored"):
        embax.SGD(sc.CallablePlaceholder("warmup")).get_learning_rate(0)


def test_equality_is_by_class_and_fields():
    # Compared by hash these two are equal: hash(-1.0) == hash(-2.0).
    assert embax.FTRL(learning_rate_power=-1.0) != embax.FTRL(learning_rate_power=-2.0)
    assert embax.Adagrad(0.1) == embax.Adagrad(0.1) and hash(embax.Adagrad(0.1)) == hash(embax.Adagrad(0.1))
    assert embax.Adagrad(0.1) != embax.RowwiseAdagrad(0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        embax.Adagrad(0.1).learning_rate = 0.2


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: embax.Adam(beta_1=1.0), "Adam: beta_1=1.0 must be in [0, 1)"),
        (
            lambda: embax.Adagrad(initial_accumulator_value=-1.0),
            "Adagrad: initial_accumulator_value=-1.0 must not be",
        ),
        (lambda: embax.FTRL(learning_rate_power=0.5), "FTRL: learning_rate_power=0.5 must not be positive"),
        (
            lambda: embax.LaProp(rms_clip_threshold=1.0),
            "rms_clip_threshold=1.0 is not supported; use row_clip_norm=",
        ),
        (lambda: embax.SGD(row_clip_norm=0.0), "SGD: row_clip_norm=0.0 must be greater than 0"),
        (lambda: embax.SGD(l2_weight_decay=-1.0), "SGD: l2_weight_decay=-1.0 must not be negative"),
        (lambda: embax.Custom(0.1), "Custom: neither custom_computation_fn nor stablehlo is given"),
    ],
)
def test_errors_name_class_field_value_rule(make, text):
    with pytest.raises(ValueError) as error:
        make()
    assert text in str(error.value)


def _adagrad(gradient, row, accumulator, rate):
    accumulator = accumulator + gradient * gradient
    return row - rate * gradient / jnp.sqrt(accumulator), accumulator


@pytest.mark.parametrize("limits", [(None, None), (-0.5, 0.75)])
def test_a_program_steps_like_its_function(limits):
    text = embax.Custom.lower_to_stablehlo(_adagrad, 3, 1)
    text = embax.Custom.wrap_stablehlo_with_limits(text, 3, 1, 1, *limits)
    program = embax.Custom(0.1, stablehlo=text, slot_variable_initializers_tuple=(0.1,))
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    gradient = embax.RowGradients(jnp.array([1, 4, 6]), jnp.asarray(rng.normal(size=(3, 3)), jnp.float32), 6)
    ours = embax.apply_rows(program, embax.init_slots(program, table), gradient)
    wanted = embax.apply_rows(embax.Adagrad(0.1), embax.init_slots(embax.Adagrad(0.1), table), gradient)
    touched = np.asarray(wanted.table)[[1, 4]]
    if limits[0] is not None:
        touched = np.clip(touched, *limits)
    np.testing.assert_allclose(ours.table[jnp.array([1, 4])], touched, rtol=1e-6)
    np.testing.assert_array_equal(ours.table[jnp.array([0, 2, 3, 5])], table[jnp.array([0, 2, 3, 5])])
    np.testing.assert_allclose(ours.slots[0], wanted.slots.accumulator, rtol=1e-6)


def test_programs_of_arrays_of_numbers_and_of_functions_of_one_name():
    """As TPU programs take numbers; ``clip`` is a function of the program, of its wrapping and of ours."""
    row = jax.ShapeDtypeStruct((1, 4), np.float32)
    text = jax.jit(lambda g, row, rate: jnp.clip(row - rate * g, -1.0, 1.0)).lower(row, row, row).as_text()
    assert text.count("func.func private @clip") == 1
    program = embax.Custom(2.0, stablehlo=embax.Custom.wrap_stablehlo_with_limits(text, 4, 0, 1, -0.5, 0.5))
    gradient = embax.RowGradients(jnp.array([1, 3]), jnp.arange(-4.0, 4.0).reshape(2, 4) / 8, 6)

    @jax.jit
    def step(table):
        return jnp.clip(embax.apply_rows(program, embax.init_slots(program, table), gradient).table, -0.25, 5.0)

    wanted = np.ones((6, 4), np.float32)
    wanted[[1, 3]] = np.clip(np.clip(1 - 2 * np.asarray(gradient.values), -0.5, 0.5), -0.25, 5)
    np.testing.assert_allclose(step(jnp.ones((6, 4))), wanted, rtol=1e-6)


def test_programs_that_do_not_fit_are_refused():
    text = embax.Custom.lower_to_stablehlo(lambda gradient, row, rate: row - rate * gradient, 3)
    program = embax.Custom(0.1, stablehlo=text)
    state = embax.init_slots(program, jnp.ones((6, 2)))
    gradient = embax.RowGradients(jnp.array([1]), jnp.ones((1, 2)), 6)
    with pytest.raises(ValueError, match=r"takes float32\[1, 3\], .* and is given float32\[1, 2\]"):
        embax.apply_rows(program, state, gradient)
    broken = embax.Custom(0.1, stablehlo="module {")
    with pytest.raises(ValueError, match="stablehlo is not the text of a StableHLO module with a main function"):
        embax.apply_rows(broken, state, gradient)


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("exponent", [0, 1, 2, 10, 1000, 100_000])
def test_one_minus_power_keeps_its_digits(base, exponent):
    np.testing.assert_allclose(one_minus_power(base, exponent), 1 - base**exponent, rtol=5e-7)


@pytest.mark.parametrize("step", [0, 1, 7, 5000, 1_000_000])
@pytest.mark.parametrize("name", ["adam", "laprop", "f2a"])
def test_steps_far_apart_against_the_oracle(name, step):
    optimizer = {"adam": embax.Adam(0.1), "laprop": embax.LaProp(0.1), "f2a": embax.F2A(0.1)}[name]
    row, gradient = np.array([0.5, -1.0]), np.array([0.3, 2.0])
    slots = {k: v[0] for k, v in oracle.initial_slots(name, 1, 2).items()}
    wanted, _ = oracle.step_row(name, row, gradient, slots, step, {"learning_rate": 0.1})
    container = type(optimizer.slots())(*(jnp.asarray(s, jnp.float32)[None] for s in slots.values()))
    hyper = optimizer.hyperparameters(jnp.int32(step))
    rows, _ = optimizer.update_rows(
        jnp.asarray(row, jnp.float32)[None], jnp.asarray(gradient, jnp.float32)[None], container, hyper
    )
    np.testing.assert_allclose(rows[0], wanted, rtol=2e-6)


def test_a_rate_of_zero_and_an_empty_accumulator_leave_ftrl_finite():
    for optimizer in (embax.FTRL(lambda step: 0.1 * jnp.float32(step)), embax.FTRL(0.1, initial_accumulator_value=0.0)):
        state = embax.init_slots(optimizer, jnp.ones((2, 2)))
        gradient = embax.RowGradients(jnp.array([0]), jnp.array([[0.0, 1.0]]), 2)
        for step in range(3):
            state = embax.apply_rows(optimizer, state, gradient, jnp.int32(step))
            assert np.isfinite(state.table).all() and np.isfinite(state.slots.linear).all()


# ---- optax ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transformation",
    [
        optax.sgd(0.1),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.adam(0.1),
        optax.adamw(0.1, weight_decay=0.01),
        optax.adagrad(0.1),
        optax.rmsprop(0.1),
        optax.lion(0.1),
        optax.sgd(optax.exponential_decay(0.5, 2, 0.5)),
        optax.chain(optax.clip(0.1), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
    ],
)
def test_rows_touched_at_every_step_move_as_under_dense_optax(transformation):
    optimizer = embax.Optax(transformation=transformation)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    state, dense, dense_state = embax.init_slots(optimizer, table), table, transformation.init(table)
    with jax.numpy_dtype_promotion("standard"):
        for step in range(4):
            gradient = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
            rows = embax.RowGradients(jnp.arange(5), gradient, 5)
            state = embax.apply_rows(optimizer, state, rows, step)
            changes, dense_state = transformation.update(gradient, dense_state, dense)
            dense = optax.apply_updates(dense, changes)
            np.testing.assert_allclose(state.table, dense, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("transformation", "text"),
    [
        (
            optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
            "steps two rows together otherwise than apart",
        ),
        (optax.chain(optax.clip_by_global_norm(1000.0), optax.sgd(0.1)), "steps two rows together otherwise"),
        (
            optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(),
            "a scalar state must stay or count the steps, for it",
        ),
        (optax.lamb(0.1), "steps two rows together otherwise than apart"),
        (optax.adafactor(0.1), "only states shaped like the table, or counts of steps"),
        (optax.noisy_sgd(0.1, key=0), "Optax:"),
        (0.1, "has no init and update; pass an optax transformation"),
    ],
)
def test_what_is_not_row_local_is_refused(transformation, text):
    with pytest.raises(ValueError) as error:
        embax.Optax(transformation=transformation)
    assert text in str(error.value)


def test_rates_outside_of_the_transformation_are_refused():
    with pytest.raises(ValueError, match="Optax: learning_rate=0.5 belongs into the transformation"):
        embax.Optax(0.5, optax.sgd(0.1))
    with pytest.raises(ValueError, match="decoupled_weight_decay=0.1 belongs there too"):
        embax.Optax(transformation=optax.sgd(0.1), decoupled_weight_decay=0.1)


def test_custom_slots_and_results_are_checked():
    two = embax.Custom(0.1, lambda g, w, a, lr: (w - lr * g, a, a), slot_variable_initializers_tuple=(0.0,))
    with pytest.raises(ValueError, match=r"the function returned 2 slots for 1; return \(row, \*slots\)"):
        embax.apply_rows(
            two,
            embax.init_slots(two, jnp.ones((3, 2))),
            embax.RowGradients(jnp.array([1]), jnp.ones((1, 2)), 3),
        )
    by_initializer = embax.Custom(
        0.1, lambda g, w, a, lr: (w, a), slot_variable_initializers_tuple=(jax.nn.initializers.ones,)
    )
    assert by_initializer.slots()[0].initial_value == 1.0
    with pytest.raises(ValueError, match="does not give one value everywhere"):
        embax.Custom(0.1, lambda *a: a, slot_variable_initializers_tuple=(jax.nn.initializers.normal(),))
