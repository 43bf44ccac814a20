"""``embax.sparsecore.lib.flax.nnx``."""
