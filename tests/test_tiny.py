"""The library in seven lines, by hand, in under five seconds."""

import jax
import jax.numpy as jnp
import numpy as np

import embax


def test_seven_lines():
    table = embax.TableSpec(
        name="item",
        vocabulary_size=7,
        embedding_dim=1,
        initializer=jax.nn.initializers.ones,
        optimizer=embax.SGD(0.5),
        combiner="sum",
    )
    features = {"history": embax.FeatureSpec(name="history", table_spec=table, input_shape=(3,), output_shape=(3, 1))}
    plan = embax.plan(features, backend="reference")
    tables = embax.init(plan, jax.random.key(0))
    batch = embax.preprocess(plan, {"history": [[5, 3], [], [6, 6]]})
    activations, residuals = embax.lookup(plan, tables, batch)
    np.testing.assert_array_equal(activations["history"].ravel(), [2, 0, 2])
    gradients = {"history": jnp.array([[1.0], [100.0], [10.0]])}
    tables = embax.update(plan, tables, residuals, gradients, step=0)
    # Row 6 was seen twice: one step with the sum, 0.5 * (10 + 10). Nothing points at the gradient of sample 1.
    np.testing.assert_array_equal(tables["item"].table.ravel(), [1, 1, 1, 0.5, 1, 0.5, -9])
