"""The cases of ``flax.linen``: its lifted transformations, layers with state, FeatureEmbed, and the TrainState."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

import embax
import embax.linen
from tests.transform_cases import (
    ABSENT,
    DIM,
    IDS,
    INSIDE,
    JAX_LOOP,
    LAYERS,
    LOOP,
    VOCABULARY,
    WHOLE,
    Case,
    Problem,
    is_table,
)
from tests.transform_cases_jax import head
from tests.transform_models import FEATURES

LINEN: list[Case] = []
OPTIMIZER = embax.SGD(0.1)
KEY = jax.random.key(0)


def embed(optimizer, **settings):
    """Returns flax's Embed, or embax's with an optimizer."""
    if optimizer is None:
        return nn.Embed(VOCABULARY, DIM, **settings)
    return embax.linen.Embed(VOCABULARY, DIM, optimizer=optimizer, **settings)


class Tower(nn.Module):
    """A loss of an embedding's rows, scaled by ``total``."""

    optimizer: Any

    @nn.compact
    def __call__(self, total, ids):
        rows = embed(self.optimizer, name="embed")(ids)
        w = self.param("w", nn.initializers.normal(1.0), (DIM,))
        return head(jnp.nan_to_num(rows), w * total)


class Carried(nn.Module):
    """A Tower in the form of a scan's body."""

    optimizer: Any

    @nn.compact
    def __call__(self, total, ids):
        return total + Tower(self.optimizer, name="tower")(total, ids), None


class DenseFeatures(nn.Module):
    """What FeatureEmbed computes of dense ids and weights, from a plain parameter."""

    @nn.compact
    def __call__(self, ids, weights):
        ids, weights = ids["history"], weights["history"]
        present = (ids >= 0) & (ids < VOCABULARY)
        rows = self.param("item", nn.initializers.zeros, (VOCABULARY, DIM))[jnp.where(present, ids, 0)]
        return {"history": jnp.sum(rows * jnp.where(present, weights, 0)[..., None], -2)}


class Pooled(nn.Module):
    """Many ids pooled, with a weight to learn for each place of a sample."""

    optimizer: Any

    @nn.compact
    def __call__(self, total, ids):
        name = "features"
        layer = DenseFeatures(name=name) if self.optimizer is None else embax.linen.FeatureEmbed(FEATURES, name=name)
        weights = jnp.broadcast_to(self.param("weights", nn.initializers.normal(1.0), (IDS.shape[1],)), ids.shape)
        w = self.param("w", nn.initializers.normal(1.0), (DIM,))
        return head(layer({"history": ids}, {"history": weights})["history"], w * total)


class CarriedPooled(nn.Module):
    """A Pooled in the form of a scan's body."""

    optimizer: Any

    @nn.compact
    def __call__(self, total, ids):
        return total + Pooled(self.optimizer, name="tower")(total, ids), None


def case(name, expected=None, eager=False, **settings):
    """Returns a decorator that makes a case of the ``__call__(self, ids)`` of a module with an ``optimizer``."""

    def add(calculate):
        body = {"__annotations__": {"optimizer": Any}, "__call__": nn.compact(calculate)}
        model = type("Model", (nn.Module,), body)
        LINEN.append(
            Case(name, "linen", functools.cache(lambda: problem_of(model, **settings)), eager=eager, **(expected or {}))
        )
        return calculate

    return add


def problem_of(model, has_aux=False, **settings):
    """Returns the Problem of a module; its aux is what batch statistics become."""
    ids, rngs = jnp.asarray(IDS), {"params": KEY, "dropout": jax.random.key(1)}
    variables = jax.jit(model(OPTIMIZER).init)(rngs, ids)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss_of(optimizer):
        def loss(params, ids):
            inputs, module = {"params": params, **state}, model(optimizer)
            if has_aux:
                return module.apply(inputs, ids, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"])
            return module.apply(inputs, ids)

        return loss

    def dense():
        return loss_of(None), jax.tree.map(lambda x: x.value if is_table(x) else x, params, is_leaf=is_table)

    return Problem(loss_of(OPTIMIZER), params, (ids,), dense=dense, has_aux=has_aux, **settings)


def one(model, ids):
    return model(jnp.float32(1), ids)


# ---- lifted transformations ----------------------------------------------------------------------------------------


@case("a lookup", eager=True)
def lookup(self, ids):
    return one(Tower(self.optimizer), ids)


@case("two lookups of one table")
def _(self, ids):
    tower = Tower(self.optimizer)
    return one(tower, ids) * one(tower, ids[:, :1])


@case("`nn.jit`", eager=True)
def _(self, ids):
    return one(nn.jit(Tower)(self.optimizer), ids)


Jitted = nn.jit(Tower)


@case("`nn.jit`, called before, twice", warm=True)
def _(self, ids):
    tower = Jitted(self.optimizer)
    return one(tower, ids) * one(tower, ids[::-1])


@case("`nn.remat`", eager=True)
def _(self, ids):
    return one(nn.remat(Tower)(self.optimizer), ids)


@case("`nn.remat` with a policy")
def _(self, ids):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return one(nn.remat(Tower, policy=policy)(self.optimizer), ids)


def example(module):
    return nn.vmap(module, in_axes=(None, 0), variable_axes={"params": None}, split_rngs={"params": False})


def layer(module, axis=0, **settings):
    return nn.vmap(
        module,
        in_axes=(None, None),
        variable_axes={"params": axis},
        split_rngs={"params": True},
        axis_size=LAYERS,
        **settings,
    )


def steps(module, **settings):
    return nn.scan(module, variable_broadcast="params", split_rngs={"params": False}, **settings)


def layers(module, **settings):
    return nn.scan(
        module,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=LAYERS,
        **settings,
    )


@case("`nn.vmap` over ids")
def _(self, ids):
    return jnp.sum(one(example(Tower)(self.optimizer), ids) ** 2)


@case("`nn.vmap` over layers")
def _(self, ids):
    return jnp.sum(one(layer(Tower)(self.optimizer), ids) ** 2)


@case("`nn.scan` over steps", eager=True)
def _(self, ids):
    return one(steps(Carried)(self.optimizer), ids)[0]


@case("`nn.scan` over steps, reversed and unrolled")
def _(self, ids):
    return one(steps(Carried, reverse=True, unroll=2)(self.optimizer), ids)[0]


@case("`nn.scan` over layers", eager=True)
def _(self, ids):
    return one(layers(Carried)(self.optimizer), ids)[0]


@case("`nn.scan` over layers of `nn.remat`")
def _(self, ids):
    return one(layers(nn.remat(Carried, prevent_cse=False))(self.optimizer), ids)[0]


@case("`nn.cond`")
def _(self, ids):
    def loss(ids):
        return nn.cond(ids[0] > 3, one, lambda tower, ids: jnp.float32(2), tower, ids)

    tower = Tower(self.optimizer)
    one(tower, ids)
    return loss(ids[0]) * loss(ids[2])


@case("`nn.switch`")
def _(self, ids):
    tower = Tower(self.optimizer)
    branches = [one, lambda tower, ids: one(tower, ids) ** 2, lambda tower, ids: jnp.float32(2)]
    return one(tower, ids) * nn.switch(ids[0, 1] + 2, branches, tower, ids)


def until(tower, ids):
    def body(tower, state):
        i, total = state
        return i + 1, total + one(tower, ids[i])

    start = jnp.int32(0), jnp.float32(0)
    return nn.while_loop(lambda tower, state: state[0] < 3, body, tower, start, broadcast_variables="params")[1]


@case("`nn.while_loop`", {"sparse": LOOP, "prefetched": JAX_LOOP})
def _(self, ids):
    tower = Tower(self.optimizer)
    return one(tower, ids) * until(tower, ids)


@case("`nn.while_loop`, its result in `stop_gradient`")
def _(self, ids):
    tower = Tower(self.optimizer)
    return one(tower, ids) * jax.lax.stop_gradient(until(tower, ids))


@case("`nn.custom_vjp` around a lookup", {"sparse": INSIDE})
def _(self, ids):
    def forward(tower, ids):
        return nn.vjp(lambda tower: one(tower, ids), tower)

    def backward(kept, cotangent):
        return *kept(cotangent), None

    tower = Tower(self.optimizer)
    one(tower, ids)
    return nn.custom_vjp(one, forward_fn=forward, backward_fn=backward)(tower, ids)


@case("`jax.grad` of a function of other arrays inside")
def _(self, ids):
    tower = Tower(self.optimizer)
    one(tower, ids)
    return jnp.sum(jax.grad(lambda total: tower(total, ids))(jnp.float32(0.5)) ** 2)


# ---- whole tables, layers with state, FeatureEmbed -----------------------------------------------------------------


@case("`attend` to all rows", {"sparse": WHOLE, "prefetched": ABSENT, "plain": WHOLE})
def _(self, ids):
    return jnp.sum(jax.nn.logsumexp(embed(self.optimizer, name="embed").attend(jnp.ones(DIM))))


@case("dropout and batch normalisation", eager=True, has_aux=True)
def _(self, ids):
    rows = nn.Dropout(0.5, deterministic=False)(jnp.nan_to_num(embed(self.optimizer, name="embed")(ids)))
    rows = nn.BatchNorm(use_running_average=False)(rows)
    return head(rows, self.param("w", nn.initializers.normal(1.0), (DIM,)))


class Stateful(nn.Module):
    """A Tower with dropout and batch normalisation."""

    optimizer: Any

    @nn.compact
    def __call__(self, total, ids):
        rows = nn.Dropout(0.5, deterministic=False)(jnp.nan_to_num(embed(self.optimizer, name="embed")(ids)))
        rows = nn.BatchNorm(use_running_average=False)(rows)
        return head(rows, self.param("w", nn.initializers.normal(1.0), (DIM,))) + total


@case("dropout and batch normalisation in `nn.remat` and `nn.jit`", has_aux=True)
def _(self, ids):
    return one(nn.jit(nn.remat(Stateful))(self.optimizer), ids)


@case("FeatureEmbed with weights to learn", eager=True)
def _(self, ids):
    return one(Pooled(self.optimizer), ids)


@case("FeatureEmbed in `nn.jit` and `nn.remat`, called before", warm=True)
def _(self, ids):
    return one(nn.jit(nn.remat(Pooled))(self.optimizer), ids)


@case("FeatureEmbed in `nn.vmap` over ids")
def _(self, ids):
    return jnp.sum(one(example(Pooled)(self.optimizer), ids[:, None]) ** 2)


@case("FeatureEmbed in `nn.scan` over steps")
def _(self, ids):
    return one(steps(CarriedPooled)(self.optimizer), ids[:, None])[0]


@case("FeatureEmbed in `nn.scan` over layers")
def _(self, ids):
    return one(layers(CarriedPooled)(self.optimizer), ids)[0]


# ---- transformations of the gradient itself ------------------------------------------------------------------------


def trained(gradient):
    """Training steps of a TrainState in a scan, one for each row of ids."""

    def train(params, ids):
        has_tables = any(is_table(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_table))
        kind = embax.linen.TrainState if has_tables else train_state.TrainState
        state = kind.create(apply_fn=None, params=params, tx=optax.sgd(0.1)).replace(step=jnp.int32(0))

        def step(state, ids):
            value, gradients = gradient(state.params, ids[None])
            return state.apply_gradients(grads=gradients), value

        state, values = jax.lax.scan(step, state, ids)
        return state.params, values

    return train


case("the gradient in `vmap`: one for each example", outer=lambda f: jax.vmap(f, (None, 0)))(lookup)
case("training steps in `scan`", outer=trained)(lookup)
