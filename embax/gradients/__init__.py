"""The two doors to row gradients: ``value_and_grad`` and ``prefetch``."""
