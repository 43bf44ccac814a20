"""``embax.sparsecore.utils``."""
