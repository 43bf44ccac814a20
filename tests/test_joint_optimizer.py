"""One optimizer for dense parameters and tables equals optax on dense gradients; what it refuses, in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_models import standard

import embax
import embax.linen
import embax.nnx

pytestmark = pytest.mark.once

ROWS, IDS, DIM = 61, 9, 3  # ids are the first few of the rows, so that calls share rows
ADAGRAD = embax.Adagrad(0.2), optax.adagrad(0.2, initial_accumulator_value=0.1, eps=0)
SGD = embax.SGD(0.2), optax.sgd(0.2)
BOTH = pytest.mark.parametrize("table_optimizer, tx", [SGD, ADAGRAD], ids=["sgd", "adagrad"])


def loss_fn(params, batch):
    hidden = jnp.tanh(params["word"][batch["ids"]] @ params["kernel"] + params["bias"])
    return 4 * jnp.mean((hidden - batch["target"]) ** 2)


def arrays():
    rng = np.random.default_rng(0)
    shapes = {"word": (ROWS, DIM), "kernel": (DIM, DIM), "bias": (1, DIM)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def with_table(optimizer):
    return {**arrays(), "word": embax.Table(arrays()["word"], optimizer)}


def batches(*sizes):
    rng = np.random.default_rng(1)
    draw = [(rng.integers(0, IDS, n), rng.normal(size=(n, DIM)) * (0.2 + i % 3)) for i, n in enumerate(sizes)]
    return [{"ids": jnp.asarray(i, jnp.int32), "target": jnp.asarray(t, jnp.float32)} for i, t in draw]


def by_optax(tx, given):
    """Returns the parameters after each call of optax on dense gradients."""
    tx = standard(tx)

    @jax.jit
    def step(params, state, batch):
        changes, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, changes), state

    params, out = arrays(), []
    state = tx.init(params)
    for batch in given:
        params, state = step(params, state, batch)
        out.append(params)
    return out


def stepping(joint):
    """Returns a jitted step of ``joint``."""

    def step(params, state, batch):
        loss, gradients = embax.value_and_grad(loss_fn)(params, batch)
        return joint.update(params, gradients, state)

    return jax.jit(step)


def by_embax(table_optimizer, joint, given):
    """Returns the parameters, as plain arrays, after each call of ``joint``."""
    params, step, out = with_table(table_optimizer), stepping(joint), []
    state = joint.init(params)
    for batch in given:
        params, state = step(params, state, batch)
        out.append({**params, "word": params["word"].value})
    return out


def assert_same(ours, theirs):
    assert not np.array_equal(theirs[-1]["word"], arrays()["word"])
    for mine, other in zip(ours, theirs, strict=True):
        for name in other:
            np.testing.assert_allclose(mine[name], other[name], rtol=2e-5, atol=2e-6, err_msg=name)


def dense_gradients(params, batch):
    return jax.grad(loss_fn)(params, batch)


@BOTH
def test_max_norm_is_that_of_dense_and_row_gradients_together(table_optimizer, tx):
    given = batches(*[6] * 9)
    ours = by_embax(table_optimizer, embax.JointOptimizer(tx, max_norm=2.0), given)
    theirs = by_optax(optax.chain(optax.clip_by_global_norm(2.0), tx), given)
    assert_same(ours, theirs)
    gradients = [dense_gradients(p, b) for p, b in zip(theirs, given[1:], strict=False)]
    norms = [float(optax.tree.norm(g)) for g in gradients]
    assert min(norms) < 2 < max(norms)  # some were clipped, some were not
    # The norm of the rows alone, and of the dense part alone, would have clipped less.
    assert any(float(jnp.linalg.norm(g["word"])) < 2 < n for g, n in zip(gradients, norms, strict=True))


MULTI_STEPS = {
    "every_k=3, ragged": (*ADAGRAD, embax.JointOptimizer(ADAGRAD[1], every_k=3), [4, 7, 2, 7, 2, 7]),
    "optax.MultiSteps": (*SGD, embax.JointOptimizer(optax.MultiSteps(SGD[1], 3)), [5] * 6),
}


@pytest.mark.parametrize("case", MULTI_STEPS)
def test_every_k_is_multi_steps(case):
    table_optimizer, tx, joint, sizes = MULTI_STEPS[case]
    given = batches(*sizes)
    ours = by_embax(table_optimizer, joint, given)
    assert_same(ours, by_optax(optax.MultiSteps(tx, 3), given))
    for call, (before, after) in enumerate(zip([arrays(), *ours], ours, strict=False)):
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        assert moved == (set(before) if call % 3 == 2 else set())


def test_every_k_of_a_table_smaller_than_the_rows_of_its_calls():
    joint, given = embax.JointOptimizer(SGD[1], every_k=2), batches(40, 40)
    assert_same(by_embax(SGD[0], joint, given), by_optax(optax.MultiSteps(SGD[1], 2), given))


def test_optax_multi_steps_sets_every_k():
    joint = embax.JointOptimizer(optax.MultiSteps(SGD[1], 3))
    assert joint.every_k == 3 and not hasattr(joint.tx, "inner_opt")
    assert embax.JointOptimizer(optax.MultiSteps(SGD[1], 3), every_k=3).every_k == 3


def test_max_norm_with_every_k_clips_the_mean():
    table_optimizer, tx = ADAGRAD
    given = batches(*[5] * 6)
    ours = by_embax(table_optimizer, embax.JointOptimizer(tx, max_norm=0.7, every_k=3), given)
    clipped = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.7), tx), 3)
    theirs = by_optax(clipped, given)
    assert_same(ours, theirs)
    assert not np.allclose(theirs[-1]["word"], by_optax(optax.MultiSteps(tx, 3), given)[-1]["word"], atol=1e-3)


def linear(step):
    return 0.3 - 0.04 * jnp.asarray(step, jnp.float32)


def kernels_of(params):
    return jax.tree.map(lambda p: p.ndim > 1 and p.shape[0] > 1, params)


def kind_of(params):
    return jax.tree.map(lambda p: "kernel" if p.shape[0] > 1 else "bias", params)


TRANSFORMATIONS = {
    "chain": (optax.chain(optax.trace(0.9), optax.scale(-0.1)), *ADAGRAD),
    "masked": (optax.chain(optax.masked(optax.add_decayed_weights(0.3), kernels_of), optax.sgd(0.1)), *SGD),
    "multi_transform": (optax.multi_transform({"kernel": optax.sgd(0.3), "bias": ADAGRAD[1]}, kind_of), *ADAGRAD),
    "schedule, SGD": (optax.sgd(linear), embax.SGD(linear), optax.sgd(linear)),
    "schedule, Adagrad": (optax.sgd(linear, momentum=0.9), embax.Adagrad(linear), optax.adagrad(linear, eps=0)),
}


@pytest.mark.parametrize("case", TRANSFORMATIONS)
def test_any_transformation_of_the_dense_parameters(case):
    tx, table_optimizer, table_tx = TRANSFORMATIONS[case]
    given = batches(*[5] * 6)
    labels = {"word": "table", "kernel": "rest", "bias": "rest"}
    both = optax.multi_transform({"table": table_tx, "rest": tx}, labels)
    assert_same(by_embax(table_optimizer, embax.JointOptimizer(tx), given), by_optax(both, given))


def test_schedules_count_updates_where_gradients_are_accumulated():
    tx, table_optimizer, _ = TRANSFORMATIONS["schedule, SGD"]
    given = batches(*[5] * 6)
    ours = by_embax(table_optimizer, embax.JointOptimizer(tx, every_k=2), given)
    assert_same(ours, by_optax(optax.MultiSteps(tx, 2), given))


def test_the_state_is_a_pytree_that_survives_a_round_trip():
    table_optimizer, tx = ADAGRAD
    joint, params, given = embax.JointOptimizer(tx, max_norm=1.0, every_k=3), with_table(ADAGRAD[0]), batches(*[5] * 7)
    step, state = stepping(joint), joint.init(params)
    for batch in given[:4]:
        params, state = step(params, state, batch)
    leaves, structure = jax.tree.flatten((params, state))
    copied = jax.tree.unflatten(structure, [jnp.array(np.array(leaf)) for leaf in leaves])
    assert jax.tree.structure(copied) == structure and isinstance(copied[0]["word"], embax.Table)
    for batch in given[4:]:
        params, state = step(params, state, batch)
        copied = step(*copied, batch)
    jax.tree.map(np.testing.assert_array_equal, copied, (params, state))
    assert int(state.step) == 2 and int(state.pending.count) == 1


@pytest.mark.parametrize("shapes", [False, True], ids=["gradients", "shapes"])
def test_like_makes_room_so_that_a_scan_can_accumulate(shapes):
    table_optimizer, tx = ADAGRAD
    joint, params, given = embax.JointOptimizer(tx, every_k=2), with_table(table_optimizer), batches(*[5] * 6)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *given)
    gradients = jax.jit(embax.value_and_grad(loss_fn))
    like = (jax.eval_shape(gradients, params, given[0]) if shapes else gradients(params, given[0]))[1]

    def body(carry, batch):
        params, state = stepping(joint)(*carry, batch)
        return (params, state), {**params, "word": params["word"].value}

    _, out = jax.lax.scan(body, (params, joint.init(params, like=like)), stacked)
    ours = [jax.tree.map(lambda a, i=i: a[i], out) for i in range(6)]
    assert_same(ours, by_optax(optax.MultiSteps(tx, 2), given))
    with pytest.raises(TypeError, match="scan"):
        jax.lax.scan(body, (params, joint.init(params)), stacked)


BAD_ARGUMENTS = [
    (dict(tx="adam"), TypeError, "JointOptimizer: tx='adam' has no init and update; pass an optax transformation"),
    (dict(max_norm=0), ValueError, "JointOptimizer: max_norm=0 must be greater than 0, or None"),
    (dict(max_norm=-1.5), ValueError, "max_norm=-1.5 must be greater than 0"),
    (dict(max_norm=float("nan")), ValueError, "max_norm=nan must be greater than 0"),
    (dict(every_k=0), ValueError, "JointOptimizer: every_k=0 must be an integer of at least 1"),
    (dict(every_k=2.0), ValueError, "every_k=2.0 must be an integer"),
    (dict(every_k=True), ValueError, "every_k=True must be an integer"),
    (
        dict(tx=optax.MultiSteps(optax.sgd(1), 3), every_k=2),
        ValueError,
        "JointOptimizer: every_k=2, and tx is an optax.MultiSteps of 3",
    ),
]
A_SKIP = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite)
UNFOLLOWED = {
    "a schedule": optax.MultiSteps(optax.sgd(1.0), lambda step: jnp.where(step < 5, 2, 4)),
    "a sum": optax.MultiSteps(optax.sgd(1.0), 2, use_grad_mean=False),
    "a rule": A_SKIP,
}


@pytest.mark.parametrize("arguments, error, text", BAD_ARGUMENTS, ids=lambda x: str(x)[:40])
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error) as raised:
        embax.JointOptimizer(**arguments)
    assert text in str(raised.value)


@pytest.mark.parametrize("case", UNFOLLOWED)
def test_multi_steps_that_rows_cannot_follow_are_refused(case):
    with pytest.raises(ValueError, match="has a schedule, a sum instead of a mean, or a rule to skip updates"):
        embax.JointOptimizer(UNFOLLOWED[case])


@pytest.mark.parametrize("wrapped", [False, True])
def test_multi_steps_inside_of_a_transformation_are_refused(wrapped):
    hidden = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    tx = optax.chain(optax.clip(1.0), optax.masked(hidden, kernels_of)) if wrapped else hidden
    text = "tx contains an optax.MultiSteps, and the tables would not wait for it; pass the transformation inside"
    with pytest.raises(ValueError, match=text):
        embax.JointOptimizer(tx).init(with_table(SGD[0]))
    layer = embax.nnx.Embed(ROWS, DIM, optimizer=SGD[0], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=text):
        embax.nnx.Optimizer(layer, tx)
    with pytest.raises(ValueError, match=text):
        embax.linen.TrainState.create(apply_fn=None, params=with_table(SGD[0]), tx=tx)


def test_dense_parameters_need_a_transformation():
    with pytest.raises(ValueError, match="tx is None, and there are 2 dense parameters beside the tables; pass an"):
        embax.JointOptimizer().init(with_table(SGD[0]))
    alone = {"word": with_table(SGD[0])["word"]}
    state = embax.JointOptimizer().init(alone)
    gradient = {"word": embax.RowGradients(jnp.array([4, ROWS]), jnp.ones((2, DIM)).at[1].set(0), ROWS)}
    alone, state = embax.JointOptimizer().update(alone, gradient, state)
    np.testing.assert_allclose(alone["word"].value, arrays()["word"].at[4].add(-0.2), rtol=1e-6)


def as_floats(gradients):
    return jax.tree.map(lambda g: g.astype(jnp.float32), gradients)


def densified(gradients):
    return {**gradients, "word": gradients["word"].to_dense()}


def of_prefetched_rows(gradients):
    batch = batches(5)[0]
    small = embax.prefetch(with_table(ADAGRAD[0]), {"word": batch["ids"]})
    return {**gradients, "word": jax.grad(loss_fn, allow_int=True)(small, batch)["word"]}


def of_another_table(gradients):
    rows = gradients["word"]
    return {**gradients, "word": embax.RowGradients(rows.rows, rows.values, ROWS + 3)}


def without_bias(gradients):
    return {name: gradients[name] for name in ("word", "kernel")}


BAD_GRADIENTS = [
    (as_floats, TypeError, 'table "word": the rows of a RowGradients are float32; they must be integers. A tree.map'),
    (densified, TypeError, 'table "word": ArrayImpl is not an embax.RowGradients'),
    (of_prefetched_rows, TypeError, 'table "word": the gradient is that of prefetched rows; pass prefetched.row_grad'),
    (of_another_table, ValueError, f'table "word" [{ROWS}, {DIM}]: the gradient is of a table [64, 3]'),
    (without_bias, ValueError, "JointOptimizer: the gradients must have the structure of the parameters"),
    (lambda gradients: None, ValueError, "JointOptimizer: the gradients must have the structure of the parameters"),
]


ACCUMULATING = [(*case, 2) for case in BAD_GRADIENTS]


@pytest.mark.parametrize(
    "spoil, error, text, every_k",
    [(*case, 1) for case in BAD_GRADIENTS] + ACCUMULATING,
    ids=lambda x: getattr(x, "__name__", None),
)
def test_gradients_of_the_wrong_kind_are_named_and_change_nothing(spoil, error, text, every_k):
    joint, params, batch = embax.JointOptimizer(SGD[1], every_k=every_k), with_table(ADAGRAD[0]), batches(5)[0]
    gradients = jax.jit(embax.value_and_grad(loss_fn))(params, batch)[1]
    params, state = joint.update(params, gradients, joint.init(params))
    before = jax.tree.map(np.array, (params, state))
    with pytest.raises(error) as raised:
        joint.update(params, spoil(gradients), state)
    assert text in str(raised.value)
    jax.tree.map(np.testing.assert_array_equal, (params, state), before)


def test_a_train_state_names_gradients_of_the_wrong_kind():
    params, batch = with_table(SGD[0]), batches(5)[0]
    state = embax.linen.TrainState.create(apply_fn=None, params=params, tx=SGD[1])
    gradients = embax.linen.value_and_grad(loss_fn)(params, batch)[1]
    for spoil, error, text in BAD_GRADIENTS:
        with pytest.raises(error) as raised:
            state.apply_gradients(grads=spoil(gradients))
        assert text in str(raised.value)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e4, np.inf])
@pytest.mark.parametrize("max_norm", [0.5, 5.0])
def test_norms_equal_those_of_optax_on_dense_gradients(size, max_norm):
    rng = np.random.default_rng(5)
    rows = jnp.asarray([2, 3, 50, ROWS, ROWS], jnp.int32)
    values = jnp.asarray(rng.normal(size=(5, DIM)), jnp.float32).at[3:].set(0)
    gradients = {"word": embax.RowGradients(rows, values, ROWS), "bias": jnp.ones((1, DIM)), "kernel": jnp.eye(DIM)}
    gradients["word"] = gradients["word"].scale(min(size, 1e4))
    if np.isinf(size):
        gradients["bias"] = gradients["bias"].at[0, 0].set(jnp.inf)
    dense = densified(gradients)
    np.testing.assert_allclose(embax.global_norm(gradients), optax.tree.norm(dense), rtol=1e-6)
    clipped = densified(embax.clip_by_global_norm(gradients, max_norm))
    expected, _ = optax.clip_by_global_norm(max_norm).update(dense, optax.EmptyState())
    for name in dense:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-6, err_msg=name)
