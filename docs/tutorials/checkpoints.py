# %% [markdown]
# # Checkpoints: resume, move, serve
#
# A training run is stopped halfway and goes on from its checkpoint, **bit for bit** as if it had never stopped. The
# same checkpoint is then loaded on four devices, and served without an optimizer, in rows of 8 bits.
# `pip install 'embax[checkpoint]' optax`, then run this page's script.

# %%
import os

# Before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import functools  # noqa: E402
import tempfile  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

import embax  # noqa: E402
import embax.checkpoint  # noqa: E402

# %% [markdown]
# ## A model, and data with a known truth
#
# A sample is three items; its label is the sum of their hidden values, and some noise. A batch is made from the
# number of its step, so that a run that goes on sees what it would have seen.

# %%
ITEMS, DIM, BATCH = 200, 8, 128
value_of_item = np.random.default_rng(0).normal(size=ITEMS)


def data_of(step):
    rng = np.random.default_rng(step + 1)
    ids = rng.integers(ITEMS, size=(BATCH, 3))
    noise = 0.2 * rng.normal(size=BATCH)
    return ids, (value_of_item[ids].sum(axis=1) + noise).astype(np.float32)


item = embax.TableSpec(
    name="item",
    vocabulary_size=ITEMS,
    embedding_dim=DIM,
    combiner="sum",
    initializer=jax.nn.initializers.normal(0.1),
    # The first step of a row is of the whole rate.
    optimizer=embax.Adagrad(0.2, initial_accumulator_value=0.0),
)
items = embax.FeatureSpec(name="items", table_spec=item, input_shape=(None, 3), output_shape=(None, DIM))
plan = embax.plan(items)
adam = optax.adam(1e-2)


def fresh():
    dense = {"w": jnp.ones(DIM)}
    return embax.init(plan, jax.random.key(0)), {"dense": dense, "adam": adam.init(dense)}


# %%
@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(plan, tables, rest, batch, labels, step):
    def loss_of(dense, activations):
        return ((activations @ dense["w"] - labels) ** 2).mean()

    activations, residuals = embax.lookup(plan, tables, batch)
    loss, gradients = jax.value_and_grad(loss_of, argnums=(0, 1))(rest["dense"], activations)
    changes, state = adam.update(gradients[0], rest["adam"], rest["dense"])
    rest = {"dense": optax.apply_updates(rest["dense"], changes), "adam": state}
    return embax.update(plan, tables, residuals, gradients[1], step), rest, loss


def train(plan, tables, rest, steps):
    """Returns tables and the rest after these steps, and the loss of each."""
    losses = []
    for step in steps:
        ids, labels = data_of(step)
        batch = embax.preprocess(plan, ids)
        tables, rest, loss = train_step(plan, tables, rest, batch, labels, step)
        losses.append(float(loss))
    return tables, rest, losses


# %% [markdown]
# ## Without a stop
#
# Two hundred steps, for comparison.

# %%
whole_tables, whole_rest, whole_losses = train(plan, *fresh(), range(200))
assert whole_losses[-1] < 0.05 * whole_losses[0]
print(f"loss {whole_losses[0]:.3f} at first, {whole_losses[-1]:.3f} at last")
# > loss 3.594 at first, 0.043 at last

# %% [markdown]
# ## Saved, and resumed bit for bit
#
# One call saves the tables with their slot variables (Adagrad's sums), everything dense, and a note of where the
# data stood. Files are written while training goes on; leaving the `with` waits for them.

# %%
folder = tempfile.mkdtemp()
tables, rest, begun = train(plan, *fresh(), range(100))
with embax.checkpoint.Checkpoints(folder) as checkpoints:
    tables = checkpoints.save(100, plan, tables, dense=rest, data={"next_step": 100})
del tables, rest  # the process ends here; what follows could be another one

with embax.checkpoint.Checkpoints(folder) as checkpoints:
    # A dense part of the same form, for its structure.
    found = checkpoints.restore(plan, dense=fresh()[1])
steps = range(found.data["next_step"], 200)
tables, rest, ended = train(plan, found.tables, found.dense, steps)

assert begun + ended == whole_losses  # equal, not close
jax.tree.map(np.testing.assert_array_equal, (tables, rest), (whole_tables, whole_rest))

# %% [markdown]
# ## On another mesh
#
# On disk a table has its rows in the order of ids, whatever devices it came from. So any plan may load it: one with
# a mesh of four devices goes on from step 100 as well, and its losses are those of one device up to rounding.

# %%
four = embax.plan(items, mesh=Mesh(np.array(jax.devices()[:4]), ("data",)))
with embax.checkpoint.Checkpoints(folder) as checkpoints:
    found = checkpoints.restore(four, dense=fresh()[1])
_, _, on_four = train(four, found.tables, found.dense, range(100, 200))
np.testing.assert_allclose(on_four, whole_losses[100:], rtol=1e-3)
print(f"last loss on one device {whole_losses[-1]:.5f}, on four {on_four[-1]:.5f}")
# > last loss on one device 0.04293, on four 0.04293

# %% [markdown]
# ## Serving
#
# `serving=True` loads rows without slot variables, for lookups only: half the memory, with Adagrad. In codes of 8 bits
# a row takes about a quarter of that again, once rows are long.

# %%
with embax.checkpoint.Checkpoints(folder) as checkpoints:
    found = checkpoints.restore(plan, dense=fresh()[1], serving=True)
served = embax.quantize_tables(plan, found.tables, bits=8)


@jax.jit
def predict(tables, dense, batch):
    activations, _ = embax.lookup(plan, tables, batch)
    return activations @ dense["w"]


ids, labels = data_of(1000)  # never trained on
batch = embax.preprocess(plan, ids)
exact = predict(found.tables, found.dense["dense"], batch)
coded = predict(served, found.dense["dense"], batch)
assert np.corrcoef(exact, labels)[0, 1] > 0.98
np.testing.assert_allclose(coded, exact, atol=0.1)
for name, numbers in (("labels", labels), ("from float32", exact), ("from 8 bits", coded)):
    print(name, *(f"{number:.3f}" for number in numbers[:4]))
# > labels 1.756 0.962 -1.341 -0.468
# > from float32 1.829 1.023 -1.190 -0.833
# > from 8 bits 1.830 1.023 -1.191 -0.833

# %% [markdown]
# Next: [only the rows that were written](../checkpoints.md#only-what-was-written),
# [Flax models](../checkpoints.md#models), and
# [what a checkpoint outlives](../checkpoints.md#what-a-checkpoint-outlives).
