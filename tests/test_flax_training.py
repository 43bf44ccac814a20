"""Training flax models: embax takes dense flax's steps, loss by loss, and touches nothing but rows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_models import DIM, TABLES, Batches, dense, loss_of, run, sparse, standard

import embax
import embax.linen
import embax.nnx

pytestmark = pytest.mark.once

FLAVOURS = ["nnx", "linen"]
LARGE = 200_000
OPTIMIZERS = {
    "sgd": (embax.SGD(0.3), optax.sgd(0.3)),
    "adagrad": (embax.Adagrad(0.2), optax.adagrad(0.2, initial_accumulator_value=0.1, eps=0)),
    "adam": (embax.Adam(0.02), standard(optax.adam(0.02))),
}


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return request.param


def assert_same_training(flavour, model, optimizer, size, batches):
    """Trains dense flax + optax and embax, and compares losses, tables and parameters."""
    ours, theirs = OPTIMIZERS[optimizer]
    runs = [run(flavour, model, swap, theirs, size, batches[0]) for swap in (dense(flavour), sparse(flavour, ours))]
    curves = [np.array([trained.step(batch) for batch in batches]) for trained in runs]
    assert curves[0][-20:].mean() < 0.9 * curves[0][:20].mean()  # there was something to learn
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-5, atol=2e-6)
    for name in TABLES[model]:
        np.testing.assert_allclose(runs[1].table(name), runs[0].table(name), rtol=2e-4, atol=1e-5)
    for mine, other in zip(runs[1].parameters(), runs[0].parameters(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("model", TABLES)
def test_two_hundred_steps_equal_dense_flax_and_optax(flavour, model, optimizer):
    source = Batches(model, size=23)
    assert_same_training(flavour, model, optimizer, 23, [source.next() for _ in range(200)])


@pytest.mark.parametrize("flavour, model", [("nnx", "words"), ("linen", "recommender")])
def test_adam_equals_dense_adam_where_every_step_touches_every_row(flavour, model):
    source = Batches(model, size=12, count=24)
    batches = [source.next(every_row=True) for _ in range(200)]
    assert all(set(range(12)) <= set(b["candidates" if model == "words" else "user"].tolist()) for b in batches)
    assert_same_training(flavour, model, "adam", 12, batches)


def test_adam_leaves_a_row_alone_until_it_is_touched_again(flavour):
    """The documented difference: dense Adam moves a row in every step, its momentum going on; lazy Adam does not."""
    source, batches = Batches("recommender", size=9), []
    for step in range(32):
        batch = source.next()
        batch["user"] = np.where(batch["user"] == 0, 1, batch["user"])
        batch["user"][0] = 0 if step % 10 == 0 else 2
        batches.append(batch)
    ours, theirs = OPTIMIZERS["adam"]
    lazy = run(flavour, "recommender", sparse(flavour, ours), theirs, 9, batches[0])
    moving = run(flavour, "recommender", dense(flavour), theirs, 9, batches[0])
    for step, batch in enumerate(batches):
        before = lazy.table("user")[0], *(slot[0] for slot in lazy.slots("user"))
        dense_before = moving.table("user")[0]
        lazy.step(batch), moving.step(batch)
        after = lazy.table("user")[0], *(slot[0] for slot in lazy.slots("user"))
        assert not np.array_equal(moving.table("user")[0], dense_before)
        same = [np.array_equal(b, a) for b, a in zip(before, after, strict=True)]
        assert same == [step % 10 != 0] * 3, f"step {step}: row, momentum, velocity unchanged: {same}"


def test_flax_models_clip_and_accumulate_as_with_optax(flavour):
    (table_optimizer, tx), every_k = OPTIMIZERS["adagrad"], 3
    source = Batches("words", 250)
    given = [source.next() for _ in range(7)]
    theirs = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.3), tx), every_k)
    runs = [
        run(flavour, "words", dense(flavour), standard(theirs), 250, given[0]),
        run(flavour, "words", sparse(flavour, table_optimizer, max_norm=0.3, every_k=every_k), tx, 250, given[0]),
    ]
    for call, batch in enumerate(given):
        before = runs[1].table("word")
        losses = [trained.step(batch) for trained in runs]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
        np.testing.assert_allclose(runs[1].table("word"), runs[0].table("word"), rtol=2e-5, atol=2e-6)
        for mine, other in zip(runs[1].parameters(), runs[0].parameters(), strict=True):
            np.testing.assert_allclose(mine, other, rtol=2e-5, atol=2e-6)
        assert np.array_equal(runs[1].table("word"), before) == (call % every_k != every_k - 1)


def assert_touches_rows_only(report, arrays):
    assert report.ok, report
    assert report.writes == arrays, report
    assert 0 < report.temp_bytes < report.table_bytes // 50, report


# Words are looked up as inputs and as candidates (weight tying); the recommender looks up one of its tables twice.
STEPS = [
    ("words", embax.SGD(0.1), {}),
    ("recommender", embax.Adagrad(0.1), {}),
    ("words", embax.Adam(0.1), {}),
    ("words", embax.Adagrad(0.1), {"every_k": 2}),
    ("recommender", embax.Adam(0.1), {"max_norm": 0.5}),
]


@pytest.mark.parametrize("model, optimizer, settings", STEPS, ids=lambda x: getattr(x, "kernel", None) or str(x))
def test_a_donated_step_touches_rows_only(flavour, model, optimizer, settings):
    source = Batches(model, LARGE)
    batch = source.next()
    trained = run(flavour, model, sparse(flavour, optimizer, **settings), optax.sgd(0.1), LARGE, batch)
    arrays = len(TABLES[model]) * (1 + optimizer.slot_variables_count())
    if "every_k" in settings:  # the first call makes room for the gradients, in a program of its own
        trained.step(batch)
    report = embax.check_step(trained.jitted, *trained.arguments, batch)
    assert_touches_rows_only(report, arrays)
    assert report.table_bytes == arrays * LARGE * DIM * 4


def test_a_dense_step_does_not(flavour):
    batch = Batches("words", LARGE).next()
    trained = run(flavour, "words", dense(flavour), optax.sgd(0.1), LARGE, batch)
    donated = (0, 1) if flavour == "nnx" else 0
    report = embax.check_step(trained.jitted, *trained.arguments, batch, donate_argnums=donated)
    assert any(f"f32[{LARGE},{DIM}]" in found for found in report.table_sized)


def test_a_donated_table_stays_where_it_is(flavour):
    batch = Batches("words", 1000).next()
    trained = run(flavour, "words", sparse(flavour, embax.Adagrad(0.1)), optax.sgd(0.1), 1000, batch)

    def array():
        return (
            trained.model.word.embedding[...] if flavour == "nnx" else trained.state.params["word"]["embedding"].value
        )

    before = array()
    place = before.unsafe_buffer_pointer()
    trained.step(batch)
    assert before.is_deleted() and array().unsafe_buffer_pointer() == place


def scanned(flavour, trained, swap):
    """Returns a jitted function of the run's arguments and stacked batches: one scan over all steps."""
    if flavour == "linen":

        def linen_step(state, batch):
            def loss_fn(params):
                return loss_of(state.apply_fn({"params": params}, batch), batch)

            loss, gradients = swap.value_and_grad(loss_fn)(state.params)
            return state.apply_gradients(grads=gradients), loss

        return jax.jit(lambda state, batches: jax.lax.scan(linen_step, state, batches), donate_argnums=0)

    def nnx_step(carry, batch):
        model, optimizer = carry
        loss, gradients = swap.value_and_grad(lambda model: loss_of(model(batch), batch))(model)
        optimizer.update(model, gradients)
        return carry, loss

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def steps(model, optimizer, batches):
        return nnx.scan(nnx_step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))((model, optimizer), batches)[1]

    return steps


def stacked(batches):
    return jax.tree.map(lambda *parts: np.stack(parts), *batches)


def test_a_scan_over_steps_touches_rows_only(flavour):
    source, swap = Batches("recommender", LARGE), sparse(flavour, embax.Adagrad(0.1))
    batches = [source.next() for _ in range(3)]
    trained = run(flavour, "recommender", swap, optax.sgd(0.1), LARGE, batches[0])
    report = embax.check_step(scanned(flavour, trained, swap), *trained.arguments, stacked(batches))
    assert_touches_rows_only(report, 4)


def test_a_scan_over_steps_equals_dense_flax_and_optax(flavour):
    source, (ours, theirs) = Batches("words", 11), OPTIMIZERS["adagrad"]
    batches = stacked([source.next() for _ in range(20)])
    first, losses, tables = jax.tree.map(lambda part: part[0], batches), [], []
    for swap in (dense(flavour), sparse(flavour, ours)):
        trained = run(flavour, "words", swap, theirs, 11, first)
        out = scanned(flavour, trained, swap)(*trained.arguments, batches)
        if flavour == "linen":
            trained.state, out = out
        losses.append(out)
        tables.append(trained.table("word"))
    assert losses[0].shape == (20,)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-4, atol=1e-6)


def step_of(flavour, layer, ids, loss_fn):
    """Returns (donated step, its arguments) of a loss of one layer's activations."""
    if flavour == "nnx":
        optimizer = embax.nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)

        @functools.partial(nnx.jit, donate_argnums=(0, 1))
        def nnx_step(layer, optimizer, ids):
            loss, gradients = embax.nnx.value_and_grad(lambda layer: loss_fn(layer(ids)))(layer)
            optimizer.update(layer, gradients)
            return loss

        return nnx_step, (layer, optimizer, ids)
    params = layer.init(jax.random.key(0), ids)["params"]
    state = embax.linen.TrainState.create(apply_fn=layer.apply, params=params, tx=optax.sgd(0.1))

    @functools.partial(jax.jit, donate_argnums=0)
    def linen_step(state, ids):
        loss, gradients = embax.linen.value_and_grad(lambda p: loss_fn(state.apply_fn({"params": p}, ids)))(
            state.params
        )
        return state.apply_gradients(grads=gradients), loss

    return linen_step, (state, ids)


@pytest.mark.parametrize("optimizer", [embax.SGD(0.1), embax.Adagrad(0.1)], ids=["sgd", "adagrad"])
def test_a_step_of_a_linear_loss_touches_rows_only(flavour, optimizer):
    """With a linear loss nothing but the rows' order after the lookup keeps XLA from copying the table."""
    ids = jnp.arange(64).reshape(8, 8) * 17
    if flavour == "nnx":
        layer = embax.nnx.Embed(LARGE, DIM, optimizer=optimizer, rngs=nnx.Rngs(0))
    else:
        layer = embax.linen.Embed(LARGE, DIM, optimizer=optimizer)
    step, arguments = step_of(flavour, layer, ids, jnp.sum)
    assert_touches_rows_only(embax.check_step(step, *arguments), 1 + optimizer.slot_variables_count())


@pytest.mark.parametrize("flavour, form", [("nnx", "IdBatch"), ("linen", "IdBatch"), ("linen", "raw ids")])
def test_a_step_of_a_feature_embed_touches_rows_only(flavour, form):
    init = nn.initializers.normal(0.1)
    settings = {"vocabulary_size": LARGE, "embedding_dim": DIM, "combiner": "mean", "initializer": init}
    item = embax.TableSpec(name="item", optimizer=embax.Adagrad(0.1), **settings)
    user = embax.TableSpec(name="user", optimizer=embax.Adam(0.1), **settings)
    tables = {"history": item, "clicked": item, "user": user}
    features = {
        name: embax.FeatureSpec(name=name, table_spec=table, input_shape=(8, 5), output_shape=(8, DIM))
        for name, table in tables.items()
    }
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, LARGE, (8, 5), np.int32) for name in tables}
    batch = embax.preprocess(embax.plan(features), ids) if form == "IdBatch" else ids
    if flavour == "nnx":
        layer = embax.nnx.FeatureEmbed(features, rngs=nnx.Rngs(0))
    else:
        layer = embax.linen.FeatureEmbed(features)
    step, arguments = step_of(flavour, layer, batch, lambda a: (a["history"] * a["clicked"] * a["user"]).sum())
    assert_touches_rows_only(embax.check_step(step, *arguments), 2 + 3)


class SmallWords(nnx.Module):
    def __init__(self, rngs):
        self.word = embax.nnx.Embed(250, 3, optimizer=embax.Adagrad(0.1), rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, ids):
        return self.out(self.word(ids))


def only_dense(model, gradients):
    flat = nnx.to_flat_state(gradients)
    return nnx.from_flat_state([(path, v) for path, v in flat if not isinstance(v, embax.nnx.TableGradient)])


def dense_in_place(model, gradients):
    dense = nnx.Param(gradients.word.embedding.row_gradients.to_dense())
    flat = [(path, v) for path, v in nnx.to_flat_state(gradients) if path != ("word", "embedding")]
    return nnx.from_flat_state([*flat, (("word", "embedding"), dense)])


def rows_as_floats(model, gradients):
    return jax.tree.map(lambda g: g.astype(jnp.float32), gradients)


def of_a_prefetched_model(model, gradients):
    small = embax.nnx.prefetch(model, jnp.array([3, 4]))
    return nnx.grad(lambda small: small.word(jnp.array([3, 4])).sum())(small)


NO_TABLES = "the model has tables ['word/embedding'], and the gradients are of tables []"
BAD_NNX = [
    (only_dense, KeyError, NO_TABLES),
    (dense_in_place, KeyError, NO_TABLES),
    (rows_as_floats, TypeError, "the rows of a RowGradients are float32; they must be integers"),
    (
        of_a_prefetched_model,
        TypeError,
        'table "word/embedding": the gradient is that of prefetched rows; pass embax',
    ),
]


BAD_NNX_ACCUMULATED = [(*case, 2) for case in BAD_NNX]


@pytest.mark.parametrize(
    "spoil, error, text, every_k",
    [(*case, 1) for case in BAD_NNX] + BAD_NNX_ACCUMULATED,
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_nnx_optimizer_names_gradients_of_the_wrong_kind_and_changes_nothing(spoil, error, text, every_k):
    model = SmallWords(nnx.Rngs(0))
    optimizer = embax.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param, every_k=every_k)
    gradients = embax.nnx.value_and_grad(lambda model: model(jnp.array([3, 5])).sum())(model)[1]
    optimizer.update(model, gradients)
    before = jax.tree.map(np.array, nnx.as_pure(nnx.state((model, optimizer))))
    with pytest.raises(error) as raised:
        optimizer.update(model, spoil(model, gradients))
    assert text in str(raised.value)
    after = nnx.as_pure(nnx.state((model, optimizer)))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_nnx_gradients_may_leave_nnx_jit():
    model, ids = SmallWords(nnx.Rngs(0)), jnp.array([3, 5])
    both = embax.nnx.value_and_grad(lambda model, ids: model(ids).sum())
    found, expected = nnx.jit(both)(model, ids)[1], both(model, ids)[1]
    jax.tree.map(np.testing.assert_allclose, *(g.word.embedding.row_gradients for g in (found, expected)))
