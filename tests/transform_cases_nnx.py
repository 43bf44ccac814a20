"""The cases of ``flax.nnx``: its transformations, layers with state, and FeatureEmbed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import embax
import embax.nnx
from embax.nnx.variables import Sentinel
from tests.transform_cases import (
    ABSENT,
    IDS,
    INSIDE,
    JAX_LOOP,
    LOOP,
    WHOLE,
    Case,
    compiled,
    densified,
    is_compared,
)
from tests.transform_models import Layers, Pooled, Stateful, Tower

NNX: list[Case] = []


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss over a module.

    Attributes:
      loss: ``loss(model, *args)``.
      make: returns the model, given the optimizer of its tables, or None for flax's own layers.
      args, has_aux, outer, warm: as for JAX; ``outer`` may return modules, whose variables are compared.
    """

    loss: Callable
    make: Callable
    args: tuple
    has_aux: bool = False
    outer: Callable = lambda gradient: gradient
    warm: bool = False

    def run(self, way: str, jit: bool) -> Any:
        """Returns value, gradients and what the model's state has become, row gradients made dense."""
        model = self.make(None if way == "dense" else embax.SGD(0.1))
        if self.warm:
            self.loss(model, *self.args)
        gradient = self.outer(getattr(self, f"_{way}")())
        graph, state = nnx.split(model)

        def compared(state, args):
            model = nnx.merge(graph, state)
            answer = jax.tree.map(_variables, gradient(model, *args), is_leaf=_has_variables)
            return answer, _variables(nnx.state(model, nnx.Any(nnx.BatchStat, nnx.RngCount)))

        return (compiled(compared) if jit else compared)(state, self.args)

    def names(self) -> list[str]:
        """Returns the names of the tables: their paths."""
        state = nnx.state(self.make(embax.SGD(0.1)), embax.nnx.Table)
        return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]

    def _dense(self):
        return nnx.value_and_grad(self.loss, has_aux=self.has_aux)

    def _plain(self):
        return nnx.value_and_grad(self.loss, has_aux=self.has_aux)

    def _sparse(self):
        return embax.nnx.value_and_grad(self.loss, has_aux=self.has_aux)

    def _prefetched(self):
        def gradient(model, *args):
            small = embax.nnx.prefetch(model, dict.fromkeys(self.names(), args[0]))
            value, gradients = nnx.value_and_grad(self.loss, has_aux=self.has_aux)(small, *args)
            return value, embax.nnx.row_gradients(small, gradients)

        return gradient


def _has_variables(node: Any) -> bool:
    return isinstance(node, (nnx.State, nnx.Module))


def _variables(node: Any) -> Any:
    """Returns the variables of a State or module by path, tables and their gradients dense, sentinels left out."""
    if not _has_variables(node):
        return node
    state = nnx.state(node, nnx.Any(nnx.Param, embax.nnx.Table)) if isinstance(node, nnx.Module) else node
    flat = [(path, v) for path, v in nnx.to_flat_state(state) if not isinstance(v, Sentinel)]
    arrays = {"/".join(map(str, path)): getattr(v, "row_gradients", None) or v.get_value() for path, v in flat}
    return jax.tree.map(densified, arrays, is_leaf=is_compared)


def case(name, expected=None, model=Tower, eager=False, **settings):
    """Returns a decorator that makes a case of ``loss(model, ids)``; ``settings`` are those of its Problem."""

    def add(loss):
        def problem():
            return Problem(loss, lambda optimizer: model(optimizer, nnx.Rngs(0)), (jnp.asarray(IDS),), **settings)

        NNX.append(Case(name, "nnx", problem, eager=eager, **(expected or {})))
        return loss

    return add


def over(model, ids):
    return model(ids)


# ---- transformations in the loss -----------------------------------------------------------------------------------

case("a lookup", eager=True)(over)


@case("two lookups of one table")
def _(model, ids):
    return model(ids) * model(ids[:, :1])


jitted = nnx.jit(over)


@case("`nnx.jit` inside", eager=True)
def _(model, ids):
    return nnx.jit(over)(model, ids)


@case("one `nnx.jit` inside, twice, called before", warm=True)
def _(model, ids):
    return jitted(model, ids) * jitted(model, ids[::-1])


def rematted(model, ids):
    return nnx.remat(over)(model, ids)


def by_example(model, ids):
    return jnp.sum(nnx.vmap(over, in_axes=(None, 0))(model, ids[:, None]) ** 2)


def steps(model, ids):
    @nnx.scan(in_axes=(nnx.StateAxes({...: None}), nnx.Carry, 0), out_axes=nnx.Carry)
    def step(model, total, ids):
        return total + model(ids, total)

    return step(model, jnp.float32(1), ids[:, None])


case("`nnx.remat`", eager=True)(rematted)
case("`nnx.vmap` over ids")(by_example)
case("`nnx.scan` over steps, the model in every step")(steps)


@case("`nnx.scan` over steps, the model in its carry")
def _(model, ids):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def step(carry, ids):
        model, total = carry
        return model, total + model(ids, total)

    return step((model, jnp.float32(1)), ids[:, None])[1]


@case("`nnx.vmap` over layers", model=Layers)
def _(model, ids):
    return jnp.sum(nnx.vmap(over, in_axes=(0, None))(model.layers, ids) ** 2)


@case("`nnx.scan` over layers", model=Layers)
def _(model, ids):
    @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
    def layer(model, total, ids):
        return total + model(ids, total)

    return layer(model.layers, jnp.float32(1), ids)


@case("`nnx.scan` over layers, with `StateAxes` and `nnx.remat`", model=Layers)
def _(model, ids):
    @nnx.scan(in_axes=(nnx.StateAxes({...: 0}), nnx.Carry, None), out_axes=nnx.Carry)
    @nnx.remat
    def layer(model, total, ids):
        return total + model(ids, total)

    return layer(model.layers, jnp.float32(1), ids)


@case("`nnx.cond`", eager=True)
def _(model, ids):
    def loss(ids):
        return nnx.cond(ids[0] > 3, lambda m, ids: m(ids), lambda m, ids: jnp.sum(m.w[...]), model, ids)

    return loss(ids[0]) * loss(ids[2])


@case("`nnx.switch`")
def _(model, ids):
    branches = [over, lambda m, ids: m(ids) ** 2, lambda m, ids: jnp.sum(m.w[...])]
    return nnx.switch(ids[0, 1] + 2, branches, model, ids)


def until(model, ids):
    def body(state):
        model, i, total = state
        return model, i + 1, total + model(ids[i])

    return nnx.while_loop(lambda state: state[1] < 3, body, (model, jnp.int32(0), jnp.float32(0)))[2]


@case("`nnx.while_loop`", {"sparse": LOOP, "prefetched": JAX_LOOP})
def _(model, ids):
    return model(ids) * until(model, ids)


@case("`nnx.while_loop`, its result in `stop_gradient`")
def _(model, ids):
    return model(ids) * jax.lax.stop_gradient(until(model, ids))


@case("`nnx.fori_loop` of known length")
def _(model, ids):
    def body(i, state):
        model, total = state
        return model, total + model(ids[i], total)

    return nnx.fori_loop(0, 3, body, (model, jnp.float32(1)))[1]


@functools.partial(nnx.custom_vjp, nondiff_argnums=(nnx.DiffState(0, nnx.Param),))
def custom(model, ids):
    return model(ids)


def custom_backward(kept, cotangents):
    model, ids = kept
    gradients = nnx.grad(over)(model, ids)
    return jax.tree.map(lambda x: x * cotangents[1], gradients), None


custom.defvjp(lambda model, ids: (model(ids), (model, ids)), custom_backward)


@case("`nnx.custom_vjp` around a lookup", {"sparse": INSIDE})
def _(model, ids):
    return custom(model, ids)


@case("`jax.grad` of a function of other arrays inside", eager=True)
def _(model, ids):
    return jnp.sum(jax.grad(lambda total: model(ids, total))(jnp.float32(0.5)) ** 2)


# ---- whole tables, layers with state, FeatureEmbed -----------------------------------------------------------------


@case("`attend` to all rows", {"sparse": WHOLE, "prefetched": ABSENT, "plain": WHOLE})
def _(model, ids):
    return jnp.sum(jax.nn.logsumexp(model.embed.attend(model.w[...])))


@case(
    "`attend` to all rows, its result in `stop_gradient`",
    {"prefetched": ABSENT},
)
def _(model, ids):
    return model(ids) * jnp.sum(jax.lax.stop_gradient(model.embed.attend(model.w[...])))


@case(
    "`attend` to all rows, its result not in the loss but in aux",
    {"prefetched": ABSENT},
    has_aux=True,
)
def _(model, ids):
    return model(ids), model.embed.attend(model.w[...])


case("dropout and batch normalisation", model=Stateful, eager=True)(over)


@case("dropout and batch normalisation in `nnx.jit` and `nnx.remat`", model=Stateful)
def _(model, ids):
    return nnx.jit(nnx.remat(over))(model, ids)


@case("aux: the activations, NaN among them", has_aux=True)
def _(model, ids):
    return model(ids), {"rows": model.embed(ids)}


case("FeatureEmbed with weights to learn", model=Pooled, eager=True)(over)
case("FeatureEmbed in `nnx.jit`, called before", model=Pooled, warm=True)(jitted)
case("FeatureEmbed in `nnx.remat`", model=Pooled)(rematted)
case("FeatureEmbed in `nnx.vmap` over ids", model=Pooled)(by_example)
case("FeatureEmbed in `nnx.scan` over steps", model=Pooled)(steps)


# ---- transformations of the gradient itself ------------------------------------------------------------------------


def by_gradient(gradient):
    return nnx.vmap(gradient, in_axes=(None, 0))


def trained(gradient):
    """Training steps in a scan, one for each row of ids."""

    def train(model, ids):
        # Dense models have no tables, so one optimizer does for both.
        optimizer = embax.nnx.Optimizer(model, optax.sgd(0.1))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def step(carry, ids):
            model, optimizer = carry
            value, gradients = gradient(model, ids[None])
            optimizer.update(model, gradients)
            return (model, optimizer), value

        _, values = step((model, optimizer), ids)
        return model, values

    return train


case("the gradient in `nnx.jit`", outer=nnx.jit)(over)
case("the gradient in `nnx.vmap`: one for each example", outer=by_gradient)(over)
case("training steps in `nnx.scan`", outer=trained)(over)
