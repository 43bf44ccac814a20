"""More cases of plain JAX: derivatives in the loss, whole tables, devices, transformations of the gradient itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import embax
from tests.transform_cases import ABSENT, DIM, INSIDE, RIGHT, VOCABULARY, WHOLE, Case, Outcome, is_rows
from tests.transform_cases_jax import block, chosen, head, look, over, steps
from tests.transform_cases_jax import case as case_of

OUTER: list[Case] = []
case = functools.partial(case_of, cases=OUTER)

# ---- custom derivatives --------------------------------------------------------------------------------------------


@jax.custom_jvp
def custom_jvp(table, ids, w):
    return block(table, ids, w)


@custom_jvp.defjvp
def _(primals, tangents):
    return jax.jvp(block, primals, tangents)


@jax.custom_vjp
def custom_vjp(table, ids, w):
    return block(table, ids, w)


custom_vjp.defvjp(lambda *args: (block(*args), args), lambda args, cotangent: jax.vjp(block, *args)[1](cotangent))


@jax.custom_vjp
def halved(rows):
    return rows


halved.defvjp(lambda rows: (rows, None), lambda _, cotangent: (cotangent / 2,))


@case("`custom_jvp` around a lookup", {"sparse": INSIDE})
def _(params, ids):
    return custom_jvp(params["word"], ids, params["w"])


@case("`custom_vjp` around a lookup", {"sparse": INSIDE})
def _(params, ids):
    return custom_vjp(params["word"], ids, params["w"])


@case("`custom_vjp` of activations")
def _(params, ids):
    return head(halved(look(params["word"], ids)), params["w"])


# ---- derivatives inside of the loss --------------------------------------------------------------------------------


@case("`jax.grad` inside, of another argument", eager=True)
def _(params, ids):
    return jnp.sum(jax.grad(lambda w: block(params["word"], ids, w))(params["w"]) ** 2)


@case("`jax.grad` inside, of activations")
def _(params, ids):
    return jnp.sum(jax.grad(head)(look(params["word"], ids), params["w"]) ** 2)


@case("`jax.grad` inside, of the table", {"sparse": Outcome("error", embax.SparseGradientError, ("embax.prefetch",))})
def _(params, ids):
    inner = jax.grad(block, allow_int=True)(params["word"], ids, params["w"])
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(inner) if jnp.issubdtype(x.dtype, jnp.floating))


@case("`jax.jvp` inside, of dense parameters")
def _(params, ids):
    return jax.jvp(lambda w: block(params["word"], ids, w), (params["w"],), (jnp.ones(DIM),))[1]


@case("`jax.hessian` inside, of dense parameters")
def _(params, ids):
    return jnp.sum(jax.hessian(lambda w: block(params["word"], ids, w))(params["w"]) ** 2)


@case("`jax.linearize` inside, of dense parameters")
def _(params, ids):
    value, linear = jax.linearize(lambda w: block(params["word"], ids, w), params["w"])
    return value * linear(jnp.ones(DIM))


# ---- whole tables --------------------------------------------------------------------------------------------------


def whole(name, **expected):
    """Returns a decorator for a loss that uses ``table.value``, of which prefetched rows have none."""
    return case(name, {"sparse": WHOLE, "prefetched": ABSENT, "plain": RIGHT, **expected})


@whole("the sum of a whole table")
def _(params, ids):
    return jnp.sum(params["word"].value)


@whole("a table cast with `astype`")
def _(params, ids):
    rows = jnp.take(params["word"].value.astype(jnp.bfloat16), ids[:1], axis=0)
    return head(rows.astype(jnp.float32), params["w"])


@whole("a table transposed, for all its inner products")
def _(params, ids):
    return jnp.sum(jax.nn.logsumexp(params["w"] @ params["word"].value.T))


@whole("the bare array indexed, not the table")
def _(params, ids):
    return head(params["word"].value[jnp.abs(ids) % VOCABULARY], params["w"])


@whole("a table in `stop_gradient`", sparse=RIGHT)
def _(params, ids):
    return head(jax.lax.stop_gradient(params["word"].value), params["w"])


@case("`Table.whole()`", {"sparse": WHOLE, "prefetched": ABSENT, "plain": WHOLE})
def _(params, ids):
    return head(params["word"].whole(), params["w"])


# ---- beside lookups ------------------------------------------------------------------------------------------------


@case("aux: the activations, NaN among them", eager=True, has_aux=True)
def _(params, ids):
    return over(params, ids), {"rows": params["word"][ids], "ids": ids}


@case("`jax.debug.callback` of activations")
def _(params, ids):
    rows = look(params["word"], ids)
    jax.debug.callback(lambda rows: None, rows)
    return head(rows, params["w"])


def known(ids):
    return abs(ids) % 5


@case("`pure_callback` that makes ids", ids=known)
def _(params, ids):
    made = jax.pure_callback(known, jax.ShapeDtypeStruct(ids.shape, ids.dtype), ids)
    return over(params, made)


# ---- devices -------------------------------------------------------------------------------------------------------

DEVICES = 8
MANY_IDS = np.random.default_rng(1).integers(-10, 10, (DEVICES, 3)).astype(np.int32)


def many_ids():
    return (jnp.asarray(MANY_IDS),)


def mesh():
    return jax.make_mesh((DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(function, out_specs, **settings):
    specs = PartitionSpec(), PartitionSpec("devices")
    return jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=out_specs, **settings)


def in_parallel(params, ids, **settings):
    return sharded(lambda p, ids: jax.lax.psum(over(p, ids), "devices"), PartitionSpec(), **settings)(params, ids)


case("`shard_map` in the loss", args=many_ids)(in_parallel)
case("`shard_map` in the loss, unchecked", args=many_ids)(functools.partial(in_parallel, check_vma=False))


@case("`shard_map` in the loss, each device with the same ids", args=many_ids)
def _(params, ids):
    def local(params, all_ids, ids):
        return jax.lax.psum(over(params, ids) * over(params, all_ids), "devices")

    specs = PartitionSpec(), PartitionSpec(), PartitionSpec("devices")
    return jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=PartitionSpec())(params, ids, ids)


@case("`shard_map` in `scan`, and `lax.map` in it", args=many_ids)
def _(params, ids):
    def local(params, ids):
        return jax.lax.psum(jnp.sum(jax.lax.map(lambda ids: over(params, ids), ids) ** 2), "devices")

    def body(total, ids):
        return total + sharded(local, PartitionSpec())(params, ids), None

    return jax.lax.scan(body, jnp.float32(0), jnp.stack([ids, ids[::-1]]))[0]


@case("`pmap` in the loss", args=many_ids)
def _(params, ids):
    return jnp.sum(jax.pmap(over, in_axes=(None, 0))(params, ids))


def everywhere(value, gradients):
    """Returns value and gradients of all devices together."""

    def together(gradient):
        if is_rows(gradient):
            parts = jax.tree.map(lambda x: jax.lax.all_gather(x, "devices"), gradient)
            return embax.merge_row_gradients(parts)
        return jax.tree.map(lambda x: jax.lax.psum(x, "devices"), gradient)

    return jax.lax.psum(value, "devices"), jax.tree.map(together, gradients, is_leaf=is_rows)


def data_parallel(gradient):
    def local(params, ids):
        return everywhere(*gradient(params, ids))

    return sharded(local, PartitionSpec(), check_vma=False)


def data_parallel_checked(gradient):
    """Parameters are marked as varying, so that shard_map does not sum up their gradients by itself."""

    def local(params, ids):
        params = jax.tree.map(lambda x: jax.lax.pcast(x, "devices", to="varying"), params)
        return gather(*gradient(params, ids))

    def gather(value, gradients):
        gradients = jax.tree.map(lambda x: x[None], gradients)
        return value[None], gradients

    def summed(params, ids):
        value, gradients = sharded(local, PartitionSpec("devices"))(params, ids)
        merged = jax.tree.map(
            lambda g: embax.merge_row_gradients(g) if is_rows(g) else jax.tree.map(lambda x: jnp.sum(x, 0), g),
            gradients,
            is_leaf=is_rows,
        )
        return jnp.sum(value), merged

    return summed


def data_parallel_pmap(gradient):
    def local(params, ids):
        return everywhere(*gradient(params, ids))

    mapped = jax.pmap(local, axis_name="devices", in_axes=(None, 0))
    return lambda params, ids: jax.tree.map(lambda x: x[0], mapped(params, ids[:, None]))


# ---- transformations of the gradient itself ------------------------------------------------------------------------

case("the gradient in `vmap`: one for each example", outer=lambda f: jax.vmap(f, (None, 0)))(over)
case("the gradient in `jit`", outer=jax.jit)(chosen)
case("the gradient in `checkpoint`", outer=jax.checkpoint)(steps)


def curvature(gradient):
    def dense(w, params, ids):
        return gradient({**params, "w": w}, ids)[1]["w"]

    return lambda params, ids: jax.jacfwd(dense)(params["w"], params, ids)


def tangent(gradient):
    def along(w, params, ids):
        rows = gradient({**params, "w": w}, ids)[1]["word"]
        return rows.to_dense() if is_rows(rows) else rows.value

    return lambda params, ids: jax.jvp(lambda w: along(w, params, ids), (params["w"],), (jnp.ones(DIM),))


case("`jax.jacfwd` of the dense gradient", outer=curvature)(over)
case("`jax.jvp` of the row gradient", outer=tangent)(over)


def trained(gradient):
    """Training steps in a scan, one for each row of ids."""

    def train(params, ids):
        optimizer = embax.JointOptimizer(optax.sgd(0.1))

        def step(carry, ids):
            params, state = carry
            value, gradients = gradient(params, ids)
            return optimizer.update(params, gradients, state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), ids)
        return params, values

    return train


case("training steps in `scan`", outer=trained)(over)
case("the gradient in `cond`", outer=lambda f: lambda p, i: jax.lax.cond(i[0, 0] > 0, f, f, p, i[::-1]))(over)
case("the gradient on each device of a `shard_map`", args=many_ids, outer=data_parallel)(over)
case(
    "the gradient on each device of a checked `shard_map`",
    args=many_ids,
    outer=data_parallel_checked,
)(over)
case("the gradient on each device of a `pmap`", args=many_ids, outer=data_parallel_pmap)(over)
