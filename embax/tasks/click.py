"""Two models of a click-like label over categorical fields, as embax tables and a dense part.

``LogisticRegression`` gives every value of every field one weight. ``Dlrm`` adds to the same sum networks over the
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
      weight_rate: Adagrad's rate for the weights of single values.
      l2: of the looked-up rows, per sample.
    """

    cards: tuple[tuple[str, int], ...]
    weight_rate: float = 0.3
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
        """Returns the logits ``[towers, batch]``; ``key`` draws the dropout, None leaves it out."""

    def loss(self, params: Any, activations: Any, labels: jax.Array, key: jax.Array, smoothing: float):
        """Returns the training loss: cross entropy with smoothed labels, plus the L2 term of what was looked up.

        Smoothing moves the labels 0 and 1 by ``smoothing / 2`` towards each other: discounts come and go with the
        weeks, and what was certain in training is less so later.
        """
        logits = self.logits(params, activations, key)
        targets = labels[None] * (1.0 - smoothing) + smoothing / 2
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
        return (params["bias"] + sum(activations.values())[:, 0])[None]


@dataclasses.dataclass(frozen=True)
class Dlrm(Model):
    """A deep learning recommendation model beside a logistic regression, trained as one.

    The logit is the bias, the weight of every value, and a network whose input is the embeddings of the fields, one
    after another, and the dot products of each two of them. In training each embedding of each sample is left out with
    probability ``dropout``. There are ``towers`` networks, each with embeddings of its own; each has to predict the
    label, and the prediction is the mean of their logits.

    Naumov et al. 2019 (arXiv 1906.00091); Cheng et al. 2016 (arXiv 1606.07792) for the part beside it.

    Attributes:
      pairs: (field, number of codes) of fields that have weights only, no embeddings.
    """

    pairs: tuple[tuple[str, int], ...] = ()
    embedding_dim: int = 8
    towers: int = 4
    hidden: tuple[int, ...] = (64, 32)
    weight_rate: float = 0.2
    embedding_rate: float = 0.1
    dropout: float = 0.3

    def features(self, schedule: Schedule) -> Any:
        weights = Tables("weight", 1, self.weight_rate, schedule)
        embeddings = Tables("embedding", self.embedding_dim * self.towers, self.embedding_rate, schedule)
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
        make = jax.nn.initializers.he_normal(batch_axis=0)
        layers = [
            {"kernel": make(jax.random.fold_in(key, i), (self.towers, a, b)), "bias": jnp.zeros((self.towers, 1, b))}
            for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        ]
        return {"bias": jnp.zeros((1,)), "layers": layers}

    def logits(self, params: Any, activations: Any, key: jax.Array | None) -> jax.Array:
        wide = params["bias"] + sum(activations["weight"].values())[:, 0]
        embedded = jnp.stack([activations["embedding"][name] for name in self.fields], axis=1)
        # Towers lead from here on: their layers are one batched product.
        embedded = embedded.reshape(*embedded.shape[:2], self.towers, self.embedding_dim).transpose(2, 0, 1, 3)
        if key is not None:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, (*embedded.shape[:3], 1))
            embedded = jnp.where(kept, embedded / (1.0 - self.dropout), 0.0)
        first, second = np.triu_indices(len(self.cards), 1)
        dots = jnp.einsum("tbid,tbjd->tbij", embedded, embedded)[:, :, first, second]
        hidden = jnp.concatenate([dots, embedded.reshape(*dots.shape[:2], -1)], axis=2)
        *inner, last = params["layers"]
        for layer in inner:
            hidden = jax.nn.relu(_dense(layer, hidden))
        return wide[None] + _dense(last, hidden)[:, :, 0]


def _dense(layer: Mapping[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """Returns the outputs of one layer of every tower, ``[towers, batch, outputs]``."""
    return jnp.einsum("tbi,tio->tbo", inputs, layer["kernel"]) + layer["bias"]


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
