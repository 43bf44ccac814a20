"""The CPU backend: the native kernels where there is one, the reference for the rest."""

import jax

from embax.id_batch import StackIds
from embax.kernels import native, reference
from embax.planning import StackPlan

NAME = "cpu"


def unavailable() -> str | None:
    """Returns why this backend cannot be used: another platform, or no native library."""
    if jax.default_backend() != "cpu":
        return f"the default JAX backend is {jax.default_backend()}"
    status = native.load()
    return None if status.available else status.reason


def gather_pool(stack: StackPlan, table: jax.Array, ids: StackIds) -> jax.Array:
    """Returns the activations: natively for float32 rows, else by the reference."""
    if stack.dtype != "float32" or stack.quantization is not None:
        return reference.gather_pool(stack, table, ids)
    pooled = native.gather_pool_f32(table, ids.ids, ids.offsets, ids.gains)
    return pooled.astype(stack.activation_dtype)


update = reference.update
apply = reference.apply
row_gradients = reference.row_gradients
