"""Small plans that several tests share."""

import jax
import numpy as np
from jax.sharding import Mesh

import embax


def table_spec(name="item", rows=50, dim=4, optimizer=None, combiner="sum", **settings):
    settings.setdefault("initializer", jax.nn.initializers.normal(1.0))
    optimizer = embax.Adagrad(0.1) if optimizer is None else optimizer
    return embax.TableSpec(
        name=name, vocabulary_size=rows, embedding_dim=dim, optimizer=optimizer, combiner=combiner, **settings
    )


def feature(table, name="history", inputs=(None, 3), outputs=None, **settings):
    outputs = (inputs[0], table.embedding_dim) if outputs is None else outputs
    return embax.FeatureSpec(name=name, table_spec=table, input_shape=inputs, output_shape=outputs, **settings)


def line_of(devices):
    """Returns a mesh of so many devices in a row."""
    return Mesh(np.array(jax.devices()[:devices]), ("x",))
