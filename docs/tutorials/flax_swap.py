# %% [markdown]
# # From flax to embax, in three lines
#
# A model of `flax.nnx` with an `nnx.Embed` is trained twice: as it is, and with three lines changed. The losses are
# the same; what a step works on is not. `pip install 'embax[flax]' optax`, then run this page's script.

# %%
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import embax
import embax.nnx

# %% [markdown]
# ## Texts with a known truth
#
# Every word has a hidden value, and a text of twelve words is good if their sum is above 0.

# %%
rng = np.random.default_rng(0)
WORDS, TEXTS, LENGTH = 5_000, 7_000, 12
value_of_word = rng.normal(size=WORDS)
often = 1 / (10 + np.arange(WORDS))  # few words are frequent, most are rare
texts = rng.choice(WORDS, size=(TEXTS, LENGTH), p=often / often.sum())
good = (value_of_word[texts].sum(axis=1) > 0).astype(np.float32)

# %% [markdown]
# ## The model as flax has it


# %%
class Model(nnx.Module):
    def __init__(self, rngs):
        self.words = nnx.Embed(WORDS, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, ids):
        return self.out(self.words(ids).sum(axis=1))[:, 0]


def loss_fn(model, ids, labels):
    return optax.sigmoid_binary_cross_entropy(model(ids), labels).mean()


model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adagrad(1.0, eps=0.0), wrt=nnx.Param)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, ids, labels):
    loss, grads = nnx.value_and_grad(loss_fn)(model, ids, labels)
    optimizer.update(model, grads)
    return loss


# %% [markdown]
# ## The same with embax
#
# Three lines: the layer, the optimizer, the gradient. For a seed the initial values are those of flax. `embax.Adagrad`
# has the formula of `optax.adagrad`, without its epsilon; the accumulators of both begin at 0.1.


# %%
class SparseModel(Model):
    def __init__(self, rngs):
        # 1: was nnx.Embed(WORDS, 16, rngs=rngs)
        self.words = embax.nnx.Embed(WORDS, 16, optimizer=embax.Adagrad(1.0), rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)


sparse_model = SparseModel(nnx.Rngs(0))
# 2: was nnx.Optimizer(...)
sparse_optimizer = embax.nnx.Optimizer(sparse_model, optax.adagrad(1.0, eps=0.0), wrt=nnx.Param)


@nnx.jit(donate_argnums=(0, 1))
def sparse_step(model, optimizer, ids, labels):
    # 3: was nnx.value_and_grad(...)
    loss, grads = embax.nnx.value_and_grad(loss_fn)(model, ids, labels)
    optimizer.update(model, grads)
    return loss


np.testing.assert_array_equal(model.words.embedding[...], sparse_model.words.embedding[...])

# %% [markdown]
# ## What a step works on
#
# `check_step` reads a compiled step, without running it, and lists what in it is as large as a table (`print` the
# report to see it). Flax's step makes a gradient of all 5,000 rows and steps them all, whatever the batch has. Embax's
# step works on the rows of the batch. What that means in time on your machine is told by a clock;
# [here is one](../benchmarks.md).

# %%
BATCH = 200
first = jnp.asarray(texts[:BATCH]), jnp.asarray(good[:BATCH])
sparse_report = embax.check_step(sparse_step, sparse_model, sparse_optimizer, *first)
assert sparse_report.ok
print("works on rows only:", sparse_report.ok)
# > works on rows only: True

# %% [markdown]
# ## The same numbers

# %%
losses, sparse_losses = [], []
for _ in range(5):
    for numbers in rng.permutation(6_000).reshape(-1, BATCH):
        batch = jnp.asarray(texts[numbers]), jnp.asarray(good[numbers])
        losses.append(float(train_step(model, optimizer, *batch)))
        sparse_losses.append(float(sparse_step(sparse_model, sparse_optimizer, *batch)))
np.testing.assert_allclose(sparse_losses, losses, rtol=1e-3)
np.testing.assert_allclose(sparse_model.words.embedding[...], model.words.embedding[...], atol=1e-3)
for number in (0, 100, len(losses) - 1):
    print(f"step {number}: flax {losses[number]:.5f}, embax {sparse_losses[number]:.5f}")
# > step 0: flax 0.82954, embax 0.82954
# > step 100: flax 0.49030, embax 0.49030
# > step 149: flax 0.36115, embax 0.36115

# %%
right = ((sparse_model(jnp.asarray(texts[6_000:])) > 0) == (good[6_000:] > 0)).mean()
assert right > 0.7
print(f"of 1,000 new texts {right:.1%} are told right; half would be by guessing")
# > of 1,000 new texts 76.5% are told right; half would be by guessing

# %% [markdown]
# Adam, momentum and decay differ where a row is not touched: dense ones go on moving it, embax leaves it alone. [The
# same numbers?](../flax.md#the-same-numbers) has the whole story, [Linen and Equinox](../flax.md) the other lines.
