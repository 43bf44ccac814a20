"""The cases of plain JAX: jit, checkpoint, vmap, loops and branches in a loss over a pytree with a table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import embax
from tests.transform_cases import COPIES, DIM, IDS, JAX_LOOP, LAYERS, LOOP, RIGHT, VOCABULARY, Case, Problem

JAX: list[Case] = []


def case(name, expected=None, layers=False, args=None, eager=False, cases=JAX, **settings):
    """Returns a decorator that makes a case of ``loss(params, ids)``; ``settings`` are those of its Problem."""

    def add(loss):
        def problem():
            arguments = (jnp.asarray(IDS),) if args is None else args()
            return Problem(loss, parameters(layers), arguments, **settings)

        cases.append(Case(name, "jax", problem, eager=eager, **(expected or {})))
        return loss

    return add


def parameters(layers=False):
    shape = (LAYERS, VOCABULARY, DIM) if layers else (VOCABULARY, DIM)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return {"word": embax.Table(jnp.asarray(values), embax.SGD(0.1)), "w": jnp.array([0.5, -1.5])}


def look(table, ids):
    """Returns the rows at ``ids``, zeros out of range."""
    return jnp.nan_to_num(table[ids])


def head(rows, w):
    return jnp.sum(jnp.tanh(rows @ w))


def block(table, ids, w):
    """Returns the loss of a lookup, by one function for all cases that wrap one."""
    return head(look(table, ids), w)


def over(params, ids):
    return block(params["word"], ids, params["w"])


# ---- without, and under jit and checkpoint -------------------------------------------------------------------------

case("a lookup", eager=True)(over)


@case("two lookups of one table")
def _(params, ids):
    return over(params, ids) * over(params, ids[:, :1])


@case("no lookup at all: no rows", {"plain": RIGHT})
def _(params, ids):
    return head(ids.astype(jnp.float32)[:, :DIM], params["w"])


jitted = jax.jit(block)


@case("`jax.jit` inside")
def _(params, ids):
    return jax.jit(lambda table, ids: jax.jit(block)(table, ids, params["w"]))(params["word"], ids)


@case("`jax.jit` inside, called before", eager=True, warm=True)
def _(params, ids):
    return jitted(params["word"], ids, params["w"])


@case("one `jax.jit` inside, twice", warm=True)
def _(params, ids):
    return jitted(params["word"], ids, params["w"]) * jitted(params["word"], ids[::-1], 2 * params["w"])


@case("`jax.checkpoint`")
def _(params, ids):
    return jax.checkpoint(jax.checkpoint(block))(params["word"], ids, params["w"])


@case("`jax.checkpoint` with a policy", eager=True)
def _(params, ids):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(block, policy=policy)(params["word"], ids, params["w"])


@case("`jax.checkpoint` in `scan`")
def _(params, ids):
    @jax.checkpoint
    def body(total, ids):
        return total + over(params, ids), None

    return jax.lax.scan(body, jnp.float32(0), ids)[0]


@case("`scan` in `jax.checkpoint`")
def _(params, ids):
    return jax.checkpoint(steps)(params, ids)


# ---- vmap ----------------------------------------------------------------------------------------------------------


@case("`vmap` over ids")
def _(params, ids):
    return jnp.sum(jax.vmap(over, (None, 0))(params, ids) ** 2)


@case("`vmap` in `vmap`")
def _(params, ids):
    return jnp.sum(jax.vmap(jax.vmap(over, (None, 0)), (None, 1))(params, ids) ** 2)


@case("`vmap` over ids, with `psum` over its axis")
def _(params, ids):
    def one(ids):
        loss = over(params, ids)
        return loss * jax.lax.psum(loss, "batch")

    return jnp.sum(jax.vmap(one, axis_name="batch")(ids))


@case("`vmap` over layers `[L, V, D]`", layers=True)
def _(params, ids):
    return jnp.sum(jax.vmap(block, (0, None, None))(params["word"], ids, params["w"]) ** 2)


@case("`vmap` over layers `[L, V, D]` and ids", eager=True, layers=True)
def _(params, ids):
    two = jnp.stack([ids, ids[::-1]])
    return jnp.sum(jax.vmap(jax.vmap(block, (None, 0, None)), (0, 0, None))(params["word"], two, params["w"]) ** 2)


# ---- scan, map, fori_loop of known length --------------------------------------------------------------------------


def steps(params, ids, **settings):
    """A recurrence: the state multiplies what is looked up."""

    def body(state, ids):
        state = jnp.tanh(state + jnp.sum(look(params["word"], ids), 0) * params["w"])
        return state, state

    state, states = jax.lax.scan(body, jnp.ones(DIM), ids, **settings)
    return jnp.sum(state * states[1])


case("`scan` over steps")(steps)
case("`scan` over steps, reversed", eager=True)(functools.partial(steps, reverse=True))
case("`scan` over steps, unrolled")(functools.partial(steps, unroll=3))
case("`scan` over steps in `jit`, called before", warm=True)(jax.jit(steps))


@case("`scan` over layers `[L, V, D]`", layers=True)
def _(params, ids):
    def body(total, table):
        return total + block(table, ids, params["w"] * total), None

    return jax.lax.scan(body, jnp.float32(1), params["word"])[0]


@case("`scan` over layers, reversed, in `checkpoint`", eager=True, layers=True)
def _(params, ids):
    @jax.checkpoint
    def body(total, layer):
        table, ids = layer
        return total + block(table, ids, params["w"] * total), None

    return jax.lax.scan(body, jnp.float32(1), (params["word"], ids[:LAYERS]), reverse=True)[0]


@case("`scan`, the table in its carry", eager=True)
def _(params, ids):
    def body(carry, ids):
        table, total = carry
        return (table, total + block(table, ids, params["w"] * total)), None

    return jax.lax.scan(body, (params["word"], jnp.float32(1)), ids)[0][1]


@case("`scan` in `scan`")
def _(params, ids):
    def outer(total, ids):
        return jax.lax.scan(lambda t, i: (t + over({**params, "w": params["w"] * t}, i), None), total, ids)

    return jax.lax.scan(outer, jnp.float32(1), ids)[0]


@case("`scan` over steps in `scan` over layers", layers=True)
def _(params, ids):
    def outer(total, table):
        return jax.lax.scan(lambda t, i: (t + block(table, i, params["w"] * t), None), total, ids)[0], None

    return jax.lax.scan(outer, jnp.float32(1), params["word"])[0]


@case("`vmap` of `scan`")
def _(params, ids):
    return jnp.sum(jax.vmap(lambda ids: steps(params, ids[:, None]))(ids) ** 2)


@case("`vmap` in `scan`")
def _(params, ids):
    def body(total, ids):
        return total + jnp.sum(jax.vmap(over, (None, 0))(params, ids) ** 2), None

    return jax.lax.scan(body, jnp.float32(0), ids)[0]


@case("`lax.map`")
def _(params, ids):
    return jnp.sum(jax.lax.map(lambda ids: over(params, ids), ids) ** 2)


@case("`lax.map` in batches")
def _(params, ids):
    return jnp.sum(jax.lax.map(lambda ids: over(params, ids), ids, batch_size=3) ** 2)


@case("`associative_scan` over activations")
def _(params, ids):
    return head(jax.lax.associative_scan(jnp.multiply, look(params["word"], ids)), params["w"])


def looped(params, ids, count):
    def body(i, total):
        return total + over({**params, "w": params["w"] * total}, ids[i])

    return jax.lax.fori_loop(0, count, body, jnp.float32(1))


@case("`fori_loop` of known length")
def _(params, ids):
    return looped(params, ids, 3)


# ---- loops without reverse mode ------------------------------------------------------------------------------------

NO_REVERSE = {"sparse": LOOP, "prefetched": JAX_LOOP}


@case("`fori_loop` of unknown length", NO_REVERSE)
def _(params, ids):
    return looped(params, ids, jnp.sum(ids > 7))


def until(params, ids):
    def body(state):
        i, total = state
        return i + 1, total + over(params, ids[i])

    return jax.lax.while_loop(lambda state: (state[0] < 4) & (state[1] < 2), body, (0, jnp.float32(0)))[1]


@case("`while_loop`", NO_REVERSE)
def _(params, ids):
    return until(params, ids) * over(params, ids)


@case("`while_loop`, its result in `stop_gradient`", eager=True)
def _(params, ids):
    return jax.lax.stop_gradient(until(params, ids)) * over(params, ids)


@case("`while_loop`, its result not in the loss but in aux", has_aux=True)
def _(params, ids):
    return over(params, ids), until(params, ids)


@case("`while_loop` with a lookup in its condition")
def _(params, ids):
    def condition(i):
        return over(params, ids[i]) < 0.5

    return over(params, ids) * jax.lax.while_loop(condition, lambda i: i + 1, 0).astype(jnp.float32)


# ---- cond ----------------------------------------------------------------------------------------------------------


def chosen(params, ids):
    """A branch by the ids: two that look up differently, and one that does not."""
    branches = [
        lambda ids: over(params, ids),
        lambda ids: over(params, ids[:1]) * over(params, ids[1:]),
        lambda ids: jnp.sum(params["w"]),
    ]
    return jax.lax.switch(ids.reshape(-1)[0] % 3, branches, ids)


@case("`cond`, lookups in both branches")
def _(params, ids):
    def loss(ids):
        return jax.lax.cond(ids[0] > 3, lambda: over(params, ids), lambda: over(params, ids[1:]) ** 2)

    return loss(ids[0]) * loss(ids[2])


@case("`cond`, a lookup in one branch", eager=True)
def _(params, ids):
    def loss(ids):
        return jax.lax.cond(ids[0] > 3, lambda: over(params, ids), lambda: jnp.sum(params["w"]))

    return loss(ids[0]) * loss(ids[2])


@case("`switch` of three branches")
def _(params, ids):
    return chosen(params, ids[0]) * chosen(params, ids[2]) * chosen(params, ids[3])


@case("`cond` in `scan`")
def _(params, ids):
    return jax.lax.scan(lambda total, ids: (total + chosen(params, ids), None), jnp.float32(0), ids)[0]


@case("`cond` in `vmap`, another condition for each entry", {"sparse": COPIES})
def _(params, ids):
    return jnp.sum(jax.vmap(chosen, (None, 0))(params, ids) ** 2)


@case("`scan` in `cond`")
def _(params, ids):
    return jax.lax.cond(ids[0, 0] > 0, lambda: steps(params, ids), lambda: steps(params, ids, reverse=True))
