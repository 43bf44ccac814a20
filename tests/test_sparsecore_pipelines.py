"""Pipelines of SparseCore steps train as the core does that looks up batch i before i - 1 and i - 2 have updated."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import line_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import embax
from embax.sparsecore import layers
from embax.sparsecore.lib.auto_pipelining import auto_pipelining
from embax.sparsecore.lib.flax.linen import embed as linen_embed
from embax.sparsecore.lib.flax.linen import embed_optimizer
from embax.sparsecore.lib.flax.nnx import embed as nnx_embed
from embax.sparsecore.lib.nn import embedding, embedding_spec
from embax.sparsecore.lib.nn import embedding_pipelining_utils as pipelining

pytestmark = pytest.mark.usefixtures("eight_devices")
BATCH, ROWS, DIM, STEPS, RATE = 16, 40, 8, 4, 0.1


def _features():
    optimizers = {"a": embedding_spec.AdamOptimizerSpec(0.1), "b": embedding_spec.AdagradOptimizerSpec(_rate)}
    tables = {
        name: embedding_spec.TableSpec(
            name=name,
            vocabulary_size=ROWS,
            embedding_dim=DIM,
            initializer=jax.nn.initializers.normal(1.0),
            optimizer=optimizer,
            combiner="mean",
        )
        for name, optimizer in optimizers.items()
    }
    shapes = {"a": (BATCH, 3), "b": (BATCH,)}
    return {
        name: embedding_spec.FeatureSpec(
            name=name, table_spec=table, input_shape=shapes[name], output_shape=(BATCH, DIM)
        )
        for name, table in tables.items()
    }


def _rate(step):
    return 0.1 / (1.0 + jnp.asarray(step, jnp.float32))


def _ids(number):
    """One batch has many more ids: arrays of other lengths. Every fourth sample has none."""
    rng = np.random.default_rng(number)
    lengths = np.tile([0, 1, 2, 3 if number != 2 else 30], BATCH // 4)
    return {"a": rng.integers(0, ROWS, (BATCH, 3)), "b": [rng.integers(0, ROWS, n) for n in lengths]}


def _weights(number):
    rng = np.random.default_rng(200 + number)
    return jax.tree.map(lambda part: rng.uniform(0.5, 2, part.shape).astype(np.float32), _ids(number))


def _labels(number):
    return np.random.default_rng(100 + number).normal(size=BATCH).astype(np.float32)


def _loss(activations, kernel, labels):
    return jnp.mean((((activations["a"] + activations["b"]) @ kernel)[:, 0] - labels) ** 2)


def _kernel():
    return jnp.full((DIM, 1), 0.1)


@functools.cache
def _by_the_core(weighted=False, late=True):
    """Returns the losses, the tables and the kernel, trained by embax itself; ``late`` as a pipeline does."""
    plan, kernel = embax.plan(_features()), _kernel()
    tables, losses, looked, waiting = embax.init(plan, jax.random.key(0)), [], {}, {}
    for number in range(STEPS + 2):
        if number >= 2 and late:
            tables = embax.update(plan, tables, *waiting.pop(number - 2), step=number - 2)
        if number < STEPS:
            batch = embax.preprocess(plan, _ids(number), _weights(number) if weighted else None)
            looked[number] = embax.lookup(plan, tables, batch)
        own = number - 1 if late else number
        if 0 <= own < STEPS:
            activations, residuals = looked.pop(own)
            loss, gradients = jax.value_and_grad(_loss, (0, 1))(activations, kernel, _labels(own))
            kernel = kernel - RATE * gradients[1]
            losses.append(float(loss))
            waiting[own] = residuals, gradients[0]
            if not late:
                tables = embax.update(plan, tables, *waiting.pop(own), step=own)
    return losses, embax.to_arrays(plan, tables), kernel


def _check(losses, variables, kernel, devices, weighted=False):
    wanted, arrays, own = _by_the_core(weighted)
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)
    np.testing.assert_allclose(kernel, own, rtol=2e-5, atol=1e-6)
    rows = -(-ROWS // (8 * devices)) * 8 * devices
    order = [(i % devices) * (rows // devices) + i // devices for i in range(ROWS)]
    for name, parts in variables.items():
        np.testing.assert_allclose(np.asarray(parts[0])[order], arrays[name]["table"], rtol=3e-5, atol=5e-6)


def test_a_pipeline_is_not_plain_training():
    assert not np.allclose(_by_the_core()[0][2:], _by_the_core(late=False)[0][2:], rtol=1e-3)


def _made(devices, weighted=False):
    """Returns the mesh, features, their first variables and the batches."""
    mesh, features = line_of(devices), _features()
    embedding.prepare_feature_specs_for_training(features, devices, 1)
    sharding = NamedSharding(mesh, P("x", None))
    variables = embedding.init_embedding_variables(jax.random.key(0), embedding.get_table_specs(features), sharding, 1)
    batches = [_inputs(n, features, devices, weighted) for n in range(STEPS)]
    return mesh, features, variables, batches


def _inputs(number, features, devices, weighted=False, **options):
    given = _weights(number) if weighted else None
    return embedding.preprocess_sparse_dense_matmul_input(
        _ids(number), given, features, devices, devices, num_sc_per_device=1, **options
    )[0]


def _padded(batches):
    """Returns batches of one shape: the pipeline's state has one. Room behind the last id is never read."""
    largest = jax.tree.map(lambda *parts: max(part.shape[0] for part in parts), *batches)
    return [_grown(batch, batches[0].num_minibatches.shape[0], largest) for batch in batches]


def _grown(batch, devices, largest):
    def grow(part, size):
        own = part.reshape(devices, -1)
        return np.pad(own, ((0, 0), (0, size // devices - own.shape[1]))).reshape(-1)

    return jax.tree.map(grow, batch, largest)


def _dense(activations, dense_inputs, kernel, forward_aux):
    labels, number = dense_inputs
    loss, gradients = jax.value_and_grad(_loss, (0, 1))(activations, kernel, labels)
    # What a batch has told its lookup must come with its activations, and go to its update.
    return gradients[0], (loss, forward_aux, number), kernel - RATE * gradients[1], number


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_pipeline_is_two_steps_late(devices, weighted):
    """Donated buffers, shardings of the state, what is passed beside, and zeros to run empty on."""
    mesh, features, variables, batches = _made(devices, weighted)
    update = pipelining.get_default_sc_bwd_function(features, mesh)
    look_up = pipelining.get_default_sc_fwd_function(features, mesh)

    def forward(sparse_inputs, variables):
        return look_up(sparse_inputs, variables)[0], sparse_inputs.lhs_row_pointers["b"].sum()

    def backward(sparse_inputs, gradients, variables, tc_aux, step=None):
        return update(sparse_inputs, gradients, variables, tc_aux, step)[0], (tc_aux, step)

    backward.takes_step = True
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
    batches = [
        pipelining.CurrentStepInput(jax.device_put(batch, split), jax.device_put((_labels(n), jnp.int32(n)), whole))
        for n, batch in enumerate(_padded(batches))
    ]
    sums = [int(batch.sparse_inputs.lhs_row_pointers["b"].sum()) for batch in batches]
    kernel = jax.device_put(_kernel(), whole)
    state = pipelining.get_initial_state(batches[0], kernel, variables, forward, _dense, whole, split)
    of_state = pipelining.get_pipeline_state_sharding(pipelining.PipelineState, whole, split, whole, whole)
    of_input = pipelining.CurrentStepInput(split, whole)
    tables = NamedSharding(mesh, P("x", None))
    functions = {"sc_fwd_function": forward, "tc_function": _dense, "sc_bwd_function": backward}
    steps = {
        fake: jax.jit(
            functools.partial(pipelining.step, fake_tc_step=fake, **functions),
            in_shardings=(of_input, whole, tables, of_state),
            out_shardings=(whole, whole, whole, tables, of_state),
            donate_argnums=(1, 2, 3),
        )
        for fake in (False, True)
    }
    losses, first = [], jax.tree.leaves(variables)
    for number in range(pipelining.get_pipeline_train_steps(STEPS)):
        valid = pipelining.is_output_valid(number, STEPS)
        batch = batches[number] if number < STEPS else jax.tree.map(jnp.zeros_like, batches[0])
        (loss, aux, own), beside, kernel, variables, state = steps[not valid](batch, kernel, variables, state)
        if valid:
            losses.append(float(loss))
            assert (int(aux), int(own)) == (sums[number - 1], number - 1)
        if number >= 2:
            assert (int(beside[0]), int(beside[1])) == (number - 2, number - 2)
    assert all(leaf.is_deleted() for leaf in first)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batches))  # those were only lent
    assert state.last_step_inputs.embedding_activations["a"].sharding == split
    assert state.step_before_last_step_inputs.embedding_gradients["b"].sharding == split
    assert int(state.pipeline_step) == STEPS + 2
    _check(losses, variables, kernel, devices, weighted)


def test_the_last_batch_may_come_again():
    mesh, features, variables, batches = _made(2)
    forward = pipelining.get_default_sc_fwd_function(features, mesh)
    backward = pipelining.get_default_sc_bwd_function(features, mesh)
    dense = functools.partial(pipelining.step, sc_fwd_function=forward, sc_bwd_function=backward, tc_function=_dense)
    batches = [pipelining.CurrentStepInput(b, (_labels(n), np.int32(n))) for n, b in enumerate(_padded(batches))]
    kernel, losses = _kernel(), []
    state = pipelining.get_initial_state(batches[0], kernel, variables, forward, _dense)
    step = jax.jit(dense, static_argnames="fake_tc_step")
    for number in range(STEPS + 2):
        valid = pipelining.is_output_valid(number, STEPS)
        (loss, *_), _, kernel, variables, state = step(
            batches[min(number, STEPS - 1)], kernel, variables, state, fake_tc_step=not valid
        )
        losses += [float(loss)] if valid else []
    _check(losses, variables, kernel, 2)
    with pytest.raises(ValueError, match="global_mesh has the axes .* it must have one"):
        pipelining.get_default_sc_fwd_function(features, jax.make_mesh((2, 2), ("a", "b")))


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("devices", [1, 4])
def test_zeros_are_a_batch_without_ids(devices, weighted, leading):
    mesh, features, variables, _ = _made(devices)
    given = _inputs(3, features, devices, weighted, has_leading_dimension=leading)
    nothing = jax.tree.map(jnp.zeros_like, given)
    door = layers.Door(features, mesh, "x", 1)
    gradients = {name: jnp.full((BATCH, DIM), 3.0) for name in "ab"}

    @jax.jit
    def run(inputs, variables):
        return door.lookup(inputs, variables), door.update(gradients, inputs, variables, jnp.int32(4))

    activations, new = run(nothing, variables)
    assert all((np.asarray(part) == 0).all() for part in activations.values())
    jax.tree.map(np.testing.assert_array_equal, new, variables)
    activations, new = run(given, variables)
    assert all((np.asarray(part) != 0).any() for part in activations.values())
    assert all((new[name].table != variables[name].table).any() for name in "ab")


class Carry(NamedTuple):
    variables: Any
    kernel: Any
    step: Any


def _train_step(door, wrap=lambda function: function):
    """Returns a train step over both tables."""

    def train_step(carry, inputs, labels):
        def loss_of(variables, kernel):
            return _loss(layers.looked_up(door, inputs, variables, carry.step), kernel, labels)

        loss, (variables, kernel) = jax.value_and_grad(wrap(loss_of), (0, 1))(carry.variables, carry.kernel)
        return Carry(variables, carry.kernel - RATE * kernel, carry.step + 1), loss, {"step": carry.step}

    return train_step


def _by_hand(door):
    """Returns a train step of shard_maps and gradients written out, without a layer's custom gradient."""

    def train_step(carry, inputs, labels):
        activations = door.lookup(inputs, carry.variables)
        loss, (own, kernel) = jax.value_and_grad(_loss, (0, 1))(activations, carry.kernel, labels)
        variables = door.update(own, inputs, carry.variables, carry.step)
        return Carry(variables, carry.kernel - RATE * kernel, carry.step + 1), loss, {"step": carry.step}

    return train_step


def _piped(train_step, carry, batches, labels=_labels):
    """Returns what the steps gave, and the last carry."""
    state, found, first = auto_pipelining.init_state(), [], jax.tree.leaves(carry)
    for number, batch in enumerate(batches):
        state, (carry, *results) = train_step(state, carry, batch, labels(number))
        found.append(results)
    state, (carry, *results) = auto_pipelining.finalize_pipelining(train_step, state, carry)
    assert jax.tree.leaves(state) == [] and all(leaf.is_deleted() for leaf in first)  # the carry is donated
    assert jax.tree.leaves(found[0]) == []  # of no batch yet
    return [*found[1:], results], carry


STEP_KINDS = {
    "layer": lambda door: _train_step(door),
    "shard_maps": _by_hand,
    "jitted": lambda door: jax.jit(_train_step(door)),
    "jit in it": lambda door: _train_step(door, jax.jit),
    "checkpoint": lambda door: _train_step(door, jax.checkpoint),
}


@pytest.mark.parametrize(("devices", "kind"), [(4, kind) for kind in STEP_KINDS] + [(1, "layer"), (1, "shard_maps")])
def test_a_train_step_is_cut_by_itself(devices, kind):
    mesh, features, variables, batches = _made(devices)
    train_step = auto_pipelining.auto_pipelining(STEP_KINDS[kind](layers.Door(features, mesh, "x", 1)))
    found, carry = _piped(train_step, Carry(variables, _kernel(), jnp.int32(0)), batches)
    _check([float(loss) for loss, _ in found], carry.variables, carry.kernel, devices)
    assert [int(beside["step"]) for _, beside in found] == list(range(STEPS)) and int(carry.step) == STEPS


def test_two_pipelines_of_one_function():
    """Emptied in the middle and begun again: the batches of each half are late among themselves."""
    mesh, features, variables, batches = _made(2)
    door = layers.Door(features, mesh, "x", 1)
    train_step = auto_pipelining.auto_pipelining(_by_hand(door))
    carry = Carry(variables, _kernel(), jnp.int32(0))
    own = jax.tree.map(jnp.copy, carry)
    for number in range(2):  # one batch alone is plain training
        (loss, _), *_ = _piped(train_step, carry, batches[number : number + 1], lambda _, n=number: _labels(n))[0]
        carry = _piped(
            train_step, jax.tree.map(jnp.copy, own), batches[number : number + 1], lambda _, n=number: _labels(n)
        )[1]
        own, wanted, _ = jax.jit(_by_hand(door))(own, batches[number], _labels(number))
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        for one, other in zip(jax.tree.leaves(carry), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class LinenModel(nn.Module):
    mesh: Any
    features: Any

    def setup(self):
        self.embed = linen_embed.SparseCoreEmbed(self.features, "x", self.mesh)
        self.kernel = self.param("kernel", lambda _: _kernel())

    def __call__(self, inputs, step):
        return self.embed(inputs, step), self.kernel


@pytest.mark.parametrize(("devices", "boxed"), [(1, False), (4, True)])
def test_linen(devices, boxed):
    mesh, features, variables, batches = _made(devices)
    model = LinenModel(mesh, features)
    params: Any = model.init(jax.random.key(0), batches[0], 0)["params"]
    box = params["embed"][linen_embed.EMBEDDING_PARAM_NAME]
    params["embed"][linen_embed.EMBEDDING_PARAM_NAME] = box.replace_boxed(variables) if boxed else variables
    optimizer = embed_optimizer.create_optimizer_for_sc_model(params, optax.sgd(RATE))

    def train_step(carry, inputs, labels):
        params, state, step = carry

        def loss_of(params):
            found = cast(Any, model.apply({"params": params}, inputs, step))
            return _loss(found[0], found[1], labels)

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return (embed_optimizer.apply_updates_for_sc_model(params, updates), state, step + 1), loss

    run = auto_pipelining.auto_pipelining(train_step)
    found, (params, _, _) = _piped(run, (params, optimizer.init(params), jnp.int32(0)), batches)
    params = nn.unbox(params)
    _check(
        [float(loss) for (loss,) in found], params["embed"][linen_embed.EMBEDDING_PARAM_NAME], params["kernel"], devices
    )


class NNXModel(nnx.Module):
    def __init__(self, mesh, features, rngs):
        self.embed = nnx_embed.SparseCoreEmbed(features, "x", mesh, rngs)
        self.kernel = nnx.Param(_kernel())


class _Key:
    def params(self):
        return jax.random.key(0)


@pytest.mark.parametrize("devices", [1, 4])
def test_nnx(devices):
    mesh, features, _, batches = _made(devices)
    model = NNXModel(mesh, features, _Key())
    optimizer = nnx_embed.PartitionedOptimizer(model, optax.sgd(RATE))
    graph, first = nnx.split((model, optimizer))

    def train_step(carry, inputs, labels):
        state, step = carry
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(lambda model: _loss(model.embed(inputs, step), model.kernel[...], labels))(
            model
        )
        optimizer.update(model, grads)
        return (nnx.state((model, optimizer)), step + 1), loss

    found, (state, _) = _piped(auto_pipelining.auto_pipelining(train_step), (first, jnp.int32(0)), batches)
    model, _ = nnx.merge(graph, state)
    _check([float(loss) for (loss,) in found], model.embed.embedding_table.get_value(), model.kernel[...], devices)


def test_static_arguments_shardings_and_effects():
    mesh, features, variables, batches = _made(2)
    door, seen, ones = layers.Door(features, mesh, "x", 1), [], jnp.ones(BATCH)  # an array that is closed over

    def train_step(carry, inputs, kind, labels):
        if kind == "noted":
            jax.debug.callback(lambda step: seen.append(int(step)), carry.step)
        return _by_hand(door)(carry, inputs, labels * ones)

    whole, tables = NamedSharding(mesh, P()), NamedSharding(mesh, P("x", None))
    outputs = (None, (Carry(tables, whole, whole), whole, whole))
    run = auto_pipelining.auto_pipelining(train_step, out_shardings=outputs, static_argnums=(2,))
    carry, state, losses = Carry(variables, _kernel(), jnp.int32(0)), auto_pipelining.init_state(), []
    for number, batch in enumerate(batches):
        kind = "noted" if number % 2 else "not"
        state, (carry, loss, _) = run(state, carry, batch, kind, _labels(number))
        losses.append(loss)
    state, (carry, loss, _) = auto_pipelining.finalize_pipelining(run, state, carry)
    jax.effects_barrier()
    assert seen == [1, 3]
    assert carry.kernel.sharding == whole and carry.variables["a"].table.sharding == tables
    _check([*map(float, losses[1:]), float(loss)], carry.variables, carry.kernel, 2)
    with pytest.raises(ValueError, match="static_argnums=0: 0 is the carry; name arguments behind it, from 1"):
        auto_pipelining.auto_pipelining(train_step, static_argnums=0)


def test_a_frozen_table_stays():
    mesh, features, variables, batches = _made(2)
    door = layers.Door(features, mesh, "x", 1)

    def train_step(carry, inputs, labels):
        new, loss, _ = _by_hand(door)(carry, inputs, labels)
        return new._replace(variables={**new.variables, "b": carry.variables["b"]}), loss

    before = jax.tree.map(np.asarray, variables)
    _, carry = _piped(auto_pipelining.auto_pipelining(train_step), Carry(variables, _kernel(), jnp.int32(0)), batches)
    jax.tree.map(np.testing.assert_array_equal, carry.variables["b"], before["b"])
    assert (before["a"].table != carry.variables["a"].table).any()


def _wrong(door, how):
    """Returns a train step that cannot be cut, for the reason of that name."""

    def train_step(carry, inputs, labels):
        new, loss, _ = _by_hand(door)(carry, inputs, labels)
        if how == "no tuple":
            return new
        if how == "other carry":
            return (new.variables, new.kernel), loss
        if how == "other shape":
            return new._replace(kernel=new.kernel[:, 0]), loss
        if how == "no update":
            return new._replace(variables=carry.variables), loss
        if how == "no lookup":
            ones = {name: jnp.ones((BATCH, DIM)) for name in "ab"}
            return new._replace(variables=door.update(ones, inputs, carry.variables, 0), kernel=carry.kernel), 0.0
        if how == "changed after":
            return new._replace(variables=jax.tree.map(lambda part: part * 0.5, new.variables)), loss
        if how == "read":
            return new, loss + carry.variables["a"].table.sum()
        if how == "cond":
            found = jax.lax.cond(
                loss > 0, lambda v: door.lookup(inputs, v)["a"], lambda v: v["a"].table[:BATCH], carry.variables
            )
            return new, found.sum()
        if how == "new read":
            return new, loss + new.variables["a"].table.sum()
        if how == "given out":
            return new, carry.variables["a"].table
        if how == "two lookups":
            first = door.lookup(inputs, carry.variables)["a"]
            again = inputs.replace(num_minibatches=inputs.num_minibatches + first.astype(jnp.int32)[0, 0])
            return new, loss + door.lookup(again, carry.variables)["b"].sum()
        again = inputs.replace(num_minibatches=inputs.num_minibatches + carry.step)
        return new, loss + door.lookup(again, carry.variables)["b"].sum()

    return train_step


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("no tuple", "'train_step': the train step returns Carry; return a tuple, the new carry first"),
        (
            "other carry",
            "the new carry has the structure .* and the carry .*; return the new carry first, in the struct",
        ),
        ("other shape", r"carry.kernel is float32\[8, 1\], and float32\[8\] in the new carry; it must keep its shape"),
        ("no update", "no table is updated; return the updated tables in the new carry"),
        ("no lookup", "no lookup is used: no shard_map reads the carry's tables for the dense part"),
        (
            "changed after",
            r"the new carry.variables\['a'\].table comes from `mul`, and not from a shard_map that reads",
        ),
        ("read", r"carry.variables\['a'\].table is read by `reduce_sum`; only a lookup and an update may read tables"),
        ("cond", r"carry.variables\['a'\].table is read by `cond`; only a lookup"),
        ("new read", "something beside the new carry is made of updated tables, which in a pipeline are not there yet"),
        ("given out", r"carry.variables\['a'\].table is given out beside its place in the new carry"),
        (
            "two lookups",
            r"the lookup of carry.variables\['a'\].table depends on another lookup or update of the same st",
        ),
        ("step", r"the lookup of carry.variables\['a'\].table depends on carry.step, which is not that old yet"),
    ],
    ids=lambda part: part if len(part) < 15 else "",
)
def test_a_step_that_cannot_be_cut_is_refused(how, text):
    mesh, features, variables, batches = _made(2)
    run = auto_pipelining.auto_pipelining(_wrong(layers.Door(features, mesh, "x", 1), how))
    carry = Carry(variables, _kernel(), jnp.int32(0))
    with pytest.raises(ValueError, match=text):
        run(auto_pipelining.init_state(), carry, batches[0], _labels(0))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(carry))


def test_wrong_calls_are_refused():
    mesh, features, variables, batches = _made(2)
    train_step = _by_hand(layers.Door(features, mesh, "x", 1))
    run = auto_pipelining.auto_pipelining(train_step)
    carry = Carry({name: tuple(parts) for name, parts in variables.items()}, _kernel(), jnp.int32(0))
    with pytest.raises(ValueError, match="there are no EmbeddingVariables in its carry; keep tables there as"):
        run(auto_pipelining.init_state(), carry, batches[0], _labels(0))
    with pytest.raises(ValueError, match="finalize_pipelining: nothing is under way; call the train step with a batch"):
        auto_pipelining.finalize_pipelining(run, auto_pipelining.init_state(), carry)
    with pytest.raises(ValueError, match="is not from auto_pipelining; pass what that has returned"):
        auto_pipelining.finalize_pipelining(train_step, auto_pipelining.init_state(), carry)


def test_an_all_reduce_interface_changes_nothing():
    _, features, _, _ = _made(2)
    reduce = embedding.get_all_reduce_interface(["host:1"], 8000, host_id=1, host_count=2)
    assert (reduce.peer_addresses, reduce.minibatching_port, reduce.host_id, reduce.host_count) == (
        ("host:1",),
        8000,
        1,
        2,
    )
    assert embedding.get_all_reduce_interface([], 8000).host_count == 1
    for minibatching in (False, True):
        plain = _inputs(3, features, 2, enable_minibatching=minibatching)
        given = _inputs(3, features, 2, enable_minibatching=minibatching, all_reduce_interface=reduce)
        jax.tree.map(np.testing.assert_array_equal, given, plain)
    layer = linen_embed.SparseCoreEmbed(features, "x", line_of(2))
    jax.tree.map(
        np.testing.assert_array_equal,
        layer.preprocess_inputs(0, _ids(3), all_reduce_interface=reduce),
        layer.preprocess_inputs(0, _ids(3)),
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("host:1", 1), "peer_addresses='host:1' must be a sequence of texts host:port"),
        (([1], 1), r"peer_addresses=\[1\] must be a sequence of texts host:port"),
        (([], 70000), "minibatching_port=70000 must be an integer from 0 to 65535"),
        (([], "80"), "minibatching_port='80' must be an integer from 0 to 65535"),
        (([], 80, 2, 2), "host_id=2 of host_count=2: processes are numbered from 0 to host_count - 1"),
        (([], 80, 0, 0), "host_id=0 of host_count=0: processes are numbered"),
    ],
)
def test_all_reduce_interfaces_that_cannot_be(arguments, text):
    with pytest.raises(ValueError, match=text):
        embedding.get_all_reduce_interface(*arguments)
