"""Laws 1 and 2: every backend equals the float64 oracle, for every optimizer, combiner, dtype and input kind."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import embax

STEPS = 3


@functools.partial(jax.jit, static_argnums=0)
def _step(plan, tables, batch, gradients, step):
    activations, residuals = embax.lookup(plan, tables, batch)
    return activations, embax.update(plan, tables, residuals, gradients, step)


def test_cases_are_swept():
    assert len(battery.KINDS) == 11 and battery.CASES == 1584


# Rounding to 16 bits is the kernels' work, not the formulas': three formulas stand for all in the default run.
IN_16_BITS = ("sgd", "rowwise_adagrad", "adam_modified")


def _sweep():
    for name in battery.OPTIMIZERS:
        for dtype in battery.DTYPES:
            later = dtype != "float32" and name not in IN_16_BITS
            yield pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.nightly] if later else [])


@pytest.mark.parametrize(("name", "dtype"), list(_sweep()))
def test_against_oracle(name, dtype, backend):
    case, rng = battery.OPTIMIZERS[name], np.random.default_rng(sum(map(ord, name + dtype)))
    plan = battery.plan_of(case.make(), dtype, backend)
    tables = embax.init(plan, jax.random.key(1))
    for step in range(STEPS):
        ids, weights, samples, sample_weights = battery.inputs_of(rng)
        batch = embax.preprocess(plan, ids, weights)
        shapes = jax.eval_shape(functools.partial(embax.lookup, plan), tables, batch)[0]
        gradients = {k: jnp.asarray(rng.normal(size=s.shape), s.dtype) for k, s in shapes.items()}
        before = embax.to_arrays(plan, tables)
        activations, tables = _step(plan, tables, batch, gradients, jnp.int32(step))
        after = embax.to_arrays(plan, tables)
        for feature in ids:
            what = f"{feature}, step {step}"
            combiner = feature.partition("_")[0]
            arguments = samples[feature], sample_weights[feature], combiner
            _check_activations(before[feature], activations[feature], arguments, dtype, what)
            _check_update(case, step, before[feature], after[feature], arguments, gradients[feature], dtype, what)


def _check_activations(before, activations, arguments, dtype, what):
    table = np.asarray(before["table"], np.float64)
    wanted = oracle.pool(table, *arguments)
    battery.close(
        np.asarray(activations).reshape(wanted.shape),
        wanted,
        battery.EPSILON[dtype],
        np.abs(table).max(),
        what,
    )


def _check_update(case, step, before, after, arguments, gradients, dtype, what):
    samples, weights, combiner = arguments
    before = {k: np.asarray(v, np.float64) for k, v in before.items()}
    slot_names = list(oracle.OPTIMIZERS[case.oracle_name].slots)
    ours = [k for k in before if k != "table"]
    slots = {theirs: before[mine] for theirs, mine in zip(slot_names, ours, strict=True)}
    wanted_table, wanted_slots = oracle.update(
        before["table"],
        slots,
        samples,
        weights,
        combiner,
        np.asarray(gradients, np.float64).reshape(len(samples), -1),
        case.oracle_name,
        step=step,
        hyper=case.hyper(step),
        **case.modifiers,
    )
    touched = sorted({i for sample in samples for i in sample})
    untouched = sorted(set(range(battery.VOCABULARY)) - set(touched))
    for mine, theirs in zip(["table", *ours], [None, *slot_names], strict=True):
        wanted = wanted_table if theirs is None else wanted_slots[theirs]
        actual = np.asarray(after[mine], np.float64)
        assert np.array_equal(actual[untouched], before[mine][untouched]), f"{what}: {mine} moved untouched rows"
        epsilon = battery.EPSILON[dtype] if mine == "table" else 2.0**-23
        battery.close(actual, wanted, epsilon, max(np.abs(wanted).max(), 1.0), f"{what}: {mine}")
