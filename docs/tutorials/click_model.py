# %% [markdown]
# # A click model on rows of your own
#
# Rows with a user, an item, the item's tags and a click become a model that says how likely a click is. Fields of
# text become ids, ids become embeddings, and a small network of plain JAX makes a logit of them. Tables are trained
# by embax, the network by optax. It takes a few seconds on one core: `pip install optax` beside embax, then run this
# page's script.

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import embax

# %% [markdown]
# ## The rows
#
# We make them up, with a truth that we know: users and items have hidden tastes of three numbers, some tags are liked
# by everybody and some by nobody, and a click is drawn from the probability that follows. So we can say in the end how
# good a model could be at best. **To use your own rows, replace this cell**: all that the rest of the page wants is a
# dict of columns and an array of clicks.

# %%
rng = np.random.default_rng(0)
USERS, ITEMS, TAGS, ROWS = 500, 200, 30, 120_000
user_taste, item_taste = rng.normal(size=(USERS, 3)), rng.normal(size=(ITEMS, 3))
tag_liked = rng.normal(size=TAGS)
tags_of_item = [rng.choice(TAGS, rng.integers(0, 4), replace=False) for _ in range(ITEMS)]

user, item = rng.integers(USERS, size=ROWS), rng.integers(ITEMS, size=ROWS)
liked = np.array([tag_liked[tags].sum() for tags in tags_of_item])
logit = (user_taste[user] * item_taste[item]).sum(axis=1) + liked[item] - 1.0
probability = 1 / (1 + np.exp(-logit))
clicked = rng.random(ROWS) < probability

rows = {
    "user": np.array([f"user-{number}" for number in user]),
    "item": np.array([f"item-{number}" for number in item]),
    "tags": [[f"tag-{number}" for number in tags_of_item[i]] for i in item],
}
for number in range(3):
    print(*(rows[name][number] for name in rows), clicked[number])
# > user-47 item-138 [] False
# > user-228 item-65 [] False
# > user-182 item-52 ['tag-19', 'tag-1', 'tag-2'] False

# %% [markdown]
# ## From text to ids
#
# An id is the number of a row in a table, from 0. The vocabulary comes from the rows that we train on; id 0 is kept
# for whatever else turns up later.

# %%
train = 100_000  # the first rows; the others are for the test


def vocabulary_of(values):
    return {value: number for number, value in enumerate(np.unique(values), start=1)}


def ids_of(values, vocabulary):
    return np.array([vocabulary.get(value, 0) for value in values], np.int32)


vocabularies = {
    "user": vocabulary_of(rows["user"][:train]),
    "item": vocabulary_of(rows["item"][:train]),
    "tags": vocabulary_of([tag for tags in rows["tags"][:train] for tag in tags]),
}
ids = {
    "user": ids_of(rows["user"], vocabularies["user"]),
    "item": ids_of(rows["item"], vocabularies["item"]),
    # 0 to 3 ids in a row: ragged.
    "tags": [ids_of(tags, vocabularies["tags"]) for tags in rows["tags"]],
}

# %% [markdown]
# ## Tables and features
#
# A table says how many rows there are and how they learn; a feature says which column is looked up where. The tags
# of a sample become one vector, their sum. All three tables have the same dimension and optimizer, so they
# share one array, and one lookup reads them all.

# %%
DIM = 8


def feature_of(name):
    table = embax.TableSpec(
        name=name,
        vocabulary_size=len(vocabularies[name]) + 1,
        embedding_dim=DIM,
        combiner="sum",
        initializer=jax.nn.initializers.normal(0.1),
        # The first step of a row is of the whole rate.
        optimizer=embax.Adagrad(0.1, initial_accumulator_value=0.0),
    )
    return embax.FeatureSpec(name=name, table_spec=table, input_shape=(None,), output_shape=(None, DIM))


# A batch has at most 3 tags a sample. Said beforehand, all batches have one shape, and the step is compiled once.
BATCH = 2000
plan = embax.plan({name: feature_of(name) for name in ids}, capacity={"tags": 3 * BATCH})
tables = embax.init(plan, jax.random.key(0))

# %% [markdown]
# ## The network
#
# Plain JAX. It sees the three vectors of a sample, and the product of the user's with the item's.


# %%
def logits_of(dense, activations):
    user, item, tags = activations["user"], activations["item"], activations["tags"]
    inputs = jnp.concatenate([user * item, user, item, tags], axis=1)
    hidden = jax.nn.relu(inputs @ dense["first"] + dense["bias"])
    return hidden @ dense["second"] + (user * item).sum(axis=1)


def loss_of(dense, activations, labels):
    return optax.sigmoid_binary_cross_entropy(logits_of(dense, activations), labels).mean()


first, second = jax.random.split(jax.random.key(1))
dense = {
    "first": 0.1 * jax.random.normal(first, (4 * DIM, 16)),
    "bias": jnp.zeros((1, 16)),
    "second": 0.1 * jax.random.normal(second, (16,)),
}
adam = optax.adam(3e-3)
adam_state = adam.init(dense)

# %% [markdown]
# ## The step
#
# `lookup` gives the activations, one vector for each sample and feature. `jax.value_and_grad` differentiates the loss
# with respect to the network **and the activations**. `update` takes the gradients of these to the rows that
# they came from: each of them takes one optimizer step, and no other row is read or written.


# %%
@functools.partial(jax.jit, donate_argnums=(0, 1, 2))  # donated: updated in place
def train_step(tables, dense, adam_state, batch, labels, step):
    activations, residuals = embax.lookup(plan, tables, batch)
    loss, gradients = jax.value_and_grad(loss_of, argnums=(0, 1))(dense, activations, labels)
    tables = embax.update(plan, tables, residuals, gradients[1], step)
    changes, adam_state = adam.update(gradients[0], adam_state, dense)
    return tables, optax.apply_updates(dense, changes), adam_state, loss


# %% [markdown]
# `preprocess` runs on the host, checks every id, and raises an error that names feature, sample and id if one is
# not in the vocabulary.


# %%
def batch_of(numbers):
    columns = {"user": ids["user"][numbers], "item": ids["item"][numbers]}
    columns["tags"] = [ids["tags"][number] for number in numbers]
    return embax.preprocess(plan, columns), jnp.asarray(clicked[numbers], jnp.float32)


step = 0
for epoch in range(4):
    losses = []
    for numbers in rng.permutation(train).reshape(-1, BATCH):
        batch, labels = batch_of(numbers)
        tables, dense, adam_state, loss = train_step(tables, dense, adam_state, batch, labels, step)
        losses.append(loss)
        step += 1
    print(f"epoch {epoch}: loss {np.mean(losses):.3f}")
# > epoch 0: loss 0.561
# > epoch 1: loss 0.444
# > epoch 2: loss 0.408
# > epoch 3: loss 0.399

# %% [markdown]
# ## How good is it?
#
# The AUC is the probability that a row with a click is ranked above one without: 0.5 for guessing. The truth itself
# does not reach 1, for clicks are drawn.


# %%
def auc(scores, labels):
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    ones, zeros = labels.sum(), (~labels).sum()
    return (ranks[labels].sum() - ones * (ones + 1) / 2) / (ones * zeros)


@jax.jit
def predict(tables, dense, batch):
    activations, _ = embax.lookup(plan, tables, batch)
    return jax.nn.sigmoid(logits_of(dense, activations))


test = np.arange(train, ROWS)
batches = [batch_of(numbers)[0] for numbers in test.reshape(-1, BATCH)]
predicted = np.concatenate([predict(tables, dense, batch) for batch in batches])
reached, best = auc(predicted, clicked[test]), auc(probability[test], clicked[test])
assert reached > 0.80
assert best - 0.05 < reached < best
print(f"test AUC {reached:.3f}; the truth itself has {best:.3f}")
# > test AUC 0.852; the truth itself has 0.865

# %% [markdown]
# Next: [checkpoints](checkpoints.md) of tables and network; [several devices](mesh.md); every parameter of tables,
# features and optimizers in [the specification](../specification.md).
