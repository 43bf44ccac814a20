"""``embax.sparsecore.lib.fdo``: statistics of batches on disk."""
