"""All seven lines lower for every platform on the reference backend; the native kernels go out when vouched for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, table_spec
from jax import export

import embax
from embax import kernels

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


@pytest.mark.skipif(kernels.get("cpu").unavailable() is not None, reason="the native library is not built")
def test_native_kernels_are_exported_and_run():
    plan = embax.plan({"x": feature(table_spec(optimizer=embax.Adam(0.1)), inputs=(4, 2))}, backend="cpu")
    tables, batch = embax.init(plan, jax.random.key(0)), embax.preprocess(plan, {"x": np.arange(8).reshape(4, 2)})

    def step(tables, batch):
        activations, residuals = embax.lookup(plan, tables, batch)
        return embax.update(plan, tables, residuals, activations, 0)["item"].table

    with pytest.raises(ValueError, match="embax_gather_pool"):  # JAX asks who vouches for calls it does not know
        export.export(jax.jit(step))(tables, batch)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in embax.native_calls()]
    exported = export.export(jax.jit(step), disabled_checks=checks)(tables, batch)
    np.testing.assert_array_equal(exported.call(tables, batch), jax.jit(step)(tables, batch))
