# %% [markdown]
# # The same training on a mesh of devices
#
# A plan is given a mesh, and nothing else changes: `init`, `preprocess`, `lookup` and `update` are called as on one
# device, tables and batches are spread over all, and the numbers stay the same. Here four devices are made of one
# CPU, to try it out; with four GPUs leave the environment variable away.

# %%
import os

# Before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import functools  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

import embax  # noqa: E402

# %% [markdown]
# ## Data with a known truth
#
# Every item has a hidden value; a sample is a history of up to six items, and its label is the mean of their values.

# %%
rng = np.random.default_rng(0)
ITEMS, SAMPLES, BATCH = 200, 2048, 128
value_of_item = rng.normal(size=ITEMS)
histories = [rng.integers(ITEMS, size=rng.integers(1, 7)) for _ in range(SAMPLES)]
labels = np.array([value_of_item[history].mean() for history in histories], np.float32)

# %% [markdown]
# ## Training, whatever the plan
#
# The whole loop, once. It does not know how many devices there are: that is a matter of the plan.

# %%
DIM = 8
item = embax.TableSpec(
    name="item",
    vocabulary_size=ITEMS,
    embedding_dim=DIM,
    combiner="mean",
    initializer=jax.nn.initializers.normal(0.1),
    # The first step of a row is of the whole rate.
    optimizer=embax.Adagrad(0.2, initial_accumulator_value=0.0),
)
history = embax.FeatureSpec(name="history", table_spec=item, input_shape=(None,), output_shape=(None, DIM))
# At most six items a sample, so that all batches have one shape.
CAPACITY = {"history": 6 * BATCH}


def loss_of(activations, labels):
    return ((activations.sum(axis=1) - labels) ** 2).mean()


def train(plan):
    """Returns the tables after two epochs, and the loss of every step."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(tables, batch, labels, step):
        activations, residuals = embax.lookup(plan, tables, batch)
        loss, gradients = jax.value_and_grad(loss_of)(activations, labels)
        return embax.update(plan, tables, residuals, gradients, step), loss

    tables, losses = embax.init(plan, jax.random.key(0)), []
    order = np.random.default_rng(1)
    for _ in range(2):
        for numbers in order.permutation(SAMPLES).reshape(-1, BATCH):
            batch = embax.preprocess(plan, [histories[n] for n in numbers])
            tables, loss = train_step(tables, batch, jnp.asarray(labels[numbers]), len(losses))
            losses.append(float(loss))
    return tables, losses


# %% [markdown]
# ## One device, then four

# %%
one = embax.plan(history, capacity=CAPACITY)
mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
# Rows are dealt out: every fourth to a device.
four = embax.plan(history, capacity=CAPACITY, mesh=mesh)

one_tables, one_losses = train(one)
four_tables, four_losses = train(four)
np.testing.assert_allclose(four_losses, one_losses, rtol=1e-3, atol=1e-6)
assert one_losses[-1] < 0.05 * one_losses[0]
for step in (0, -1):
    print(f"loss {one_losses[step]:.5f} on one device, {four_losses[step]:.5f} on four")
# > loss 0.41080 on one device, 0.41080 on four
# > loss 0.00113 on one device, 0.00113 on four

# %% [markdown]
# Each device holds a quarter of the rows, in an order of the mesh's own. `to_arrays` gives tables by name, with
# row i at place i, from any plan; so they can be compared.

# %%
one_rows = embax.to_arrays(one, one_tables)["item"]["table"]
four_rows = embax.to_arrays(four, four_tables)["item"]["table"]
np.testing.assert_allclose(four_rows, one_rows, rtol=1e-3, atol=1e-4)
print([shard.data.shape for shard in four_tables["item"].table.addressable_shards])
# > [(50, 8), (50, 8), (50, 8), (50, 8)]

# %% [markdown]
# And the truth? The sum of an item's row has become its hidden value.

# %%
found = np.asarray(four_rows).sum(axis=1)
correlation = np.corrcoef(found, value_of_item)[0, 1]
assert correlation > 0.98
print(f"correlation of what was found with the truth: {correlation:.3f}")
# > correlation of what was found with the truth: 0.999

# %% [markdown]
# ## Other places for rows
#
# A mesh may split the batch along one axis and the tables along several, and each table has a placement: by rows,
# columns, whole, or copied to every device. The results are the same again.

# %%
square = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
devices = embax.Devices(square, batch_axes=("data", "model"), table_axes="model")
columns = embax.plan(history, capacity=CAPACITY, mesh=devices, placement={"item": "column"})
_, column_losses = train(columns)
np.testing.assert_allclose(column_losses, one_losses, rtol=1e-3, atol=1e-6)

# %% [markdown]
# Next: [which placement is good for what](../mesh.md#where-tables-lie), what it costs on the wire, and
# [several processes](../mesh.md#several-processes). A table that was trained on one mesh is loaded on another by
# [a checkpoint](checkpoints.md).
