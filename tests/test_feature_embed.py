"""FeatureEmbed of both Flax APIs is the core of embax: the same tables, activations, row gradients and steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import feature, table_spec

import embax
import embax.linen
import embax.nnx

pytestmark = pytest.mark.once

BATCH = 3


def close(one, other):
    """Asserts that both are equal up to rounding, in units of the largest number there."""
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


INITIALIZER = jax.nn.initializers.normal(1.0)  # one object: plans are then equal


def features():
    """Three tables, two of which share a stack; every form of input, in a nested structure."""
    item = table_spec("item", 9, 4, embax.Adagrad(0.1), "mean", initializer=INITIALIZER)
    tag = table_spec("tag", 5, 4, embax.Adagrad(0.1), "sum", initializer=INITIALIZER)
    word = table_spec("word", 7, 2, embax.SGD(0.5), "sqrtn", initializer=INITIALIZER)
    return {
        "user": {
            "dense": feature(item, "dense", (None, 3)),
            "ragged": feature(item, "ragged", (None,)),
            "tags": feature(tag, "tags", (None, 2), padding_id=0),
        },
        "words": {
            "pooled": feature(word, "pooled", (None, 4)),
            "positions": feature(word, "positions", (None, 2), (None, 2, 2)),
            "pooled positions": feature(word, "pooled positions", (None, 2, 2), (None, 2, 2)),
        },
    }


def inputs(seed=0):
    """Ids and weights for ``features``, as arrays and RaggedIds: what fits outside of jit and inside."""
    rng = np.random.default_rng(seed)
    splits = np.array([0, 3, 3, 5], np.int32)

    def of(make):
        return {
            "user": {
                "dense": make(9, (BATCH, 3)),
                "ragged": embax.RaggedIds(make(9, (5,)), splits),
                "tags": make(5, (BATCH, 2)),
            },
            "words": {
                "pooled": make(7, (BATCH, 4)),
                "positions": make(7, (BATCH, 2)),
                "pooled positions": make(7, (BATCH, 2, 2)),
            },
        }

    ids = of(lambda rows, shape: rng.integers(0, rows, shape).astype(np.int32))
    return ids, of(lambda rows, shape: rng.uniform(0.5, 2.0, shape).astype(np.float32))


def loss_of(activations):
    """Nonlinear, and another function of every activation."""
    parts = [jnp.tanh(x * 0.1 * (n + 1)).sum() for n, x in enumerate(jax.tree.leaves(activations))]
    return jnp.square(sum(parts))


def with_activations(activations):
    return loss_of(activations), activations


class NNXModel:
    """A FeatureEmbed of NNX with the tables of the core, and its optimizer."""

    def __init__(self, tables):
        self.layer = embax.nnx.FeatureEmbed(features(), rngs=nnx.Rngs(0))
        for name, state in tables.items():
            self.layer.tables[name].set_value(state.table)
        self.optimizer = embax.nnx.Optimizer(self.layer, optax.sgd(0.1), wrt=nnx.Param)
        self.plan = self.layer.plan

        @nnx.jit
        def step(layer, optimizer, *given):
            door = embax.nnx.value_and_grad(lambda layer: with_activations(layer(*given)), has_aux=True)
            (_, activations), gradients = door(layer)
            optimizer.update(layer, gradients)
            return activations, {name: v.row_gradients for name, v in gradients["tables"].items()}

        self.jitted = step

    def step(self, *given):
        """Steps, and returns activations and row gradients."""
        return self.jitted(self.layer, self.optimizer, *given)

    def states(self):
        return {
            name: (variable.get_value(), *self.optimizer.slots[f"tables/{name}"].get_value())
            for name, variable in self.layer.tables.items()
        }


class LinenModel:
    """A FeatureEmbed of Linen with the tables of the core, in a TrainState."""

    def __init__(self, tables):
        self.layer = embax.linen.FeatureEmbed(features())
        params = self.layer.init(jax.random.key(0), inputs()[0])["params"]
        params = {name: params[name].with_value(state.table) for name, state in tables.items()}
        self.state = embax.linen.TrainState.create(apply_fn=self.layer.apply, params=params, tx=optax.sgd(0.1))
        self.plan = self.layer.plan

        @jax.jit
        def step(state, *given):
            loss = lambda params: with_activations(state.apply_fn({"params": params}, *given))  # noqa: E731
            (_, activations), gradients = embax.linen.value_and_grad(loss, has_aux=True)(state.params)
            return state.apply_gradients(grads=gradients), activations, gradients

        self.jitted = step

    def step(self, *given):
        """Steps, and returns activations and row gradients."""
        self.state, *out = self.jitted(self.state, *given)
        return out

    def states(self):
        names = [table.name for table in jax.tree.leaves(self.state.params, is_leaf=lambda x: hasattr(x, "value"))]
        slots = dict(zip(names, self.state.slots, strict=True))
        return {name: (self.state.params[name].value, *slots[name]) for name in names}


both = pytest.mark.parametrize("model", [NNXModel, LinenModel])


@pytest.fixture(scope="module")
def core():
    """The plan, tables that are drawn once, and the jitted step of the core."""
    plan = embax.plan(features())
    assert {s.name: s.rows for s in plan.stacks} == {"item_tag": 14, "word": 7}

    @jax.jit
    def step(tables, batch):
        activations, residuals = embax.lookup(plan, tables, batch)
        rows = embax.row_gradients(plan, residuals, jax.grad(loss_of)(activations))
        return rows, embax.update(plan, tables, residuals, jax.grad(loss_of)(activations))

    return plan, embax.init(plan, jax.random.key(5)), step


@pytest.mark.parametrize("raw, weighted", [(False, True), (True, False)], ids=["weighted IdBatch", "raw ids in jit"])
@both
def test_a_layer_is_the_core(core, model, raw, weighted):
    plan, tables, step = core
    layer = model(tables)
    assert layer.plan == plan
    for seed in range(2):
        ids, weights = inputs(seed)
        given = (ids, weights) if weighted else (ids,)
        batch = embax.preprocess(plan, *given)
        given = given if raw else (batch,)
        wanted = embax.lookup(plan, tables, batch)[0]
        mine, gradients = layer.step(*given)
        if not seed:
            jax.tree.map(np.testing.assert_array_equal, mine, wanted)  # bit by bit, from the same tables
        rows, tables = step(tables, batch)
        for name in rows:
            close(gradients[name].to_dense(), rows[name].to_dense())
            assert np.abs(rows[name].to_dense()).max() > 0.1
            jax.tree.map(close, layer.states()[name], (tables[name].table, *tables[name].slots))


def test_a_joint_optimizer_steps_linen_parameters(core):
    """Tables one by one, without a TrainState."""
    plan, tables, step = core
    layer, batch = embax.linen.FeatureEmbed(plan), embax.preprocess(plan, inputs()[0])
    params = {n: embax.linen.Table(s.table, plan.stack(n).optimizer, n) for n, s in tables.items()}
    optimizer = embax.JointOptimizer()

    @jax.jit
    def joint(params, state):
        gradients = embax.value_and_grad(lambda p: loss_of(layer.apply({"params": p}, batch)))(params)[1]
        return optimizer.update(params, gradients, state)

    params, state = joint(params, optimizer.init(params))
    wanted = step(tables, batch)[1]
    for name, slots in zip(sorted(wanted), state.slots, strict=True):
        jax.tree.map(close, (params[name].value, *slots), (wanted[name].table, *wanted[name].slots))


def pooled(rows, weights, combiner):
    """The definition of weighted pooling, over the last axis but one."""
    total = (rows * weights[..., None]).sum(-2)
    divisor = {"sum": jnp.ones(()), "mean": weights.sum(-1), "sqrtn": jnp.sqrt(jnp.square(weights).sum(-1))}[combiner]
    return total / jnp.broadcast_to(divisor, total.shape[:-1])[..., None]


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("family", ["nnx", "linen"])
def test_learnable_weights(family, combiner):
    """Gradients of weights and of rows, from one loss, are those of the dense computation."""
    given = {"x": feature(table_spec("item", 9, 4, embax.SGD(0.1), combiner), "x", (None, 3))}
    ids, weights = jnp.array([[1, 2, 2], [0, 8, 1]]), jnp.array([[0.5, 1.0, 2.0], [1.5, 0.25, 1.0]])
    table = jax.random.normal(jax.random.key(1), (9, 4))

    def dense(table, weights):
        return loss_of(pooled(table[ids], weights, combiner))

    wanted, (wanted_rows, wanted_weights) = jax.value_and_grad(dense, (0, 1))(table, weights)
    if family == "nnx":
        layer = embax.nnx.FeatureEmbed(given, rngs=nnx.Rngs(0))
        layer.tables["item"].set_value(table)
        model = nnx.Dict(layer=layer, weights=nnx.Param(weights))

        @nnx.jit
        def step(model):
            value, g = embax.nnx.value_and_grad(lambda m: loss_of(m.layer({"x": ids}, {"x": m.weights[...]})))(model)
            return value, g["layer"]["tables"]["item"].row_gradients, g["weights"].get_value()

        value, rows, gradient = step(model)
    else:
        layer = embax.linen.FeatureEmbed(given)
        params = {"item": embax.linen.Table(table, embax.SGD(0.1), "item")}
        fun = lambda p, w: loss_of(layer.apply({"params": p}, {"x": ids}, {"x": w}))  # noqa: E731
        value, (rows, gradient) = jax.jit(embax.linen.value_and_grad(fun, (0, 1)))(params, weights)
        rows = rows["item"]
    close(value, wanted)
    close(rows.to_dense(), wanted_rows)
    close(gradient, wanted_weights)


@both
def test_prefetching_a_batch(core, model):
    """Plain JAX over a prefetched model; what was not prefetched is NaN or an error, never another row."""
    plan, tables, step = core
    layer, ids = model(tables), inputs()[0]
    batch = embax.preprocess(plan, ids)
    rows, wanted = step(tables, batch)[0], embax.lookup(plan, tables, batch)[0]
    if model is NNXModel:
        small = embax.nnx.prefetch(layer.layer, batch)
        lookup = nnx.jit(lambda small, batch: small(batch))
        _, gradients = nnx.jit(nnx.value_and_grad(lambda small: loss_of(small(batch))))(small)
        gradients = embax.nnx.row_gradients(small, gradients)["tables"]
        gradients, eager = {name: v.row_gradients for name, v in gradients.items()}, small
    else:
        small = embax.linen.prefetch(layer.state.params, batch)
        eager = lambda batch: layer.layer.apply({"params": small}, batch)  # noqa: E731
        lookup = jax.jit(lambda small, batch: layer.layer.apply({"params": small}, batch))
        _, gradients = jax.jit(embax.linen.value_and_grad(lambda small: loss_of(lookup(small, batch))))(small)
    jax.tree.map(np.testing.assert_array_equal, lookup(small, batch), wanted)
    for name in rows:
        close(gradients[name].to_dense(), rows[name].to_dense())

    only = jax.tree.map(np.array, ids)
    only["user"]["dense"][0] = missing = sorted(set(range(9)) - set(np.ravel(ids["user"]["dense"])))[0]
    other = embax.preprocess(plan, only)
    if missing in ids["user"]["ragged"].values:
        pytest.fail("every id is prefetched; draw others")
    wanted["user"]["dense"] = wanted["user"]["dense"].at[0].set(jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, lookup(small, other), wanted)
    with pytest.raises(
        ValueError, match=f'table "(tables/)?item_tag": id {missing} is looked up, and embax.prefetch was not'
    ):
        eager(other)


def by_table(plan, rows):
    return embax.to_arrays(plan, {s.name: embax.init_slots(s.optimizer, rows[s.name]) for s in plan.stacks})


@pytest.mark.parametrize("family", ["nnx", "linen"])
def test_initial_values_do_not_depend_on_stacking(family):
    values = []
    for stacks in ("auto", "none"):
        if family == "nnx":
            layer = embax.nnx.FeatureEmbed(features(), rngs=nnx.Rngs(3), stacks=stacks)
            rows = {name: table.get_value() for name, table in layer.tables.items()}
            init = {s: t.table for s, t in embax.init(layer.plan, nnx.Rngs(3).params()).items()}
            jax.tree.map(np.testing.assert_array_equal, rows, init)
        else:
            layer = embax.linen.FeatureEmbed(features(), {"stacks": stacks})
            rows = nn.meta.unbox(layer.init(jax.random.key(3), inputs()[0]))["params"]
        values.append({name: arrays["table"] for name, arrays in by_table(layer.plan, rows).items()})
    assert sorted(values[0]) == ["item", "tag", "word"] and np.std(values[0]["item"]) > 0.5
    jax.tree.map(np.testing.assert_array_equal, *values)


class TwoTowers(nnx.Module):
    def __init__(self, rngs):
        self.user = nnx.Dict(id=embax.nnx.Embed(9, 2, optimizer=embax.SGD(0.1), rngs=rngs))
        self.item = nnx.Dict(id=embax.nnx.Embed(5, 2, optimizer=embax.SGD(0.1), rngs=rngs))

    def __call__(self, users, items):
        return (self.user.id(users) * self.item.id(items)).sum()


class LinenTowers(nn.Module):
    @nn.compact
    def __call__(self, users, items):
        rows = embax.linen.Embed(9, 2, optimizer=embax.SGD(0.1), name="user")(users)
        return (rows * embax.linen.Embed(5, 2, optimizer=embax.SGD(0.1), name="item")(items)).sum()


@pytest.mark.parametrize("family", ["nnx", "linen"])
def test_prefetching_tables_by_name(family):
    users, items = jnp.array([8, 1, 1]), jnp.array([4, -1, 0])
    if family == "nnx":
        model, prefetch, jit = TwoTowers(nnx.Rngs(0)), embax.nnx.prefetch, nnx.jit
        door = embax.nnx.value_and_grad(lambda model: model(users, items))
        names = "user/id/embedding", "id/embedding", "item/id/embedding"
        rows_in = lambda g: [g[name]["id"]["embedding"].row_gradients for name in ("user", "item")]  # noqa: E731
    else:
        towers, prefetch, jit = LinenTowers(), embax.linen.prefetch, jax.jit
        model = towers.init(jax.random.key(0), users, items)
        door = embax.linen.value_and_grad(lambda model: towers.apply(model, users, items))
        names = "user/embedding", "embedding", "item/embedding"
        rows_in = lambda g: [g["params"][name]["embedding"] for name in ("user", "item")]  # noqa: E731

    @jit
    def step(model):
        value, gradients = door(model)
        return value, [rows.to_dense() for rows in rows_in(gradients)]

    small = prefetch(model, {names[0]: users, names[2]: {"nested": [items]}})
    jax.tree.map(close, step(small), step(model))
    for wrong, count in ((names[1], 2), ("nobody", 0), (names[0][1:], 0)):
        with pytest.raises(
            KeyError, match=f"prefetch: ids are given for table '{wrong}', which {count} tables are called"
        ):
            prefetch(model, {wrong: users})
    with pytest.raises(ValueError, match=r"prefetch: there are 2 tables \(.*\); give the ids by table"):
        prefetch(model, users)


STRUCTURES = {
    "one": lambda a, b: a,
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: {"x": [a, {"y": b}], "z": ()},
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["nnx", "linen"])
def test_structures(family, structure):
    """Activations have the structure of the features; Linen, which changes lists, takes it from a Plan."""
    tree = STRUCTURES[structure]
    item = table_spec("item", 9, 4, embax.SGD(0.1), "sum")
    plan = embax.plan(tree(feature(item, "a", (None, 3)), feature(item, "b", (None, 3))))
    ids = tree(jnp.array([[1, 2, 2]]), jnp.array([[0, 1, 2]]))
    if family == "nnx":
        layer = embax.nnx.FeatureEmbed(plan, rngs=nnx.Rngs(0))
        activations, table = layer(ids), layer.tables["item"].get_value()
    else:
        layer = embax.linen.FeatureEmbed(plan)
        activations, variables = layer.init_with_output(jax.random.key(0), ids)
        table = variables["params"]["item"].value
    jax.tree.map(close, activations, jax.tree.map(lambda i: table[i].sum(1), ids))
    assert jax.tree.structure(activations) == jax.tree.structure(ids) == plan.structure


def test_what_is_refused(core):
    plan, tables, _ = core
    ids, weights = inputs()
    batch, layer = embax.preprocess(plan, ids), embax.nnx.FeatureEmbed(features(), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="FeatureEmbed: an IdBatch has its weights already; give weights to preprocess"
    ):
        layer(batch, weights)
    with pytest.raises(ValueError, match="ids must have the structure of the features given to plan"):
        layer({"user": ids["user"]})
    with pytest.raises(ValueError, match="stacks: a Plan is given, which has its settings"):
        embax.nnx.FeatureEmbed(plan, stacks="none", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="stacks: a Plan is given, which has its settings"):
        embax.linen.FeatureEmbed(plan, {"stacks": "none"}).init(jax.random.key(0), batch)
    params = {name: state.table[1:] for name, state in tables.items()}
    with pytest.raises(
        ValueError, match=r'table "item_tag": the parameter has shape \(13, 4\), and the features say \(14, 4\)'
    ):
        embax.linen.FeatureEmbed(plan).apply({"params": params}, batch)
    with pytest.raises(embax.SparseGradientError, match=r'table "item_tag" \[14, 4\]: a plain jax.grad'):
        jax.grad(lambda p: loss_of(embax.linen.FeatureEmbed(plan).apply({"params": p}, batch)))(
            {n: embax.linen.Table(s.table, plan.stack(n).optimizer, n) for n, s in tables.items()}
        )
    with pytest.raises(embax.SparseGradientError, match="a plain jax.grad"):
        nnx.grad(lambda layer: loss_of(layer(batch)))(layer)
