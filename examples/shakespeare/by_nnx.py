"""The next word by the NNX layer: ``python by_nnx.py --devices 4``."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import settings
import text
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from settings import AXIS, DIM, HIDDEN

from embax.sparsecore.lib.flax.nnx import checkpoint_utils, embed
from embax.sparsecore.lib.nn import embedding


class Model(nnx.Module):
    """Two layers over the words of a context."""

    def __init__(self, feature, mesh, vocabulary, rngs):
        self.embed = embed.SparseCoreEmbed(feature, AXIS, mesh, rngs)
        self.hidden = nnx.Linear(text.CONTEXT * DIM, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, vocabulary, rngs=rngs)

    def __call__(self, inputs, step):
        context = self.embed(inputs, step).reshape(-1, text.CONTEXT * DIM)
        return self.out(nnx.relu(self.hidden(context)))


def train(devices, steps, save=None, restore=None):
    """Returns the loss of every step."""
    words, numbers = text.read()
    feature = settings.features(len(words))
    mesh = jax.sharding.Mesh(jax.devices()[:devices], (AXIS,))
    model = Model(feature, mesh, len(words), nnx.Rngs(0))
    optimizer = embed.PartitionedOptimizer(model, optax.adam(3e-3))
    num_sc = model.embed.num_sc_per_device
    topology = {"num_global_devices": devices, "num_sc_per_device": num_sc}
    first = 0
    if restore:
        checkpoint_utils.restore_cross_topology_checkpoint(
            cross_topology_checkpoint_restore_path=restore.absolute(),
            model=model,
            optimizer=optimizer,
            target_feature_specs=feature,
            **topology,
        )
        first = int(optimizer.step[...])

    split = NamedSharding(mesh, P(AXIS))
    shardings = (embed.get_named_sharding(model, mesh), embed.get_named_sharding(optimizer, mesh), split, split, None)

    @nnx.jit(in_shardings=shardings, donate_argnums=(0, 1))
    def step(model, optimizer, inputs, labels, number):
        def loss_of(model):
            return settings.loss_of(model(inputs, number), labels)

        loss, gradients = nnx.value_and_grad(loss_of)(model)  # for the tables: the tables after their step
        optimizer.update(model, gradients)
        return loss

    losses = []
    for number, ids, labels in text.batches(numbers, first, steps):
        inputs, _ = embedding.preprocess_sparse_dense_matmul_input(
            ids, None, feature, devices, devices, num_sc_per_device=num_sc
        )
        losses.append(float(step(model, optimizer, inputs, labels, np.int32(number))))
    if save:
        options = ocp.CheckpointManagerOptions(create=True)
        with checkpoint_utils.create_checkpoint_manager(cp_path=save.absolute(), cp_options=options) as manager:
            checkpoint_utils.save_checkpoint(
                cp_manager=manager,
                step=first + steps,
                model=model,
                optimizer=optimizer,
                feature_specs=feature,
                **topology,
            )
    return losses


if __name__ == "__main__":
    settings.main(train, __doc__)
