"""Models of a click-like label over categorical columns, bags and numbers, as embax tables and a dense part.

``LogisticRegression`` gives every value of every column one weight. ``Dlrm`` and ``Dcn`` add to the same sum a network
over the embeddings of the columns: of their dot products, or of a cross network.

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
from embax.tasks.layers import init_layers, layered
from embax.tasks.optimizers import optimizer_of

Schedule = Callable[[Any], Any]
Cards = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Fields:
    """What a model sees of a row; tuples, to be hashable.

    Attributes:
      categorical: (column, rows of its table) of one value in a row each.
      bags: likewise, of a list of values in a row each.
      wide: columns among them that have weights and no embeddings.
      numbers: how many numeric columns there are.
    """

    categorical: Cards
    bags: Cards = ()
    wide: tuple[str, ...] = ()
    numbers: int = 0

    @property
    def cards(self) -> Cards:
        """All columns of categories."""
        return self.categorical + self.bags

    @property
    def deep(self) -> Cards:
        """The columns that have embeddings."""
        return tuple((name, rows) for name, rows in self.cards if name not in self.wide)


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """What a click model is: features for the plan, ids for a batch, dense parameters, logits.

    Attributes:
      fields: the columns.
      name: of its tables, ``name`` or ``name/embedding`` before the column's.
      optimizer: of its tables, a name among ``optimizers.NAMES``.
      weight_rate: the optimizer's rate for the weights of values.
      l2: what a sample's looked-up rows cost in the loss, by the sum of their squares.
    """

    fields: Fields
    name: str = "weight"
    optimizer: str = "adagrad"
    weight_rate: float = 0.2
    l2: float = 1e-3

    @abc.abstractmethod
    def features(self, schedule: Schedule) -> Any:
        """Returns the FeatureSpecs of the model; rates are multiplied by ``schedule`` of the step."""

    @abc.abstractmethod
    def ids(self, columns: Mapping[str, Any]) -> Any:
        """Returns the ids of a batch, in the structure of ``features``, from the ids of each column."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Any:
        """Returns fresh dense parameters."""

    @abc.abstractmethod
    def logits(self, params: Any, activations: Any, numbers: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the logits ``[batch]``; ``key`` draws the dropout, None leaves it out."""

    def loss(self, params: Any, activations: Any, rows: Any, key: jax.Array, smoothing: float) -> jax.Array:
        """Returns the training loss: cross entropy with smoothed labels, plus the L2 term of what was looked up.

        Smoothing moves the labels 0 and 1 by ``smoothing / 2`` towards each other: what was certain in training may be
        less so later. ``rows`` is the pair of numbers ``[batch, numbers]`` and labels ``[batch]``.
        """
        numbers, labels = rows
        logits = self.logits(params, activations, numbers, key)
        targets = labels * (1.0 - smoothing) + smoothing / 2
        entropy = jnp.mean(jax.nn.softplus(logits) - targets * logits)
        squares = sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(activations))
        return entropy + self.l2 / len(labels) * squares

    def _linear(self) -> dict[str, jax.Array]:
        """Returns a bias and, where there are numbers, their slopes: checkpoints have no arrays of size 0."""
        slopes = {"slopes": jnp.zeros((self.fields.numbers,))} if self.fields.numbers else {}
        return {"bias": jnp.zeros((1,)), **slopes}

    def _tables(self, kind: str, dim: int, rate: float, schedule: Schedule) -> "Tables":
        return Tables(kind, dim, optimizer_of(self.optimizer, lambda step: rate * schedule(step)), self.fields)


@dataclasses.dataclass(frozen=True)
class LogisticRegression(Model):
    """One-hot logistic regression: a bias, a weight per value in tables of embedding_dim 1, one per numeric column."""

    def features(self, schedule: Schedule) -> Any:
        weights = self._tables(self.name, 1, self.weight_rate, schedule)
        return {name: weights.feature(name, rows) for name, rows in self.fields.cards}

    def ids(self, columns: Mapping[str, Any]) -> Any:
        return {name: columns[name] for name, _ in self.fields.cards}

    def init(self, key: jax.Array) -> Any:
        return self._linear()

    def logits(self, params: Any, activations: Any, numbers: jax.Array, key: jax.Array | None) -> jax.Array:
        return _linear(params, activations, numbers)


@dataclasses.dataclass(frozen=True)
class Deep(Model):
    """A logistic regression with a network over embeddings beside it, trained as one.

    In training each embedding of each sample is left out with probability ``dropout``. Numbers enter through a layer of
    their own, as one more embedding.

    Cheng et al. 2016 (arXiv 1606.07792).

    Attributes:
      embedding_dim: of all embeddings.
      hidden: widths of the network's layers.
      embedding_rate: the optimizer's rate for the embeddings.
      dropout: see above.
    """

    embedding_dim: int = 8
    hidden: tuple[int, ...] = (64, 32)
    embedding_rate: float = 0.1
    dropout: float = 0.3

    @property
    def vectors(self) -> int:
        """Embeddings of a sample, the one of its numbers too."""
        return len(self.fields.deep) + bool(self.fields.numbers)

    def features(self, schedule: Schedule) -> Any:
        weights = self._tables(self.name, 1, self.weight_rate, schedule)
        embeddings = self._tables("embedding", self.embedding_dim, self.embedding_rate, schedule)
        return {
            "weight": {name: weights.feature(name, rows) for name, rows in self.fields.cards},
            "embedding": {name: embeddings.feature(name, rows) for name, rows in self.fields.deep},
        }

    def ids(self, columns: Mapping[str, Any]) -> Any:
        return {
            "weight": {name: columns[name] for name, _ in self.fields.cards},
            "embedding": {name: columns[name] for name, _ in self.fields.deep},
        }

    def init(self, key: jax.Array) -> Any:
        deep, numbers = jax.random.split(key)
        params = self._linear() | {"network": self.begun(deep)}
        if self.fields.numbers:
            # Small, as embeddings are at first: else what numbers happen to give is all that the network sees.
            begun = init_layers(numbers, [self.fields.numbers, self.embedding_dim])
            params["numbers"] = jax.tree.map(lambda part: 0.05 * part, begun)
        return params

    def logits(self, params: Any, activations: Any, numbers: jax.Array, key: jax.Array | None) -> jax.Array:
        wide = _linear(params, activations["weight"], numbers)
        vectors = [activations["embedding"][name] for name, _ in self.fields.deep]
        if self.fields.numbers:
            vectors.append(layered(params["numbers"], numbers))
        embedded = jnp.stack(vectors, axis=1)
        if key is not None:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, (*embedded.shape[:2], 1))
            embedded = jnp.where(kept, embedded / (1.0 - self.dropout), 0.0)
        return wide + self.network(params["network"], embedded)

    @abc.abstractmethod
    def begun(self, key: jax.Array) -> Any:
        """Returns fresh parameters of the network."""

    @abc.abstractmethod
    def network(self, params: Any, embedded: jax.Array) -> jax.Array:
        """Returns ``[batch]`` of embeddings ``[batch, vectors, embedding_dim]``."""


@dataclasses.dataclass(frozen=True)
class Dlrm(Deep):
    """A network over the embeddings, one after another, and the dot products of each two of them.

    Naumov et al. 2019 (arXiv 1906.00091).
    """

    def begun(self, key: jax.Array) -> Any:
        pairs = self.vectors * (self.vectors - 1) // 2
        return init_layers(key, [self.vectors * self.embedding_dim + pairs, *self.hidden, 1])

    def network(self, params: Any, embedded: jax.Array) -> jax.Array:
        first, second = np.triu_indices(self.vectors, 1)
        dots = jnp.einsum("bid,bjd->bij", embedded, embedded)[:, first, second]
        return layered(params, jnp.concatenate([dots, embedded.reshape(len(embedded), -1)], axis=1))[:, 0]


@dataclasses.dataclass(frozen=True)
class Dcn(Deep):
    """A cross network and a plain one beside each other: DCN-V2, parallel, with matrices of full rank.

    Wang et al. 2021 (arXiv 2008.13535): x' = x0 * (W x + b) + x.

    Attributes:
      crosses: layers of the cross network.
    """

    crosses: int = 2

    def begun(self, key: jax.Array) -> Any:
        width = self.vectors * self.embedding_dim
        keys = jax.random.split(key, self.crosses + 2)
        crosses = [init_layers(one, [width, width]) for one in keys[2:]]
        deep = init_layers(keys[0], [width, *self.hidden])
        return {"crosses": crosses, "deep": deep, "last": init_layers(keys[1], [width + self.hidden[-1], 1])}

    def network(self, params: Any, embedded: jax.Array) -> jax.Array:
        first = crossed = embedded.reshape(len(embedded), -1)
        for layer in params["crosses"]:
            crossed = first * layered(layer, crossed) + crossed
        deep = jax.nn.relu(layered(params["deep"], first))
        return layered(params["last"], jnp.concatenate([crossed, deep], axis=1))[:, 0]


def _linear(params: Any, weights: Mapping[str, jax.Array], numbers: jax.Array) -> jax.Array:
    """Returns the sum of every sample's weights, of ``[batch, 1]`` each, and of its numbers times slopes."""
    summed = params["bias"] + jnp.concatenate(list(weights.values()), axis=1).sum(axis=1)
    return summed + numbers @ params["slopes"] if "slopes" in params else summed


class Tables:
    """Tables of one kind: they share a size, a start and an optimizer, so ``embax.plan`` stacks them."""

    def __init__(self, kind: str, dim: int, optimizer: Any, fields: Fields):
        self.kind, self.dim, self.optimizer = kind, dim, optimizer
        self.bags = {name for name, _ in fields.bags}
        self.initializer = jax.nn.initializers.zeros if dim == 1 else jax.nn.initializers.normal(0.01)

    def feature(self, name: str, rows: int) -> embax.FeatureSpec:
        """Returns a feature with a table of its own, both named ``kind/name``; a bag counts as its mean."""
        table = embax.TableSpec(
            name=f"{self.kind}/{name}",
            vocabulary_size=rows,
            embedding_dim=self.dim,
            initializer=self.initializer,
            optimizer=self.optimizer,
            combiner="mean" if name in self.bags else "sum",
        )
        shapes = {"input_shape": (None,), "output_shape": (None, self.dim)}
        return embax.FeatureSpec(name=table.name, table_spec=table, **shapes)
