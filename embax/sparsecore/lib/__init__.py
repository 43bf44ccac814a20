"""See ``embax.sparsecore``."""
