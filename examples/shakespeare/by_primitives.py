"""The next word by the SparseCore primitives: ``python by_primitives.py --devices 4``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import settings
import stored
import text
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from settings import AXIS, DIM, HIDDEN

from embax.sparsecore.lib.nn import embedding


def dense_part(vocabulary):
    """Returns the parameters of two layers."""
    hidden, out = jax.random.split(jax.random.key(1))
    init = jax.nn.initializers.lecun_normal()
    return {
        "hidden": init(hidden, (text.CONTEXT * DIM, HIDDEN)),
        "bias": jnp.zeros(HIDDEN),
        "out": init(out, (HIDDEN, vocabulary)),
    }


def loss_of(activations, dense, labels):
    context = activations.reshape(-1, text.CONTEXT * DIM)
    return settings.loss_of(jax.nn.relu(context @ dense["hidden"] + dense["bias"]) @ dense["out"], labels)


def train(devices, steps, save=None, restore=None):
    """Returns the loss of every step."""
    words, numbers = text.read()
    feature = settings.features(len(words))
    mesh = jax.sharding.Mesh(jax.devices()[:devices], (AXIS,))
    num_sc = 1
    embedding.prepare_feature_specs_for_training(feature, devices, num_sc)
    tables = embedding.get_table_specs(feature)
    variables = embedding.init_embedding_variables(
        jax.random.key(0), tables, NamedSharding(mesh, P(AXIS, None)), num_sc
    )
    dense, optimizer = dense_part(len(words)), optax.adam(3e-3)
    dense, state = jax.device_put((dense, optimizer.init(dense)), NamedSharding(mesh, P()))
    first = 0
    if restore:
        fresh = {"dense": dense, "state": state, "step": first}
        variables, found = stored.restore(restore, tables, variables, devices * num_sc, fresh)
        dense, state, first = found["dense"], found["state"], int(found["step"])

    shared = {"feature_specs": feature, "global_device_count": devices, "num_sc_per_device": num_sc}

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=((P(AXIS), P(), P()), P(AXIS), P(AXIS), P()),
        out_specs=((P(AXIS), P(), P()), P()),
        check_vma=False,
    )
    def step(carry, inputs, labels, number):
        variables, dense, state = carry
        activations = embedding.tpu_sparse_dense_matmul(inputs, variables, **shared)
        loss, gradients = jax.value_and_grad(loss_of, (0, 1))(activations, dense, labels)
        loss, own = jax.lax.pmean((loss, gradients[1]), AXIS)  # each device has its part of the batch
        updates, state = optimizer.update(own, state, dense)
        variables = embedding.tpu_sparse_dense_matmul_grad(
            gradients[0] / devices, inputs, variables, step=number, **shared
        )
        return (variables, optax.apply_updates(dense, updates), state), loss

    carry, losses = (variables, dense, state), []
    for number, ids, labels in text.batches(numbers, first, steps):
        inputs, _ = embedding.preprocess_sparse_dense_matmul_input(
            ids, None, feature, devices, devices, num_sc_per_device=num_sc
        )
        carry, loss = step(carry, inputs, labels, np.int32(number))
        losses.append(float(loss))
    if save:
        variables, dense, state = carry
        rest = {"dense": dense, "state": state, "step": first + steps}
        stored.save(save, tables, variables, devices * num_sc, rest)
    return losses


if __name__ == "__main__":
    settings.main(train, __doc__)
