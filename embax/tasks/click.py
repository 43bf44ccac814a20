"""Two models of a click-like label over categorical fields, as embax tables and a dense part.

``LogisticRegression`` gives every value of every field one weight. ``Dlrm`` adds to the same sum a network over the
embeddings of the fields and their dot products.

A model is hashable, so that it can be static under jit; it owns no arrays.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import embax

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """What a click model is: features for the plan, ids for a batch, dense parameters, logits.

    Attributes:
      cards: (field, number of its codes) in the order of the fields; a tuple, to be hashable.
      weight_rate: Adagrad's rate for the weights of values.
      l2: what a sample's looked-up rows cost in the loss, by the sum of their squares.
    """

    cards: tuple[tuple[str, int], ...]
    weight_rate: float = 0.2
    l2: float = 1e-3

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(name for name, _ in self.cards)

    @abc.abstractmethod
    def features(self, schedule: Schedule) -> Any:
        """Returns the FeatureSpecs of the model; rates are multiplied by ``schedule`` of the step."""

    @abc.abstractmethod
    def ids(self, columns: Mapping[str, np.ndarray]) -> Any:
        """Returns the ids of a batch, in the structure of ``features``, from one column of codes per field."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Any:
        """Returns fresh dense parameters."""

    @abc.abstractmethod
    def logits(self, params: Any, activations: Any, key: jax.Array | None) -> jax.Array:
        """Returns the logits ``[batch]``; ``key`` draws the dropout, None leaves it out."""

    def loss(self, params: Any, activations: Any, labels: jax.Array, key: jax.Array, smoothing: float):
        """Returns the training loss: cross entropy with smoothed labels, plus the L2 term of what was looked up.

        Smoothing moves the labels 0 and 1 by ``smoothing / 2`` towards each other: discounts come and go with the
        weeks, and what was certain in training is less so later.
        """
        logits = self.logits(params, activations, key)
        targets = labels * (1.0 - smoothing) + smoothing / 2
        entropy = jnp.mean(jax.nn.softplus(logits) - targets * logits)
        squares = sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(activations))
        return entropy + self.l2 / len(labels) * squares


@dataclasses.dataclass(frozen=True)
class LogisticRegression(Model):
    """One-hot logistic regression: a bias and one weight per value, in tables of embedding_dim 1."""

    def features(self, schedule: Schedule) -> Any:
        weights = Tables("weight", 1, self.weight_rate, schedule)
        return {name: weights.feature(name, card) for name, card in self.cards}

    def ids(self, columns: Mapping[str, np.ndarray]) -> Any:
        return {name: columns[name] for name in self.fields}

    def init(self, key: jax.Array) -> Any:
        return {"bias": jnp.zeros((1,))}

    def logits(self, params: Any, activations: Any, key: jax.Array | None) -> jax.Array:
        return params["bias"] + _sum(activations)


@dataclasses.dataclass(frozen=True)
class Dlrm(Model):
    """A deep learning recommendation model beside a logistic regression, trained as one.

    The logit is the bias, the weight of every value, and a network whose input is the embeddings of the fields, one
    after another, and the dot products of each two of them. In training each embedding of each sample is left out with
    probability ``dropout``.

    Naumov et al. 2019 (arXiv 1906.00091); Cheng et al. 2016 (arXiv 1606.07792) for the part beside it.

    Attributes:
      pairs: (field, number of its codes) of fields that have weights but no embeddings.
      hidden: widths of the network's layers.
    """

    pairs: tuple[tuple[str, int], ...] = ()
    embedding_dim: int = 8
    hidden: tuple[int, ...] = (64, 32)
    embedding_rate: float = 0.1
    dropout: float = 0.3

    def features(self, schedule: Schedule) -> Any:
        weights = Tables("weight", 1, self.weight_rate, schedule)
        embeddings = Tables("embedding", self.embedding_dim, self.embedding_rate, schedule)
        return {
            "weight": {name: weights.feature(name, card) for name, card in self.cards + self.pairs},
            "embedding": {name: embeddings.feature(name, card) for name, card in self.cards},
        }

    def ids(self, columns: Mapping[str, np.ndarray]) -> Any:
        embedded = {name: columns[name] for name in self.fields}
        return {"weight": embedded | {name: columns[name] for name, _ in self.pairs}, "embedding": embedded}

    def init(self, key: jax.Array) -> Any:
        count = len(self.cards)
        sizes = [count * self.embedding_dim + count * (count - 1) // 2, *self.hidden, 1]
        make = jax.nn.initializers.he_normal()
        layers = [
            {"kernel": make(jax.random.fold_in(key, i), (a, b)), "bias": jnp.zeros((1, b))}
            for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        ]
        return {"bias": jnp.zeros((1,)), "layers": layers}

    def logits(self, params: Any, activations: Any, key: jax.Array | None) -> jax.Array:
        wide = params["bias"] + _sum(activations["weight"])
        embedded = jnp.stack([activations["embedding"][name] for name in self.fields], axis=1)
        if key is not None:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, (*embedded.shape[:2], 1))
            embedded = jnp.where(kept, embedded / (1.0 - self.dropout), 0.0)
        first, second = np.triu_indices(len(self.cards), 1)
        dots = jnp.einsum("bid,bjd->bij", embedded, embedded)[:, first, second]
        hidden = jnp.concatenate([dots, embedded.reshape(len(embedded), -1)], axis=1)
        *inner, last = params["layers"]
        for layer in inner:
            hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
        return wide + (hidden @ last["kernel"] + last["bias"])[:, 0]


def _sum(weights: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the sum of every sample's weights, ``[batch]``, of ``[batch, 1]`` each."""
    return jnp.concatenate(list(weights.values()), axis=1).sum(axis=1)


class Tables:
    """Tables of one kind: they share a size, a start and an optimizer, so ``embax.plan`` stacks them."""

    def __init__(self, kind: str, dim: int, rate: float, schedule: Schedule):
        self.kind, self.dim = kind, dim
        # An accumulator of 0 makes the first step of every weight one of the whole rate, however rare its value is.
        self.optimizer = embax.Adagrad(lambda step: rate * schedule(step), initial_accumulator_value=0.0)
        self.initializer = jax.nn.initializers.zeros if dim == 1 else jax.nn.initializers.normal(0.01)

    def feature(self, name: str, rows: int) -> embax.FeatureSpec:
        """Returns a feature of one id per sample, with a table of its own, both named ``kind/name``."""
        table = embax.TableSpec(
            name=f"{self.kind}/{name}",
            vocabulary_size=rows,
            embedding_dim=self.dim,
            initializer=self.initializer,
            optimizer=self.optimizer,
            combiner="sum",
        )
        shapes = {"input_shape": (None,), "output_shape": (None, self.dim)}
        return embax.FeatureSpec(name=table.name, table_spec=table, **shapes)
