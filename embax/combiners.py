"""Combiners: how the rows of a sample's ids become one activation.

A combiner turns the weights of a sample's ids into gains; the activation is the gain-weighted sum of
the rows, so that no kernel knows which combiner it serves:

=======  ============================  ======================
name     gain of an id of weight w     without weights (n ids)
=======  ============================  ======================
sum      w                             1
mean     w / sum(w)                    1 / n
sqrtn    w / sqrt(sum(w ** 2))         1 / sqrt(n)
=======  ============================  ======================

A sample whose divisor is zero (no ids, or weights that add up to zero) has gains of zero, hence a zero
activation. Sums run over the ids that are present: padding has no weight.
"""

from collections.abc import Callable

COMBINERS = ("sum", "mean", "sqrtn")


def check_combiner(combiner: str, owner: str) -> None:
    """Raises ValueError naming ``owner`` unless ``combiner`` is one of ``COMBINERS``."""
    if combiner not in COMBINERS:
        raise ValueError(
            f"{owner}: combiner {combiner!r} is not one of {', '.join(map(repr, COMBINERS))} (lower case); choose one "
            "of them"
        )


def weight_power(combiner: str) -> int | None:
    """Returns p such that the divisor is (sum of w ** p) ** (1 / p); None where there is no divisor."""
    return {"sum": None, "mean": 1, "sqrtn": 2}[combiner]


def gains_from_weights(combiner: str, weights, sums: Callable, spread: Callable, xp):
    """Returns the gains of ``weights``, an array of one weight per id.

    Args:
      combiner: one of ``COMBINERS``.
      weights: float array, one per id; absent ids hold 0.
      sums: maps an array of one number per id to its sums, one per sample.
      spread: maps an array of one number per sample to one per id, that of its sample.
      xp: ``numpy`` on the host, ``jax.numpy`` inside jit.

    Returns:
      An array like ``weights``.

    Example, one sample with the ids of weights 1 and 3:

    >>> import numpy as np
    >>> gains_from_weights("mean", np.array([1.0, 3.0]), lambda w: w.sum(keepdims=True), lambda n: np.repeat(n, 2), np)
    array([0.25, 0.75])
    """
    power = weight_power(combiner)
    if power is None:
        return weights
    total = sums(weights**power)
    # The inner where keeps derivatives finite where the divisor is zero; to divide by infinity gives the gain zero.
    divisor = xp.where(total == 0, xp.ones_like(total), total)
    if power == 2:
        divisor = xp.sqrt(divisor)
    return weights / spread(xp.where(total == 0, xp.inf, divisor))
