"""Custom optimizers as texts: a program trains as the function that it was lowered from, and as the formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import line_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from embax.sparsecore.lib.nn import custom_optimizer_lowering as lowering
from embax.sparsecore.lib.nn import embedding, embedding_spec

pytestmark = pytest.mark.usefixtures("eight_devices")
BATCH, ROWS, DIM, STEPS, RATE, START = 16, 50, 8, 3, 0.3, 0.1


def _momentum(gradient, row, accumulator, momentum, rate):
    accumulator = accumulator + gradient * gradient
    momentum = 0.9 * momentum + gradient / jnp.sqrt(accumulator)
    return row - rate * momentum, accumulator, momentum


def _plain(gradient, row, rate):
    return row - rate * gradient


def _spec(slots=(START, 0.0), **how):
    return embedding_spec.CustomOptimizerSpec(RATE, slot_variable_initializers_tuple=slots, **how)


def _ids(number):
    return np.random.default_rng(number).integers(0, ROWS, (BATCH, 3))


def _gradient(number):
    return np.random.default_rng(50 + number).normal(size=(BATCH, DIM)).astype(np.float32)


def _trained(optimizer, devices, limits=None):
    """Returns the table in the order of its ids, before and after training."""
    table = embedding_spec.TableSpec(
        name="t",
        vocabulary_size=ROWS,
        embedding_dim=DIM,
        initializer=jax.nn.initializers.normal(1.0),
        optimizer=optimizer,
        combiner="sum",
    )
    feature = embedding_spec.FeatureSpec(name="f", table_spec=table, input_shape=(BATCH, 3), output_shape=(BATCH, DIM))
    embedding.prepare_feature_specs_for_training(feature, devices, 1)
    mesh = line_of(devices)
    variables = embedding.init_embedding_variables(
        jax.random.key(0), embedding.get_table_specs(feature), NamedSharding(mesh, P("x", None)), 1
    )

    def step(gradient, inputs, variables):
        shared = {"global_device_count": devices, "num_sc_per_device": 1, "embedding_var_limits": limits}
        return embedding.tpu_sparse_dense_matmul_grad(gradient, inputs, variables, feature, step=0, **shared)

    split = P("x")
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
    rows = variables["t"].table.shape[0]
    order = [(i % devices) * (rows // devices) + i // devices for i in range(ROWS)]
    before = np.asarray(variables["t"].table)[order]
    for number in range(STEPS):
        inputs, _ = embedding.preprocess_sparse_dense_matmul_input(
            _ids(number), None, feature, devices, devices, num_sc_per_device=1
        )
        variables = run(_gradient(number), inputs, variables)
    return before, np.asarray(variables["t"].table)[order]


def _by_hand(table, limits):
    table = table.astype(np.float64)
    accumulator, momentum = np.full_like(table, START), np.zeros_like(table)
    for number in range(STEPS):
        total = np.zeros_like(table)
        np.add.at(total, _ids(number).reshape(-1), np.repeat(_gradient(number), 3, axis=0))
        touched = np.unique(_ids(number))
        accumulator[touched] += total[touched] ** 2
        momentum[touched] = 0.9 * momentum[touched] + total[touched] / np.sqrt(accumulator[touched])
        table[touched] -= RATE * momentum[touched]
        if limits is not None:
            table[touched] = np.clip(table[touched], *limits)
    return table


@pytest.mark.parametrize("limits", [None, (-0.5, 0.75), (-0.5, None), (None, 0.75)])
@pytest.mark.parametrize("devices", [1, 4])
def test_a_program_trains_as_its_function(devices, limits):
    """Limits at lowering, around a program, around the update: the same three times."""
    text = lowering.lower_to_stablehlo(_momentum, DIM, 2)
    before, after = _trained(_spec(custom_computation_fn=_momentum), devices, limits)
    np.testing.assert_allclose(after, _by_hand(before, limits), rtol=2e-5, atol=2e-6)
    assert (np.unique(np.concatenate([_ids(n) for n in range(STEPS)])).size < ROWS) and (before != after).any()
    texts = [(text, limits)]
    if limits is not None:
        assert not np.allclose(after, _by_hand(before, None))  # the limits are met
        texts.append((lowering.lower_to_stablehlo(_momentum, DIM, 2, 1, *limits), None))
        texts.append((lowering.wrap_stablehlo_with_limits(text.encode(), DIM, 2, 1, *limits), None))
    for program, around in texts:
        np.testing.assert_allclose(_trained(_spec(stablehlo=program), devices, around)[1], after, rtol=2e-6, atol=1e-6)


def test_texts():
    text = lowering.lower_to_stablehlo(_plain, embedding_dim=4)
    assert "stablehlo.subtract" in text and "tensor<1x4xf32>" in text and "@main" in text
    assert lowering.wrap_stablehlo_with_limits(text, 4, 0, 1) == text
    assert lowering.wrap_stablehlo_with_limits(text.encode(), 4, 0, 1) == text
    limited = lowering.wrap_stablehlo_with_limits(text, 4, 0, 1, min_value=0.0, max_value=10.0)
    assert limited != text and "stablehlo.subtract" in limited
    program = _spec((), stablehlo=limited)
    found = program.update_rows(jnp.array([[-3.0, 2.0, 7.0, 30.0]]), jnp.ones((1, 4)), (), program.hyperparameters(0))[
        0
    ]
    np.testing.assert_allclose(found, [[0.0, 1.7, 6.7, 10.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({}, [-2, 0, 2, 5]),
        ({"min_value": 0.0}, [0, 0, 2, 5]),
        ({"max_value": 3.0}, [-2, 0, 2, 3]),
        ({"min_value": 0.0, "max_value": 3.0}, [0, 0, 2, 3]),
    ],
)
def test_clipping(limits, wanted):
    assert lowering.apply_clipping(jnp.array([-2.0, 0.0, 2.0, 5.0]), **limits).tolist() == wanted


def test_programs_of_other_sizes_are_refused():
    text = lowering.lower_to_stablehlo(_plain, 5)
    with pytest.raises(ValueError, match=r"takes float32\[1, 5\], .* and is given float32\[1, 8\]"):
        _trained(_spec((), stablehlo=text), 1)
    with pytest.raises(ValueError, match=r"takes float32\[1, 5\], .* and is given float32\[1, 4\]"):
        lowering.wrap_stablehlo_with_limits(text, 4, 0, 1, 0.0)
    with pytest.raises(ValueError, match="stablehlo is not the text of a StableHLO module with a main function"):
        lowering.wrap_stablehlo_with_limits("module {", 5, 0, 1, 0.0)
