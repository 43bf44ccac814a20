"""A word model in Equinox whose table is trained by row: ``pip install embax equinox optax``, then run this file.

An ``embax.Table`` is a pytree node like any other: Equinox filters, partitions and serialises it as it does an array.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import embax

VOCABULARY, DIM, CLASSES = 50_000, 32, 4


class WordModel(eqx.Module):
    words: embax.Table
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        table, hidden, out = jax.random.split(key, 3)
        self.words = embax.Table(0.1 * jax.random.normal(table, (VOCABULARY, DIM)), embax.Adagrad(0.5), name="words")
        self.hidden = eqx.nn.Linear(DIM, DIM, key=hidden)
        self.out = eqx.nn.Linear(DIM, CLASSES, key=out)

    def __call__(self, ids):
        """Returns the logits of one document, int32 ``[length]``."""
        return self.out(jax.nn.relu(self.hidden(self.words[ids].mean(axis=0))))


def loss_fn(params, static, ids, labels):
    model = eqx.combine(params, static)
    logits = jax.vmap(model)(ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def documents(seed, steps, batch=256, length=12):
    """Yields documents whose class shows in which words they use."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        labels = rng.integers(0, CLASSES, batch)
        ids = rng.integers(0, 200, (batch, length)) * CLASSES + labels[:, None]
        yield jnp.asarray(ids, jnp.int32), jnp.asarray(labels, jnp.int32)


def train(steps=60):
    """Returns the losses of a short training run."""
    params, static = eqx.partition(WordModel(jax.random.key(0)), eqx.is_inexact_array)
    optimizer = embax.JointOptimizer(optax.adam(1e-2), max_norm=1.0)
    state = optimizer.init(params)

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, params, state):
        loss, gradients = embax.value_and_grad(loss_fn)(params, static, *batch)
        params, state = optimizer.update(params, gradients, state)
        return loss, params, state

    losses = []
    for batch in documents(0, steps):
        loss, params, state = step(batch, params, state)
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
