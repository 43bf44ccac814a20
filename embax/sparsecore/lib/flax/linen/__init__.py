"""``embax.sparsecore.lib.flax.linen``."""
