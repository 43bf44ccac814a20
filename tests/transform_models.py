"""The NNX models of the transform battery: with an optimizer for their tables, or None for flax's own layers."""

import jax
import jax.numpy as jnp
from flax import nnx

import embax
import embax.nnx
from tests.transform_cases import DIM, IDS, LAYERS, VOCABULARY
from tests.transform_cases_jax import head


class Tower(nnx.Module):
    """An embedding and a loss of its rows."""

    def __init__(self, optimizer, rngs):
        settings = {} if optimizer is None else {"optimizer": optimizer}
        embed = nnx.Embed if optimizer is None else embax.nnx.Embed
        self.embed = embed(VOCABULARY, DIM, rngs=rngs, **settings)
        self.w = nnx.Param(jax.random.normal(rngs.params(), (DIM,)))

    def __call__(self, ids, total=1.0):
        return head(jnp.nan_to_num(self.embed(ids)), self.w[...] * total)


class Layers(nnx.Module):
    """Towers whose variables have a leading axis."""

    def __init__(self, optimizer, rngs):
        make = nnx.vmap(lambda rngs: Tower(optimizer, rngs))
        self.layers = nnx.split_rngs(splits=LAYERS)(make)(rngs)


class Stateful(nnx.Module):
    """An embedding behind dropout and batch normalisation."""

    def __init__(self, optimizer, rngs):
        self.tower = Tower(optimizer, rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(DIM, rngs=rngs)

    def __call__(self, ids):
        rows = jnp.nan_to_num(self.tower.embed(ids))
        return head(self.norm(self.dropout(rows)), self.tower.w[...])


class DenseFeatures(nnx.Module):
    """What FeatureEmbed computes of dense ids and weights, from a plain parameter."""

    def __init__(self, value):
        self.tables = nnx.Dict({"item": nnx.Param(value)})

    def __call__(self, ids, weights):
        ids, weights = ids["history"], weights["history"]
        present = (ids >= 0) & (ids < VOCABULARY)
        rows = self.tables["item"][...][jnp.where(present, ids, 0)]
        return {"history": jnp.sum(rows * jnp.where(present, weights, 0)[..., None], -2)}


FEATURES = {
    "history": embax.FeatureSpec(
        name="history",
        table_spec=embax.TableSpec(
            name="item",
            vocabulary_size=VOCABULARY,
            embedding_dim=DIM,
            combiner="sum",
            initializer=jax.nn.initializers.normal(1.0),
            optimizer=embax.SGD(0.1),
        ),
        input_shape=(None, IDS.shape[1]),
        output_shape=(None, DIM),
    )
}


class Pooled(nnx.Module):
    """Many ids pooled, with a weight to learn for each place of a sample."""

    def __init__(self, optimizer, rngs):
        features = embax.nnx.FeatureEmbed(FEATURES, rngs=rngs)
        self.features = features if optimizer else DenseFeatures(features.tables["item"].get_value())
        self.weights = nnx.Param(jnp.array([0.5, 1.0, -2.0]))
        self.w = nnx.Param(jax.random.normal(rngs.params(), (DIM,)))

    def __call__(self, ids, total=1.0):
        weights = jnp.broadcast_to(self.weights[...], ids.shape)
        return head(self.features({"history": ids}, {"history": weights})["history"], self.w[...] * total)
