"""Law: a step saved as what was written since another one loads as a step saved whole, whatever became of the other."""

import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import OPTIMIZERS
from flax import nnx
from helpers import feature, line_of, table_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embax
import embax.nnx

checkpoint = pytest.importorskip("embax.checkpoint")

NORMAL = jax.nn.initializers.normal(0.37)
EXAMPLES = int(os.environ.get("EMBAX_EXAMPLES", "2"))
SIZES = {"a": 901, "b": 337, "c/d": 95}
DIM = 8
PLACEMENTS = ["row", "column", "table", "replicated"]

pytestmark = pytest.mark.usefixtures("eight_devices")


def _plan(devices=0, placement="row", stacks="auto", optimizer=None, sizes=SIZES, **settings):
    optimizer = embax.Adagrad(0.1) if optimizer is None else optimizer
    tables = [table_spec(n, rows, DIM, optimizer, initializer=NORMAL, **settings) for n, rows in sizes.items()]
    where = {"mesh": line_of(devices), "placement": placement} if devices else {}
    return embax.plan([feature(table, table.name) for table in tables], stacks=stacks, **where)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _stepped(plan, tables, batch):
    activations, residuals = embax.lookup(plan, tables, batch)
    return embax.update(plan, tables, residuals, [jnp.cos(part) for part in activations], step=0)


def _trained(plan, tables, seed, samples=8):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, rows, (samples, 3)).astype(np.int32) for rows in SIZES.values()]
    return _stepped(plan, tables, embax.preprocess(plan, ids))


def _host(plan, tables):
    return jax.tree.map(np.asarray, embax.to_arrays(plan, tables))


def _same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def _deltas(folder, step):
    return json.loads((folder / str(step) / "embax" / "embax.json").read_text())["checkpoint"]["deltas"]


def _folders(folder, step):
    return [path.name for path in (folder / str(step) / "tables").iterdir() if path.is_dir()]


def _begun(plan):
    return embax.track(plan, embax.init(plan, jax.random.key(0)))


def _run(folder, plan, steps, asynchronous=True, **options):
    """Trains and saves; returns what every step was."""
    wanted, tables = [], _begun(plan)
    with checkpoint.Checkpoints(folder, keep=None, asynchronous=asynchronous, **options) as checkpoints:
        for step in range(steps):
            tables = _trained(plan, tables, step)
            wanted.append(_host(plan, tables))
            tables = checkpoints.save(step, plan, tables)
    return wanted


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_steps_load_as_they_were(tmp_path, placement, asynchronous):
    plan, other = _plan(4, placement), _plan(0, stacks="none")
    wanted = _run(tmp_path, plan, 4, asynchronous)
    assert [len(_deltas(tmp_path, step)) for step in range(4)] == [0, 1, 2, 3]
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step, arrays in enumerate(wanted):
            _same(_host(other, checkpoints.restore(other, step=step).tables), arrays)
            _same(_host(plan, checkpoints.restore(plan, step=step).tables), arrays)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    old=st.tuples(st.sampled_from([0, 1, 2, 8]), st.sampled_from(PLACEMENTS)),
    new=st.tuples(st.sampled_from([0, 1, 2, 8]), st.sampled_from(PLACEMENTS)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    piece=st.sampled_from([8 << 20, DIM * 4]),
)
@example((2, "row"), (0, "row"), "adagrad", "bfloat16", DIM * 4)
@example((8, "row"), (2, "column"), "rowwise_adagrad", "float32", 4 * DIM * 4)
@example((2, "column"), (0, "row"), "adagrad", "bfloat16", DIM * 4)
def test_any_plan_to_any_plan(tmp_path_factory, old, new, optimizer, dtype, piece):
    optimizer, folder = OPTIMIZERS[optimizer].make(), tmp_path_factory.mktemp("c")
    before, after = (_plan(*where, optimizer=optimizer, dtype=dtype) for where in (old, new))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embax.checkpoint.arrays.PIECE_BYTES", piece)
        wanted = _run(folder, before, 3)
        assert len(_deltas(folder, 2)) == 2
        with checkpoint.Checkpoints(folder) as checkpoints:
            _same(_host(after, checkpoints.restore(after).tables), wanted[-1])


def test_few_rows_are_few_bytes(tmp_path):
    plan = _plan()
    _run(tmp_path, plan, 2)
    own = [path for path in (tmp_path / "1" / "tables").rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    whole = sum(path.stat().st_size for path in (tmp_path / "0" / "tables").rglob("0"))
    # At most 24 rows of each table, of 1,333 rows in all.
    assert sum(path.stat().st_size for path in own if path.name == "0") < whole / 10


def test_the_other_step_may_go(tmp_path):
    plan = _plan(2)
    tables = _begun(plan)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in range(3):
            tables = checkpoints.save(step, plan, _trained(plan, tables, step))
        wanted = _host(plan, tables)
        checkpoints.wait()
        assert checkpoints.steps() == [2] and len(_deltas(tmp_path, 2)) == 2
        _same(_host(plan, checkpoints.restore(plan).tables), wanted)


def test_going_on_after_a_restore(tmp_path):
    plan, other = _plan(2), _plan(0)
    _run(tmp_path, plan, 2)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        tables = checkpoints.restore(other, track=True).tables
        tables = _trained(other, tables, 9)
        wanted = _host(other, tables)
        checkpoints.save(2, other, tables)
        checkpoints.wait()
        assert len(_deltas(tmp_path, 2)) == 2  # on other devices, and still only what was written
        _same(_host(plan, checkpoints.restore(plan).tables), wanted)


def test_marks_that_are_not_given_back(tmp_path):
    """Whoever goes on with the tables that were saved, marks and all, writes more, and loses nothing."""
    plan = _plan()
    tables = _begun(plan)
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        tables = checkpoints.save(0, plan, _trained(plan, tables, 0))
        for step in (1, 2):
            tables = _trained(plan, tables, step)
            checkpoints.save(step, plan, tables)
        checkpoints.wait()
        assert [len(_deltas(tmp_path, step)) for step in (1, 2)] == [1, 1]
        _same(_host(plan, checkpoints.restore(plan).tables), _host(plan, tables))


@pytest.mark.parametrize("what", ["deleted", "another", "damaged", "failed", "missing", "cut"])
def test_without_the_other_step_everything_is_written(tmp_path, what, monkeypatch):
    plan = _plan()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        tables = _trained(plan, _begun(plan), 0)
        if what == "failed":

            def fail(*_):
                raise OSError("no space left on device")

            with monkeypatch.context() as patch:
                patch.setattr("embax.checkpoint.tables.arrays.create", fail)
                with pytest.raises((checkpoint.CheckpointError, OSError), match="no space left"):
                    tables = checkpoints.save(0, plan, tables)
                    checkpoints.wait()
        else:
            tables = checkpoints.save(0, plan, tables)
            checkpoints.wait()
        if what in ("deleted", "another"):
            checkpoints.delete(0)
        if what == "another":
            checkpoints.save(0, plan, _trained(plan, _begun(plan), 5))
            checkpoints.wait()
        if what in ("missing", "cut"):
            piece = tmp_path / "0" / "tables" / "a" / "table" / "c" / "0" / "0"
            content = piece.read_bytes()
            piece.unlink()
            if what == "cut":
                piece.write_bytes(content[:-100])
        if what == "damaged":
            document = tmp_path / "0" / "embax" / "embax.json"
            document.write_text(document.read_text().replace("Adagrad", "Adagrat"))
        tables = _trained(plan, tables, 1)
        wanted = _host(plan, tables)
        checkpoints.save(1, plan, tables)
        checkpoints.wait()
        assert not _deltas(tmp_path, 1)
        _same(_host(plan, checkpoints.restore(plan, step=1).tables), wanted)


def test_when_everything_is_written_again(tmp_path):
    plan = _plan()
    wanted = _run(tmp_path, plan, 5, deltas=2)
    assert [len(_deltas(tmp_path, step)) for step in range(5)] == [0, 1, 2, 0, 1]
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        found = checkpoints.restore(plan, track=True)
        _same(_host(plan, found.tables), wanted[-1])
        tables = _trained(plan, found.tables, 7, samples=4000)  # most rows
        checkpoints.save(6, plan, tables)
        checkpoints.wait()
        assert not _deltas(tmp_path, 6)
        # Slots that began anew, another optimizer's setting: the step before is not what was trained.
        fresh = checkpoints.restore(plan, fresh_slots=True, track=True).tables
        checkpoints.save(7, plan, fresh)
        other = _plan(optimizer=embax.Adagrad(0.2))
        changed = checkpoints.restore(other, accept=("optimizer.learning_rate",), track=True).tables
        checkpoints.save(8, other, changed)
        checkpoints.wait()
        assert not _deltas(tmp_path, 7) and not _deltas(tmp_path, 8)
        _same(_host(plan, checkpoints.restore(plan, step=7).tables), _host(plan, fresh))


def test_tables_that_took_other_names_are_written_whole(tmp_path):
    plan = _plan(sizes={"a": 200, "b": 200})
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        checkpoints.save(0, plan, _begun(plan))
        swapped = checkpoints.restore(plan, rename={"a": "b", "b": "a"}, track=True).tables
        checkpoints.save(1, plan, swapped)
        same = checkpoints.restore(plan, rename={"a": "a"}, track=True).tables
        checkpoints.save(2, plan, same)
        checkpoints.wait()
        assert [len(_deltas(tmp_path, step)) for step in (1, 2)] == [0, 1]
        _same(_host(plan, checkpoints.restore(plan).tables), _host(plan, swapped))
        with pytest.raises(TypeError, match="serving=True is for lookups, and track=True for training; leave one"):
            checkpoints.restore(plan, serving=True, track=True)


@pytest.mark.parametrize("devices", [0, 4])
def test_marks_may_lie_anywhere(tmp_path, devices):
    plan = _plan(devices)
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        tables = _trained(plan, checkpoints.save(0, plan, _begun(plan)), 0)
        wanted = _host(plan, tables)
        tables = {
            name: state._replace(touched=jax.tree.map(np.asarray, state.touched)) for name, state in tables.items()
        }
        checkpoints.save(1, plan, tables)
        moved = {
            name: state._replace(touched=jax.tree.map(jnp.asarray, state.touched)) for name, state in tables.items()
        }
        checkpoints.save(2, plan, moved)
        checkpoints.wait()
        for step in (1, 2):
            assert len(_deltas(tmp_path, step)) == 1
            _same(_host(plan, checkpoints.restore(plan, step=step).tables), wanted)


@pytest.mark.parametrize("links", [True, False])
def test_compaction(tmp_path, links, monkeypatch):
    plan = _plan(2)
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    wanted = _run(tmp_path, plan, 3)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.compact()
        assert not _deltas(tmp_path, 2) and _folders(tmp_path, 2) == ["base.1"]
        for step, arrays in enumerate(wanted):
            _same(_host(plan, checkpoints.restore(plan, step=step).tables), arrays)
        tables = _trained(plan, checkpoints.restore(plan, track=True).tables, 7)
        checkpoints.save(3, plan, tables)
        checkpoints.wait()
        assert _deltas(tmp_path, 3) == ["delta.0"]
        checkpoints.compact(3)
        checkpoints.compact(3)  # nothing to do
        _same(_host(plan, checkpoints.restore(plan).tables), _host(plan, tables))
        checkpoint.export_table(tmp_path / "2", "a", tmp_path / "a.safetensors")


def test_a_compaction_that_is_cut_short(tmp_path, monkeypatch):
    plan = _plan()
    wanted = _run(tmp_path, plan, 2)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for name in ("write_document", "_sweep"):
            calls, real = [], getattr(checkpoint.compaction, name)

            def die(*args, real=real, calls=calls, name=name):
                calls.append(args)
                if name == "write_document" or len(calls) > 1:
                    raise KeyboardInterrupt
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(f"embax.checkpoint.compaction.{name}", die)
                with pytest.raises(KeyboardInterrupt):
                    checkpoints.compact()
            _same(_host(plan, checkpoints.restore(plan).tables), wanted[-1])
        assert len(_folders(tmp_path, 1)) > 1
        checkpoints.compact()
        assert _folders(tmp_path, 1) == ["base.1"]
        _same(_host(plan, checkpoints.restore(plan).tables), wanted[-1])


def test_every_damaged_file_is_named(tmp_path):
    plan = _plan(2)
    _run(tmp_path / "whole", plan, 2)
    step = tmp_path / "whole" / "1"
    files = sorted(p.relative_to(step) for p in (step / "tables").rglob("*") if p.is_file() and "delta" in str(p))
    assert len(files) > 10
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(step, folder / "1")
        path, change = folder / "1" / name, number % 3
        content = path.read_bytes()
        path.write_bytes(
            (content[:-3], content[:-1] + bytes([content[-1] ^ 1]), content[:1] + b"~" + content[2:])[change]
        )
        with checkpoint.Checkpoints(folder) as checkpoints:
            with pytest.raises(checkpoint.CheckpointError) as error:
                checkpoints.restore(plan)
            assert str(name.parent).removesuffix("/0").removesuffix("/c") in str(error.value), (name, error.value)
            assert "load another step" in str(error.value)


def test_export_has_what_was_written_last(tmp_path):
    from safetensors.numpy import load_file

    plan = _plan(2)
    wanted = _run(tmp_path, plan, 3)[-1]
    checkpoint.export_table(tmp_path / "2", "c/d", tmp_path / "t.safetensors")
    _same(dict(sorted(load_file(tmp_path / "t.safetensors").items())), dict(sorted(wanted["c/d"].items())))


def test_one_table_tracked_and_another_not(tmp_path):
    plan = _plan(stacks="none")
    tables = _begun(plan)
    tables["b"] = tables["b"]._replace(touched=None)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"rows of \['a', 'c/d'\] are tracked, and of \['b'\] not; track all"):
            checkpoints.save(0, plan, tables)
        assert checkpoints.steps() == []
    with pytest.raises(ValueError, match="deltas=-1 must be an integer of at least 0"):
        checkpoint.Checkpoints(tmp_path, deltas=-1)


def test_nnx(tmp_path):
    import embax.checkpoint.nnx as door

    def made():
        model = embax.nnx.Embed(400, DIM, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(0))
        optimizer = embax.nnx.Optimizer(model, optax.sgd(0.1))
        optimizer.track_rows(model)
        return model, optimizer

    def train(model, optimizer, ids):
        _, gradients = embax.nnx.value_and_grad(lambda model: jnp.sin(model(ids)).sum())(model)
        optimizer.update(model, gradients)

    model, optimizer = made()
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in range(3):
            train(model, optimizer, jnp.array([3, 50 * step, 3, 7]))
            door.save(checkpoints, step, model, optimizer)
        other, its_optimizer = made()
        door.restore(checkpoints, other, its_optimizer)
        assert [len(_deltas(tmp_path, step)) for step in range(3)] == [0, 1, 2]
        for one, another in ((model, other), (optimizer, its_optimizer)):
            jax.tree.map(np.testing.assert_array_equal, nnx.state(another), nnx.state(one))
        train(other, its_optimizer, jnp.array([1]))
        door.save(checkpoints, 3, other, its_optimizer)
        checkpoints.wait()
        assert len(_deltas(tmp_path, 3)) == 3
        door.restore(checkpoints, model, optimizer)
        np.testing.assert_array_equal(model.embedding[...], other.embedding[...])
        # A model restored without its optimizer has rows that no mark tells of.
        train(model, optimizer, jnp.array([9]))
        door.save(checkpoints, 4, model, optimizer)
        door.restore(checkpoints, model, step=3)
        train(model, optimizer, jnp.array([2]))
        door.save(checkpoints, 5, model, optimizer)
        door.restore(checkpoints, other, its_optimizer)
        np.testing.assert_array_equal(model.embedding[...], other.embedding[...])
        assert not _deltas(tmp_path, 5)


def test_linen(tmp_path):
    import embax.checkpoint.linen as door
    import embax.linen

    layer = embax.linen.Embed(400, DIM, optimizer=embax.SGD(1.0))
    params = layer.init(jax.random.key(0), jnp.array([3]))["params"]
    state = embax.linen.TrainState.create(apply_fn=layer.apply, params=params, tx=optax.sgd(1.0)).track_rows()
    begun = state
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in range(3):
            ids = jnp.array([3, 50 * step, 3, 7])
            _, grads = embax.linen.value_and_grad(lambda p, ids=ids: layer.apply({"params": p}, ids).sum())(
                state.params
            )
            state = door.save(checkpoints, step, state.apply_gradients(grads=grads))
        assert int(state.touched[0].rows.sum()) == 0
        restored, _ = door.restore(checkpoints, begun)
        assert [len(_deltas(tmp_path, step)) for step in range(3)] == [0, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, restored, state)
