"""Models with tables, saved and loaded by one call: NNX and Linen, on other devices, with more rows, for serving."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import feature, line_of, table_spec

import embax
import embax.linen
import embax.nnx

checkpoint = pytest.importorskip("embax.checkpoint")
from embax.checkpoint import linen as linen_checkpoints  # noqa: E402
from embax.checkpoint import nnx as nnx_checkpoints  # noqa: E402

NORMAL = jax.nn.initializers.normal(0.37)
DIM = 8

pytestmark = pytest.mark.usefixtures("eight_devices")


def _features(rows=21):
    tables = [
        table_spec(name, size, DIM, embax.Adam(0.1), initializer=NORMAL) for name, size in (("a", rows), ("b", 9))
    ]
    return [feature(table, table.name, inputs=(None, 3)) for table in tables]


def _ids():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 9, (8, 3)).astype(np.int32) for _ in range(2)], rng.integers(0, 13, (8,)).astype(np.int32)


class Model(nnx.Module):
    def __init__(self, seed=0, rows=21, **where):
        rngs = nnx.Rngs(seed)
        self.encoder = embax.nnx.FeatureEmbed(_features(rows), rngs=rngs, **where)
        where = {"mesh": where["mesh"]} if where else {}
        self.words = embax.nnx.Embed(13, DIM, optimizer=embax.Adagrad(0.1), rngs=rngs, **where)
        self.head = nnx.Linear(DIM, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, ids, words):
        first, second = self.encoder(ids)
        return self.head(self.dropout(first + second + self.words(words)))


@nnx.jit
def _nnx_step(model, optimizer, ids, words):
    loss, gradients = embax.nnx.value_and_grad(lambda model: (model(ids, words) ** 2).sum())(model)
    optimizer.update(model, gradients)
    return loss


def _nnx(steps, seed=0, **settings):
    model = Model(seed, **settings)
    optimizer = embax.nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), max_norm=1.0)
    return model, optimizer, _train_nnx(model, optimizer, steps)


def _train_nnx(model, optimizer, steps):
    ids, words = _ids()
    return [float(_nnx_step(model, optimizer, embax.preprocess(model.encoder.plan, ids), words)) for _ in range(steps)]


@pytest.mark.parametrize("where", [{}, {"mesh": 4, "placement": "row"}, {"mesh": 2, "placement": "column"}])
def test_nnx_goes_on_as_if_nothing_had_happened(tmp_path, where):
    where = {**where, "mesh": line_of(where["mesh"])} if where else {}
    model, optimizer, _ = _nnx(2)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        nnx_checkpoints.save(checkpoints, 2, model, optimizer, data={"epoch": 1})
        wanted = _train_nnx(model, optimizer, 2)
        other, other_optimizer, _ = _nnx(0, seed=5, **where)
        found = nnx_checkpoints.restore(checkpoints, other, other_optimizer)
    assert (found.step, found.data) == (2, {"epoch": 1})
    np.testing.assert_allclose(_train_nnx(other, other_optimizer, 2), wanted, rtol=0 if not where else 2e-5)
    assert int(other_optimizer.step.get_value()) == 4


def test_nnx_with_more_rows_and_for_serving(tmp_path):
    model, optimizer, _ = _nnx(1)
    saved = embax.to_arrays(model.encoder.plan, _states(model, optimizer))["a"]
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        nnx_checkpoints.save(checkpoints, 1, model, optimizer)
        larger, larger_optimizer, _ = _nnx(0, seed=5, rows=30)
        before = embax.to_arrays(larger.encoder.plan, _states(larger, larger_optimizer))["a"]
        nnx_checkpoints.restore(checkpoints, larger, larger_optimizer)
        served = Model(seed=7)
        nnx_checkpoints.restore(checkpoints, served)
    after = embax.to_arrays(larger.encoder.plan, _states(larger, larger_optimizer))["a"]
    for part in ("table", "momentum", "velocity"):
        np.testing.assert_array_equal(after[part], np.concatenate([saved[part], before[part][21:]]))
    ids, words = _ids()
    served.eval(), model.eval()
    np.testing.assert_array_equal(served(ids, words), model(ids, words))


@pytest.mark.parametrize("where", [{}, {"mesh": 4}])
def test_a_model_of_shapes_becomes_one_of_arrays(tmp_path, where):
    where = {"mesh": line_of(4), "placement": "row"} if where else {}

    def built(rows=21):
        model = Model(3, rows, **where)
        return model, embax.nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), max_norm=1.0)

    model, optimizer, _ = _nnx(2)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        nnx_checkpoints.save(checkpoints, 2, model, optimizer)
        shapes, its_optimizer = nnx.eval_shape(built)
        nnx_checkpoints.restore(checkpoints, shapes, its_optimizer)
        assert _train_nnx(shapes, its_optimizer, 2) == pytest.approx(_train_nnx(model, optimizer, 2), rel=1e-5)
        larger, its_optimizer = nnx.eval_shape(lambda: built(30))
        with pytest.raises(checkpoint.CheckpointError, match="vocabulary_size was 21 and is 30: pass key="):
            nnx_checkpoints.restore(checkpoints, larger, its_optimizer)
        nnx_checkpoints.restore(checkpoints, larger, its_optimizer, key=jax.random.key(1))
        words = embax.nnx.Embed(14, DIM, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(0))
        nnx_checkpoints.save(checkpoints, 3, words)
        words = nnx.eval_shape(lambda: embax.nnx.Embed(15, DIM, optimizer=embax.Adagrad(0.1), rngs=nnx.Rngs(0)))
        with pytest.raises(
            checkpoint.CheckpointError, match="was 14 and is 15: give a model that has rows, not its sh"
        ):
            nnx_checkpoints.restore(checkpoints, words, key=jax.random.key(1))


def test_gradients_that_were_being_accumulated_come_back(tmp_path):
    def built():
        model = Model()
        return model, embax.nnx.Optimizer(model, optax.sgd(0.1), every_k=3)

    model, optimizer = built()
    _train_nnx(model, optimizer, 4)  # one update, and a third of the next
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        nnx_checkpoints.save(checkpoints, 4, model, optimizer)
        other, its_optimizer = built()  # which has seen no gradient, and so has no room for them yet
        nnx_checkpoints.restore(checkpoints, other, its_optimizer)
    _train_nnx(model, optimizer, 2)
    _train_nnx(other, its_optimizer, 2)
    of = nnx.Param, embax.nnx.Table
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other, of), nnx.state(model, of))
    assert int(its_optimizer.updates.get_value()) == 2


def _states(model, optimizer):
    return {
        name: embax.TableState(table.get_value(), optimizer.slots[f"encoder/tables/{name}"].get_value())
        for name, table in model.encoder.tables.items()
    }


def test_nnx_of_another_model(tmp_path):
    model, optimizer, _ = _nnx(0)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        nnx_checkpoints.save(checkpoints, 1, model, optimizer)
        model.head = nnx.Linear(DIM, 2, rngs=nnx.Rngs(0))
        before = np.asarray(model.words.embedding.get_value())
        with pytest.raises(
            checkpoint.CheckpointError, match=r"model/head/kernel/value was float32\[8, 1\] and is float32\[8, 2\]"
        ):
            nnx_checkpoints.restore(checkpoints, model, optimizer)
        np.testing.assert_array_equal(before, model.words.embedding.get_value())


class LinenModel(nn.Module):
    where: tuple = ()

    @nn.compact
    def __call__(self, ids, words):
        where = dict(self.where)
        features = dict(zip("ab", _features(), strict=True))
        encoded = embax.linen.FeatureEmbed(features, where, name="encoder")(ids)
        own = {"mesh": where["mesh"]} if where else {}
        embedded = embax.linen.Embed(13, DIM, optimizer=embax.Adagrad(0.1), name="words", **own)(words)
        return nn.Dense(1, name="head")(encoded["a"] + encoded["b"] + embedded)


def _linen(seed, where=()):
    model = LinenModel(where)
    ids, words = _ids()
    ids = dict(zip("ab", ids, strict=True))
    params = jax.jit(model.init)(jax.random.key(seed), ids, words)["params"]
    plan = embax.plan(dict(zip("ab", _features(), strict=True)), **dict(where))
    state = embax.linen.TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(state):
        loss_fn = embax.linen.value_and_grad(lambda params: (model.apply({"params": params}, ids, words) ** 2).sum())
        loss, gradients = loss_fn(state.params)
        return state.apply_gradients(grads=gradients), loss

    return plan, state, step


@pytest.mark.parametrize("where", [(), (("mesh", 4), ("placement", "row"))])
def test_linen_goes_on_as_if_nothing_had_happened(tmp_path, where):
    where = tuple({**dict(where), "mesh": line_of(4)}.items()) if where else ()
    plan, state, step = _linen(0)
    state, _ = step(state)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        linen_checkpoints.save(checkpoints, 1, state, plans={"encoder": plan}, data=[3])
        other_plan, other, other_step = _linen(9, where)
        other, found = linen_checkpoints.restore(checkpoints, other, plans={"encoder": other_plan})
    assert (found.step, found.data, int(other.step)) == (1, [3], 1)
    names = {path.name for path in (tmp_path / "1" / "tables").iterdir() if path.is_dir()}
    assert names == {"encoder%2Fa", "encoder%2Fb", "words%2Fembedding"}
    for _ in range(2):
        state, wanted = step(state)
        other, loss = other_step(other)
        np.testing.assert_allclose(loss, wanted, rtol=0 if not where else 2e-5)


def test_layers_of_tables(tmp_path):
    """A table [layers, V, D] of no plan: layer after layer on disk."""
    values = jnp.arange(2 * 5 * DIM, dtype=jnp.float32).reshape(2, 5, DIM)
    from embax.checkpoint.trees import own_table

    table = embax.Table(values, embax.SGD(0.1), "word")
    held = own_table("word", table)
    state = embax.TableState(values.reshape(10, DIM), embax.init_slots(embax.SGD(0.1), values.reshape(10, DIM)).slots)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_held(0, [(held, state)], None, None)
        found = checkpoints.restore_held(None, [(held, None)], None, checkpoint.Choice())
        larger = own_table("word", embax.Table(jnp.zeros((2, 7, DIM)), embax.SGD(0.1)))
        with pytest.raises(
            checkpoint.CheckpointError, match="its 2 layers had 10 rows together and have 14: layers cannot"
        ):
            checkpoints.restore_held(None, [(larger, None)], None, checkpoint.Choice(key=jax.random.key(0)))
    np.testing.assert_array_equal(found.tables[0].table, state.table)


def test_two_tables_of_one_name(tmp_path):
    table = embax.Table(jnp.zeros((5, DIM)), embax.SGD(0.1))
    from embax.checkpoint.trees import own_table

    held = [(own_table("word", table), embax.init_slots(embax.SGD(0.1), table.value))] * 2
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            ValueError, match='two tables would be called "word" in a checkpoint; rename a table or a layer'
        ):
            checkpoints.save_held(0, held, None, None)


def test_linen_plans(tmp_path):
    """On a mesh tables know their plan; a plan of no layer is refused."""
    where = tuple({"mesh": line_of(4), "placement": "row"}.items())
    plan, state, _ = _linen(0, where)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match='plans names layer "enc", and the tables are in'):
            linen_checkpoints.save(checkpoints, 0, state, plans={"enc": plan})
        linen_checkpoints.save(checkpoints, 0, state)
        checkpoints.wait()
        names = {path.name for path in (tmp_path / "0" / "tables").iterdir() if path.is_dir()}
        assert names == {"encoder%2Fa", "encoder%2Fb", "words%2Fembedding"}
        with pytest.raises(TypeError, match="a TrainState has slot variables"):
            linen_checkpoints.restore(checkpoints, state, serving=True)
