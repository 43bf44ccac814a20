"""Law: rows that are laid out for SparseCores come back, whatever the stack, the devices and the way it is told of."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import line_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from embax.sparsecore.lib.nn import embedding, embedding_spec, table_stacking
from embax.sparsecore.utils import utils

pytestmark = pytest.mark.usefixtures("eight_devices")
ROWS = {"a": 70, "b": 33, "c": 5}
DIMS = {"a": 13, "b": 16, "c": 9}


def _tables(cores, rotation=None, rows=None):
    """Returns the tables a, b and c, in one stack for so many devices and SparseCores of each."""
    devices, per_device = cores
    features = []
    for name, size in (rows or ROWS).items():
        table = embedding_spec.TableSpec(
            name=name,
            vocabulary_size=size,
            embedding_dim=DIMS[name],
            initializer=jax.nn.initializers.zeros,
            optimizer=embedding_spec.AdamOptimizerSpec(0.1),
            combiner="sum",
        )
        features.append(
            embedding_spec.FeatureSpec(
                name=name, table_spec=table, input_shape=(96, 1), output_shape=(96, table.embedding_dim)
            )
        )
    table_stacking.stack_tables(features, list(rows or ROWS), devices, per_device, rotation, stack_name="s")
    return {feature.name: feature.table_spec for feature in features}


def _message(tables, num_sc):
    """Returns what a checkpoint's message says of the tables: objects with its fields."""
    stacked = next(iter(tables.values())).stacked_table_spec
    members = [
        SimpleNamespace(
            table_name=name,
            vocab_size=table.vocabulary_size,
            embedding_dim=table.embedding_dim,
            padded_vocab_size=table.setting_in_stack.padded_vocab_size,
            padded_embedding_dim=table.setting_in_stack.padded_embedding_dim,
            row_offset_in_shard=table.setting_in_stack.row_offset_in_shard,
            shard_rotation=table.setting_in_stack.shard_rotation,
        )
        for name, table in tables.items()
    ]
    stack = SimpleNamespace(
        stack_name="s",
        stack_vocab_size=stacked.stack_vocab_size,
        stack_embedding_dim=stacked.stack_embedding_dim,
        num_sparsecores=num_sc,
        table_specs=members,
    )
    return SimpleNamespace(stacked_table_specs=[stack])


def _given(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(rows, DIMS[name])).astype(np.float32) for name, rows in ROWS.items()}


def _by_hand(given, num_sc, rotation, pad=0.0):
    """Returns the array of the stack, put together a SparseCore at a time, by the words of the definition."""
    cores = [[] for _ in range(num_sc)]
    for number, rows in enumerate(given.values()):
        turned = {(core + number * rotation) % num_sc: rows[core::num_sc] for core in range(num_sc)}
        size = -(-len(rows) // (8 * num_sc)) * 8
        for core, mine in turned.items():
            block = np.full((size, 16), pad, np.float32)
            block[: len(mine), : rows.shape[1]] = mine
            cores[core].append(block)
    return np.concatenate([block for core in cores for block in core])


CASES = [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2), (8, 1), (8, 4)]


@pytest.mark.parametrize(("devices", "cores"), CASES)
def test_tables_are_laid_out_and_come_back(devices, cores):
    num_sc, given = devices * cores, _given()
    tables = _tables((devices, cores))
    (whole,) = table_stacking.stack_and_shard_tables(tables, given, num_sc).values()
    np.testing.assert_array_equal(whole, _by_hand(given, num_sc, cores))
    marked = table_stacking.stack_and_shard_tables(tables, given, num_sc, pad_value=-1.0)["s"]
    np.testing.assert_array_equal(marked, _by_hand(given, num_sc, cores, -1.0))
    slots = {name: embedding.EmbeddingVariables(rows, (rows + 1, rows + 2)) for name, rows in given.items()}
    stacks = table_stacking.stack_and_shard_tables(tables, slots, num_sc)
    back = table_stacking.unshard_and_unstack_tables(tables, stacks, num_sc)
    jax.tree.map(np.testing.assert_array_equal, back, slots)
    assert isinstance(back["a"], embedding.EmbeddingVariables)


@pytest.mark.parametrize(("devices", "cores"), CASES)
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_tables_of_a_message(devices, cores, kind):
    """Against the arrays of the specifications; on a mesh, of a sharding that the rows of b and c do not divide by."""
    num_sc, given, tables = devices * cores, _given(), _tables((devices, cores), rotation=1)
    message, wanted = _message(tables, num_sc), _by_hand(given, num_sc, 1)
    split = NamedSharding(line_of(devices), P("x", None))
    stacks = {"s": (wanted, {"slot": wanted + 1})}
    if kind == "jax":
        stacks = jax.device_put(stacks, split)
    found = table_stacking.unstack_and_unshard_stacked_tables(stacks, message)
    assert set(found) == set(ROWS)
    for name, (rows, slots) in found.items():
        np.testing.assert_array_equal(rows, given[name])
        np.testing.assert_array_equal(slots["slot"], given[name] + 1)
        if kind == "jax":
            assert rows.sharding.is_fully_replicated == (devices == 1 or ROWS[name] % devices != 0), name
    again = table_stacking.stack_and_shard_feature_tables(found, message)
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(again["s"]), (wanted, {"slot": _plus_one(given, num_sc)})
    )
    assert all(type(leaf) is type(stacks["s"][0]) for leaf in jax.tree.leaves(again))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(again))


def _plus_one(given, num_sc):
    return _by_hand({name: rows + 1 for name, rows in given.items()}, num_sc, 1)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_sharding_is_kept(kind):
    tables = _tables((4, 2))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),), devices=jax.devices()[:4])
    split = NamedSharding(mesh, P("x", None))
    whole = jax.device_put(_by_hand(_given(), 8, 2), split)
    rows = {"a": 64, "b": 32, "c": 8}
    even, given = _message(_tables((4, 2), rows=rows), 8), {n: jnp.ones((rows[n], DIMS[n])) for n in rows}
    found = table_stacking.unstack_and_unshard_stacked_tables({"s": whole}, _message(tables, 8))
    assert found["a"].sharding.device_set == split.device_set  # though 4 devices do not divide 70 rows
    again = table_stacking.stack_and_shard_feature_tables(jax.device_put(given, split), even)
    assert again["s"].sharding == split
    led = jax.device_put(np.asarray(whole).reshape(4, -1, 16), NamedSharding(mesh, P("x", None, None)))
    for name, table in table_stacking.unstack_and_unshard_stacked_tables({"s": led}, _message(tables, 8)).items():
        np.testing.assert_array_equal(table, _given()[name])  # an array for pmap leads with the device


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_other_numbers(dtype):
    tables = _tables((2, 2))
    given = {name: jnp.asarray(rows * 9).astype(dtype) for name, rows in _given().items()}
    stacks = table_stacking.stack_and_shard_tables(tables, given, 4)
    assert stacks["s"].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, table_stacking.unshard_and_unstack_tables(tables, stacks, 4), given)


def test_a_slot_of_one_number_a_row():
    tables = _tables((2, 2))
    given = {name: rows[:, :1] for name, rows in _given().items()}
    stacks = table_stacking.stack_and_shard_tables(tables, given, 4)
    np.testing.assert_array_equal(stacks["s"], _by_hand(given, 4, 2)[:, :1])
    jax.tree.map(np.testing.assert_array_equal, table_stacking.unshard_and_unstack_tables(tables, stacks, 4), given)


def test_under_jit():
    tables, given = _tables((2, 2)), _given()
    there = jax.jit(lambda given: table_stacking.stack_and_shard_tables(tables, given, 4))(given)
    np.testing.assert_array_equal(there["s"], _by_hand(given, 4, 2))
    back = jax.jit(lambda stacks: table_stacking.unshard_and_unstack_tables(tables, stacks, 4))(there)
    jax.tree.map(np.testing.assert_array_equal, back, given)


@pytest.mark.parametrize("donate", [False, True])
def test_what_is_given_away(donate):
    message, given = _message(_tables((2, 2)), 4), jax.tree.map(jnp.asarray, _given())
    stacks = table_stacking.stack_and_shard_feature_tables(given, message, delete_input=donate)
    assert {array.is_deleted() for array in given.values()} == {donate}
    found = table_stacking.unstack_and_unshard_stacked_tables(stacks, message, donate=donate)
    assert stacks["s"].is_deleted() == donate
    jax.tree.map(np.testing.assert_array_equal, found, _given())


def test_nothing_is_given_away_by_a_mistake():
    message, given = _message(_tables((2, 2)), 4), jax.tree.map(jnp.asarray, _given())
    stacks = table_stacking.stack_and_shard_feature_tables(given, message)
    other = SimpleNamespace(**vars(message.stacked_table_specs[0]) | {"stack_name": "z"})
    both = SimpleNamespace(stacked_table_specs=[*message.stacked_table_specs, other])
    with pytest.raises(ValueError, match=r'stack "z" is not among the stacked_tables \(s\); give an array for every'):
        table_stacking.unstack_and_unshard_stacked_tables(stacks, both, donate=True)
    with pytest.raises(
        ValueError, match=r'stack "z": its array has shape \[8, 16\], and the specification says \[192,'
    ):
        table_stacking.unstack_and_unshard_stacked_tables(stacks | {"z": jnp.ones((8, 16))}, both, donate=True)
    with pytest.raises(ValueError, match=r'table "c" is not among the feature_tables \(a, b\); give an array'):
        table_stacking.stack_and_shard_feature_tables({name: given[name] for name in "ab"}, message, delete_input=True)
    short = given | {"c": given["c"][:4]}
    with pytest.raises(
        ValueError, match=r'table "c": its array has shape \[4, 9\], and the specification says \[5, 9\]'
    ):
        table_stacking.stack_and_shard_feature_tables(short, message, delete_input=True)
    assert not any(array.is_deleted() for array in jax.tree.leaves((given, stacks, short)))


def test_tables_for_other_cores():
    tables, given = _tables((4, 2)), _given()
    stacks = table_stacking.stack_and_shard_tables(tables, given, 8)
    text = 'table "a" was stacked to have 128 rows, and for 4 SparseCores it has 96; pass as many shards'
    with pytest.raises(ValueError, match=text):
        table_stacking.stack_and_shard_tables(tables, given, 4)
    with pytest.raises(ValueError, match=text):
        table_stacking.unshard_and_unstack_tables(tables, stacks, 4)
    with pytest.raises(ValueError, match=r'stack "s" is not among the stacked_tables \(other\)'):
        table_stacking.unshard_and_unstack_tables(tables, {"other": stacks["s"]}, 8)
    with pytest.raises(
        ValueError, match=r'table "a": its array has shape \[71, 13\], and the specification says \[70,'
    ):
        table_stacking.stack_and_shard_tables(tables, given | {"a": np.ones((71, 13), np.float32)}, 8)
    alone = embedding_spec.TableSpec(
        name="u",
        vocabulary_size=8,
        embedding_dim=8,
        initializer=jax.nn.initializers.zeros,
        optimizer=embedding_spec.SGDOptimizerSpec(),
        combiner="sum",
    )
    with pytest.raises(ValueError, match='table "u" is in no stack yet; call prepare_feature_specs_for_training first'):
        table_stacking.stack_and_shard_tables(alone, np.ones((8, 8)), 1)


# ---- row numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "cores"), CASES)
def test_rows_of_ids(devices, cores):
    """An array in which every row holds its own id says where each of them stands."""
    num_sc = devices * cores
    tables = _tables((devices, cores))
    message = _message(tables, num_sc)
    ids = {name: np.repeat(np.arange(rows, dtype=np.float32)[:, None], DIMS[name], 1) for name, rows in ROWS.items()}
    whole = _by_hand(ids, num_sc, cores, -1.0)[:, 0]
    (stack,) = message.stacked_table_specs
    asked = {"c": [4, 0, 4], "a": np.array([69, 3], np.int16), "b": []}
    found = table_stacking.get_row_ids_in_stacked_tables(message, asked)
    each = [
        table_stacking.get_row_ids_in_stacked_table(stack, table, asked[table.table_name])
        for table in stack.table_specs
    ]
    assert found == {"s": sum(each, [])} and [len(rows) for rows in each] == [2, 0, 3]
    assert [int(whole[row]) for row in found["s"]] == [69, 3, 4, 0, 4]
    setting, size = tables["c"].setting_in_stack, stack.stack_vocab_size
    row = table_stacking.compute_physical_row_ids(num_sc, size, setting.shard_rotation, setting.row_offset_in_shard, 4)
    assert row == each[2][0] and type(each[2][0]) is int


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"c": [0, 5]}, 'table "c": row id 5 is not in its vocabulary of 5; ids are 0 to 4'),
        ({"c": [-1]}, 'table "c": row id -1 is not in its vocabulary of 5'),
        ({"c": [1.0]}, 'table "c": row_ids are float64; ids must be integers'),
        ({"z": [1]}, 'row_ids: there is no table "z"; the specifications have a, b, c'),
    ],
)
def test_rows_of_ids_that_are_none(asked, text):
    with pytest.raises(ValueError, match=text):
        table_stacking.get_row_ids_in_stacked_tables(_message(_tables((2, 1)), 2), asked)


@pytest.mark.parametrize(("field", "value"), [("num_sparsecores", 0), ("num_sparsecores", 5), ("stack_vocab_size", 8)])
def test_messages_that_describe_nothing(field, value):
    message = _message(_tables((2, 1)), 2)
    setattr(message.stacked_table_specs[0], field, value)
    with pytest.raises(
        ValueError, match=r'stack "s": 70 rows of 13 of table "a", from row 0 of every SparseCore on, are'
    ):
        table_stacking.get_row_ids_in_stacked_tables(message, {"a": [1]})


def test_settings_and_stacks():
    tables = _tables((2, 2), rotation=1)
    settings = table_stacking.compute_table_to_setting_in_stack("s", tables, 2, 2, rotation=1)
    assert settings == {name: table.setting_in_stack for name, table in tables.items()}
    assert list(settings["c"].__dict__.values()) == ["s", 32, 16, 24 + 16, 2]  # 96 / 4 and 64 / 4 rows before it
    assert table_stacking.get_table_stacks(tables) == {"s": list(tables.values())}
    assert table_stacking.round_up_dim_and_vocab_size(tables, 4) == (
        {"a": 16, "b": 16, "c": 16},
        {"a": 96, "b": 64, "c": 32},
    )
    assert table_stacking.get_default_limits("s", 4096) == 256


# ---- one table, without padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "cores"), CASES)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_one_table(devices, cores, kind):
    rows = np.arange(devices * cores * 3 * 2, dtype=np.float32).reshape(-1, 2)
    found = utils.shard_emb_table(kind(rows), num_devices=devices, num_sc_per_device=cores)
    assert found.shape == (devices, 3 * cores, 2) and isinstance(found, type(kind(rows)))
    wanted = [[rows[d * cores + core :: devices * cores] for core in range(cores)] for d in range(devices)]
    np.testing.assert_array_equal(found, np.array(wanted).reshape(found.shape))
    np.testing.assert_array_equal(utils.unshard_emb_table(found, cores), rows)
    np.testing.assert_array_equal(utils.unshard_emb_table(found.tolist(), num_sc_per_device=cores), rows)


def test_one_table_that_does_not_divide():
    with pytest.raises(ValueError, match="the table has 7 rows, and 4 SparseCores cannot share them evenly; pad it"):
        utils.shard_emb_table(np.ones((7, 2)), num_devices=2, num_sc_per_device=2)
    with pytest.raises(ValueError, match="the table has 6 rows, and 4 SparseCores cannot share them"):
        utils.unshard_emb_table(np.ones((2, 3, 2)), 2)
    with pytest.raises(ValueError, match=r"the table has shape \[7\]; it must be \[rows, embedding_dim\]"):
        utils.shard_emb_table(np.ones(7), num_devices=1, num_sc_per_device=1)
    for wrong in (
        lambda: utils.shard_emb_table(np.ones((4, 2)), num_devices=1, num_sc_per_device=1, sharding_strategy="DIV"),
        lambda: utils.unshard_emb_table(np.ones((1, 4, 2)), 1, sharding_strategy="DIV"),
    ):
        with pytest.raises(ValueError, match="sharding_strategy='DIV' is not supported; it must be MOD"):
            wrong()


def test_where_a_table_lies():
    mesh = line_of(4)
    place = utils.embedding_table_format(mesh, P("x", None))
    table = jax.device_put(np.ones((8, 2)), place)
    assert table.sharding == NamedSharding(mesh, P("x", None))
    assert jax.jit(lambda: jnp.zeros((8, 2)), out_shardings=place)().addressable_shards[3].index[0] == slice(6, 8)
    assert utils.embedding_table_format_with_sharding(place) is place


def test_cores_of_a_chip():
    kinds = {"cpu": 1, "TPU v5 lite": 4, "TPU v6e": 2, **utils.NUM_SC_PER_DEVICE_MAP}
    assert {kind: utils.num_sparsecores_per_device(SimpleNamespace(device_kind=kind)) for kind in kinds} == kinds
    assert utils.num_sparsecores_per_device() == 1
