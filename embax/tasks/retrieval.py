"""Models of the next item of a user: a vector for each user and each item, near where the user took the item.

``mf`` is plain matrix factorisation: the vectors are rows of two tables. In ``two-tower`` a network on each side makes
them of the embeddings of several columns. Each batch brings items drawn as negatives, shared by all its samples.
"""

import dataclasses
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

import embax
from embax.data.blocks import Rows
from embax.tasks.click import Cards
from embax.tasks.layers import init_layers, layered
from embax.tasks.optimizers import optimizer_of
from embax.tasks.training import Schedule, Task

SIDES = ("user", "item", "negative")


class Pairs(NamedTuple):
    """Rows of users and the items that they took, with other items drawn for the batch.

    Attributes:
      rows: the pairs.
      negatives: the drawn items, with their columns.
    """

    rows: Rows
    negatives: Rows

    @property
    def ids(self) -> dict[str, Any]:
        """The ids of the pairs, by column."""
        return self.rows.ids

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(frozen=True)
class Draw(grain.transforms.RandomMap):
    """Draws items for a batch, each of those that training knows as likely as any other.

    Args:
      catalogue: the columns of every item, in the order of their rows; row 0 is none and never drawn.
      count: of a batch.
    """

    catalogue: Rows
    count: int

    def random_map(self, element: Rows, rng: np.random.Generator) -> Pairs:
        """Returns the batch with its negatives."""
        return Pairs(element, self.catalogue.taken(rng.integers(1, len(self.catalogue), self.count)))


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is minimised; ``negatives`` are drawn uniformly.

    softmax: cross entropy of the item among the negatives, by scores over a temperature (van den Oord et al. 2018,
    arXiv 1807.03748). bpr: log-sigmoid of the difference to one negative for each sample, by dot products (Rendle et
    al. 2009, arXiv 1205.2618). ccl: 1 - cosine, and the mean of the negatives' cosines above a margin, times a weight
    (Mao et al. 2021, arXiv 2109.12613).

    Attributes:
      kind: softmax, bpr or ccl.
      score: of softmax: cosine, or dot, the dot product with the user's vector at length 1. An item's length is then
        its own, which popular ones use; a user's length would change no order of items.
      temperature: of softmax.
      margin: of ccl.
      weight: of ccl.
    """

    kind: str = "softmax"
    score: str = "dot"
    temperature: float = 0.12
    margin: float = 0.8
    weight: float = 150.0

    def at_length_1(self, side: str) -> bool:
        """Whether the vectors of a side count by their direction alone."""
        return self.kind == "ccl" or (self.kind == "softmax" and (side == "user" or self.score == "cosine"))

    def of(self, own: jax.Array, others: jax.Array, same: jax.Array) -> jax.Array:
        """Returns the loss of each sample.

        Args:
          own: scores of users and the items they took, ``[batch]``.
          others: scores of users and the negatives, ``[batch, negatives]``.
          same: whether a negative is the item itself, which is then left out, ``[batch, negatives]``.
        """
        if self.kind == "softmax":
            others = jnp.where(same, -jnp.inf, others / self.temperature)
            every = jnp.concatenate([own[:, None] / self.temperature, others], axis=1)
            return jax.nn.logsumexp(every, axis=1) - own / self.temperature
        if self.kind == "bpr":
            one = jnp.arange(len(own)) % others.shape[1]
            apart = own - jnp.take_along_axis(others, one[:, None], axis=1)[:, 0]
            left = jnp.take_along_axis(same, one[:, None], axis=1)[:, 0]
            return jnp.where(left, 0.0, jax.nn.softplus(-apart))
        above = jnp.where(same, 0.0, jax.nn.relu(others - self.margin))
        return 1.0 - own + self.weight * above.mean(axis=1)


@dataclasses.dataclass(frozen=True)
class RetrievalTask(Task):
    """Two sides and a loss.

    Attributes:
      user: (column, rows of its table) of the user's side; the first is the key.
      item: likewise.
      loss: what is minimised.
      towers: whether a network makes the vectors.
      embedding_dim: of rows and of vectors.
      hidden: widths of the networks' layers.
      optimizer: of the tables.
      rate: its rate.
      l2: what looked-up rows of users and items cost, by the mean of the sums of their squares.
    """

    user: Cards
    item: Cards
    loss: Loss = Loss()
    towers: bool = False
    embedding_dim: int = 64
    hidden: tuple[int, ...] = ()
    optimizer: str = "adam"
    rate: float = 0.002
    l2: float = 0.0

    def side(self, name: str) -> Cards:
        """The columns of a side: all of them for towers, else the key."""
        cards = self.user if name == "user" else self.item
        return cards if self.towers else cards[:1]

    def features(self, schedule: Schedule) -> Any:
        optimizer = optimizer_of(self.optimizer, lambda step: self.rate * schedule(step))
        tables = {
            name: embax.TableSpec(
                name=name,
                vocabulary_size=rows,
                embedding_dim=self.embedding_dim,
                # Larger ones outlive several epochs of Adam's steps: cosines turn rows by the step over their length.
                initializer=jax.nn.initializers.normal(0.01),
                optimizer=optimizer,
                combiner="mean",
            )
            for name, rows in self.side("user") + self.side("item")
        }
        shapes = {"input_shape": (None,), "output_shape": (None, self.embedding_dim)}
        return {
            side: {
                name: embax.FeatureSpec(name=f"{side}/{name}", table_spec=tables[name], **shapes)
                for name, _ in self.side(side)
            }
            for side in SIDES
        }

    def ids(self, rows: Pairs) -> tuple[Any, Any]:
        own, drawn = rows.rows.ids, rows.negatives.ids
        found = {side: {name: own[name] for name, _ in self.side(side)} for side in ("user", "item")}
        found["negative"] = {name: drawn[name] for name, _ in self.side("item")}
        key = self.item[0][0]
        return found, (own[key], drawn[key])

    def init(self, key: jax.Array) -> Any:
        if not self.towers:
            return {}
        keys = dict(zip(("user", "item"), jax.random.split(key), strict=True))
        return {
            side: init_layers(keys[side], [len(self.side(side)) * self.embedding_dim, *self.hidden, self.embedding_dim])
            for side in keys
        }

    def vectors(self, params: Any, activations: Any, side: str) -> jax.Array:
        """Returns the vectors of a side, ``[samples, embedding_dim]``; of length 1 where the loss wants it."""
        parts = [activations[name] for name, _ in self.side(side)]
        made = parts[0]
        if self.towers:
            made = layered(params["user" if side == "user" else "item"], jnp.concatenate(parts, axis=1))
        if not self.loss.at_length_1(side):
            return made
        return made * jax.lax.rsqrt(jnp.sum(made * made, axis=1, keepdims=True) + 1e-12)

    def losses(
        self, params: Any, activations: Any, rows: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        users, items, others = (self.vectors(params, activations[side], side) for side in SIDES)
        taken, drawn = rows
        each = self.loss.of(jnp.sum(users * items, axis=1), users @ others.T, taken[:, None] == drawn[None, :])
        squares = sum(jnp.sum(leaf * leaf) for side in ("user", "item") for leaf in activations[side].values())
        loss = jnp.mean(each)
        return loss + self.l2 * squares / len(users), {"loss": loss}
