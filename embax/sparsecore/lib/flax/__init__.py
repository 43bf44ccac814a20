"""``embax.sparsecore.lib.flax``: layers."""
