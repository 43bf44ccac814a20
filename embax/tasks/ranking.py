"""How well items are ranked for users: Recall@k and NDCG@k over all items but those that a user is known to have.

A user's Recall@k is the share of the test items that are among the first k. NDCG@k counts an item at place p as
1 / log2(p + 1), p from 1, over the most that could be had: of min(k, test items) hits in front. Both are means over the
users who have test items.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from embax.data.files import DataError

NOTHING = (
    "there is nothing to rank for: no user of training has a further item in the rows to be measured; bring more rows, "
    "split them otherwise, or lower --min-count, which users must reach, too"
)
USERS = 1024  # that are ranked at once


class Taken(NamedTuple):
    """Which items each user took: those of user u are ``items[starts[u]:starts[u + 1]]``, in order, each once."""

    starts: np.ndarray
    items: np.ndarray

    @classmethod
    def of(cls, users: np.ndarray, items: np.ndarray, count: int) -> "Taken":
        """Returns the items by user, of pairs in any order; users are 0 .. count - 1."""
        pairs = np.unique(users.astype(np.int64) << 32 | items.astype(np.int64))
        users, items = pairs >> 32, (pairs & 0xFFFFFFFF).astype(np.int32)
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(np.bincount(users, minlength=count), out=starts[1:])
        return cls(starts, items)

    def without(self, others: "Taken") -> "Taken":
        """Returns what others of the same users do not have."""
        pairs = [np.repeat(np.arange(len(t.starts) - 1), t.counts()) << 32 | t.items for t in (self, others)]
        kept = np.setdiff1d(*pairs, assume_unique=True)
        return Taken.of(kept >> 32, kept & 0xFFFFFFFF, len(self.starts) - 1)

    def counts(self) -> np.ndarray:
        """Items of each user."""
        return np.diff(self.starts)

    def places(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items of some users: the number of the user among them, and the item."""
        lengths = self.counts()[users]
        number = np.repeat(np.arange(len(users)), lengths)
        ends = np.cumsum(lengths)
        at = np.arange(len(number)) - np.repeat(ends - lengths, lengths) + np.repeat(self.starts[users], lengths)
        return number, self.items[at]


def ranked(
    rank: Callable[[np.ndarray, tuple[np.ndarray, np.ndarray]], np.ndarray], known: Taken, test: Taken, k: int = 20
):
    """Returns ``{"recall@k": ..., "ndcg@k": ...}``.

    Args:
      rank: given users, and pairs (number of the user, item) that are out of the question, returns ``[users, k]``
        items or fewer, the best first, -1 where there is none.
      known: what each user is known to have.
      test: what is to be found; what is known is not asked for again.
      k: places that count.

    Raises:
      DataError: nobody has anything to be found.
    """
    test = test.without(known)
    users = np.flatnonzero(test.counts())
    if not len(users):
        raise DataError(NOTHING)
    gains = 1.0 / np.log2(np.arange(2, k + 2))
    best = np.concatenate([[0.0], np.cumsum(gains)])
    recall = ndcg = 0.0
    for first in range(0, len(users), USERS):
        own = users[first : first + USERS]
        found = rank(own, known.places(own))
        number, items = test.places(own)
        wanted = np.sort(number.astype(np.int64) << 32 | items)
        shown = np.where(found < 0, -1, np.arange(len(own))[:, None] << 32 | found.astype(np.int64))
        at = np.minimum(np.searchsorted(wanted, shown), len(wanted) - 1)
        hit = wanted[at] == shown
        counts = test.counts()[own]
        recall += (hit.sum(axis=1) / counts).sum()
        ndcg += ((hit * gains[: hit.shape[1]]).sum(axis=1) / best[np.minimum(counts, k)]).sum()
    return {f"recall@{k}": recall / len(users), f"ndcg@{k}": ndcg / len(users)}


def most_popular(items: int, k: int = 20) -> Callable[[np.ndarray, tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Returns a ranking by popularity, for items whose numbers rise as their popularity falls; 0 is none."""

    def rank(users: np.ndarray, known: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        # A user knows finitely many: the first k that are not known are among the first k + known.
        most = int(np.bincount(known[0], minlength=1).max()) + k if len(known[0]) else k
        out = np.zeros((len(users), min(items, most) + 1), bool)
        inside = known[1] < out.shape[1]
        out[known[0][inside], known[1][inside]] = True
        out[:, 0] = True
        best = np.argsort(out, axis=1, kind="stable")[:, :k]
        return np.where(np.take_along_axis(out, best, axis=1), -1, best)

    return rank
