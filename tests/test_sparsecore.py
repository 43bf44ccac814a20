"""Law: the SparseCore primitives compute what the definition says, whatever the stacks, devices and SparseCores."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from battery import OPTIMIZERS as BATTERY
from helpers import line_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import embax
from embax.sparsecore.lib.nn import embedding, embedding_spec, table_stacking

# Two tests of 8 programs, or at night of 251, with 20 batches each: 320 and 10,040.
EXAMPLES = int(os.environ.get("EMBAX_EXAMPLES", "6")) * 5 // 4
# Those whose slot variables have the oracle's names, and are of the SparseCore API.
OPTIMIZERS = {
    name: (case.make(), case)
    for name, case in BATTERY.items()
    if name not in ("custom", "optax", "adagrad_callable", "rowwise_adagrad", "sgd_modified", "adam_modified")
}
STEPS = 20  # of every example: a program, and so many random batches

pytestmark = pytest.mark.usefixtures("eight_devices")


@st.composite
def cases(draw, counts):
    names = [f"t{i}" for i in range(draw(st.integers(1, 3)))]
    features = {f"f_{name}": name for name in names}
    if draw(st.booleans()):
        features["f_again"] = names[0]
    devices, cores = draw(st.sampled_from(counts)), draw(st.sampled_from([1, 2, 3, 4]))
    return {
        "rows": {name: draw(st.integers(1, 90)) for name in names},
        "dims": {name: draw(st.sampled_from([3, 8, 13])) for name in names},
        "combiner": draw(st.sampled_from(oracle.COMBINERS)),
        "features": features,
        "ragged": {name: draw(st.booleans()) for name in features},
        "weighted": draw(st.booleans()),
        "devices": devices,
        "cores": cores,
        "stacking": draw(st.sampled_from(["none", "auto", "all"])),
        "rotation": draw(st.sampled_from([None, 0, 1])),
        "optimizer": draw(st.sampled_from(sorted(OPTIMIZERS))),
        "seed": draw(st.integers(0, 999)),
    }


def _features(case):
    """Returns prepared features; their batch has two samples for every SparseCore."""
    optimizer, batch = OPTIMIZERS[case["optimizer"]][0], 2 * case["devices"] * case["cores"]
    tables = {
        name: embedding_spec.TableSpec(
            name=name,
            vocabulary_size=rows,
            embedding_dim=case["dims"][name],
            initializer=jax.nn.initializers.normal(1.0),
            optimizer=optimizer,
            combiner=case["combiner"],
        )
        for name, rows in case["rows"].items()
    }
    features = {
        name: embedding_spec.FeatureSpec(
            name=name,
            table_spec=tables[table],
            input_shape=(batch,) if case["ragged"][name] else (batch, 3),
            output_shape=(batch, case["dims"][table]),
        )
        for name, table in case["features"].items()
    }
    where = case["devices"], case["cores"]
    if case["stacking"] == "auto":
        table_stacking.auto_stack_tables(features, *where, case["rotation"])
    elif case["stacking"] == "all":
        table_stacking.stack_tables(features, list(tables), *where, case["rotation"])
    embedding.prepare_feature_specs_for_training(features, *where)
    return features, tables, batch


def _ids(case, batch, rng):
    ids, weights = {}, {}
    for name, table in case["features"].items():
        # Four ids for the two samples of a SparseCore: batches of one shape share a program.
        first = rng.integers(0, 5, batch // 2)
        lengths = np.stack([first, 4 - first], 1).reshape(-1) if case["ragged"][name] else np.full(batch, 3)
        own = [rng.integers(0, case["rows"][table], n) for n in lengths]
        beside = [rng.uniform(0.5, 2, n).astype(np.float32) for n in lengths]
        ids[name], weights[name] = own, beside
        if not case["ragged"][name]:
            ids[name], weights[name] = np.stack(own), np.stack(beside)
    return ids, weights


def _programs(case, features):
    mesh = line_of(case["devices"])
    shared = {"feature_specs": features, "num_sc_per_device": case["cores"], "global_device_count": mesh.size}

    def run(function, inputs):
        split = P(mesh.axis_names)
        in_specs = (P(), *(split,) * inputs)
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False))

    def look(_, batch, variables):
        return embedding.tpu_sparse_dense_matmul(batch, variables, **shared)

    def step(number, gradients, batch, variables):
        return embedding.tpu_sparse_dense_matmul_grad(gradients, batch, variables, step=number, **shared)

    forward, backward = run(look, 2), run(step, 3)
    return mesh, forward, backward


def _check(case):
    features, tables, batch = _features(case)
    mesh, forward, backward = _programs(case, features)
    rng = np.random.default_rng(case["seed"])
    variables = embedding.init_embedding_variables(
        jax.random.key(0), tables, NamedSharding(mesh, P(mesh.axis_names, None)), case["cores"]
    )
    shards = case["devices"] * case["cores"]
    for step in range(STEPS):
        ids, weights = _ids(case, batch, rng)
        given = weights if case["weighted"] else None
        inputs, _ = embedding.preprocess_sparse_dense_matmul_input(
            ids, given, features, mesh.size, mesh.size, num_sc_per_device=case["cores"]
        )
        before = _tables(tables, variables, shards)
        activations = forward(jnp.int32(step), inputs, variables)
        gradients = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in activations.items()}
        variables = backward(jnp.int32(step), gradients, inputs, variables)
        after = _tables(tables, variables, shards)
        for name, table in case["features"].items():
            own = given and [list(map(float, w)) for w in given[name]]
            samples = [list(map(int, sample)) for sample in ids[name]]
            wanted = oracle.pool(before[table]["table"], samples, own, case["combiner"])
            np.testing.assert_allclose(activations[name], wanted, rtol=3e-5, atol=3e-5, err_msg=name)
        for table in tables:
            _check_table(case, step, table, before[table], after[table], ids, given, gradients)


def _tables(tables, variables, shards):
    """Returns rows and slots of every table by name."""
    found = table_stacking.unshard_and_unstack_tables(tables, variables, shards)
    named = {}
    for name, (rows, slots) in found.items():
        width = {part: 1 if slot.row_wise else None for part, slot in tables[name].optimizer.slots()._asdict().items()}
        named[name] = {"table": np.asarray(rows)} | {
            part: np.asarray(values)[:, : width[part]] for part, values in slots._asdict().items()
        }
    return named


def _check_table(case, step, table, before, after, ids, weights, gradients):
    known = OPTIMIZERS[case["optimizer"]][1]
    names = [name for name, of in case["features"].items() if of == table]
    bags = [list(map(int, sample)) for name in names for sample in ids[name]]
    given = weights and [list(map(float, w)) for name in names for w in weights[name]]
    stacked = np.concatenate([gradients[name] for name in names])
    slots = {name: value for name, value in before.items() if name != "table"}
    wanted, wanted_slots = oracle.update(
        before["table"], slots, bags, given, case["combiner"], stacked, known.oracle_name,
        step=step, hyper=known.hyper(step), **known.modifiers,
    )  # fmt: skip
    untouched = sorted(set(range(case["rows"][table])) - {i for bag in bags for i in bag})
    for name, value in {"table": wanted, **wanted_slots}.items():
        np.testing.assert_array_equal(after[name][untouched], before[name][untouched], err_msg=f"{table} {name}")
        np.testing.assert_allclose(after[name], value, rtol=3e-5, atol=3e-5, err_msg=f"{table} {name}")


_TWO = {
    "rows": {"t0": 70, "t1": 33},
    "dims": {"t0": 13, "t1": 13},
    "combiner": "mean",
    "features": {"f_t0": "t0", "f_t1": "t1", "f_again": "t0"},
    "ragged": {"f_t0": False, "f_t1": True, "f_again": True},
    "weighted": True,
    "devices": 4,
    "cores": 2,
    "stacking": "auto",
    "rotation": None,
    "optimizer": "adagrad",
    "seed": 1,
}


@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases([1, 4]))
@example(case=_TWO)
def test_a_step_is_the_oracles(case):
    _check(case)


@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases([2, 8]))
@example(case=_TWO | {"devices": 2, "cores": 1, "stacking": "none", "weighted": False})
def test_a_step_is_the_oracles_on_other_devices(case):
    _check(case)


# ---- statistics --------------------------------------------------------------------------------------------------


def _feature(name="x", rows=64, dim=8, batch=2, table="t", **settings):
    spec = embedding_spec.TableSpec(
        name=table,
        vocabulary_size=rows,
        embedding_dim=dim,
        initializer=jax.nn.initializers.normal(1.0),
        optimizer=embedding_spec.SGDOptimizerSpec(0.5),
        combiner="sum",
        **settings,
    )
    return embedding_spec.FeatureSpec(name=name, table_spec=spec, input_shape=(batch,), output_shape=(batch, dim))


def _preprocessed(feature, ids, devices=1, cores=1, weights=None, **options):
    embedding.prepare_feature_specs_for_training(feature, devices, cores)
    return embedding.preprocess_sparse_dense_matmul_input(
        ids, weights, feature, devices, devices, num_sc_per_device=cores, **options
    )


def test_statistics_are_those_of_a_tpu():
    ids = [np.array([0, 0, 0, 2, 4, 1]), np.array([1, 1, 1, 3, 3, 5, 5, 7, 7, 0])]
    _, stats = _preprocessed(_feature(), ids, cores=2)
    assert stats.max_ids_per_partition["t"].tolist() == [3, 4]
    assert stats.max_unique_ids_per_partition["t"].tolist() == [3, 4]
    assert stats.required_buffer_size_per_sc["t"].tolist() == [16, 16]
    assert stats.id_drop_counters == {"t": 0} and stats.would_drop == {"t": 0}


def test_unique_ids_are_counted_over_samples():
    _, stats = _preprocessed(_feature(batch=4), [[2, 4], [2], [4, 6], [3]], cores=2)
    assert stats.max_ids_per_partition["t"].tolist() == [3, 1]
    assert stats.max_unique_ids_per_partition["t"].tolist() == [2, 1]


def test_limits_can_be_rehearsed():
    def run(limits, **options):
        feature = _feature(max_ids_per_partition=4, max_unique_ids_per_partition=2)
        return _preprocessed(feature, [np.arange(20), np.arange(3)], limits=limits, **options)

    inputs, stats = run("ignore")
    assert stats.would_drop == {"t": 19} and inputs.num_minibatches.tolist() == [1]
    assert run("ignore", enable_minibatching=True)[0].num_minibatches.tolist() == [16]
    with pytest.warns(UserWarning) as found:
        run("warn")
    most, unique = (str(warning.message) for warning in found)
    assert most.startswith('stack "t": 23 ids go from one SparseCore to another, and max_ids_per_partition is 4: a TPU')
    assert "20 ids" in unique and "max_unique_ids_per_partition is 2" in unique and found[0].filename == __file__
    with pytest.raises(ValueError, match="raise the limit by update_preprocessing_parameters"):
        run("error")
    with pytest.raises(ValueError, match="limits='loud' must be one of ignore, warn, error"):
        run("loud")


def test_parameters_are_updated_from_statistics():
    feature = _feature(max_ids_per_partition=4)
    _, stats = _preprocessed(feature, [np.arange(20), np.arange(3)], cores=2)
    embedding.update_preprocessing_parameters(feature, stats, 2)
    spec = feature.table_spec.stacked_table_spec
    assert (spec.max_ids_per_partition, spec.max_unique_ids_per_partition) == (10, 10)
    assert spec.suggested_coo_buffer_size_per_device == 64
    _preprocessed(feature, [np.arange(20), np.arange(3)], cores=2, limits="error")


# ---- ways to call it ---------------------------------------------------------------------------------------------


def test_pmap_and_shard_map_agree():
    feature = _feature(batch=8)
    ids = [np.array([i, i + 1, 63 - i]) for i in range(8)]
    embedding.prepare_feature_specs_for_training(feature, 4, 2)
    mesh = line_of(4)
    shared = {"feature_specs": feature, "num_sc_per_device": 2, "global_device_count": 4}
    found = {}
    for kind in ("shard_map", "pmap"):
        lead = kind == "pmap"
        inputs, _ = _preprocessed(feature, ids, 4, 2, has_leading_dimension=lead)
        spec = P("x", None, None) if lead else P("x", None)
        variables = embedding.init_embedding_variables(
            jax.random.key(0), embedding.get_table_specs(feature), NamedSharding(mesh, spec), 2
        )

        def step(batch, variables):
            activations = embedding.tpu_sparse_dense_matmul(batch, variables, **shared)
            gradients = jnp.cos(activations)
            return activations, embedding.tpu_sparse_dense_matmul_grad(gradients, batch, variables, step=0, **shared)

        if lead:
            run = jax.pmap(step, devices=jax.devices()[:4])
        else:
            run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False))
        activations, variables = run(inputs, variables)
        found[kind] = np.asarray(activations).reshape(8, 8), np.asarray(variables["t"].table).reshape(64, 8)
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_device_without_a_mesh_and_stacked_activations():
    feature = _feature(dim=5)
    inputs, _ = _preprocessed(feature, [[3], [5, 5]], cores=2)
    mesh = line_of(1)
    variables = embedding.init_embedding_variables(
        jax.random.key(0), embedding.get_table_specs(feature), NamedSharding(mesh, P("x", None)), 2
    )
    whole = embedding.tpu_sparse_dense_matmul(
        inputs, variables, feature, global_device_count=1, num_sc_per_device=2, perform_unstacking=False
    )
    assert whole["t"].shape == (2, 8) and not whole["t"][:, 5:].any()
    own = embedding.unstack_embedding_activations(whole, feature, 1, 2)
    rows = embax.init(embax.plan(_feature(dim=5)), jax.random.key(0))["t"].table
    np.testing.assert_allclose(own, [rows[3], 2 * rows[5]], rtol=1e-6)
    of_four = _feature(dim=5, batch=8)
    embedding.prepare_feature_specs_for_training(of_four, 4, 2)
    with pytest.raises(ValueError, match=r"global_device_count=4, and the call is outside of a shard_map: 1 device"):
        embedding.tpu_sparse_dense_matmul(inputs, variables, of_four, global_device_count=4, num_sc_per_device=2)
    with pytest.raises(
        ValueError, match='"t" was made for 1 device of 2 SparseCores, and this call is for 4 devices of 2'
    ):
        embedding.tpu_sparse_dense_matmul(inputs, variables, feature, global_device_count=4, num_sc_per_device=2)
    kept = embedding.tpu_sparse_dense_matmul_grad(
        jnp.ones((2, 5)), inputs, variables, feature, num_sc_per_device=2, step=0, embedding_var_limits=(-0.1, None)
    )
    (table,) = [table_stacking.unshard_and_unstack_tables(feature.table_spec, kept, 2).table]
    np.testing.assert_allclose(table[3], jnp.maximum(rows[3] - 0.5, -0.1), rtol=1e-6)
    np.testing.assert_array_equal(table[4], rows[4])  # below the limit or not: nobody touched it


def test_a_batch_of_zeros_has_no_ids():
    feature = _feature()
    inputs, _ = _preprocessed(feature, [[3], [5, 5]])
    variables = embedding.init_embedding_variables(
        jax.random.key(0), embedding.get_table_specs(feature), NamedSharding(line_of(1), P("x", None)), 1
    )
    nothing = jax.tree.map(jnp.zeros_like, inputs)
    shared = {"feature_specs": feature, "global_device_count": 1, "num_sc_per_device": 1}
    assert not embedding.tpu_sparse_dense_matmul(nothing, variables, **shared).any()
    after = embedding.tpu_sparse_dense_matmul_grad(jnp.ones((2, 8)), nothing, variables, **shared)
    np.testing.assert_array_equal(after["t"].table, variables["t"].table)


@pytest.mark.parametrize("devices", [1, 4])
def test_sparse_tensors(devices):
    batch = 2 * devices
    rng = np.random.default_rng(0)
    samples = rng.permutation(np.repeat(np.arange(batch), 3))
    values = rng.integers(0, 64, samples.size)
    feature = _feature(batch=batch)
    embedding.prepare_feature_specs_for_training(feature, devices, 1)
    shared = {"num_sc_per_device": 1}
    sparse, _ = embedding.preprocess_sparse_dense_matmul_input_from_sparse_tensor(
        np.stack([samples, samples * 0], 1), values, np.array([batch, 9]), feature, devices, devices, **shared
    )
    bags = [values[samples == sample] for sample in range(batch)]
    dense, _ = embedding.preprocess_sparse_dense_matmul_input(bags, None, feature, devices, devices, **shared)
    jax.tree.map(np.testing.assert_array_equal, sparse, dense)
    with pytest.raises(ValueError, match=r'feature "x": index 0 is of sample 9, and dense_shape has 2 samples'):
        embedding.preprocess_sparse_dense_matmul_input_from_sparse_tensor(
            np.array([[9, 0]]), np.array([1]), np.array([2, 1]), feature, devices, devices, **shared
        )


# ---- layout ------------------------------------------------------------------------------------------------------


def test_initial_values_are_those_of_the_core():
    for devices, cores, stacking in ((1, 1, "none"), (4, 2, "auto"), (8, 3, "none")):
        case = _TWO | {"devices": devices, "cores": cores, "stacking": stacking, "rows": {"t0": 70_000, "t1": 33}}
        features, tables, _ = _features(case)
        sharding = NamedSharding(line_of(devices), P("x", None))
        variables = embedding.init_embedding_variables(jax.random.key(3), tables, sharding, cores)
        found = _tables(tables, variables, devices * cores)
        plain = {name: _feature(name, case["rows"][name], 13, table=name) for name in tables}
        wanted = embax.to_arrays(plan := embax.plan(plain), embax.init(plan, jax.random.key(3)))
        for name in tables:
            np.testing.assert_array_equal(found[name]["table"], wanted[name]["table"])
        whole = variables[tables["t1"].stacked_table_spec.stack_name].table
        assert float(jnp.abs(whole).sum()) == pytest.approx(
            sum(float(jnp.abs(wanted[table.name]["table"]).sum()) for table in tables.values()
                if table.stacked_table_spec == tables["t1"].stacked_table_spec), rel=1e-4
        )  # fmt: skip


def test_stacking_and_back():
    case = _TWO | {"stacking": "auto"}
    _, tables, _ = _features(case)
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=(case["rows"][name], 13)).astype(np.float32) for name in tables}
    stacks = table_stacking.stack_and_shard_tables(tables, given, 8)
    assert stacks["t0_t1"].shape == (192, 16)
    back = table_stacking.unshard_and_unstack_tables(tables, stacks, 8)
    jax.tree.map(np.testing.assert_array_equal, back, given)
    setting = tables["t1"].setting_in_stack
    assert (setting.row_offset_in_shard, setting.shard_rotation, setting.padded_vocab_size) == (16, 2, 64)
    np.testing.assert_array_equal(stacks["t0_t1"][3 * 24 + 16, :13], given["t1"][1])  # (1 + 2) % 8, behind 16 rows


def test_long_names_and_small_limits_of_memory():
    features = [_feature(f"x{i}", table="t" * 30 + str(i), batch=64) for i in range(3)]
    table_stacking.auto_stack_tables(features, 1, 2, activation_mem_bytes_limit=2 * 32 * 8 * 4)
    names = sorted(table_stacking.get_table_stacks([feature.table_spec for feature in features]))
    assert len(names) == 2 and names[1].endswith("...") is False and len(max(names, key=len)) == 50 + 3 + 12
    assert [feature.table_spec.stacked_table_spec.total_sample_count for feature in features] == [128, 128, 64]


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "names", "text"),
    [
        ({}, ["a", "a"], 'stack "a_a": table "a" is repeated; name each table once'),
        ({}, ["a", "z"], 'there is no table "z"; the features have a, b'),
        ({"combiner": "mean"}, ["a", "b"], r"have different values of combiner: \['sum', 'mean'\]; they must agree"),
        ({"optimizer": embedding_spec.SGDOptimizerSpec(0.1)}, ["a", "b"], "have different values of optimizer"),
    ],
)
def test_tables_that_cannot_be_stacked(change, names, text):
    features = [_feature("x", table="a"), _feature("y", table="b")]
    for field, value in change.items():
        setattr(features[1].table_spec, field, value)
    with pytest.raises(ValueError, match=text):
        table_stacking.stack_tables(features, names, 1, 1)
    assert not any(feature.table_spec.is_stacked() for feature in features)


def test_stacking_twice_and_padding():
    features = [_feature("x", table="a"), _feature("y", table="b"), _feature("z", table="c", dim=16)]
    table_stacking.stack_tables(features, ["a"], 1, 1)
    with pytest.raises(ValueError, match='table "a" is already stacked in "a"; stack a table once'):
        table_stacking.stack_tables(features, ["a", "b"], 1, 1)
    with pytest.raises(ValueError, match='the name is already used by the stack of table "a"; give another'):
        table_stacking.stack_tables(features, ["b"], 1, 1, stack_name="a")
    with pytest.raises(ValueError, match=r"512 numbers of padding could be saved by stacking tables of one padded dim"):
        table_stacking.stack_tables(features, ["b", "c"], 1, 1, fail_on_excess_padding=True)
    with pytest.raises(AttributeError, match="is stacked, combiner can no longer be set"):
        features[0].table_spec.combiner = "mean"


@pytest.mark.parametrize(
    ("ids", "weights", "text"),
    [
        ([[3], [64]], None, r'table "t": id 64 >= vocabulary_size 64 \(feature "x", sample 1\)'),
        ([[3], [-1]], None, r'table "t": id -1 is negative \(feature "x", sample 1\)'),
        ([[3], [2]], [[1.0], [np.nan]], r'feature "x", sample 1'),
        ([[3], [2], [1]], None, 'feature "x": 3 samples cannot be shared by 1 local devices with 2 SparseCores'),
        ([[3], [2], [1], [0]], None, r'feature "x": 4 samples on 1 of 1 devices do not make the batch of 2'),
    ],
)
def test_inputs_that_are_refused(ids, weights, text):
    with pytest.raises(ValueError, match=text):
        _preprocessed(_feature(), ids, cores=2, weights=weights)


def test_calls_that_are_refused():
    feature = _feature()
    with pytest.raises(ValueError, match=r'feature "x": its table "t" is in no stack yet; call embedding.prepare_'):
        embedding.get_stacked_table_specs(feature)
    with pytest.raises(ValueError, match="num_sc_per_device=0 must be an integer of at least 1"):
        embedding.prepare_feature_specs_for_training(feature, 1, 0)
    with pytest.raises(ValueError, match='feature "x" is already defined'):
        embedding.get_table_specs([feature, _feature()])
    inputs, _ = _preprocessed(feature, [[3], [5]])
    with pytest.raises(ValueError, match="sharding_strategy='DIV' is not supported; it must be MOD"):
        embedding.tpu_sparse_dense_matmul(inputs, {}, feature, global_device_count=1, sharding_strategy="DIV")
    with pytest.raises(ValueError, match=r"the features have stacks \['t'\], and the embedding variables \[\]"):
        embedding.tpu_sparse_dense_matmul(inputs, {}, feature, global_device_count=1, num_sc_per_device=1)
    small = {"t": embedding.EmbeddingVariables(jnp.zeros((8, 8)), ())}
    with pytest.raises(ValueError, match=r'stack "t": the table has shape \[8, 8\] on a device, and 1 devices have'):
        embedding.tpu_sparse_dense_matmul(inputs, small, feature, global_device_count=1, num_sc_per_device=1)
    mesh = line_of(2)
    for spec in (P(None, "x"), P("x")):
        with pytest.raises(ValueError, match=r"must be P\(axis, None\), or P\(axis, None, None\) for pmap"):
            embedding.init_embedding_variables(jax.random.key(0), feature.table_spec, NamedSharding(mesh, spec), 1)
    turned = jax.sharding.Mesh(np.array(jax.devices()[1::-1]), ("x",))
    with pytest.raises(
        ValueError, match=r"the mesh has other devices than the first of jax.devices\(\), or another order"
    ):
        embedding.init_embedding_variables(
            jax.random.key(0), feature.table_spec, NamedSharding(turned, P("x", None)), 1
        )
    with pytest.raises(ValueError, match="features must have the structure of feature_specs"):
        _preprocessed({"a": _feature()}, {"b": [[1], [2]]})


def test_an_optimizer_that_padding_would_change():
    feature = _feature(dim=5)
    feature.table_spec.optimizer = embax.RowwiseAdagrad(0.1)
    inputs, _ = _preprocessed(feature, [[3], [5]])
    sharding = NamedSharding(line_of(1), P("x", None))
    variables = embedding.init_embedding_variables(jax.random.key(0), feature.table_spec, sharding, 1)
    with pytest.raises(ValueError, match="rows are padded with columns, which would change the mean that RowwiseAda"):
        embedding.tpu_sparse_dense_matmul_grad(jnp.ones((2, 5)), inputs, variables, feature, num_sc_per_device=1)
