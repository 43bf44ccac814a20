# %% [markdown]
# # Retrieval: two tables and a sampled softmax
#
# Which of all items comes next for a user? A vector for each user, one for each item: the items whose products
# with the user's vector are largest are retrieved. A softmax over all items would read the whole table in each
# step, so the loss compares the right item with a small sample of others. Tables here are leaves
# of a pytree, and `embax.value_and_grad` gives their gradients as rows.

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import embax

# %% [markdown]
# ## Who took what
#
# Made up, with a known truth: every item is of one of 20 kinds, every user likes two of them, and nine times of ten
# takes an item of these; within a kind some items are taken more often than others. The last item that a user took
# is kept for the test.

# %%
rng = np.random.default_rng(0)
USERS, ITEMS, KINDS, TAKEN = 1500, 1000, 20, 30
kind_of_item = rng.integers(KINDS, size=ITEMS)
popularity = 1 / (1 + rng.permutation(ITEMS)) ** 0.6
likes = np.array([rng.choice(KINDS, size=2, replace=False) for _ in range(USERS)])


def chances_of(user):
    liked = np.isin(kind_of_item, likes[user])
    return popularity * np.where(liked, 0.9 / popularity[liked].sum(), 0.1 / popularity[~liked].sum())


chances = np.array([chances_of(user) for user in range(USERS)])
taken = np.array([rng.choice(ITEMS, size=TAKEN, replace=False, p=row) for row in chances])
known, held_out = taken[:, :-1], taken[:, -1]
pairs = np.stack([np.repeat(np.arange(USERS), TAKEN - 1), known.ravel()], axis=1)
print(len(pairs), "pairs of a user and an item")
# > 43500 pairs of a user and an item

# %% [markdown]
# ## Two tables in a pytree
#
# A `Table` is an array with an optimizer for its rows. It goes wherever a leaf may stand: in a dict, a dataclass, an
# Equinox model. The temperature is an ordinary parameter, which optax trains.

# %%
DIM = 16
# The first step of a row is of the whole rate.
adagrad = embax.Adagrad(0.1, initial_accumulator_value=0.0)
keys = jax.random.split(jax.random.key(0))
params = {
    "user": embax.Table(0.1 * jax.random.normal(keys[0], (USERS, DIM)), adagrad, name="user"),
    "item": embax.Table(0.1 * jax.random.normal(keys[1], (ITEMS, DIM)), adagrad, name="item"),
    "temperature": jnp.ones(()),
}
optimizer = embax.JointOptimizer(optax.adam(1e-2))
state = optimizer.init(params)

# %% [markdown]
# ## The loss
#
# `negatives` are drawn once for a batch, and all its users share them: their rows are read once, and one matrix product
# compares every user with every one of them. They are drawn as often as items are taken, so the logits are corrected by
# the logarithm of how often each is drawn; without that, popular items would be punished. A negative that happens to be
# the right item is left out.

# %%
BATCH, NEGATIVES = 1500, 256
draws = np.bincount(known.ravel(), minlength=ITEMS) + 1.0
draws /= draws.sum()
log_draws = jnp.asarray(np.log(draws), jnp.float32)


def loss_of(params, users, items, negatives):
    query = params["user"][users] * params["temperature"]
    right = (query * params["item"][items]).sum(axis=1) - log_draws[items]
    others = query @ params["item"][negatives].T - log_draws[negatives]
    others = jnp.where(negatives == items[:, None], -jnp.inf, others)
    logits = jnp.concatenate([right[:, None], others], axis=1)
    return -jax.nn.log_softmax(logits)[:, 0].mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, users, items, negatives):
    loss, gradients = embax.value_and_grad(loss_of)(params, users, items, negatives)
    params, state = optimizer.update(params, gradients, state)
    return params, state, loss


# %%
for epoch in range(12):
    losses = []
    for batch in rng.permutation(pairs).reshape(-1, BATCH, 2):
        negatives = rng.choice(ITEMS, size=NEGATIVES, p=draws)
        params, state, loss = train_step(params, state, batch[:, 0], batch[:, 1], negatives)
        losses.append(loss)
    if epoch % 3 == 2:
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}")
# > epoch 2: loss 4.160
# > epoch 5: loss 3.859
# > epoch 8: loss 3.769
# > epoch 11: loss 3.721

# %% [markdown]
# ## Recall among ten
#
# For every user the ten best of all items that the user does not have yet: how often is the held-out one among them?
# Beside it the same for the most popular items, which is what a model must beat, and for the probabilities
# that the data were drawn from, which is what no model can beat by more than luck.


# %%
def recall(scores, count=10):
    scores = np.array(scores)
    np.put_along_axis(scores, known, -np.inf, axis=1)
    best = np.argpartition(-scores, count, axis=1)[:, :count]
    return (best == held_out[:, None]).any(axis=1).mean()


by_model = recall(params["user"].value @ params["item"].value.T)
by_popularity = recall(np.tile(draws, (USERS, 1)))
by_truth = recall(chances)
assert by_model > 3 * by_popularity
assert by_model > 0.6 * by_truth
print(f"recall among 10: model {by_model:.3f}, popularity {by_popularity:.3f}, truth {by_truth:.3f}")
# > recall among 10: model 0.203, popularity 0.025, truth 0.274

# %% [markdown]
# Next: tables of your own model by [either of two doors](../flax.md#which-door); what
# [a sparse gradient](../flax.md#what-a-sparse-gradient-is) is.
