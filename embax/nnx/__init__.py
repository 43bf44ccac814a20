"""Layers, gradients and the optimizer for ``flax.nnx`` models with sparse tables."""

from embax.nnx.embed import Embed as Embed
from embax.nnx.feature_embed import FeatureEmbed as FeatureEmbed
from embax.nnx.gradients import prefetch as prefetch
from embax.nnx.gradients import row_gradients as row_gradients
from embax.nnx.gradients import value_and_grad as value_and_grad
from embax.nnx.lora import LoRAEmbed as LoRAEmbed
from embax.nnx.optimizer import Optimizer as Optimizer
from embax.nnx.variables import Table as Table
from embax.nnx.variables import TableGradient as TableGradient
