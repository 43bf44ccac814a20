"""Law: what is loaded is what was saved, on any devices, in any stacks and placements; a bad file is named."""

import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import OPTIMIZERS
from helpers import feature, line_of, table_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import embax

checkpoint = pytest.importorskip("embax.checkpoint")

NORMAL = jax.nn.initializers.normal(0.37)
EXAMPLES = int(os.environ.get("EMBAX_EXAMPLES", "3"))
SIZES = {"a": 101, "b": 37, "c/d": 5}
DIM = 8

pytestmark = pytest.mark.usefixtures("eight_devices")


def _square(axis_type):
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(axis_type, axis_type))
    return embax.Devices(mesh, batch_axes="d", table_axes=("m",))


MESHES = {
    "none": lambda: None,
    "one": lambda: line_of(1),
    "two": lambda: line_of(2),
    "four": lambda: line_of(4),
    "eight": lambda: line_of(8),
    "square": lambda: _square(AxisType.Auto),
    "explicit": lambda: _square(AxisType.Explicit),
}
PLACEMENTS = ["row", "column", "table", "replicated"]
STACKS = {"auto": "auto", "none": "none", "pair": {"pair": ["b", "a"]}}


def _plan(mesh="none", placement="row", stacks="auto", sizes=SIZES, optimizer=None, **settings):
    optimizer = embax.Adagrad(0.1) if optimizer is None else optimizer
    tables = [table_spec(n, rows, DIM, optimizer, initializer=NORMAL, **settings) for n, rows in sizes.items()]
    where = {} if mesh == "none" else {"mesh": MESHES[mesh](), "placement": placement}
    return embax.plan([feature(table, table.name) for table in tables], stacks=stacks, **where)


def _filled(plan, seed=0):
    """Returns tables whose every number is another one, slots included."""
    arrays = embax.to_arrays(plan, embax.init(plan, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    drawn = {
        name: {part: rng.normal(size=v.shape).astype(v.dtype) for part, v in parts.items()}
        for name, parts in arrays.items()
    }
    return embax.from_arrays(plan, drawn)


def _host(plan, tables):
    return jax.tree.map(np.asarray, embax.to_arrays(plan, tables))


def _same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def _through(tmp_path, before, after, tables, **choice):
    with checkpoint.Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, before, tables)
        return checkpoints.restore(after, **choice)


# ---- any plan to any plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"), [("none", "eight"), ("eight", "two"), ("square", "none"), ("four", "explicit")]
)
@pytest.mark.parametrize("placement", ["row", "column", "table", "replicated"])
def test_other_devices(tmp_path, old, new, placement):
    before, after = _plan(old, placement, "none"), _plan(new, placement, STACKS["pair"])
    tables = _filled(before)
    found = _through(tmp_path, before, after, tables)
    assert found.step == 3 and found.dense is None and found.data is None
    _same(_host(after, found.tables), _host(before, tables))


@pytest.mark.nightly
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("old", ["one", "two", "four", "eight"])
def test_every_plan_to_every_plan(tmp_path, old, placement):
    """All pairs of devices and placements; optimizers, pairs of stackings and dtypes take turns."""
    source = 4 * ["one", "two", "four", "eight"].index(old) + PLACEMENTS.index(placement)
    names, stacks = sorted(OPTIMIZERS), list(STACKS)
    for round_, first in enumerate(range(source, len(names), 16)):
        optimizer, dtype = OPTIMIZERS[names[first]].make(), ("float32", "bfloat16", "float16")[source % 3]
        before = _plan(old, placement, STACKS[stacks[source % 3]], optimizer=optimizer, dtype=dtype)
        tables = _filled(before)
        wanted = _host(before, tables)
        with checkpoint.Checkpoints(tmp_path / str(round_)) as checkpoints:
            checkpoints.save(0, before, tables)
            for number, (new, where) in enumerate(itertools.product(["one", "two", "four", "eight"], PLACEMENTS)):
                after = _plan(new, where, STACKS[stacks[number % 3]], optimizer=optimizer, dtype=dtype)
                _same(_host(after, checkpoints.restore(after).tables), wanted)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    old=st.tuples(st.sampled_from(list(MESHES)), st.sampled_from(["row", "column", "table", "replicated"])),
    new=st.tuples(st.sampled_from(list(MESHES)), st.sampled_from(["row", "column", "table", "replicated"])),
    stacks=st.tuples(st.sampled_from(list(STACKS)), st.sampled_from(list(STACKS))),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@example(("eight", "row"), ("four", "row"), ("auto", "none"), "rowwise_adagrad", "float32")
def test_any_plan_to_any_plan(tmp_path_factory, old, new, stacks, optimizer, dtype):
    optimizer = OPTIMIZERS[optimizer].make()
    before, after = (
        _plan(mesh, placement, STACKS[name], optimizer=optimizer, dtype=dtype)
        for (mesh, placement), name in zip((old, new), stacks, strict=True)
    )
    tables = _filled(before)
    found = _through(tmp_path_factory.mktemp("c"), before, after, tables)
    _same(_host(after, found.tables), _host(before, tables))


def test_several_pieces_and_turns(tmp_path, monkeypatch):
    """Tables of many pieces, on as many turns as devices leave."""
    monkeypatch.setattr("embax.checkpoint.arrays.PIECE_BYTES", 8 * DIM * 4)
    before, after = _plan("two", "row"), _plan("eight", "column")
    tables = _filled(before)
    found = _through(tmp_path, before, after, tables)
    _same(_host(after, found.tables), _host(before, tables))


# ---- what may differ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_another_dtype(tmp_path, old, new):
    before, after = _plan(dtype=old), _plan("two", dtype=new)
    tables = _filled(before)
    found, wanted = _host(after, _through(tmp_path, before, after, tables).tables), _host(before, tables)
    for name, parts in wanted.items():
        _same(found[name]["table"], parts["table"].astype(new))
        _same(found[name]["accumulator"], parts["accumulator"])


@pytest.mark.parametrize("mesh", ["none", "two"])
def test_a_vocabulary_that_has_grown(tmp_path, mesh):
    before, after, key = _plan("two"), _plan(mesh, sizes={**SIZES, "a": 150}), jax.random.key(5)
    tables = _filled(before)
    found, old = _host(after, _through(tmp_path, before, after, tables, key=key).tables), _host(before, tables)
    fresh = _host(after, embax.init(after, key))
    for part in ("table", "accumulator"):
        _same(found["a"][part], np.concatenate([old["a"][part], fresh["a"][part][101:]]))
    _same(found["b"], old["b"])


def test_a_smaller_vocabulary_and_other_names(tmp_path):
    before, after = _plan(), _plan(sizes={"x": 60})
    tables = _filled(before)
    found = _through(tmp_path, before, after, tables, rename={"x": "a"}, shrink=True)
    _same(_host(after, found.tables)["x"], jax.tree.map(lambda part: part[:60], _host(before, tables)["a"]))


def test_without_an_optimizer_and_with_another(tmp_path):
    before, after = _plan(), _plan("two", optimizer=embax.Adam(0.1))
    tables = _filled(before)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, before, tables)
        fresh = checkpoints.restore(after, fresh_slots=True).tables
        served = checkpoints.restore(after, serving=True).tables
    wanted, begun = _host(before, tables), _host(after, embax.init(after, jax.random.key(0)))
    for name, parts in _host(after, fresh).items():
        _same(parts, {**begun[name], "table": wanted[name]["table"]})
    assert all(state.slots == () for state in served.values())
    batch = embax.preprocess(after, [np.array([[1, 2, 3]], np.int32)] * len(SIZES))
    for one, other in zip(embax.lookup(after, served, batch)[0], embax.lookup(after, fresh, batch)[0], strict=True):
        np.testing.assert_array_equal(one, other)


def test_differences_are_listed_together(tmp_path):
    before = _plan(optimizer=embax.Adagrad(lambda step: 0.1))
    after = _plan(sizes={"a": 102, "b": 36, "new": 5}, optimizer=embax.Adagrad(0.2), combiner="mean")
    with pytest.raises(checkpoint.CheckpointError) as error:
        _through(tmp_path, before, after, _filled(before))
    text = str(error.value)
    for line in (
        "\"a\": combiner was 'sum' and is 'mean'",
        '"a": optimizer.learning_rate was callable ',
        '"a": vocabulary_size was 101 and is 102: pass key=, as for embax.init, for the new rows',
        '"b": vocabulary_size was 37 and is 36: rows would be lost; pass shrink=True to lose them',
        '"new": the checkpoint has no table "new"; it has a, b, c/d',
        "or say what may differ: rename=, accept=, fresh_slots=True, shrink=True, key=",
    ):
        assert line in text, text


def test_what_is_accepted(tmp_path):
    before, after = _plan(), _plan(optimizer=embax.Adagrad(0.2))
    tables = _filled(before)
    found = _through(tmp_path, before, after, tables, accept=("optimizer.learning_rate",))
    _same(_host(after, found.tables), _host(before, tables))


# ---- one call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["none", "four"])
def test_training_goes_on_while_it_is_saved(tmp_path, mesh):
    """Donated steps right after an asynchronous save do not change what is saved."""
    plan = _plan(mesh)
    tables = _filled(plan)
    wanted = _host(plan, tables)
    dense = {"w": jnp.arange(6.0), "step": jnp.int32(4), "key": jax.random.key(3)}
    batch = embax.preprocess(plan, [np.array([[1, 2, 3], [4, 3, 2]], np.int32)] * len(SIZES))
    step = jax.jit(lambda tables, batch: _trained(plan, tables, batch), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in range(4):
            if number == 2:
                wanted = _host(plan, tables)
            checkpoints.save(number, plan, tables, dense=dense, data={"epoch": number, "at": [1, 2.5, None]})
            tables = step(tables, batch)
        found = checkpoints.restore(plan, step=2, dense=dense)
        assert checkpoints.steps() == [2, 3]
    _same(_host(plan, found.tables), wanted)
    assert found.data == {"epoch": 2, "at": [1, 2.5, None]}
    np.testing.assert_array_equal(found.dense["w"], dense["w"])
    assert jax.random.key_data(found.dense["key"]).tolist() == jax.random.key_data(dense["key"]).tolist()


def _trained(plan, tables, batch):
    activations, residuals = embax.lookup(plan, tables, batch)
    return embax.update(plan, tables, residuals, jax.tree.map(jnp.cos, activations), step=0)


def test_a_folder_that_is_not_there(tmp_path):
    plan, folder = _plan(), tmp_path / "misspelt"
    with checkpoint.Checkpoints(folder) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="there is no such folder; save a step first, or mend the"):
            checkpoints.restore(plan)
        assert checkpoints.steps() == [] and not folder.exists()
        checkpoints.save(0, plan, _filled(plan))
        assert checkpoints.restore(plan).step == 0


def test_a_step_that_is_there(tmp_path):
    plan = _plan()
    tables = _filled(plan)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            checkpoint.CheckpointError, match="there is no checkpoint; save one, or name another folder"
        ):
            checkpoints.restore(plan)
        checkpoints.save(1, plan, tables)
        with pytest.raises(ValueError, match="save: step 1 is in .* already; save another step, or delete.1. first"):
            checkpoints.save(1, plan, tables)
        with pytest.raises(TypeError, match="save: data is not of JSON"):
            checkpoints.save(2, plan, tables, data=object())
        with pytest.raises(checkpoint.CheckpointError, match=r"there is no step 5; there are \[1\]"):
            checkpoints.restore(plan, step=5)
        with pytest.raises(checkpoint.CheckpointError, match="has no dense part; restore without dense="):
            checkpoints.restore(plan, dense={"w": jnp.ones(2)})
        with pytest.raises(ValueError, match="the plan has stacks"):
            checkpoints.save(2, plan, {})
        with pytest.raises(ValueError, match="save: step 0 is below step 1, which restore.. would take for the newest"):
            checkpoints.save(0, plan, tables)
        for step in (-1, 2.0, "3"):
            with pytest.raises(ValueError, match="must be an integer of at least 0"):
                checkpoints.save(step, plan, tables)
        checkpoints.save(np.int64(4), plan, tables)
        assert checkpoints.restore(plan).step == 4
        checkpoints.delete(4)
        assert checkpoints.steps() == [1]
    with pytest.raises(ValueError, match="keep=0 must be at least 1, or None to keep all"):
        checkpoint.Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="'gs://bucket/x' is no folder of this machine"):
        checkpoint.Checkpoints("gs://bucket/x")


def test_a_save_that_fails(tmp_path, monkeypatch):
    """It is named when the next one is asked for, and what was there before stays."""
    plan = _plan(sizes={"a": 11})
    tables = _filled(plan)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, plan, tables)
        checkpoints.wait()
        with monkeypatch.context() as broken:
            broken.setattr("embax.checkpoint.tables.write", lambda *_: (_ for _ in ()).throw(OSError("no room")))
            checkpoints.save(1, plan, tables)
            with pytest.raises(
                checkpoint.CheckpointError, match="step 1 was not saved: .*no room; the steps before it"
            ):
                checkpoints.save(2, plan, tables)
        assert checkpoints.steps() == [0]
        checkpoints.save(2, plan, tables)
        _same(_host(plan, checkpoints.restore(plan).tables), _host(plan, tables))


@pytest.mark.parametrize("name", ["c", ".", "..", "table", "%2F", "x/é"])
def test_names_of_tables(tmp_path, name):
    plan = _plan(sizes={name: 11, "z": 5}, stacks="none")
    tables = _filled(plan)
    _same(_host(plan, _through(tmp_path, plan, plan, tables).tables), _host(plan, tables))
    assert len(list((tmp_path / "3" / "tables").glob("*/table/c/0/0"))) == 2
    zarr = next((tmp_path / "3" / "tables").glob("*/table/zarr.json"))
    zarr.write_text(zarr.read_text().replace('"little"', '"big"   '))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="its checksum does not fit: it was changed"):
            checkpoints.restore(plan)


def test_names_that_no_disk_takes(tmp_path):
    plan = _plan(sizes={"x" * 256: 11})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="its name on disk would have 256 characters, and must have 1 to 255"):
            checkpoints.save(0, plan, _filled(plan))
        assert checkpoints.steps() == []


def test_pieces_of_another_step(tmp_path):
    plan = _plan(sizes={"a": 11})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step in (0, 1):
            checkpoints.save(step, plan, _filled(plan, step))
        checkpoints.wait()
        piece = "tables/a/table/c/0/0"
        (tmp_path / "1" / piece).write_bytes((tmp_path / "0" / piece).read_bytes())
        with pytest.raises(checkpoint.CheckpointError, match="its checksum does not fit: it was changed"):
            checkpoints.restore(plan)
        (tmp_path / "0").rename(tmp_path / "7")
        with pytest.raises(checkpoint.CheckpointError, match="it is of step 0: the folder was renamed or copied"):
            checkpoints.restore(plan, step=7)


def test_slots_of_another_width_and_what_is_not_acceptable(tmp_path):
    before, after = _plan(optimizer=embax.RowwiseAdagrad(0.1)), _plan(optimizer=embax.Adagrad(0.1))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, before, _filled(before))
        with pytest.raises(
            checkpoint.CheckpointError, match="accumulator had 1 numbers a row and has 8; pass fresh_slots"
        ):
            checkpoints.restore(after, accept=("optimizer",))
        with pytest.raises(ValueError, match="accept names 'optimiser'; it takes combiner, quantization, optimizer"):
            checkpoints.restore(after, accept=("optimiser",))
        with pytest.raises(TypeError, match="accept='optimizer' must be a collection of names"):
            checkpoints.restore(after, accept="optimizer")


def test_callables_are_not_compared_by_name(tmp_path):
    before = _plan(optimizer=embax.Adagrad(lambda step: 0.1))
    other = {"initializer": jax.nn.initializers.ones, "optimizer": embax.Adagrad(_rate)}
    tables = [table_spec(name, rows, DIM, **other) for name, rows in SIZES.items()]
    after = embax.plan([feature(table, table.name) for table in tables])
    tables = _filled(before)
    _same(_host(after, _through(tmp_path, before, after, tables).tables), _host(before, tables))


def _rate(step):
    return 0.2


def test_dense_parts(tmp_path):
    plan = _plan(sizes={"a": 11})
    tables = _filled(plan)
    dense = {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2, jnp.bfloat16)}, "none": None, "count": 3}
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        checkpoints.save(0, plan, tables, dense=dense)
        found = checkpoints.restore(plan, dense=dense).dense
        assert found["none"] is None and int(found["count"]) == 3 and found["a"]["b"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found["a.b"], np.ones(2))
        with pytest.raises(checkpoint.CheckpointError, match=r"a/b was bfloat16\[2\] and is int32\[2\]"):
            checkpoints.restore(plan, dense={**dense, "a": {"b": jnp.zeros(2, jnp.int32)}})
        with pytest.raises(ValueError, match='dense: two arrays would be called "a/b" in a checkpoint'):
            checkpoints.save(1, plan, tables, dense={"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
        with pytest.raises(TypeError, match="dense: f is a function, no array or number; leave it out"):
            checkpoints.save(1, plan, tables, dense={"f": _rate})
        checkpoints.save(1, plan, tables, dense={})
        assert checkpoints.restore(plan, dense={}).dense == {}


def test_readable_without_embax(tmp_path):
    """A piece is rows in row order and four bytes behind them."""
    plan = _plan()
    tables = _filled(plan)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, plan, tables)
    folder = tmp_path / "1" / "tables" / "c%2Fd" / "table"
    assert json.loads((folder / "zarr.json").read_text())["shape"] == [5, DIM]
    raw = np.frombuffer((folder / "c" / "0" / "0").read_bytes()[:-4], "<f4").reshape(-1, DIM)[:5]
    np.testing.assert_array_equal(raw, _host(plan, tables)["c/d"]["table"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_to_others(tmp_path, monkeypatch, dtype):
    """By the libraries of those formats, of tables of several pieces."""
    monkeypatch.setattr("embax.checkpoint.arrays.PIECE_BYTES", 8 * DIM * 4)
    plan = _plan("two", optimizer=embax.Adam(0.1), dtype=dtype)
    tables = _filled(plan)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, plan, tables)
    wanted = _host(plan, tables)["a"]
    numpy = pytest.importorskip("safetensors.numpy")
    checkpoint.export_table(tmp_path / "1", "a", tmp_path / "a.safetensors")
    found = numpy.load_file(tmp_path / "a.safetensors")
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), values.astype(np.float32))
    parquet = pytest.importorskip("pyarrow.parquet")
    checkpoint.export_table(tmp_path / "1", "a", tmp_path / "a.parquet")
    rows = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert rows["id"] == list(range(101))
    np.testing.assert_array_equal(np.array(rows["embedding"], np.float32), wanted["table"].astype(np.float32))
    with pytest.raises(checkpoint.CheckpointError, match='there is no table "x"; there are a, b, c/d'):
        checkpoint.export_table(tmp_path / "1", "x", tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="'a.csv' must end in one of .safetensors, .parquet"):
        checkpoint.export_table(tmp_path / "1", "a", tmp_path / "a.csv")
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.parquet", "a.safetensors"]


# ---- damage ------------------------------------------------------------------------------------------------------


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def _empty(path):
    path.write_bytes(b"")


def _remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _remove])
def test_damage_is_named(tmp_path, damage):
    """Every file of a checkpoint in turn: an error that names it or its array, and nothing half-loaded."""
    plan = _plan("two", sizes={"a": 11})
    tables, dense = _filled(plan), {"w": jnp.arange(6.0), "b": jnp.ones(3)}
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        checkpoints.save(0, plan, tables, dense=dense)
        checkpoints.wait()
        folder = tmp_path / "0"
        # Orbax's mark beside the document says no more than the document itself.
        unread = (folder, folder / "embax")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent not in unread)
        files.append(folder / "embax" / "embax.json")
        assert len(files) >= 8
        for path in files:
            intact = path.read_bytes()
            if not intact:
                continue
            damage(path)
            with pytest.raises(checkpoint.CheckpointError) as error:
                checkpoints.restore(plan, dense=dense)
            text = str(error.value)
            assert str(path) in text or str(path.parent.parent.parent) in text, (path, text)
            assert "load another step" in text or "no embax checkpoint" in text, text
            path.write_bytes(intact)
        _same(_host(plan, checkpoints.restore(plan, dense=dense).tables), _host(plan, tables))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 3}, "the format has version 3, and this embax reads 1 and 2; install a newer embax"),
        ({"format": "other"}, "the format is 'other', and not 'embax-checkpoint'; it was not written by embax"),
        ({"step": 9}, "the checksum does not fit: the document was changed; load another step"),
    ],
)
def test_documents_of_others(tmp_path, change, text):
    plan = _plan(sizes={"a": 11})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, plan, _filled(plan))
        checkpoints.wait()
        path = tmp_path / "0" / "embax" / "embax.json"
        document = json.loads(path.read_text())
        document["checkpoint"].update(change)
        path.write_text(json.dumps(document))
        with pytest.raises(checkpoint.CheckpointError, match=text):
            checkpoints.restore(plan)


def test_folders_of_others(tmp_path):
    plan = _plan(sizes={"a": 11})
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "model.bin").write_bytes(b"123")
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="is no embax checkpoint, or an unfinished one"):
            checkpoints.restore(plan, step=4)
