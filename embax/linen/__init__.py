"""Layers, gradients and the train state for ``flax.linen`` models with sparse tables."""

from embax.gradients.doors import value_and_grad as value_and_grad
from embax.gradients.prefetch import prefetch as prefetch
from embax.linen.box import Table as Table
from embax.linen.embed import Embed as Embed
from embax.linen.feature_embed import FeatureEmbed as FeatureEmbed
from embax.linen.lora import LoRAEmbed as LoRAEmbed
from embax.linen.train_state import TrainState as TrainState
