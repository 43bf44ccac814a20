"""Checkpoints of SparseCore models: read on other devices, SparseCores and stacks, to the bit, and laid out by hand."""

import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from google.protobuf import text_format
from helpers import line_of, table_spec
from jax.sharding import PartitionSpec as P

import embax
from embax.sparsecore import variables as sparsecore_variables
from embax.sparsecore.lib.flax.nnx import checkpoint_utils, offline_converter
from embax.sparsecore.lib.flax.nnx import embed as nnx_embed
from embax.sparsecore.lib.nn import embedding, table_stacking
from embax.sparsecore.lib.proto import embedding_spec_pb2
from embax.sparsecore.utils import utils

pytestmark = pytest.mark.usefixtures("eight_devices")
BATCH = 32


def _custom(gradient, row, first, second, rate):
    return row - rate * gradient, first, second


# name: rows, numbers, optimizer. No vocabulary divides by the devices; a, b and c can share a stack.
TABLES = {
    "a": (37, 5, embax.Adagrad(0.1, initial_accumulator_value=0.25)),
    "b": (90, 8, embax.Adagrad(0.1, initial_accumulator_value=0.25)),
    "c": (11, 6, embax.Adagrad(0.1, initial_accumulator_value=0.25)),
    "d": (23, 12, embax.Adam(0.1)),
    "e": (7, 3, embax.SGD(0.1)),
    "f": (50, 4, embax.LaProp(lambda step: 0.1)),
    "i": (17, 4, embax.optimizers.Custom(0.1, _custom, slot_variable_initializers_tuple=(0.5, 0.0))),
    "g": (19, 9, embax.RowwiseAdagrad(0.1, initial_accumulator_value=0.5)),
    "h": (13, 4, embax.FTRL(0.1)),
}


def _features(tables=TABLES, names=None, batch=BATCH, **changed):
    """Returns a feature of each table, and a second one of b."""
    made = {}
    for name in names or tables:
        rows, dim, optimizer = changed.get(name, tables[name])
        dtype = "bfloat16" if name == "h" else "float32"
        table = table_spec(name, rows, dim, optimizer=optimizer, combiner="mean", dtype=dtype)
        for feature in (name, "b2") if name == "b" else (name,):
            made[feature] = embax.FeatureSpec(
                name=feature, table_spec=table, input_shape=(batch, 2), output_shape=(batch, dim)
            )
    return made


def _begin(rng, tables, sharding, num_sc):
    """Rows of zeros and fresh slots: what the layer draws takes seconds to compile, and is overwritten here."""
    stack, slots = tables[0].stacked_table_spec, tables[0].optimizer.slots()
    shape = (stack.stack_vocab_size, stack.stack_embedding_dim)
    new = [np.full(slot.shape(shape), slot.initial_value, slot.dtype) for slot in slots]
    new = [jax.device_put(slot, sharding) for slot in new]
    rows = jax.device_put(np.zeros(shape, tables[0].dtype), sharding)
    return embedding.EmbeddingVariables(rows, slots._make(new) if hasattr(slots, "_make") else tuple(new))


@pytest.fixture(autouse=True)
def begun_at_once(monkeypatch):
    monkeypatch.setattr(sparsecore_variables, "initial_variables", _begin)


class Model(nnx.Module):
    def __init__(self, features, mesh, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx_embed.SparseCoreEmbed(features, "x", mesh, rngs)
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(seed), (3, 2)))
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class Home:
    """A model on so many devices and SparseCores, its tables filled with numbers that tell table, part, row, column."""

    def __init__(self, monkeypatch, devices, num_sc, stacks="none", seed=0, features=None):
        self.devices, self.num_sc = devices, num_sc
        self.features = features or _features()
        if stacks == "auto":
            table_stacking.auto_stack_tables(self.features, devices, num_sc)
        elif stacks != "none":
            table_stacking.stack_tables(self.features, stacks, devices, num_sc, rotation=3)
        monkeypatch.setattr(utils, "num_sparsecores_per_device", lambda device=None: num_sc)
        self.model = Model(self.features, line_of(devices), seed)
        self.optimizer = nnx_embed.PartitionedOptimizer(self.model, optax.adam(0.1 + seed))
        self.optimizer.step.set_value(self.optimizer.step.get_value() + 3 * (seed + 1))

    def fill(self):
        made = {}
        for name, (rows, slots) in self.variables().items():
            arrays = [np.array(rows), *map(np.array, slots)]
            for table in self.tables():
                if table.stacked_table_spec.stack_name == name:
                    for number, array in enumerate(arrays):
                        at, wanted = self.where(table), _numbers(table.name, number, table.embedding_dim, array.dtype)
                        array[at, : wanted.shape[1]] = wanted[:, : array.shape[1]]
            new = [jax.device_put(array, rows.sharding) for array in arrays]
            made[name] = jax.tree.unflatten(jax.tree.structure(self.variables()[name]), new)
        self.model.embed.embedding_table.set_value(made)
        return self

    def variables(self):
        return self.model.embed.embedding_table.get_value()

    def tables(self):
        return embedding.get_table_specs(self.features).values()

    def where(self, table):
        """The formula of the layout, written out: a SparseCore of all devices after the other."""
        shards, setting = self.devices * self.num_sc, table.setting_in_stack
        each = table.stacked_table_spec.stack_vocab_size // shards
        return [
            ((i % shards + setting.shard_rotation) % shards) * each + i // shards + setting.row_offset_in_shard
            for i in range(table.vocabulary_size)
        ]

    def check(self):
        """Every row and slot is what ``fill`` wrote, and all that is padding is as it was at the start."""
        for name, (rows, slots) in self.variables().items():
            members = [t for t in self.tables() if t.stacked_table_spec.stack_name == name]
            optimizer = members[0].optimizer
            starts = [0.0, *(slot.initial_value for slot in optimizer.slots())]
            for number, (array, start) in enumerate(zip([rows, *slots], starts, strict=True)):
                assert array.sharding.is_equivalent_to(rows.sharding, 2), (name, number)
                array = np.array(array)
                for table in members:
                    wanted = _numbers(table.name, number, table.embedding_dim, array.dtype)[:, : array.shape[1]]
                    at = self.where(table)
                    np.testing.assert_array_equal(array[at, : wanted.shape[1]], wanted, f"{table.name} {number}")
                    array[at, : wanted.shape[1]] = start
                np.testing.assert_array_equal(array, np.full_like(array, start), f"padding of {name} {number}")

    def shared(self):
        return {
            "feature_specs": self.features,
            "num_global_devices": self.devices,
            "num_sc_per_device": self.num_sc,
        }

    def save(self, folder, step=1):
        options = ocp.CheckpointManagerOptions(create=True)
        with checkpoint_utils.create_checkpoint_manager(cp_path=folder, cp_options=options) as manager:
            checkpoint_utils.save_checkpoint(
                cp_manager=manager, step=step, model=self.model, optimizer=self.optimizer, **self.shared()
            )
        return folder

    def restore(self, folder, **options):
        checkpoint_utils.restore_cross_topology_checkpoint(
            cross_topology_checkpoint_restore_path=folder,
            model=self.model,
            optimizer=self.optimizer,
            target_feature_specs=self.features,
            num_global_devices=self.devices,
            num_sc_per_device=self.num_sc,
            **options,
        )

    def restore_same(self, folder, **options):
        checkpoint_utils.restore_checkpoint(
            input_checkpoint_path=folder, model=self.model, optimizer=self.optimizer, **options
        )

    def state(self):
        state = nnx.state(self.model), nnx.state(self.optimizer)
        leaves = jax.tree.leaves(state)
        return [
            np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves
        ]

    def dense(self):
        model = self.model
        values = [model.kernel.get_value(), jax.random.key_data(model.drop.rngs.key.get_value())]
        return [np.asarray(x) for x in [*values, *jax.tree.leaves(nnx.state(self.optimizer))]]


def _numbers(table, part, dim, dtype):
    rows = TABLES[table][0]
    return np.random.default_rng([ord(table), part]).normal(size=(rows, dim)).astype(dtype)


def _same(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.fixture
def home(monkeypatch):
    def make(*args, **options):
        return Home(monkeypatch, *args, **options)

    return make


PLACES = [(1, 1, "none"), (2, 1, "auto"), (4, 2, ("b", "a")), (8, 1, "auto"), (1, 4, "auto"), (2, 4, "none")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of all places, each saved once."""
    folders = {}

    def of(place):
        if place not in folders:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sparsecore_variables, "initial_variables", _begin)
                folders[place] = Home(patch, *place).fill().save(tmp_path_factory.mktemp("saved") / "c")
        return folders[place]

    return of


@pytest.mark.parametrize("new", PLACES, ids=str)
@pytest.mark.parametrize("old", PLACES, ids=str)
def test_any_devices_and_stacks(home, saved, old, new):
    target, source = home(*new, seed=1), home(*old)
    before = source.dense()
    target.restore(saved(old))
    target.check()
    _same(target.dense(), before)


@pytest.mark.parametrize("place", [(1, 1, "none"), (4, 2, ("b", "a"))], ids=str)
def test_the_same_devices(home, saved, place):
    target = home(*place, seed=1)
    target.restore_same(saved(place))
    target.check()
    _same(target.dense(), home(*place).dense())
    checkpoint_utils.restore_checkpoint(model=target.model, optimizer=target.optimizer)  # neither: nothing is done


def test_training_goes_on(home, tmp_path):
    """Steps after a restore on other devices are the steps without one."""

    @nnx.jit
    def train(model, optimizer, inputs, step):
        def loss(model):
            found = model.embed(inputs, step)
            return sum((x.astype(jnp.float32) ** 2).sum() for x in found.values()) + (model.kernel[...] ** 2).sum()

        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads)

    def step(home, number):
        rng = np.random.default_rng(number)
        ids = {name: rng.integers(0, f.table_spec.vocabulary_size, (BATCH, 2)) for name, f in home.features.items()}
        counts = {"local_device_count": home.devices, "global_device_count": home.devices}
        utils.num_sparsecores_per_device = lambda device=None: home.num_sc
        inputs, _ = embedding.preprocess_sparse_dense_matmul_input(ids, None, home.features, **counts)
        with jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
            train(home.model, home.optimizer, inputs, jnp.int32(number))

    names = ("a", "b", "d", "e")
    one, other = (
        home(2, 2, "auto", features=_features(names=names)),
        home(4, 1, "none", seed=1, features=_features(names=names)),
    )
    step(one, 0)
    one.save(tmp_path / "c")
    other.restore(tmp_path / "c")
    for number in (1, 2):
        step(one, number)
        step(other, number)
    for table in one.tables():
        (twin,) = [t for t in other.tables() if t.name == table.name]
        first = one.variables()[table.stacked_table_spec.stack_name]
        second = other.variables()[twin.stacked_table_spec.stack_name]
        for x, y in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
            wanted = np.asarray(x)[one.where(table), : table.embedding_dim]
            found = np.asarray(y)[other.where(twin), : table.embedding_dim]
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    _same([one.optimizer.step.get_value()], [other.optimizer.step.get_value()])


# A checkpoint as the original library writes it, laid out by the formulas of its documentation: 3 SparseCores on each
# of 2 devices, two tables of a stack in rows of 8, the second rotated by 3, padded with numbers that must not be read.
BY_HAND = """
stacked_table_specs {
  stack_name: "u_v" stack_vocab_size: 144 stack_embedding_dim: 8 total_sample_count: 64
  max_ids_per_partition: 256 max_unique_ids_per_partition: 256 num_sparsecores: 6
  table_specs {
    table_name: "u" vocab_size: 50 embedding_dim: 5 padded_vocab_size: 96 padded_embedding_dim: 8
    feature_specs { feature_name: "u" input_shape: 32 input_shape: 2 output_shape: 32 output_shape: 5 }%s
  }
  table_specs {
    table_name: "v" vocab_size: 41 embedding_dim: 8 padded_vocab_size: 48 padded_embedding_dim: 8
    row_offset_in_shard: 16 shard_rotation: 3
    feature_specs {
      feature_name: "v" input_shape: 32 input_shape: 2 output_shape: 32 output_shape: 8 row_offset: 32 col_offset: 96
      col_shift: 3
    }%s
  }%s
}
stacked_table_specs {
  stack_name: "w" stack_vocab_size: 48 stack_embedding_dim: 16 total_sample_count: 32 num_sparsecores: 6
  table_specs {
    table_name: "w" vocab_size: 17 embedding_dim: 10 padded_vocab_size: 48 padded_embedding_dim: 16
    feature_specs { feature_name: "w" input_shape: 32 input_shape: 2 output_shape: 32 output_shape: 10 }%s
  }
}
"""
_KIND = """ combiner: "sum" optimizer { type: %s learning_rate: 0.1 float_params { key: "%s" value: %s } }"""
ADAGRAD = _KIND % ("ADAGRAD", "initial_accumulator_value", "0.25")
TOLD = BY_HAND % (
    ADAGRAD,
    ADAGRAD,
    " activation_mem_bytes_limit: 4096 unknown_to_all: 5",
    _KIND % ("ADAM", "beta_1", ".5"),
)
LEGACY = BY_HAND % ("", "", "", "")
HAND_TABLES = {
    "u": (50, 5, embax.Adagrad(0.1, initial_accumulator_value=0.25)),
    "v": (41, 8, embax.Adagrad(0.1, initial_accumulator_value=0.25)),
    "w": (17, 10, embax.Adam(0.1, beta_1=0.5)),
}


def _logical(table, part):
    rows, dim, _ = HAND_TABLES[table]
    return np.random.default_rng([ord(table), part]).normal(size=(rows, dim)).astype(np.float32)


def _by_hand(folder, text=TOLD):
    stacks = {"u_v": (144, 8, {"u": (0, 0), "v": (16, 3)}, 2), "w": (48, 16, {"w": (0, 0)}, 3)}
    arrays = {}
    for stack, (rows, width, tables, parts) in stacks.items():
        made = [np.full((rows, width), 777.0 + part, np.float32) for part in range(parts)]
        for part, array in enumerate(made):
            for table, (offset, rotation) in tables.items():
                logical = _logical(table, part)
                for i in range(len(logical)):
                    core = (i % 6 + rotation) % 6
                    array[core * (rows // 6) + i // 6 + offset, : logical.shape[1]] = logical[i]
        arrays[stack] = made
    tree = {
        "embed": {
            "embedding_table": {
                "u_v": {"table": arrays["u_v"][0], "slot": {"accumulator": arrays["u_v"][1]}},
                "w": {"table": arrays["w"][0], "slot": {"momentum": arrays["w"][1], "velocity": arrays["w"][2]}},
            }
        },
        "kernel": {"value": np.arange(6.0, dtype=np.float32).reshape(3, 2)},
    }
    tree["embed"]["embedding_table"] = {"value": tree["embed"]["embedding_table"]}
    with ocp.CheckpointManager(folder, item_names=("model", "optimizer", "embedding_spec")) as manager:
        proto = embedding_spec_pb2.EmbeddingSpecProto()
        manager.save(
            5,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(tree),
                optimizer=ocp.args.StandardSave({"step": {"value": np.uint32(9)}}),
                embedding_spec=ocp.args.ProtoSave(proto),
            ),
        )
    (folder / "5" / "embedding_spec" / "proto.pbtxt").write_text(text)
    return folder


class HandModel(nnx.Module):
    def __init__(self, features, mesh):
        self.embed = nnx_embed.SparseCoreEmbed(features, "x", mesh, nnx.Rngs(0))
        self.kernel = nnx.Param(jnp.zeros((3, 2)))


def _hand_home(monkeypatch, devices, num_sc):
    made = Home(monkeypatch, devices, num_sc, "auto", features=_features(HAND_TABLES))
    made.model = HandModel(made.features, line_of(devices))
    made.optimizer = nnx_embed.PartitionedOptimizer(made.model, optax.sgd(0.1))
    return made


def _check_hand(home):
    for table in home.tables():
        rows, slots = home.variables()[table.stacked_table_spec.stack_name]
        for part, array in enumerate([rows, *slots]):
            found = np.asarray(array)[home.where(table), : table.embedding_dim]
            np.testing.assert_array_equal(found, _logical(table.name, part))
            assert not (np.asarray(array) > 700).any()  # padding stays behind
    np.testing.assert_array_equal(home.model.kernel.get_value(), np.arange(6.0).reshape(3, 2))
    assert home.optimizer.step.get_value() == 9


@pytest.mark.parametrize("text", [TOLD, LEGACY], ids=["told", "legacy"])
@pytest.mark.parametrize(("devices", "num_sc"), [(1, 1), (8, 2), (4, 4)])
def test_a_checkpoint_laid_out_by_hand(tmp_path, monkeypatch, devices, num_sc, text):
    target = _hand_home(monkeypatch, devices, num_sc)
    target.restore(_by_hand(tmp_path / "c", text))
    _check_hand(target)


def _read(folder, step):
    with checkpoint_utils.create_checkpoint_manager(
        cp_path=folder, cp_options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
        wanted = ocp.args.ProtoRestore(embedding_spec_pb2.EmbeddingSpecProto)
        items = {"embedding_spec": wanted, "model": ocp.args.StandardRestore(), "optimizer": ocp.args.StandardRestore()}
        return manager.restore(step, args=ocp.args.Composite(**items))


@pytest.mark.parametrize("text", [TOLD, LEGACY], ids=["told", "legacy"])
def test_conversion(tmp_path, monkeypatch, text):
    """By hand, for 4 devices of 2 SparseCores: what is written is read there as it is, and anywhere else, too."""
    source, out = _by_hand(tmp_path / "c", text), tmp_path / "out"
    topology = checkpoint_utils.TargetTopology(4, 2, "any")
    where = {"input_checkpoint_path": source, "output_checkpoint_path": out}
    checkpoint_utils.convert_cross_topology_checkpoint(**where, target_topology=topology, save_step=6)
    proto = _read(out, 6)["embedding_spec"]
    assert {stack.stack_name for stack in proto.stacked_table_specs} == {"u_v", "w"}
    assert {stack.num_sparsecores for stack in proto.stacked_table_specs} == {8}
    assert [t.HasField("optimizer") for s in proto.stacked_table_specs for t in s.table_specs] == [text == TOLD] * 3
    for devices, num_sc in ((4, 2), (1, 1)):
        target = _hand_home(monkeypatch, devices, num_sc)
        target.restore(out)
        if text == TOLD:
            _check_hand(target)
    target = _hand_home(monkeypatch, 4, 2)
    target.restore_same(out)
    for table in target.tables():
        rows, slots = target.variables()[table.stacked_table_spec.stack_name]
        for part, array in enumerate([rows, *slots]):
            found = np.asarray(array)[target.where(table), : table.embedding_dim]
            np.testing.assert_array_equal(found, _logical(table.name, part))


def test_conversion_to_plain_tables(tmp_path, monkeypatch):
    source, out = _by_hand(tmp_path / "c"), tmp_path / "out"
    checkpoint_utils.convert_cross_topology_checkpoint(input_checkpoint_path=source, output_checkpoint_path=out)
    found = _read(out, 5)["model"]["embed"]["embedding_table"]["value"]
    for name in HAND_TABLES:
        np.testing.assert_array_equal(found[name]["table"], _logical(name, 0))
    np.testing.assert_array_equal(found["w"]["slot"]["velocity"], _logical("w", 2))
    target = _hand_home(monkeypatch, 2, 2)
    target.restore(out)
    _check_hand(target)


def test_conversion_to_given_stacks(home, saved, tmp_path):
    """Tables of several optimizers, dtypes and stacks, keys and counters: file to file, then read as it is."""
    folder, target = saved((2, 1, "auto")), home(4, 2, ("b", "a"), seed=1)
    where = {"input_checkpoint_path": folder, "output_checkpoint_path": tmp_path / "out"}
    topology = checkpoint_utils.TargetTopology(4, 2)
    checkpoint_utils.convert_cross_topology_checkpoint(
        **where, target_topology=topology, target_feature_specs=target.features
    )
    target.restore_same(tmp_path / "out")
    target.check()
    _same(target.dense(), home(2, 1, "auto").dense())
    options = ocp.CheckpointManagerOptions(read_only=True)
    with checkpoint_utils.create_checkpoint_manager(cp_path=tmp_path / "out", cp_options=options) as manager:
        tables = manager.item_metadata(1)["model"].tree["embed"]["embedding_table"]["value"]
    # As Orbax writes them: slots without names as a list, and none at all where there are none.
    assert [leaf.shape for leaf in tables["i"]["slot"]] == [(64, 8)] * 2 and tables["e"]["slot"] is None
    checkpoint_utils.convert_cross_topology_checkpoint(input_checkpoint_path=None, output_checkpoint_path=tmp_path)
    other = home(2, 1, "none", features=_features(names=("a", "b")))
    with pytest.raises(ValueError, match='(?s)does not fit:.*table "c": it is in the checkpoint, and no feature looks'):
        checkpoint_utils.convert_cross_topology_checkpoint(
            input_checkpoint_path=folder,
            output_checkpoint_path=tmp_path / "nothing",
            target_topology=checkpoint_utils.TargetTopology(2, 1),
            target_feature_specs=other.features,
        )
    with pytest.raises(ValueError, match="are of a target_topology; give it, too"):
        checkpoint_utils.convert_cross_topology_checkpoint(**where, target_batch_size=4)


def test_conversion_for_another_batch(tmp_path):
    """Stacks are as large as the activations of a SparseCore allow: 4096 bytes, as the checkpoint says."""
    source = _by_hand(tmp_path / "c")
    for batch, stacks in ((64, {"u_v", "w"}), (128, {"u", "v", "w"})):
        checkpoint_utils.convert_cross_topology_checkpoint(
            input_checkpoint_path=source,
            output_checkpoint_path=tmp_path / str(batch),
            target_topology=checkpoint_utils.TargetTopology(1, 1),
            target_batch_size=batch,
        )
        proto = _read(tmp_path / str(batch), 5)["embedding_spec"]
        assert {stack.stack_name for stack in proto.stacked_table_specs} == stacks


def test_archives_and_the_command(tmp_path, monkeypatch, capsys):
    source, archive = _by_hand(tmp_path / "c"), tmp_path / "saved.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(source, arcname=".")
    monkeypatch.delenv(checkpoint_utils.ARCHIVES, raising=False)
    with pytest.raises(ValueError, match="TEST_UNDECLARED_OUTPUTS_DIR is not set; set it to the folder to unpack"):
        checkpoint_utils.decompress_checkpoint(str(archive))
    with pytest.raises(ValueError, match="TEST_UNDECLARED_OUTPUTS_DIR is not set; set it, or give another path"):
        offline_converter.expand_directory_path("TEST_UNDECLARED_OUTPUTS_DIR/x")
    monkeypatch.setenv(checkpoint_utils.ARCHIVES, str(tmp_path / "u"))
    for _ in range(2):  # again over what is there
        folder = checkpoint_utils.decompress_checkpoint(str(archive))
        assert folder == str(tmp_path / "u" / "decompressed_checkpoints" / "saved")
        assert sorted(p.name for p in (tmp_path / "u" / "decompressed_checkpoints").iterdir()) == ["saved"]
    target = _hand_home(monkeypatch, 2, 2)
    target.restore(folder)
    _check_hand(target)
    options = ["--target_num_devices=2", "--target_device_kind=TPU_v6e", "--output_checkpoint"]
    offline_converter.main([f"--input_checkpoint={archive}", *options, "TEST_UNDECLARED_OUTPUTS_DIR/out"])
    assert "converted for 2 devices of 2 SparseCores each" in capsys.readouterr().out
    target = _hand_home(monkeypatch, 2, 2)
    target.restore_same(tmp_path / "u" / "out")
    with pytest.raises(SystemExit):
        offline_converter.main(["--input_checkpoint=a", "--output_checkpoint=b", "--target_device_kind=cpu"])
    assert 'a "cpu" has no known number of SparseCores (TPU v5' in capsys.readouterr().err


@pytest.mark.parametrize("older", [False, True])
def test_an_archive_that_leads_out_of_its_folder(older, tmp_path, monkeypatch):
    """Python before 3.11.4 has no filter for archives; there embax looks itself."""
    if older:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elif not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python has no filter for archives")
    monkeypatch.setenv(checkpoint_utils.ARCHIVES, str(tmp_path / "u"))
    (tmp_path / "secret").write_text("x")
    with tarfile.open(tmp_path / "bad.tgz", "w:gz") as file:
        file.add(tmp_path / "secret", arcname="../../../out")
    with pytest.raises((ValueError, tarfile.TarError), match="out"):
        checkpoint_utils.decompress_checkpoint(str(tmp_path / "bad.tgz"))
    assert not [path for path in tmp_path.rglob("out") if path.name == "out"]


CHANGES = {
    'table "a": vocabulary_size was 37 and is 38': {"a": (38, 5, TABLES["a"][2])},
    'table "b": embedding_dim was 8 and is 7': {"b": (90, 7, TABLES["b"][2])},
    'table "d": its optimizer was Adam and is LaProp': {"d": (23, 12, embax.LaProp(0.1))},
    'table "e": its optimizer was SGD and is Adagrad': {"e": (7, 3, embax.Adagrad(0.1))},
    'table "h": table was bfloat16 and is float32': None,
}


@pytest.mark.parametrize("text", CHANGES)
def test_tables_that_do_not_fit(home, saved, text):
    change = CHANGES[text]
    features = _features(**(change or {}))
    if change is None:
        table = table_spec("h", 13, 4, optimizer=TABLES["h"][2], combiner="mean")
        features["h"] = embax.FeatureSpec(name="h", table_spec=table, input_shape=(BATCH, 2), output_shape=(BATCH, 4))
    target = home(2, 1, seed=1, features=features)
    before = target.state()
    for restore in (target.restore, target.restore_same):
        with pytest.raises(ValueError, match="(?s)c, step 1: the checkpoint does not fit:") as error:
            restore(saved((1, 1, "none")))
        assert text in str(error.value) and "build model, optimizer and feature specs as they were saved" in str(
            error.value
        )
    _same(target.state(), before)


def test_other_settings_of_an_optimizer_are_taken(home, saved):
    """A learning rate may change; what is stored beside the rows does not."""
    changed = {"a": (37, 5, embax.Adagrad(0.9, initial_accumulator_value=0.25)), "f": (50, 4, embax.LaProp(0.1))}
    target = home(2, 1, seed=1, features=_features(**changed))
    target.restore(saved((1, 1, "none")))
    target.check()


def test_tables_that_are_missing(home, saved):
    names = [name for name in TABLES if name != "c"]
    fewer = home(2, 1, features=_features(names=names))
    before = fewer.state()
    with pytest.raises(ValueError, match='table "c": it is in the checkpoint, and no feature looks it up'):
        fewer.restore(saved((1, 1, "none")))
    _same(fewer.state(), before)
    more = home(2, 1, features=_features({**TABLES, "z": (9, 4, embax.SGD(0.1))}))
    with pytest.raises(ValueError, match='table "z": the checkpoint has none; it has a, b, c, d, e, f, g, h, i'):
        more.restore(saved((1, 1, "none")))


def test_dense_parts_that_do_not_fit(home, saved):
    folder = saved((1, 1, "none"))
    target = home(2, 1)
    target.model.kernel = nnx.Param(jnp.ones((3, 4)))
    target.model.more = nnx.Param(jnp.ones(2))
    del target.model.drop
    target.optimizer = nnx_embed.PartitionedOptimizer(target.model, optax.sgd(0.1))
    before = target.state()
    with pytest.raises(ValueError, match="does not fit") as error:
        target.restore(folder)
    for line in (
        "model kernel: was float32[3, 2] and is float32[3, 4]",
        "model more: the checkpoint has none",
        "model drop/rngs/key: it is in the checkpoint, and not wanted",
        "optimizer opt_state/0/mu/kernel: it is in the checkpoint, and not wanted",
    ):
        assert line in str(error.value)
    _same(target.state(), before)


def test_steps_and_items(home, saved, tmp_path):
    target, folder = home(2, 1, seed=1), saved((1, 1, "none"))
    before = target.state()
    with pytest.raises(ValueError, match=r"step 1: there is no item \"net\"; there are .*model.*: give their names as"):
        target.restore(folder, model_key="net")
    with pytest.raises(ValueError, match=r"there is no step 4; there are \[1\]"):
        target.restore(folder, restore_step=4)
    with pytest.raises(ValueError, match="nothing: there is no checkpoint"):
        target.restore(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(
        ValueError,
        match='(?s)table "a": it stood in stack "a" of shape .40, 8. on 1 SparseCores from ro.*'
        "restore_cross_topology_checkpoint moves them",
    ):
        target.restore_same(folder)
    _same(target.state(), before)
    target.restore(None)
    _same(target.state(), before)
    saver = home(1, 1).fill()
    saver.save(tmp_path / "two", step=3)
    saver.model.kernel.set_value(saver.model.kernel.get_value() + 1)
    saver.save(tmp_path / "two", step=12)
    for step, more in ((3, 0), (None, 1), (12, 1)):
        target.restore(tmp_path / "two", restore_step=step)
        np.testing.assert_array_equal(target.model.kernel.get_value(), home(1, 1).model.kernel.get_value() + more)


def test_layers(home, saved):
    target, folder = home(2, 1, seed=1), saved((1, 1, "none"))
    target.restore(folder, embedding_layer_name="embed")
    target.check()
    with pytest.raises(
        ValueError, match="embedding_layer_name='kernel': the model's attribute of this name is a Param"
    ):
        target.restore(folder, embedding_layer_name="kernel")
    target.features = home(2, 1, features=_features(names=("a",))).features
    with pytest.raises(ValueError, match=r"the model has stacks \['a', 'b'.* and the feature specs have \['a'\]"):
        target.restore(folder)
    target.features = home(4, 2).features
    with pytest.raises(ValueError, match='stack "a" was made for 4 devices of 2 SparseCores, and this call is for 2 '):
        target.restore(folder)
    with pytest.raises(
        ValueError, match="Dropout has no SparseCoreEmbed; such checkpoints are for models that have one"
    ):
        checkpoint_utils.restore_checkpoint(input_checkpoint_path=folder, model=nnx.Dropout(0.5), optimizer=None)


def test_several_layers(home, tmp_path, monkeypatch):
    """Of two layers every table is found in the other's stead, and free arrays stay free to go with any mesh."""

    class Two(nnx.Module):
        def __init__(self, features, mesh):
            self.parts = nnx.List([nnx_embed.SparseCoreEmbed(f, "x", mesh, nnx.Rngs(0)) for f in features])
            self.kernel = nnx.Param(jnp.ones(3))

    def two(devices):
        features = [_features(names=("a", "b")), _features(names=("d", "e"))]
        model = Two(features, line_of(devices))
        return model, nnx_embed.PartitionedOptimizer(model, optax.sgd(0.1)), features

    monkeypatch.setattr(utils, "num_sparsecores_per_device", lambda device=None: 1)
    model, optimizer, features = two(2)
    options = ocp.CheckpointManagerOptions(create=True)
    counts = {"num_global_devices": 2, "num_sc_per_device": 1}
    with checkpoint_utils.create_checkpoint_manager(cp_path=tmp_path / "c", cp_options=options) as manager:
        with pytest.raises(ValueError, match="the model has stacks .*'d', 'e'.*, and the feature specs have"):
            checkpoint_utils.save_checkpoint(
                cp_manager=manager, step=1, model=model, optimizer=optimizer, feature_specs=features[0], **counts
            )
        checkpoint_utils.save_checkpoint(
            cp_manager=manager, step=1, model=model, optimizer=optimizer, feature_specs=features, **counts
        )
    other, other_optimizer, other_features = two(8)
    checkpoint_utils.restore_cross_topology_checkpoint(
        cross_topology_checkpoint_restore_path=tmp_path / "c",
        model=other,
        optimizer=other_optimizer,
        target_feature_specs=other_features,
        num_global_devices=8,
        num_sc_per_device=1,
    )
    assert not other.kernel.get_value().committed
    for one, layer in zip(model.parts, other.parts, strict=True):
        for name, (rows, _) in layer.embedding_table.get_value().items():
            old, count = np.asarray(one.embedding_table.get_value()[name][0]), TABLES[name][0]
            at = [(i % 8) * (rows.shape[0] // 8) + i // 8 for i in range(count)]
            was = [(i % 2) * (old.shape[0] // 2) + i // 2 for i in range(count)]
            np.testing.assert_array_equal(np.asarray(rows)[at], old[was])
            assert rows.sharding.spec == P("x", None)


def test_specs_that_are_damaged(tmp_path, monkeypatch):
    target = _hand_home(monkeypatch, 2, 2)
    for old, new, text in (
        (
            "num_sparsecores: 6",
            "num_sparsecores: 5",
            'table "u" of 50 rows of 5 numbers cannot stand at row 0 of each of 5',
        ),
        (
            "row_offset_in_shard: 16",
            "row_offset_in_shard: 18",
            'table "v" of 41 rows of 8 numbers cannot stand at row 18',
        ),
        ('table_name: "w"', 'table_name: "u"', 'table "u" or its stack "w" is in it twice'),
        (
            "stack_vocab_size: 144",
            "stack_vocab_size: 150",
            r'table "u": table has shape \(144, 8\), and embedding_spec',
        ),
        (
            'stack_name: "w"',
            'stack_name: "q"',
            r"table \"w\": its arrays were nowhere and are \['table', 'momentum', 'v",
        ),
    ):
        folder = tmp_path / str(abs(hash(text)))
        _by_hand(folder, TOLD.replace(old, new))
        with pytest.raises(ValueError, match=text):
            target.restore(folder)
    assert text_format.Parse(LEGACY, embedding_spec_pb2.EmbeddingSpecProto()).stacked_table_specs[0].stack_name == "u_v"
