"""All seven lines lower for every platform on the reference backend, from one machine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, table_spec
from jax import export

import embax

PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]


@pytest.mark.parametrize("optimizer", [embax.SGD(0.1), embax.Adam(0.1), embax.F2A(0.1)])
@pytest.mark.parametrize("ragged", [False, True])
def test_seven_lines_export(optimizer, ragged):
    table = table_spec(optimizer=optimizer, combiner="mean")
    plan = embax.plan({"x": feature(table, inputs=(4,) if ragged else (4, 2))}, backend="reference")

    def seven(key, ids, weights, step):
        tables = embax.init(plan, key)
        batch = embax.preprocess_traced(plan, {"x": ids}, {"x": weights})
        activations, residuals = embax.lookup(plan, tables, batch)
        loss, gradients = jax.value_and_grad(lambda a: (a["x"] ** 2).sum())(activations)
        return embax.update(plan, tables, residuals, gradients, step), loss

    if ragged:
        ids, weights = embax.RaggedIds(jnp.arange(6), jnp.array([0, 2, 2, 5, 6])), jnp.ones(6)
    else:
        ids, weights = jnp.arange(8).reshape(4, 2), jnp.ones((4, 2))
    arguments = (jax.random.key(0), ids, weights, jnp.int32(0))
    leaves, structure = jax.tree.flatten(arguments)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(seven(*jax.tree.unflatten(structure, leaves))))
    exported = export.export(flat, platforms=PLATFORMS)(*leaves)
    assert list(exported.platforms) == PLATFORMS
    again = export.deserialize(exported.serialize())
    for ours, theirs in zip(flat(*leaves), again.call(*leaves), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_preprocessed_batches_export():
    plan = embax.plan(feature(table_spec(), inputs=(None, 2)), backend="reference")
    batch, tables = embax.preprocess(plan, np.array([[1, 2], [3, 3]])), embax.init(plan, jax.random.key(0))
    leaves, structure = jax.tree.flatten((tables, batch))

    def forward(*leaves):
        return embax.lookup(plan, *jax.tree.unflatten(structure, leaves))[0]

    exported = export.export(jax.jit(forward), platforms=PLATFORMS)(*leaves)
    np.testing.assert_array_equal(exported.call(*leaves), functools.partial(forward)(*leaves))
