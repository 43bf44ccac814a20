"""The next word by the Linen layer: ``python by_linen.py --devices 4``."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import settings
import stored
import text
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from settings import AXIS, DIM, HIDDEN

from embax.sparsecore.lib.flax.linen import embed, embed_optimizer
from embax.sparsecore.lib.nn import embedding


class Model(nn.Module):
    """Two layers over the words of a context."""

    feature: Any
    mesh: Any
    vocabulary: int

    def setup(self):
        self.embed = embed.SparseCoreEmbed(self.feature, AXIS, self.mesh)
        self.hidden, self.out = nn.Dense(HIDDEN), nn.Dense(self.vocabulary)

    def __call__(self, inputs, step):
        context = self.embed(inputs, step).reshape(-1, text.CONTEXT * DIM)
        return self.out(nn.relu(self.hidden(context)))


def train(devices, steps, save=None, restore=None):
    """Returns the loss of every step."""
    words, numbers = text.read()
    feature = settings.features(len(words))
    mesh = jax.sharding.Mesh(jax.devices()[:devices], (AXIS,))
    split, whole = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    model, layer = Model(feature, mesh, len(words)), embed.SparseCoreEmbed(feature, AXIS, mesh)

    def prepared(ids, labels, step):
        return jax.device_put((layer.preprocess_inputs(step, ids), labels), split)

    _, ids, labels = next(text.batches(numbers, 0, 1))
    inputs, _ = prepared(ids, labels, 0)
    params = nn.unbox(model.init(jax.random.key(0), inputs, 0)["params"])
    optimizer = embed_optimizer.create_optimizer_for_sc_model(params, optax.adam(3e-3))
    state, first = optimizer.init(params), 0
    params, state = jax.tree.map_with_path(
        lambda path, x: x if embed_optimizer.is_table(path) else jax.device_put(x, whole), (params, state)
    )
    num_sc, tables = devices * layer.num_sc_per_device, embedding.get_table_specs(feature)
    if restore:
        fresh = {"dense": dense_of(params), "state": state, "step": first}
        variables, found = stored.restore(restore, tables, variables_of(params), num_sc, fresh)
        params = {**found["dense"], "embed": {embed.EMBEDDING_PARAM_NAME: variables}}
        state, first = found["state"], int(found["step"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, inputs, labels, number):
        def loss_of(params):
            return settings.loss_of(model.apply({"params": params}, inputs, number), labels)

        loss, gradients = jax.value_and_grad(loss_of)(params)  # for the tables: the tables after their step
        updates, state = optimizer.update(gradients, state, params)
        return embed_optimizer.apply_updates_for_sc_model(params, updates), state, loss

    losses = []
    for number, ids, labels in text.batches(numbers, first, steps):
        params, state, loss = step(params, state, *prepared(ids, labels, number), np.int32(number))
        losses.append(float(loss))
    if save:
        rest = {"dense": dense_of(params), "state": state, "step": first + steps}
        stored.save(save, tables, variables_of(params), num_sc, rest)
    return losses


def variables_of(params):
    return params["embed"][embed.EMBEDDING_PARAM_NAME]


def dense_of(params):
    return {name: part for name, part in params.items() if name != "embed"}


if __name__ == "__main__":
    settings.main(train, __doc__)
