"""Plain layers of a dense network: kernels and biases in a list."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def init_layers(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Returns layers from each width to the next, He-normal (He et al. 2015, arXiv 1502.01852), biases 0."""
    make = jax.nn.initializers.he_normal()
    return [
        {"kernel": make(jax.random.fold_in(key, i), (a, b)), "bias": jnp.zeros((1, b))}
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    ]


def layered(layers: Sequence[Any], values: jax.Array) -> jax.Array:
    """Returns what the layers make of ``[batch, first width]``, with ReLU between them."""
    *inner, last = layers
    for layer in inner:
        values = jax.nn.relu(values @ layer["kernel"] + layer["bias"])
    return values @ last["kernel"] + last["bias"]
