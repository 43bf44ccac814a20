"""Every public name of the SparseCore API is there and exercised; small tests of those that no other file has."""

import dataclasses
import hashlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparsecore_names
from flax import nnx
from helpers import line_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from embax.id_batch import bucket
from embax.sparsecore.lib.fdo import fdo_client
from embax.sparsecore.lib.flax.linen import embed as linen_embed
from embax.sparsecore.lib.flax.nnx import embed as nnx_embed
from embax.sparsecore.lib.nn import embedding, embedding_spec, table_stacking
from embax.sparsecore.lib.nn import embedding_pipelining_utils as pipelining

pytestmark = pytest.mark.usefixtures("eight_devices")
BATCH, DIM, ROWS = 16, 8, 24
NORMAL = jax.nn.initializers.normal(1.0)


def test_every_name_is_there_and_exercised():
    assert [wrong for entry in sparsecore_names.ENTRIES if (wrong := sparsecore_names.fault(entry))] == []


def test_the_script_finds_what_is_missing(capsys):
    known = sparsecore_names.ENTRIES[0]
    wrong = {
        "lib.nn.nothing: ModuleNotFoundError": {"module": "lib.nn.nothing"},
        "there is no such name": {"name": "Nothing"},
        "it has no parameter": {"name": "TableSpec", "parameter": "nothing"},
        "there is no test_nothing": {"test": "test_sparsecore_surface.py::test_nothing"},
        "does not mention": {"test": "test_sparsecore_surface.py::test_a_client_of_ones_own"},
    }
    for text, change in wrong.items():
        assert text in (sparsecore_names.fault(dataclasses.replace(known, **change)) or "")
    assert sparsecore_names.main([known]) == 0
    assert sparsecore_names.main([known, dataclasses.replace(known, name="Nothing")]) == 1
    assert "TableSpec: test_sparsecore_surface.py::test_tables" in capsys.readouterr().out


# ---- specifications ----------------------------------------------------------------------------------------------


def _table(name="t", rows=ROWS, dim=DIM, optimizer=None, combiner="sum", **settings):
    return embedding_spec.TableSpec(
        name=name,
        vocabulary_size=rows,
        embedding_dim=dim,
        initializer=NORMAL,
        optimizer=optimizer or embedding_spec.SGDOptimizerSpec(0.5),
        combiner=combiner,
        **settings,
    )


def _feature(table=None, name="x", inputs=(BATCH,), **settings):
    table = table or _table()
    return embedding_spec.FeatureSpec(
        name=name, table_spec=table, input_shape=inputs, output_shape=(inputs[0], table.embedding_dim), **settings
    )


def test_tables():
    quantization = embedding_spec.QuantizationConfig(min_value=-1.0, max_value=1.0, num_buckets=3)
    settings = {
        "max_ids_per_partition": 16,
        "max_unique_ids_per_partition": 8,
        "suggested_coo_buffer_size_per_device": 64,
        "quantization_config": quantization,
    }
    table, again = _table(**settings), _table(**settings)
    assert table == again and hash(table) == hash(again) and not table.is_stacked()
    for field in ("setting_in_stack", "stacked_table_spec"):
        with pytest.raises(AssertionError, match='table "t" is not stacked'):
            getattr(table, field)
    table.max_ids_per_partition = 24  # while it is in no stack
    embedding.prepare_feature_specs_for_training(_feature(table), 1, 1)
    assert table.is_stacked() and table.stacked_table_spec.max_ids_per_partition == 24
    again.max_ids_per_partition = 24
    assert table == again and hash(table) == hash(again)  # a stack takes no part in it
    with pytest.raises(AttributeError, match="max_ids_per_partition can no longer be set; use update_prepro"):
        table.max_ids_per_partition = 16
    with pytest.raises(AttributeError, match=r"embedding_dim can no longer be set; make another with dataclasses"):
        table.embedding_dim = 16
    given = inspect.signature(embedding_spec.TableSpec).parameters
    assert [given[name].default for name in settings] == [256, 256, None, None]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in given.values())
    with pytest.raises(TypeError, match="positional"):
        embedding_spec.TableSpec("t", 1, 1)  # type: ignore[call-arg,misc]
    private = embedding_spec.TableSpec(
        **{f.name: getattr(table, f.name) for f in dataclasses.fields(table) if f.init},
    )
    assert private._setting_in_stack is table.setting_in_stack and private._stacked_table_spec is not None


def test_features_settings_and_stacks():
    feature = _feature(_table(dim=5), inputs=(BATCH, 3), _id_transformation=None)
    assert feature.id_transformation is None
    assert feature.input_shape == (BATCH, 3) and feature.output_shape == (BATCH, 5)
    embedding.prepare_feature_specs_for_training([feature, other := _feature(feature.table_spec, "w")], 2, 1)
    assert other.id_transformation == embedding_spec.FeatureIdTransformation()  # sorted by name: w before x
    assert feature.id_transformation == embedding_spec.FeatureIdTransformation(row_offset=16, col_offset=0, col_shift=0)
    setting = embedding_spec.TableSettingInStack("t", padded_vocab_size=32, padded_embedding_dim=8)
    assert feature.table_spec.setting_in_stack == setting
    assert (setting.stack_name, setting.row_offset_in_shard, setting.shard_rotation) == ("t", 0, 0)
    stacked = feature.table_spec.stacked_table_spec
    wanted = embedding_spec.StackedTableSpec(
        stack_name="t",
        stack_vocab_size=32,
        stack_embedding_dim=8,
        optimizer=feature.table_spec.optimizer,
        combiner="sum",
        total_sample_count=2 * BATCH,
        max_ids_per_partition=256,
        max_unique_ids_per_partition=256,
        activation_mem_bytes_limit=2 * 1024 * 1024,
        suggested_coo_buffer_size_per_device=None,
        quantization_config=None,
    )
    assert stacked == wanted and stacked.replace(combiner="mean").combiner == "mean" and stacked.combiner == "sum"
    for other in (stacked.replace(max_ids_per_partition=8), wanted):
        assert jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(other)) == other


def test_quantized_rows():
    config = embedding_spec.QuantizationConfig(min_value=-1.0, max_value=1.0, num_buckets=5)
    assert config.as_tuple() == (-1.0, 1.0, 5)
    for wrong in ({"num_buckets": 1}, {"min_value": 1.0}):
        with pytest.raises(ValueError, match="QuantizationConfig: "):
            dataclasses.replace(config, **wrong)
    feature = _feature(_table(quantization_config=config), inputs=(1,))
    shared = _ready(feature, 1)
    rows = np.linspace(-2, 2, ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM)
    variables = {"t": embedding.EmbeddingVariables(rows, ())}
    inputs, _ = embedding.preprocess_sparse_dense_matmul_input([[3, 20]], None, feature, 1, 1, num_sc_per_device=1)
    found = embedding.tpu_sparse_dense_matmul(inputs, variables, **shared)
    levels = np.round((np.clip(rows[[3, 20]], -1, 1) + 1) * 2) / 2 - 1
    np.testing.assert_allclose(found, levels.sum(0)[None], atol=1e-6)


DEFAULTS = {
    embedding_spec.SGDOptimizerSpec: {"learning_rate": 0.001},
    embedding_spec.AdagradOptimizerSpec: {"learning_rate": 0.001, "initial_accumulator_value": 0.1},
    embedding_spec.AdagradMomentumOptimizerSpec: {
        "learning_rate": 0.001,
        "momentum": 0.9,
        "beta2": 1.0,
        "epsilon": 1e-10,
        "exponent": 2.0,
        "use_nesterov": False,
        "initial_accumulator_value": 0.1,
        "initial_momentum_value": 0.0,
    },
    embedding_spec.AdamOptimizerSpec: {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8},
    embedding_spec.LaPropOptimizerSpec: {
        "learning_rate": 0.001,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-30,
        "rms_clip_threshold": None,
        "initial_slot_value": 0.0,
    },
    embedding_spec.FTRLOptimizerSpec: {
        "learning_rate": 0.01,
        "learning_rate_power": -0.5,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "beta": 0.0,
        "initial_accumulator_value": 0.1,
        "initial_linear_value": 0.0,
        "multiply_linear_by_learning_rate": False,
    },
    embedding_spec.F2AOptimizerSpec: {
        "learning_rate": 0.01,
        "rho": 0.5,
        "initial_accumulator_value": 0.1,
        "initial_local_step_value": 0.0,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "max_lr_multiplier": 1e6,
    },
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_defaults_of_the_optimizers(kind):
    made, known = kind(), list(inspect.signature(kind).parameters)
    assert {name: getattr(made, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]
    assert known[: len(DEFAULTS[kind])] == list(DEFAULTS[kind])  # in this order, positionally
    assert made == kind() and hash(made) == hash(kind()) and isinstance(made, embedding_spec.OptimizerSpec)


def _sgd(w, g, _):
    return w - 0.5 * g, ()


def _adagrad(w, g, slots):
    (a,) = slots
    return w - 0.5 * g / np.sqrt(a + g * g), (a + g * g,)


def _adagrad_momentum(w, g, slots):
    a, m = slots
    a = 0.9 * a + 0.1 * g * g
    s = g * (a + 1e-3) ** (-1 / 3)
    m = 0.8 * m + s
    return w - 0.5 * (0.8 * m + s), (a, m)


def _adam(w, g, slots):
    (m, v), t = slots, 4  # step 3, counted from 0
    root = np.sqrt(1 - 0.99**t)
    m, v = m + 0.2 * (g - m), v + 0.01 * (g * g - v)
    return w - 0.5 * root / (1 - 0.8**t) * m / (np.sqrt(v) + 1e-3 * root), (m, v)


def _laprop(w, g, slots):
    (mu, nu), decay = slots, 0.9 * (1 - 0.9**3) / (1 - 0.9**4)
    nu = decay * nu + (1 - decay) * (g * g + 1e-4)
    mu = 0.8 * mu + np.sqrt(1 - 0.8**2) * g / np.sqrt(nu)
    return w - 0.5 * mu, (mu, nu)


def _ftrl(w, g, slots):
    n, z = slots
    new = n + g * g
    p, p0, l1 = new**0.4, n**0.4, 0.2 * 0.5
    z = z + 0.5 * g - (p - p0) * w
    return (np.clip(z, -l1, l1) - z) / (p + 2 * 0.5 * 0.3 + 0.1), (new, z)


def _f2a(w, g, slots):
    a, s = slots
    a, s = a + g * g, s + 1
    f = np.minimum((3 / s) ** 0.7, 1.1)
    return w - 0.5 * (f * g / np.sqrt(a) + 0.1 * np.sign(w) + 0.2 * w), (a, s)


def _by_sign(gradient, row, memory, learning_rate):
    return row - learning_rate * jnp.sign(gradient) * memory, memory + 1.0


FORMULAS = [
    (embedding_spec.SGDOptimizerSpec(learning_rate=lambda: 0.5), _sgd, embedding_spec.SGDSlotVariables()),
    (
        embedding_spec.AdagradOptimizerSpec(lambda step: 0.5 + 0.0 * step, initial_accumulator_value=0.3),
        _adagrad,
        embedding_spec.AdagradSlotVariables(accumulator=0.3),
    ),
    (
        embedding_spec.AdagradMomentumOptimizerSpec(0.5, 0.8, 0.9, 1e-3, 3.0, True, 0.3, 0.2),
        _adagrad_momentum,
        embedding_spec.AdagradMomentumSlotVariables(accumulator=0.3, momentum=0.2),
    ),
    (
        embedding_spec.AdamOptimizerSpec(0.5, 0.8, 0.99, 1e-3),
        _adam,
        embedding_spec.AdamSlotVariables(momentum=0, velocity=0),
    ),
    (
        embedding_spec.LaPropOptimizerSpec(0.5, 0.8, 0.9, 1e-4, None, 0.1),
        _laprop,
        embedding_spec.LaPropSlotVariables(mu=0.1, nu=0.1),
    ),
    (
        embedding_spec.FTRLOptimizerSpec(0.5, -0.4, 0.2, 0.3, 0.1, 0.4, 0.1, True),
        _ftrl,
        embedding_spec.FTRLSlotVariables(accumulator=0.4, linear=0.1),
    ),
    (
        embedding_spec.F2AOptimizerSpec(0.5, 0.7, 0.3, 1.0, 0.1, 0.2, 1.1),
        _f2a,
        embedding_spec.F2ASlotVariables(accumulator=0.3, local_step=1.0),
    ),
    (
        embedding_spec.CustomOptimizerSpec(
            learning_rate=0.5,
            custom_computation_fn=_by_sign,
            stablehlo=None,
            slot_variable_initializers_tuple=(2.0,),
            short_name_str="by_sign",
        ),
        lambda w, g, slots: (w - 0.5 * np.sign(g) * slots[0], (slots[0] + 1,)),
        (2.0,),
    ),
]


@pytest.mark.parametrize(("optimizer", "formula", "slots"), FORMULAS, ids=lambda value: type(value).__name__)
def test_the_formulas_of_the_optimizers(optimizer, formula, slots):
    """Step 3 (t = 4) of a row that two samples touch, against the formula in float64; the other rows stay."""
    feature = _feature(_table(optimizer=optimizer), inputs=(2,))
    shared = _ready(feature, 1)
    fresh = embedding.init_embedding_variables(
        jax.random.key(0), embedding.get_table_specs(feature), NamedSharding(line_of(1), P("x", None)), 1
    )
    assert type(fresh["t"].slot) is type(slots) and optimizer.slot_variables_count() == len(slots)
    for found, value in zip(fresh["t"].slot, slots, strict=True):
        np.testing.assert_allclose(found, np.full(found.shape, value), rtol=1e-6)
    inputs, _ = embedding.preprocess_sparse_dense_matmul_input([[5], [5]], None, feature, 1, 1, num_sc_per_device=1)
    gradients = np.random.default_rng(0).normal(size=(2, DIM)).astype(np.float32)
    new = embedding.tpu_sparse_dense_matmul_grad(gradients, inputs, fresh, step=3, **shared)
    given = list(zip(fresh["t"].slot, slots, strict=True))
    with np.errstate(all="raise"):
        row, own = np.asarray(fresh["t"].table, np.float64)[5], [np.full(a.shape[1], float(b)) for a, b in given]
        wanted = formula(row, gradients.sum(0, dtype=np.float64), own)
    np.testing.assert_allclose(new["t"].table[5], wanted[0], rtol=2e-5, atol=2e-6)
    for found, value, old in zip(new["t"].slot, wanted[1], fresh["t"].slot, strict=True):
        np.testing.assert_allclose(found[5], value, rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(np.delete(found, 5, 0), np.delete(old, 5, 0))
    np.testing.assert_array_equal(np.delete(new["t"].table, 5, 0), np.delete(fresh["t"].table, 5, 0))


def test_what_an_optimizer_says_of_itself():
    adam = embedding_spec.AdamOptimizerSpec(lambda step: 0.5 / (step + 1), beta_1=0.8)
    assert adam.get_learning_rate(1) == 0.25 and adam.short_name() == "adam"
    assert all(np.shape(value) == () for value in adam.get_hyperparameters(1)) and adam.get_hyperparameters(1)
    made = adam.slot_variables_initializers()
    assert isinstance(made, embedding_spec.AdamSlotVariables)
    np.testing.assert_array_equal(made.velocity(jax.random.key(0), (2, 3), jnp.float32), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="learning_rate is a callable of the step, and step is None; pass step="):
        adam.get_learning_rate(None)
    with pytest.raises(ValueError, match="learning_rate takes 2 arguments; it must be a number"):
        embedding_spec.SGDOptimizerSpec(lambda step, other: 0.1)
    momentum = embedding_spec.AdagradMomentumOptimizerSpec(0.1, exponent=3.0, use_nesterov=True)
    floats, bools = momentum.get_float_params(), momentum.get_bool_params()
    assert floats["exponent"] == 3.0 and bools == {"use_nesterov": True}
    assert type(momentum).from_float_and_bool_params(floats, bools, 0.1) == momentum
    assert embedding_spec.FTRLOptimizerSpec(learning_rate_power=-1.0) != embedding_spec.FTRLOptimizerSpec(
        learning_rate_power=-2.0
    )
    assert embedding_spec.SGDOptimizerSpec() != embedding_spec.AdagradOptimizerSpec()
    with pytest.raises(ValueError, match="LaProp: rms_clip_threshold"):
        embedding_spec.LaPropOptimizerSpec(rms_clip_threshold=1.0)
    with pytest.raises(ValueError, match="neither custom_computation_fn nor stablehlo is given"):
        embedding_spec.CustomOptimizerSpec()
    lost = embedding_spec.CallablePlaceholder(tag="rate")
    with pytest.raises(RuntimeError, match="the learning rate 'rate' was a callable when it was stored"):
        lost(3)
    assert embedding_spec.SGDOptimizerSpec(lost).learning_rate is lost


# ---- stacking ----------------------------------------------------------------------------------------------------


def test_names_of_stacks():
    tables = [_table(f"{letter * 20}") for letter in "abc"]
    features = [_feature(table, f"f{number}") for number, table in enumerate(tables)]
    whole = "_".join(table.name for table in tables)
    table_stacking.auto_stack_tables(features=features, global_device_count=1, num_sc_per_device=2)
    assert (
        tables[0].stacked_table_spec.stack_name == whole[:50] + "..." + hashlib.sha256(whole.encode()).hexdigest()[:12]
    )
    features = [_feature(_table(f"{letter * 20}"), letter) for letter in "abc"]
    embedding.auto_stack_tables(features, 1, 2, use_short_stack_names=False)
    assert features[0].table_spec.stacked_table_spec.stack_name == whole


@pytest.mark.parametrize("rotation", [None, 0, 3])
def test_limits_offsets_and_rotation(rotation):
    asked = []

    def limit(name, samples):
        asked.append((name, samples))
        return 40

    tables = {name: _table(name, rows, max_ids_per_partition=8) for name, rows in (("a", 40), ("b", 70), ("c", 5))}
    features = [_feature(table, name) for name, table in tables.items()]
    table_stacking.stack_tables(
        features,
        table_names=["c", "a", "b"],
        global_device_count=2,
        num_sc_per_device=2,
        rotation=rotation,
        stack_to_max_ids_per_partition=limit,
        stack_to_max_unique_ids_per_partition=lambda name, samples: 24,
        stack_name="s",
    )
    spec, turn = tables["a"].stacked_table_spec, 2 if rotation is None else rotation
    assert asked == [("s", 3 * BATCH)]
    assert (spec.max_ids_per_partition, spec.max_unique_ids_per_partition, spec.stack_vocab_size) == (40, 24, 192)
    for number, (name, offset) in enumerate((("c", 0), ("a", 8), ("b", 8 + 16))):
        setting, own = tables[name].setting_in_stack, features["abc".index(name)].id_transformation
        assert (setting.row_offset_in_shard, setting.shard_rotation) == (offset, number * turn % 4)
        assert (own.col_offset, own.col_shift) == (offset * 4, number * turn % 4)
        assert own.row_offset == "abc".index(name) * BATCH  # samples are in the order of the features
    alone = _feature(_table(max_ids_per_partition=8), "x")
    table_stacking.stack_tables([alone], ["t"], 1, 1, stack_to_max_ids_per_partition=limit)
    assert alone.table_spec.stacked_table_spec.max_ids_per_partition == 8 and len(asked) == 1


def test_tables_are_stacked_by_what_they_share():
    kinds = {
        "a": {},
        "b": {"dim": 16},
        "c": {"combiner": "mean"},
        "d": {"dim": 5},
        "e": {"optimizer": embedding_spec.SGDOptimizerSpec(0.25)},
        "f": {"quantization_config": embedding_spec.QuantizationConfig(min_value=0, max_value=1, num_buckets=4)},
        "g": {},
    }
    features = [_feature(_table(name, **settings), name) for name, settings in kinds.items()]
    embedding.auto_stack_tables(features, 2, 2, lambda name, samples: 48, lambda name, samples: 32)
    specs = embedding.get_stacked_table_specs(features)
    assert set(specs) == {"a_d_g", "b", "c", "e", "f"}
    assert specs["a_d_g"].max_ids_per_partition == 48 and specs["a_d_g"].max_unique_ids_per_partition == 32
    assert specs["b"].max_ids_per_partition == 256
    # 4 samples of 8 numbers of 4 bytes on each of 4 SparseCores: two tables to a stack.
    features = [_feature(_table(name), name) for name in "abc"]
    table_stacking.auto_stack_tables(features, 2, 2, activation_mem_bytes_limit=2 * 4 * 8 * 4)
    assert set(embedding.get_stacked_table_specs(features)) == {"a_b", "c"}
    table = _table()
    with pytest.raises(ValueError, match='feature "x" is already defined; every feature needs a name of its own'):
        embedding.get_stacked_table_specs([_feature(table), _feature(table)])
    with pytest.raises(ValueError, match='table "t" is defined twice, with other settings; share one TableSpec'):
        embedding.get_table_specs([_feature(table), _feature(_table(rows=9), "y")])


# ---- primitives --------------------------------------------------------------------------------------------------


def _ready(feature, devices, cores=1):
    embedding.prepare_feature_specs_for_training(feature, devices, cores)
    return {"feature_specs": feature, "global_device_count": devices, "num_sc_per_device": cores}


def _batch(feature, devices, cores, **options):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ROWS, (BATCH, 3))
    inputs, stats = embedding.preprocess_sparse_dense_matmul_input(
        features=ids,
        features_weights=None,
        feature_specs=feature,
        local_device_count=devices,
        global_device_count=devices,
        num_sc_per_device=cores,
        **options,
    )
    return inputs, stats, ids


def _variables(feature, devices, cores=1, **options):
    mesh = line_of(devices)
    return embedding.init_embedding_variables(
        rng=jax.random.key(0),
        table_specs=embedding.get_table_specs(feature),
        global_sharding=NamedSharding(mesh, P("x", None)),
        num_sparsecore_per_device=cores,
        **options,
    )


def _equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_is_for_hardware_changes_nothing():
    feature = _feature(_table(combiner="mean", optimizer=embedding_spec.AdagradOptimizerSpec(0.1)), inputs=(BATCH, 3))
    shared = _ready(feature, 1, 2)
    plain, stats, _ = _batch(feature, 1, 2)
    other, _, _ = _batch(
        feature,
        1,
        2,
        sharding_strategy="mod",
        allow_id_dropping=True,
        batch_number=7,
        enable_minibatching=True,
        all_reduce_interface=object(),
    )
    _equal(plain, other)  # within the limits there is one minibatch
    assert (stats.max_ids_per_partition["t"] <= 256).all() and stats.id_drop_counters == {"t": 0}
    variables, gradients = _variables(feature, 1, 2, bypass_mesh_check=True), np.ones((BATCH, DIM), np.float32)
    found = embedding.tpu_sparse_dense_matmul(plain, variables, **shared)
    _equal(
        found,
        embedding.tpu_sparse_dense_matmul(
            preprocessed_inputs=plain.sparse_dense_matmul_input,
            embedding_variables={"t": tuple(variables["t"])},  # plain tuples
            sharding_strategy="MOD",
            enable_minibatching=True,
            use_activation_unstack_primitive=True,
            **shared,
        ),
    )
    new = embedding.tpu_sparse_dense_matmul_grad(gradients, plain, variables, step=0, **shared)
    again = embedding.tpu_sparse_dense_matmul_grad(
        activation_gradients=gradients,
        preprocessed_inputs=plain,
        embedding_variables={"t": (variables["t"].table, tuple(variables["t"].slot))},
        sharding_strategy="MOD",
        label="a",
        step=0,
        enable_minibatching=True,
        use_gradient_stacking_primitive=True,
        **shared | {"global_device_count": None},  # as many as the variables say
    )
    _equal(jax.tree.leaves(new), jax.tree.leaves(again))
    assert isinstance(again["t"], embedding.EmbeddingVariables)
    assert again["t"]._fields == ("table", "slot")
    apart = embedding.tpu_sparse_dense_matmul(plain, variables, perform_unstacking=False, **shared)
    _equal(embedding.unstack_embedding_activations(apart, feature, 1, 2, use_activation_unstack_primitive=True), found)
    stacked = embedding.stack_embedding_gradients(
        gradients, feature, num_sc_per_device=2, global_device_count=1, use_gradient_stacking_primitive=True
    )
    by_stack = embedding.tpu_sparse_dense_matmul_grad(
        stacked, plain, variables, step=0, perform_stacking=False, **shared
    )
    _equal(by_stack, new)


def test_stacks_of_gradients_are_those_of_activations():
    """A SparseCore's samples of every feature are side by side, feature after feature; columns are padded."""
    tables = [_table("a", dim=5), _table("b")]
    features = [_feature(table, table.name, inputs=(8, 1)) for table in tables]
    table_stacking.stack_tables(features, ["a", "b"], 2, 2, stack_name="s")
    own = [np.random.default_rng(n).normal(size=(4, table.embedding_dim)) for n, table in enumerate(tables)]
    found = embedding.stack_embedding_gradients(own, features, 2)["s"]
    wanted = np.zeros((8, 8))
    for core in range(2):
        wanted[4 * core : 4 * core + 2, :5] = own[0][2 * core : 2 * core + 2]
        wanted[4 * core + 2 : 4 * core + 4] = own[1][2 * core : 2 * core + 2]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for back, given in zip(embedding.unstack_embedding_activations({"s": found}, features, 2, 2), own, strict=True):
        np.testing.assert_allclose(back, given, rtol=1e-6)


def test_limits_of_the_variables():
    features = [_feature(_table(name), name, inputs=(2, 1)) for name in "ab"]
    shared = _ready(features, 1)
    inputs, _ = embedding.preprocess_sparse_dense_matmul_input(
        [np.array([[1], [2]])] * 2, None, features, 1, 1, num_sc_per_device=1
    )
    variables, gradients = _variables(features, 1), [np.full((2, DIM), 3.0, np.float32)] * 2
    free = embedding.tpu_sparse_dense_matmul_grad(gradients, inputs, variables, **shared)
    new = embedding.tpu_sparse_dense_matmul_grad(
        gradients, inputs, variables, embedding_var_limits={"b": (None, -0.5)}, **shared
    )
    _equal(new["a"], free["a"])
    wanted = np.array(free["b"].table)
    wanted[1:3] = np.minimum(wanted[1:3], -0.5)
    np.testing.assert_array_equal(new["b"].table, wanted)
    assert (wanted != np.asarray(free["b"].table)).any()


def test_a_batch_and_its_parts():
    feature = _feature(_table(combiner="mean"), inputs=(BATCH, 3))
    _ready(feature, 4)
    inputs, stats, _ = _batch(feature, 4, 1)
    parts = inputs.lhs_row_pointers, inputs.lhs_embedding_ids, inputs.lhs_sample_ids, inputs.lhs_gains
    assert tuple(inputs) == tuple(inputs.sparse_dense_matmul_input) == parts
    assert isinstance(inputs.sparse_dense_matmul_input, embedding.SparseDenseMatmulInput)
    assert all(len(leaf) % 4 == 0 for leaf in jax.tree.leaves(inputs))
    assert inputs.replace(num_minibatches=2).num_minibatches == 2 and inputs.num_minibatches.tolist() == [1] * 4
    assert jax.tree.structure(embedding.PreprocessedInput(inputs.sparse_dense_matmul_input, 1)) == jax.tree.structure(
        inputs
    )
    led, _, _ = _batch(feature, 4, 1, has_leading_dimension=True)
    _equal(jax.tree.map(lambda part: part.reshape(4, -1), inputs), led)
    # 16 x 3 ids need no SparseCore more often than that.
    assert stats.max_ids_per_partition["t"].shape == (16,) and stats.max_unique_ids_per_partition["t"].max() <= 12
    made = embedding.EmbeddingVariablesInitializer(table=jax.nn.initializers.zeros, slot=())
    assert made.table(jax.random.key(0), (2, 2)).shape == (2, 2) and made.slot == ()


def test_buffers_in_the_statistics():
    feature = _feature(_table(max_ids_per_partition=4))
    _ready(feature, 1, 2)
    _, stats = embedding.preprocess_sparse_dense_matmul_input(
        [np.arange(20)] + [[1]] * (BATCH - 1), None, feature, 1, 1, num_sc_per_device=2
    )
    assert stats.required_buffer_size_per_sc["t"].tolist() == [40, 8]  # 10 and 17 ids
    assert stats.get_required_buffer_size_per_device("t", 2) == 80 == stats.get_required_buffer_size_per_device("t")
    assert stats.get_required_buffer_size_per_device("t", num_sc_per_device=4) == 160
    assert stats.get_required_buffer_size_per_device("other") is None
    stats.set_required_buffer_size_per_device("t", 50)
    assert stats.required_buffer_size_per_sc["t"].tolist() == [25, 25]
    stats.set_required_buffer_size_per_device("t", required_buffer_size_per_device=51, num_sc_per_device=2)
    assert stats.get_required_buffer_size_per_device("t") == 52
    with pytest.raises(ValueError, match='stack "other": there are no statistics of it that say how many SparseCores'):
        stats.set_required_buffer_size_per_device("other", 8)
    stats.set_required_buffer_size_per_device("other", 8, 2)
    assert stats.get_required_buffer_size_per_device("other") == 8
    embedding.update_preprocessing_parameters(feature, updated_params=stats, num_sc_per_device=2)
    spec = feature.table_spec.stacked_table_spec
    assert (spec.max_ids_per_partition, spec.suggested_coo_buffer_size_per_device) == (17, 52)
    assert feature.table_spec.max_ids_per_partition == 4
    nothing = embedding.SparseDenseMatmulInputStats({"other": np.array([99])}, {"t": np.array([5])})
    embedding.update_preprocessing_parameters(feature, nothing, 2)
    after = feature.table_spec.stacked_table_spec
    assert after == spec.replace(max_unique_ids_per_partition=5)  # what is not told stays


@pytest.mark.parametrize("table", ["float32", "bfloat16"])
def test_initial_variables_for_pmap(table):
    feature = _feature(_table(dtype=table, optimizer=embedding_spec.AdagradOptimizerSpec()))
    _ready(feature, 4, 2)
    flat = _variables(feature, 4, 2)
    turned = jax.sharding.Mesh(np.array(jax.devices()[3::-1]), ("x",))
    led = embedding.init_embedding_variables(
        jax.random.key(0),
        feature.table_spec,
        NamedSharding(turned, P("x", None, None)),
        2,
        bypass_mesh_check=True,
    )
    assert led["t"].table.shape == (4, 16, DIM) and led["t"].table.dtype == table
    _equal(jax.device_get(jax.tree.map(lambda part: part.reshape(64, DIM), led)), jax.device_get(flat))


def test_a_linen_layer_over_two_axes():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    feature = _feature(inputs=(BATCH, 3))
    layer = linen_embed.SparseCoreEmbed(
        feature_specs=feature,
        sharding_axis=("a", "b"),
        mesh=mesh,
        table_sharding_strategy="MOD",
        enable_minibatching=True,
    )
    ids = np.random.default_rng(0).integers(0, ROWS, (BATCH, 3))
    inputs = layer.preprocess_inputs(0, ids, None, all_reduce_interface=None)
    params = layer.init(jax.random.key(0), inputs)
    rows = table_stacking.unshard_and_unstack_tables(feature.table_spec, {"t": jax.tree.leaves(params)[0]}, 4)
    np.testing.assert_allclose(layer.apply(params, inputs), np.asarray(rows)[ids].sum(1), rtol=1e-5)
    with pytest.raises(ValueError, match="needs a mesh of these axes"):
        linen_embed.SparseCoreEmbed(feature, ("a", "b"))


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "cores", "minibatches", "pointers", "ids"),
    [
        (1, 1, False, 8, 16),
        (1, 4, False, 32, 256),
        (2, 4, False, 32, 512),
        (4, 4, False, 64, 1024),
        (1, 4, True, 64 * 32, 64 * 256),
    ],
)
def test_sizes_of_buffers(devices, cores, minibatches, pointers, ids):
    shared = {"global_device_count": devices, "num_sc_per_device": cores, "enable_minibatching": minibatches}
    assert embedding.compute_row_pointers_size_per_device(**shared) == pointers
    assert embedding.compute_theoretical_max_coo_buffer_size(max_ids_per_partition=16, **shared) == ids
    assert embedding.compute_theoretical_max_coo_buffer_size(9, **shared) == ids  # in whole buffers of 8
    feature = _feature(_table(max_ids_per_partition=16))
    embedding.prepare_feature_specs_for_training(feature, devices, cores)
    assert embedding.compute_coo_buffer_size_per_device(feature_specs=feature, **shared) == {"t": ids}


def test_suggested_sizes():
    feature = _feature(_table(max_ids_per_partition=16))
    embedding.prepare_feature_specs_for_training(feature, 1, 4)

    def size(**limits):
        feature.table_spec._stacked_table_spec = feature.table_spec.stacked_table_spec.replace(**limits)
        return embedding.compute_coo_buffer_size_per_device([feature], 1, 4)["t"]

    assert [size(suggested_coo_buffer_size_per_device=n) for n in (48, 96, 256)] == [64, 96, 256]
    with pytest.raises(ValueError, match=r"suggested_coo_buffer_size_per_device=1020 is 1024 ids in whole"):
        size(suggested_coo_buffer_size_per_device=1020)
    with pytest.raises(ValueError, match=r'stack "t": a buffer of 2147483648 ids is more than the 2147483646 that'):
        size(suggested_coo_buffer_size_per_device=None, max_ids_per_partition=2**27)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("combiner", ["sum", "mean"])
@pytest.mark.parametrize(("devices", "cores"), [(1, 1), (4, 2)])
def test_shapes_of_a_batch(devices, cores, combiner, leading, weighted):
    """Rectangles have these shapes, whatever is in them; a ragged feature has those of a TPU's buffers."""
    table, ragged = _table(combiner=combiner), _table("r", combiner=combiner, max_ids_per_partition=8)
    specs = {
        "x": _feature(table, inputs=(BATCH, 3)),
        "y": _feature(table, "y", inputs=(2 * BATCH, 1)),
        "s": embedding_spec.FeatureSpec(
            name="s", table_spec=table, input_shape=(BATCH, 2), output_shape=(BATCH, 2, DIM), padding_id=0
        ),
    }
    shared = {"num_sc_per_device": cores, "has_leading_dimension": leading}
    embedding.prepare_feature_specs_for_training(specs, devices, cores)
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, ROWS, spec.input_shape) for name, spec in specs.items()}
    weights = {name: np.ones(value.shape, np.float32) for name, value in ids.items()} if weighted else None
    inputs, _ = embedding.preprocess_sparse_dense_matmul_input(ids, weights, specs, devices, devices, **shared)
    found = embedding.eval_preprocess_sparse_dense_matmul_input_shape(
        specs, devices, devices, weighted=weighted, enable_minibatching=False, **shared
    )
    assert isinstance(found, embedding.PreprocessedInput)
    assert jax.tree.leaves(found) == [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in jax.tree.leaves(inputs)]
    assert jax.tree.structure(found) == jax.tree.structure(inputs)
    more = {**specs, "r": _feature(ragged, "r", padding_id=0)}
    embedding.prepare_feature_specs_for_training(more, devices, cores)
    found = embedding.eval_preprocess_sparse_dense_matmul_input_shape(
        more, devices, devices, weighted=weighted, **shared
    )
    room = bucket(embedding.compute_coo_buffer_size_per_device(more, devices, cores)["r"])
    assert found.lhs_embedding_ids["r"].size == devices * room
    assert found.lhs_row_pointers["r"].size == devices * (BATCH // devices + 1)


def test_a_step_compiled_for_shapes_takes_rectangles():
    feature, mesh = _feature(inputs=(BATCH, 3)), line_of(4)
    shared = _ready(feature, 4)
    run = jax.jit(
        jax.shard_map(
            lambda inputs, variables: embedding.tpu_sparse_dense_matmul(inputs, variables, **shared),
            mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False,
        )
    )  # fmt: skip
    inputs, _, ids = _batch(feature, 4, 1)
    variables, split = _variables(feature, 4), NamedSharding(mesh, P("x"))
    shapes = embedding.eval_preprocess_sparse_dense_matmul_input_shape(feature, 4, 4, num_sc_per_device=1)
    assert jax.eval_shape(run, shapes, variables).shape == (BATCH, DIM)
    placed = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=split), shapes)
    compiled = run.lower(placed, variables).compile()
    rows = table_stacking.unshard_and_unstack_tables(feature.table_spec, variables, 4).table
    wanted = np.asarray(rows)[ids].sum(1)
    np.testing.assert_allclose(compiled(jax.device_put(inputs, split), variables), wanted, rtol=1e-5, atol=1e-6)


def test_shapes_that_cannot_be():
    feature = _feature(inputs=(6, 3))
    with pytest.raises(ValueError, match=r'feature "x": its table "t" is in no stack yet; call embedding\.prepare'):
        embedding.eval_preprocess_sparse_dense_matmul_input_shape(feature, 1, 1)
    embedding.prepare_feature_specs_for_training(feature, 4, 1)
    with pytest.raises(ValueError, match='feature "x": a batch of 6 cannot be shared by 4 devices; make it a multiple'):
        embedding.eval_preprocess_sparse_dense_matmul_input_shape(feature, 1, 4, num_sc_per_device=1)


# ---- a layer, and a client ---------------------------------------------------------------------------------------


def test_an_nnx_layer():
    feature = _feature(inputs=(BATCH, 3))
    layer = nnx_embed.SparseCoreEmbed(
        feature_specs=feature,
        sharding_axis="x",
        mesh=line_of(2),
        rngs=nnx.Rngs(0),
        enable_minibatching=True,
        table_sharding_strategy="MOD",
    )
    variable = layer.embedding_table
    assert isinstance(variable, nnx_embed.EmbeddingVariablesParam)
    kinds = [variable, nnx.Param(jnp.ones(2))]
    assert [nnx_embed.is_embedding_variables((), value) for value in kinds] == [True, False]
    assert [nnx_embed.is_non_embedding_variables((), value) for value in kinds] == [False, True]
    inputs, _, ids = _batch(feature, 2, 1)
    rows = table_stacking.unshard_and_unstack_tables(feature.table_spec, variable.get_value(), 2).table
    found = nnx_embed.embedding_lookup(layer, inputs, step=0)
    np.testing.assert_allclose(found, np.asarray(rows)[ids].sum(1), rtol=1e-5, atol=1e-6)


def test_the_state_of_a_pipeline():
    feature, mesh = _feature(inputs=(BATCH, 3)), line_of(2)
    _ready(feature, 2)
    inputs, _, _ = _batch(feature, 2, 1)
    forward = pipelining.get_default_sc_fwd_function(feature, mesh, num_sc_per_device=1)

    def dense(activations, labels, kernel, aux):
        assert aux is None
        return activations * kernel, labels.sum(), kernel, {"seen": labels}

    batch = pipelining.CurrentStepInput(sparse_inputs=inputs, dense_inputs=jnp.arange(3.0))
    state = pipelining.get_initial_state(batch, jnp.ones(()), _variables(feature, 2), forward, dense)
    last, before = state.last_step_inputs, state.step_before_last_step_inputs
    wanted = pipelining.LastStepInput(
        sparse_inputs=inputs,
        embedding_activations=jnp.ones((BATCH, DIM)),
        dense_inputs=jnp.arange(3.0),
        sc_fwd_aux=None,
    )
    updated = pipelining.StepBeforeLastStepInput(
        sparse_inputs=inputs, embedding_gradients=jnp.ones((BATCH, DIM)), tc_aux={"seen": jnp.arange(3.0)}
    )
    for found, like in ((last, wanted), (before, updated)):
        assert type(found) is type(like)
        _equal(found, jax.tree.map(np.zeros_like, like))
    assert state.pipeline_step == 0 and state.replace(pipeline_step=3).pipeline_step == 3


def test_a_client_of_ones_own():
    class Kept(fdo_client.FDOClient):
        def record(self, data):
            self.data = data

        def publish(self):
            self.published = self.data

        def load(self):
            return self.published

    with pytest.raises(TypeError, match="abstract"):
        fdo_client.FDOClient()  # type: ignore[abstract]
    client, stats = Kept(), embedding.SparseDenseMatmulInputStats({}, {})
    client.record(stats)
    client.publish()
    assert client.load() is stats
