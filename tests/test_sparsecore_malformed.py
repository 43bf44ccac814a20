"""Law: a mistake is told by its name, and changes nothing; what is unusual and no mistake gives the right numbers."""

import contextlib
import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import line_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import embax
from embax.sparsecore.lib.nn import embedding, embedding_spec, table_stacking

pytestmark = pytest.mark.usefixtures("eight_devices")
ROWS, DIM, BATCH, CORES = 10, 8, 4, 2
GOOD = [[1], [2, 9], [], [4]]
NORMAL = jax.nn.initializers.normal(1.0)


def _table(name="t", combiner="sum", optimizer=None, **settings):
    return embedding_spec.TableSpec(
        name=name,
        vocabulary_size=ROWS,
        embedding_dim=DIM,
        initializer=NORMAL,
        optimizer=optimizer or embedding_spec.AdagradOptimizerSpec(0.5),
        combiner=combiner,
        **settings,
    )


def _feature(table=None, name="x", prepared=True, inputs=(BATCH,), **settings):
    table = table or _table()
    feature = embedding_spec.FeatureSpec(
        name=name, table_spec=table, input_shape=inputs, output_shape=(BATCH, DIM), **settings
    )
    if prepared:
        embedding.prepare_feature_specs_for_training(feature, 1, CORES)
    return feature


def _preprocess(feature, ids, weights=None, devices=1, cores=CORES, **options):
    return embedding.preprocess_sparse_dense_matmul_input(
        ids, weights, feature, devices, devices, num_sc_per_device=cores, **options
    )


def _variables(feature):
    sharding = NamedSharding(line_of(1), P("x", None))
    return embedding.init_embedding_variables(jax.random.key(0), embedding.get_table_specs(feature), sharding, CORES)


def _fields(features):
    """Returns copies of everything that specifications hold, what stacking writes included."""
    leaves = jax.tree.leaves(features, is_leaf=lambda leaf: isinstance(leaf, embedding_spec.FeatureSpec))
    return copy.deepcopy([(dict(vars(leaf)), dict(vars(leaf.table_spec))) for leaf in leaves])


@contextlib.contextmanager
def _refused(error, text, features, variables=None, ids=None):
    """Expects an error of these words; specifications, variables and ids stay as they are."""
    before, given = _fields(features), copy.deepcopy(ids)
    arrays = jax.tree.map(np.array, variables)
    with pytest.raises(error, match=text):
        yield
    assert _fields(features) == before
    jax.tree.map(np.testing.assert_array_equal, arrays, variables)
    assert repr(given) == repr(ids)


def _pooled(variables, samples, weights=None, combiner="sum"):
    """Returns the activations of samples, in float64."""
    rows = np.asarray(table_stacking.unshard_and_unstack_tables(_feature().table_spec, variables, CORES).table, float)
    found = np.zeros((len(samples), DIM))
    for number, ids in enumerate(samples):
        w = np.ones(len(ids)) if weights is None else np.asarray(weights[number], float)
        scale = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.sqrt((w * w).sum())}[combiner]
        for one, weight in zip(ids, w, strict=True):
            found[number] += rows[int(one)] * (weight / scale if scale else 0.0)
    return found


def _looked_up(feature, ids, weights=None, **options):
    variables = _variables(feature)
    inputs, _ = _preprocess(feature, ids, weights, **options)
    found = embedding.tpu_sparse_dense_matmul(
        inputs, variables, feature, global_device_count=1, num_sc_per_device=CORES
    )
    return np.asarray(found), variables


def _ragged(*samples):
    found = np.empty(len(samples), object)
    found[:] = samples
    return found


# ---- ids that are refused ----------------------------------------------------------------------------------------

_NOT_WHOLE = "they must be integers, and nothing is rounded or cast silently"
BAD_IDS = {
    "the vocabulary": (
        [[1], [2], [3], [10]],
        'table "t": id 10 >= vocabulary_size 10 (feature "x", sample 3); raise vo',
    ),
    "minus one": (
        [[1], [2], [-1], [4]],
        'table "t": id -1 is negative (feature "x", sample 2); set padding_id=-1 if it',
    ),
    "a float": ([[1], [2], [3], [4.0]], f'feature "x", sample 3: ids hold 4.0, a float; {_NOT_WHOLE}'),
    "floats": (np.ones((4, 1)), f'feature "x": ids are float64; {_NOT_WHOLE}'),
    "ragged floats": (_ragged(*[np.ones(2)] * 4), f'feature "x": ids are float64; {_NOT_WHOLE}'),
    "booleans": (np.ones((4, 1), bool), f'feature "x": ids are bool; {_NOT_WHOLE}'),
    "words": ([[1], [2], ["a"], [4]], "feature \"x\", sample 2: ids hold 'a', a str; they must be integers"),
    "2**40": (np.array([[1], [2], [3], [2**40]]), 'id 1099511627776 >= vocabulary_size 10 (feature "x", sample 3)'),
    "2**32 + 1": (_ragged(*[np.array([2**32 + 1])] * 4), 'id 4294967297 >= vocabulary_size 10 (feature "x", sample 0)'),
    "2**63 + 1": (np.array([[2**63 + 1]] * 4, np.uint64), "id 9223372036854775809 >= vocabulary_size 10"),
    "2**70": ([[1], [2], [3], [2**70]], 'id 1180591620717411303424 >= vocabulary_size 10 (feature "x", sample 3)'),
    "int8 -1": (np.array([[1], [2], [3], [-1]], np.int8), 'table "t": id -1 is negative (feature "x", sample 3)'),
    "three dimensions": (
        np.ones((4, 1, 1), int),
        'feature "x": ids have shape (4, 1, 1); the feature\'s input_shape is',
    ),
    "no samples": ([], 'feature "x": 0 samples on 1 of 1 devices do not make the batch of 4 that output_shape (4, 8)'),
    "no rows": (np.zeros((0, 3), int), 'feature "x": 0 samples on 1 of 1 devices do not make the batch of 4'),
    "three samples": (GOOD[:3], 'feature "x": 3 samples cannot be shared by 1 local devices with 2 SparseCores each'),
    "eight samples": (
        GOOD * 2,
        'feature "x": 8 samples on 1 of 1 devices do not make the batch of 4 that output_shape',
    ),
    "a number": (3, 'feature "x": ids are a int; give an array, or a list with the ids of each sample'),
    "nothing": (None, 'feature "x": ids are a NoneType; give an array, or a list with the ids of each sample'),
    "a mapping": ({"x": GOOD}, 'feature "x": ids are a dict; give an array, or a list with the ids of each sample'),
    "a word": ("abcd", 'feature "x": ids are a str; give an array, or a list with the ids of each sample'),
    "a scalar array": (np.array(3), 'feature "x": ids are a ndarray; give an array, or a list with the ids of each'),
    "coordinates": (
        embax.CooIds(np.array([0]), np.array([1]), 4),
        'feature "x": ids are CooIds; give coordinates to preprocess_sparse_dense_matmul_input_from_sparse_tensor',
    ),
}


@pytest.mark.parametrize("kind", BAD_IDS)
def test_ids_that_are_refused(kind):
    ids, text = BAD_IDS[kind]
    feature = _feature()
    variables = _variables(feature)
    with _refused(ValueError, re.escape(text), feature, variables, ids):
        _preprocess(feature, ids)
    found, _ = _looked_up(feature, GOOD)  # and goes on
    np.testing.assert_allclose(found, _pooled(variables, GOOD), rtol=1e-6, atol=1e-6)


BAD_WEIGHTS = {
    "NaN": ([[1.0], [1.0, np.nan], [], [1.0]], 'feature "x", sample 1: weight nan of id 9 is not a finite float32'),
    "infinite": (
        [[1.0], [1.0, 1.0], [], [np.inf]],
        'feature "x", sample 3: weight inf of id 4 is not a finite float32',
    ),
    "beyond float32": ([[1e300], [1, 1], [], [1]], 'feature "x", sample 0: weight 1e+300 of id 1 is not a finite fl'),
    "too few": ([[1.0], [1.0], [], [1.0]], 'feature "x", sample 1: weights are 1 in number, and ids are 2; give every'),
    "too many": ([[1.0], [1, 1], [1.0], [1.0]], 'feature "x", sample 2: weights are 1 in number, and ids are 0'),
    "three samples": ([[1.0], [1, 1], []], 'feature "x": weights have 3 samples, and ids have 4; give every id one'),
    "a word": ([["a"], [1, 1], [], [1]], "feature \"x\", sample 0: weights hold 'a', a str; they must be floating"),
    "another structure": ({"x": [[1.0]] * 4}, 'feature "x": weights are a dict; give an array, or a list with the'),
    "a rectangle": (np.ones((4, 1)), 'feature "x"'),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_weights_that_are_refused(kind, combiner):
    weights, text = BAD_WEIGHTS[kind]
    feature = _feature(_table(combiner=combiner))
    with _refused(ValueError, re.escape(text), feature, ids=weights):
        _preprocess(feature, GOOD, weights)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_sample_is_counted_in_the_whole_batch(devices):
    """Whichever SparseCore it belongs to, and whatever is wrong with it."""
    feature = dataclasses.replace(_feature(prepared=False), input_shape=(24,), output_shape=(24, DIM))
    embedding.prepare_feature_specs_for_training(feature, devices, 3)
    ids = [[1]] * 24
    for wrong, text in ((10, "id 10 >= vocabulary_size 10"), (2.5, "ids hold 2.5"), (-3, "id -3 is negative")):
        with pytest.raises(ValueError, match=rf'feature "x", sample 19.*{text}|{text}.*feature "x", sample 19'):
            _preprocess(feature, ids[:19] + [[wrong]] + ids[20:], devices=devices, cores=3)
    with pytest.raises(ValueError, match='feature "x", sample 19: weight nan of id 1'):
        _preprocess(feature, ids, [[1.0]] * 19 + [[np.nan]] + [[1.0]] * 4, devices=devices, cores=3)


STRUCTURES = [
    ({"a": GOOD}, None, "features must have the structure of feature_specs"),
    ({"a": GOOD, "b": GOOD, "c": GOOD}, None, "features must have the structure of feature_specs"),
    ([GOOD, GOOD], None, "features must have the structure of feature_specs"),
    (None, None, "features must have the structure of feature_specs"),
    ({"a": GOOD, "b": GOOD}, {"a": GOOD}, "features_weights must have the structure of feature_specs"),
    ({"a": GOOD, "b": GOOD}, [GOOD, GOOD], "features_weights must have the structure of feature_specs"),
    ({"a": GOOD, "b": None}, None, 'feature "b": ids are a NoneType; give an array'),
]


@pytest.mark.parametrize(("ids", "weights", "text"), STRUCTURES)
def test_structures_that_do_not_fit(ids, weights, text):
    features = {name: _feature(_table(name), name) for name in "ab"}
    with _refused(ValueError, text, features, ids=ids):
        _preprocess(features, ids, weights)
    with _refused(ValueError, "activation_gradients must have the structure of feature_specs", features):
        embedding.stack_embedding_gradients([np.ones((BATCH, DIM))], features, CORES)


# ---- unusual, and right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_every_width_of_ids(dtype):
    samples = [[1, 9], [], [3], [0, 0]]
    ragged = _ragged(*(np.array(ids, dtype) for ids in samples))
    found, variables = _looked_up(_feature(), ragged)
    wanted = _pooled(variables, samples)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(_looked_up(_feature(), list(ragged))[0], found)
    flat = embax.RaggedIds(np.array([1, 9, 3, 0, 0], dtype), np.array([0, 2, 2, 3, 5]))
    np.testing.assert_array_equal(_looked_up(_feature(), flat)[0], found)
    square = np.array([[1, 9], [9, 2], [3, 3], [0, 4]], dtype)
    found, variables = _looked_up(_feature(), square)
    np.testing.assert_allclose(found, _pooled(variables, square), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(_looked_up(_feature(), square[:, ::-1][:, ::-1])[0], found)
    mixed = _ragged(np.array([1, 9], dtype), np.array([], np.int64), np.array([3], np.int16), np.array([0, 0], dtype))
    np.testing.assert_allclose(_looked_up(_feature(), mixed)[0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [None, "flat", "nested"])
def test_flat_ids_and_weights_are_cut_as_samples_are(weights):
    """Splits say which sample of which SparseCore a weight belongs to."""
    samples, each = [[1, 9, 4], [], [3], [0, 2]], [[1.0, 2.0, 3.0], [], [4.0], [5.0, 6.0]]
    ids = embax.RaggedIds.from_lengths(np.concatenate(samples).astype(int), [3, 0, 1, 2])
    given = {None: None, "flat": np.arange(1.0, 7.0), "nested": each}[weights]
    found, variables = _looked_up(_feature(), ids, given)
    np.testing.assert_allclose(found, _pooled(variables, samples, weights and each), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("empty", [[[], [], [], []], np.zeros((4, 0), np.int32), [np.array([], np.int64)] * 4])
def test_a_batch_of_empty_samples(empty, combiner):
    feature = _feature(_table(combiner=combiner))
    found, variables = _looked_up(feature, empty)
    np.testing.assert_array_equal(found, np.zeros((BATCH, DIM)))
    inputs, stats = _preprocess(feature, empty)
    new = embedding.tpu_sparse_dense_matmul_grad(
        np.ones((BATCH, DIM), np.float32), inputs, variables, feature, num_sc_per_device=CORES, global_device_count=1
    )
    jax.tree.map(np.testing.assert_array_equal, new, variables)
    assert stats.max_ids_per_partition["t"].tolist() == [0, 0]


@pytest.mark.parametrize("combiner", ["mean", "sqrtn"])
def test_weights_that_add_up_to_nothing(combiner):
    """A mean of weights 1 and -1 is 0, and so is one of zeros; nothing is NaN, and the rows stay."""
    feature = _feature(_table(combiner=combiner))
    ids, weights = [[1, 2], [3], [4, 5], [6]], [[1.0, -1.0], [0.0], [1.0, 3.0], [-2.0]]
    found, variables = _looked_up(feature, ids, weights)
    np.testing.assert_allclose(found, _pooled(variables, ids, weights, combiner), rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all() and not found[1].any() and (combiner == "sqrtn" or not found[0].any())
    inputs, _ = _preprocess(feature, ids, weights)
    new = embedding.tpu_sparse_dense_matmul_grad(
        np.ones((BATCH, DIM), np.float32), inputs, variables, feature, num_sc_per_device=CORES, global_device_count=1
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    rows, old = (
        table_stacking.unshard_and_unstack_tables(feature.table_spec, v, CORES).table for v in (new, variables)
    )
    still = [3, 7] if combiner == "sqrtn" else [1, 2, 3, 7]
    np.testing.assert_array_equal(rows[jnp.array(still)], old[jnp.array(still)])
    assert (rows[4] != old[4]).any()


def test_weights_that_add_up_to_almost_nothing():
    feature = _feature(_table(combiner="mean"))
    with _refused(ValueError, 'combiner "mean" divides by weights that add up to almost zero', feature):
        _preprocess(feature, [[1, 2, 3], [3], [4], [5]], [[1e-42, 1.0, -1.0], [1.0], [1.0], [1.0]])
    found, _ = _looked_up(_feature(padding_id=-1), [[1, -1], [-1], [2], [3]])
    assert not found[1].any() and found[0].any()  # the explicit option for ids that are none


def test_tables_of_one_stack_start_apart():
    features = [_feature(_table(name), name, prepared=False) for name in "ab"]
    embedding.auto_stack_tables(features, 1, CORES)
    assert set(embedding.get_stacked_table_specs(features)) == {"a_b"}
    tables = embedding.get_table_specs(features)
    found = table_stacking.unshard_and_unstack_tables(tables, _variables(features), CORES)
    assert not (np.asarray(found["a"].table) == np.asarray(found["b"].table)).any()


# ---- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", ["ignore", "warn", "error"])
@pytest.mark.parametrize("dropping", [False, True])
def test_limits_lose_no_id(limits, dropping):
    table = _table(max_ids_per_partition=1, max_unique_ids_per_partition=1)
    feature, ids = _feature(table), [[1, 3, 5, 7], [9], [2], [4, 6]]
    variables = _variables(feature)
    if limits == "error":
        text = 'stack "t": 5 ids go from one SparseCore to another, and max_ids_per_partition is 1: a TPU would drop'
        with _refused(ValueError, text, feature, variables, ids):
            _preprocess(feature, ids, limits=limits, allow_id_dropping=dropping)
        return
    warned = contextlib.nullcontext()
    if limits == "warn":
        warned = pytest.warns(UserWarning, match=r"max_(unique_)?ids_per_partition is 1: a TPU would drop")
    with warned:
        found, _ = _looked_up(feature, ids, limits=limits, allow_id_dropping=dropping)
    np.testing.assert_allclose(found, _pooled(variables, ids), rtol=1e-5, atol=1e-6)


# ---- specifications and calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: _table(combiner="Mean"),
            ValueError,
            "combiner 'Mean' is not one of 'sum', 'mean', 'sqrtn' (lower case)",
        ),
        (lambda: _table(combiner=None), ValueError, "table \"t\": combiner None is not one of 'sum', 'mean', 'sqrtn'"),
        (lambda: _table(max_ids_per_partition=0), ValueError, 'table "t": max_ids_per_partition=0 must be an integer'),
        (
            lambda: _table(max_unique_ids_per_partition=1.5),
            ValueError,
            "max_unique_ids_per_partition=1.5 must be an int",
        ),
        (lambda: _table(suggested_coo_buffer_size_per_device=-8), ValueError, "per_device=-8 must be an integer of at"),
        (lambda: _table(optimizer="sgd"), TypeError, "table \"t\": optimizer='sgd' must be an embax optimizer"),
        (lambda: _feature(inputs=(3,)), ValueError, 'feature "x": input_shape (3,) does not fit output_shape (4, 8)'),
        (
            lambda: embedding_spec.SGDOptimizerSpec("0.1"),
            ValueError,
            "SGD: learning_rate='0.1' must be a finite number",
        ),
        (lambda: embedding_spec.SGDOptimizerSpec(np.nan), ValueError, "SGD: learning_rate=nan must be a finite number"),
    ],
)
def test_specifications_that_are_refused(make, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sharding_strategy": "DIV"}, "sharding_strategy='DIV' is not supported; it must be MOD"),
        ({"sharding_strategy": None}, "sharding_strategy=None is not supported; it must be MOD"),
        ({"limits": "raise"}, "limits='raise' must be one of ignore, warn, error"),
        (
            {"cores": 3},
            'stack "t" was made for 1 device of 2 SparseCores, and this call is for 1 device of 3 SparseCores; pass '
            "the global_device_count and num_sc_per_device of prepare_feature_specs_for_training everywhere",
        ),
        ({"cores": 0}, "num_sc_per_device=0 must be an integer of at least 1"),
        ({"cores": 2.0}, "num_sc_per_device=2.0 must be an integer of at least 1"),
        ({"cores": True}, "num_sc_per_device=True must be an integer of at least 1"),
        ({"devices": 0}, "local_device_count=0 must be an integer of at least 1"),
        ({"devices": -1}, "local_device_count=-1 must be an integer of at least 1"),
        ({"devices": 3}, "made for 1 device of 2 SparseCores, and this call is for 3 devices of 2 SparseCores"),
    ],
)
def test_options_that_are_refused(options, text):
    feature = _feature()
    with _refused(ValueError, re.escape(text), feature):
        _preprocess(feature, GOOD, **options)


def test_numbers_of_numpy_are_numbers():
    inputs, _ = _preprocess(_feature(), GOOD, devices=np.int64(1), cores=np.int32(CORES))
    jax.tree.map(np.testing.assert_array_equal, inputs, _preprocess(_feature(), GOOD)[0])


@pytest.mark.parametrize("prepare", [embedding.prepare_feature_specs_for_training, table_stacking.auto_stack_tables])
def test_features_that_are_not_prepared(prepare):
    features = [_feature(_table(name), name, prepared=False) for name in "ab"]
    text = 'feature "a": its table "a" is in no stack yet; call embedding.prepare_feature_specs_for_training first'
    with _refused(ValueError, text, features):
        _preprocess(features, [GOOD, GOOD])
    with _refused(ValueError, 'table "a" is in no stack yet; call prepare_feature_specs_for_training first', features):
        _variables(features)
    for count in (0, -1, 1.5, None):
        with _refused(ValueError, f"global_device_count={count!r} must be an integer of at least 1", features):
            prepare(features, count, CORES)
    with _refused(ValueError, "num_sc_per_device=0 must be an integer of at least 1", features):
        prepare(features, 1, 0)
    with pytest.raises(TypeError, match="features hold 'x', a str; every leaf must be a FeatureSpec"):
        prepare([features[0], "x"], 1, CORES)
    assert not features[0].table_spec.is_stacked()


def test_names_that_two_features_have():
    table = _table()
    features = [_feature(table, prepared=False), _feature(table, prepared=False)]
    for call in (embedding.get_table_specs, lambda f: embedding.prepare_feature_specs_for_training(f, 1, CORES)):
        with _refused(ValueError, 'feature "x" is already defined; every feature needs a name of its own', features):
            call(features)
    with pytest.raises(ValueError, match="there are no features; pass at least one FeatureSpec"):
        embedding.prepare_feature_specs_for_training([], 1, CORES)


@pytest.mark.parametrize(
    ("indices", "values", "shape", "text"),
    [
        ([[4, 0]], [1], [4, 1], "index 0 is of sample 4, and dense_shape has 4 samples"),
        ([[-1, 0]], [1], [4, 1], "index 0 is of sample -1, and dense_shape has 4 samples"),
        ([[0, 0]], [10], [4, 1], 'table "t": id 10 >= vocabulary_size 10 (feature "x", sample 0)'),
        ([[0, 0]], [1.0], [4, 1], 'feature "x": ids are float64; they must be integers'),
        ([[0.0, 0.0]], [1], [4, 1], 'feature "x": indices are float64; they must be integers'),
        ([[0, 0]], [1], [4.5, 1], 'feature "x": dense_shape are float64; they must be integers'),
        ([0], [1], [4, 1], 'feature "x": indices [1], values [1] and dense_shape [2] must be [n, 2], [n] and [2]'),
        ([[0, 0]], [1, 2], [4, 1], "must be [n, 2], [n] and [2]"),
        ([[0, 0]], [1], [5, 1], 'feature "x": 5 samples cannot be shared by 1 local devices with 2 SparseCores'),
    ],
)
def test_sparse_tensors_that_are_refused(indices, values, shape, text):
    feature = _feature()
    with _refused(ValueError, re.escape(text), feature):
        embedding.preprocess_sparse_dense_matmul_input_from_sparse_tensor(
            np.array(indices), np.array(values), np.array(shape), feature, 1, 1, num_sc_per_device=CORES
        )


def test_gradients_and_variables_that_do_not_fit():
    feature = _feature()
    variables, (inputs, _) = _variables(feature), _preprocess(feature, GOOD)

    def step(gradients, variables=variables, **options):
        shared = {"num_sc_per_device": CORES, "global_device_count": 1} | options
        return embedding.tpu_sparse_dense_matmul_grad(gradients, inputs, variables, feature, **shared)

    good = np.ones((BATCH, DIM), np.float32)
    cases = {
        r'feature "x": its gradient has shape \[4, 7\]; it must be that of the activations': {"gradients": good[:, :7]},
        r'feature "x": its gradient has shape \[3, 8\]; it must be that of the activations': {"gradients": good[:3]},
        r'feature "x": its gradient has shape \[\]': {"gradients": np.float32(1.0)},
        r'stack "t": gradients have shape \[8, 8\], and the inputs have 4 samples of 8 on a': {
            "gradients": good.repeat(2, 0)
        },
        r"gradients are of stacks \['u'\], and the features have \['t'\]": {
            "gradients": {"u": good},
            "perform_stacking": False,
        },
        r'stack "t": gradients have shape \[3, 8\]': {"gradients": {"t": good[:3]}, "perform_stacking": False},
        r"the features have stacks \['t'\], and the embedding variables \[\]": {"gradients": good, "variables": {}},
        r'stack "t": 0 slot variables are given, and Adagrad has 1; initialize': {
            "gradients": good,
            "variables": {"t": (variables["t"].table, ())},
        },
        r'stack "t": the table has shape \[8, 8\] on a device, and 1 devices have \[16, 8\] each': {
            "gradients": good,
            "variables": {"t": jax.tree.map(lambda part: part[:8], variables["t"])},
        },
        'stack "t" was made for 1 device of 2 SparseCores, and this call is for 2 devices of 1 SparseCore;': {
            "gradients": good,
            "global_device_count": 2,
            "num_sc_per_device": 1,
        },
        "sharding_strategy='DIV' is not supported": {"gradients": good, "sharding_strategy": "DIV"},
    }
    for text, call in cases.items():
        with _refused(ValueError, text, feature, variables):
            step(**call)
    assert (step(good)["t"].table != variables["t"].table).any()  # and goes on


def test_statistics_that_cannot_be_written_change_nothing():
    features = [_feature(_table(name), name) for name in "ab"]
    stats = embedding.SparseDenseMatmulInputStats({"a": np.array([7]), "b": np.array([None])}, {})
    with _refused(TypeError, "int", features):
        embedding.update_preprocessing_parameters(features, stats, CORES)
