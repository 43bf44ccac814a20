"""A word model and a recommender, each in NNX and in Linen, whose code takes flax's Embed as well as embax's.

A ``Swap`` holds the three lines that differ between dense flax + optax and embax: the constructor of the tables, the
gradient, the optimizer (in Linen the TrainState). Everything below them is the same code.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state

import embax
import embax.linen
import embax.nnx

DIM, LENGTH = 8, 4


class Swap(NamedTuple):
    """The three lines: ``embed(vocabulary, dim)``, ``value_and_grad(loss)``, and what makes optimizer or state."""

    embed: Callable
    value_and_grad: Callable
    optimizer: Callable


def dense(flavour: str) -> Swap:
    """Returns flax and optax alone."""
    if flavour == "nnx":
        return Swap(nnx.Embed, nnx.value_and_grad, functools.partial(nnx.Optimizer, wrt=nnx.Param))
    return Swap(nn.Embed, jax.value_and_grad, train_state.TrainState.create)


def sparse(flavour: str, optimizer: embax.Optimizer, **settings: Any) -> Swap:
    """Returns embax: tables with this optimizer, ``settings`` (max_norm, every_k) for the joint step."""
    if flavour == "nnx":
        joint = functools.partial(embax.nnx.Optimizer, wrt=nnx.Param, **settings)
        return Swap(functools.partial(embax.nnx.Embed, optimizer=optimizer), embax.nnx.value_and_grad, joint)
    joint = functools.partial(embax.linen.TrainState.create, **settings)
    return Swap(functools.partial(embax.linen.Embed, optimizer=optimizer), embax.linen.value_and_grad, joint)


def standard(tx: Any) -> Any:
    """Returns ``tx``, run under standard dtype promotion: optax.adam itself mixes float and int32."""

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def scores(table: Any, query: jax.Array, candidates: jax.Array) -> jax.Array:
    """Returns inner products with the rows of ``candidates``; flax's attend knows no candidates, it scores all rows."""
    if isinstance(table, (embax.nnx.Embed, embax.linen.Embed)):
        return table.attend(query, candidates=candidates)
    return table.attend(query)[:, candidates]


class NnxWords(nnx.Module):
    """Predicts a word among candidates from the words before it, the table being input and output."""

    def __init__(self, embed: Callable, size: int, rngs: nnx.Rngs):
        self.word = embed(size, DIM, rngs=rngs)
        self.mix = nnx.Linear(LENGTH * DIM, DIM, rngs=rngs)

    def __call__(self, batch):
        context = self.word(batch["context"])
        hidden = jnp.tanh(self.mix(context.reshape(context.shape[0], -1)))
        return scores(self.word, hidden, batch["candidates"])


class NnxRecommender(nnx.Module):
    """Predicts a click from a user, the items before, and an item; the item table is looked up twice."""

    def __init__(self, embed: Callable, size: int, rngs: nnx.Rngs):
        self.user, self.item = embed(size, DIM, rngs=rngs), embed(size, DIM, rngs=rngs)
        self.hidden, self.out = nnx.Linear(3 * DIM, DIM, rngs=rngs), nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, batch):
        user, item, history = self.user(batch["user"]), self.item(batch["item"]), self.item(batch["history"])
        hidden = jnp.tanh(self.hidden(jnp.concatenate([user, item, history.mean(1)], 1)))
        return self.out(hidden)[:, 0] + (user * item).sum(1)


class LinenWords(nn.Module):
    """``NnxWords`` in Linen."""

    embed: Any
    size: int

    def setup(self):
        self.word = self.embed(self.size, DIM)
        self.mix = nn.Dense(DIM)

    def __call__(self, batch):
        context = self.word(batch["context"])
        hidden = jnp.tanh(self.mix(context.reshape(context.shape[0], -1)))
        return scores(self.word, hidden, batch["candidates"])


class LinenRecommender(nn.Module):
    """``NnxRecommender`` in Linen."""

    embed: Any
    size: int

    def setup(self):
        self.user, self.item = self.embed(self.size, DIM), self.embed(self.size, DIM)
        self.hidden, self.out = nn.Dense(DIM), nn.Dense(1)

    def __call__(self, batch):
        user, item, history = self.user(batch["user"]), self.item(batch["item"]), self.item(batch["history"])
        hidden = jnp.tanh(self.hidden(jnp.concatenate([user, item, history.mean(1)], 1)))
        return self.out(hidden)[:, 0] + (user * item).sum(1)


MODELS = {
    ("nnx", "words"): NnxWords,
    ("nnx", "recommender"): NnxRecommender,
    ("linen", "words"): LinenWords,
    ("linen", "recommender"): LinenRecommender,
}
TABLES = {"words": ("word",), "recommender": ("user", "item")}


def loss_of(outputs: jax.Array, batch: Any) -> jax.Array:
    """Returns the mean loss: over candidates for words, of clicks for the recommender."""
    if outputs.ndim == 2:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()
    return optax.sigmoid_binary_cross_entropy(outputs, batch["label"]).mean()


class Batches:
    """Random batches of one model. Labels follow from the ids, so that there is something to learn."""

    def __init__(self, model: str, size: int, count: int = 12, seed: int = 0):
        self.model, self.size, self.count, self.rng = model, size, count, np.random.default_rng(seed)
        self.taste = np.random.default_rng(99).normal(size=(size, 2))

    def next(self, every_row: bool = False) -> dict[str, np.ndarray]:
        """Returns a batch; with ``every_row`` one that looks up every row of every table."""
        size, count, rng = self.size, self.count, self.rng
        if self.model == "words":
            first = rng.integers(0, size, (count, 1))
            context = (first + np.arange(LENGTH) * 3) % size
            target = (first[:, 0] * 7 + 1) % size
            # The sampled softmax: every target, and a few more; or all words.
            others = np.concatenate([target, rng.integers(0, size, 5)])
            candidates, label = (np.arange(size), target) if every_row else (others, np.arange(count))
            found = {"context": context, "candidates": candidates, "label": label}
        else:
            user, item = rng.integers(0, size, count), rng.integers(0, size, count)
            if every_row:
                user, item = (rng.permutation(np.resize(np.arange(size), count)) for _ in range(2))
            found = {"user": user, "item": item, "history": rng.integers(0, size, (count, LENGTH))}
            found["label"] = (self.taste[user] * self.taste[item]).sum(1) > 0
        return {name: a.astype(np.float32 if a.dtype == bool else np.int32) for name, a in found.items()}


class NnxRun:
    """A model in training, donated to every step."""

    def __init__(self, model: str, swap: Swap, tx: Any, size: int, batch: Any):
        del batch
        self.model = MODELS["nnx", model](swap.embed, size, nnx.Rngs(0))
        self.optimizer = swap.optimizer(self.model, tx)

        @functools.partial(nnx.jit, donate_argnums=(0, 1))
        def step(model, optimizer, batch):
            loss, gradients = swap.value_and_grad(lambda model: loss_of(model(batch), batch))(model)
            optimizer.update(model, gradients)
            return loss

        self.jitted = step

    @property
    def arguments(self) -> tuple:
        """What is donated to the step."""
        return self.model, self.optimizer

    def step(self, batch: Any) -> float:
        """Takes a step and returns the loss before it."""
        return float(self.jitted(self.model, self.optimizer, batch))

    def table(self, name: str) -> np.ndarray:
        """Returns a copy of a table."""
        return np.array(getattr(self.model, name).embedding[...])

    def parameters(self) -> list[np.ndarray]:
        """Returns copies of all parameters that are not tables."""
        parts = [self.model.mix] if hasattr(self.model, "mix") else [self.model.hidden, self.model.out]
        return [np.array(leaf) for part in parts for leaf in jax.tree.leaves(nnx.as_pure(nnx.state(part)))]

    def slots(self, name: str) -> list[np.ndarray]:
        """Returns copies of a table's slot variables."""
        return [np.array(slot) for slot in self.optimizer.slots[f"{name}/embedding"].get_value()]


class LinenRun:
    """The same in Linen."""

    def __init__(self, model: str, swap: Swap, tx: Any, size: int, batch: Any):
        module = MODELS["linen", model](swap.embed, size)
        params = module.init(jax.random.key(0), batch)["params"]
        self.state = swap.optimizer(apply_fn=module.apply, params=params, tx=tx)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, batch):
            def loss_fn(params):
                return loss_of(state.apply_fn({"params": params}, batch), batch)

            loss, gradients = swap.value_and_grad(loss_fn)(state.params)
            return state.apply_gradients(grads=gradients), loss

        self.jitted = step

    @property
    def arguments(self) -> tuple:
        """What is donated to the step."""
        return (self.state,)

    def step(self, batch: Any) -> float:
        """Takes a step and returns the loss before it."""
        self.state, loss = self.jitted(self.state, batch)
        return float(loss)

    def table(self, name: str) -> np.ndarray:
        """Returns a copy of a table."""
        embedding = self.state.params[name]["embedding"]
        return np.array(getattr(embedding, "value", embedding))

    def parameters(self) -> list[np.ndarray]:
        """Returns copies of all parameters that are not tables."""
        return [np.array(p) for name in ("mix", "hidden", "out") for p in jax.tree.leaves(self.state.params.get(name))]

    def slots(self, name: str) -> list[np.ndarray]:
        """Returns copies of a table's slot variables."""
        tables = [path for path in sorted(self.state.params) if "embedding" in self.state.params[path]]
        return [np.array(slot) for slot in self.state.slots[tables.index(name)]]


def run(flavour: str, model: str, swap: Swap, tx: Any, size: int, batch: Any) -> NnxRun | LinenRun:
    """Returns a fresh model in training."""
    return {"nnx": NnxRun, "linen": LinenRun}[flavour](model, swap, tx, size, batch)
