"""The ids of a batch, as every kernel reads them.

A stack of tables gets one CSR: the samples of all its features one after another, each with the rows it looks
up. Six ids of two features on a stack of 7 rows, capacity 8::

    feature "user":    [[0], [2]]            samples 0, 1
    feature "history": [[5, 3], [], [6, 6]]  samples 2, 3, 4

    ids      0  2  5  3  6  6  7  7      row numbers in the stack; 7 = one past the end = absent
    offsets  0  1  2  4  4  6            sample s owns ids[offsets[s]:offsets[s + 1]]
    gains    None                        every gain is 1

Every leaf leads with the number of shards of the batch (1 on one device). Nothing beyond ``offsets[-1]`` is
read, so a batch of zeros, ``jax.tree.map(jnp.zeros_like, batch)``, is the batch without ids.
"""

import dataclasses
from typing import Any, NamedTuple

import jax


class Statistics(NamedTuple):
    """What preprocessing met, int32 ``[shards, features]`` each, features in the plan's order.

    ``ids`` counts the ids that are present; the others count ids that are absent for a reason: equal to
    ``padding_id``, outside of the vocabulary, cut off a sequence by ``truncate``, or of a weight that is NaN
    or infinite.
    """

    ids: Any
    padding: Any
    out_of_range: Any
    truncated: Any
    bad_weights: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackIds:
    """The ids of one stack: see the module's example.

    Attributes:
      ids: int32 ``[shards, capacity]``; rows of the stack. Anything outside ``[0, rows)`` is absent.
      offsets: int32 ``[shards, samples + 1]``.
      gains: float32 ``[shards, capacity]``, or None where every gain is 1.
      samples: samples of each feature of the stack, on one shard (static).
      valencies: ids per sample of each feature where it is the same for all samples, else None (static).
      totals: samples of each feature over all shards, where the last shards are filled up with samples that are not
        there; None where none are (static).
      layout: of the stack that the ids are rows of, on a mesh, where it differs by placement (static).
    """

    ids: Any
    offsets: Any
    gains: Any
    samples: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    valencies: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    totals: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    layout: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def shard(self, index: int) -> "StackIds":
        """Returns one shard's ids, without the leading dimension."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def all_samples(self, shards: int) -> tuple[int, ...]:
        """Returns the samples of each feature over so many shards, without those that only fill up."""
        return self.totals or tuple(shards * samples for samples in self.samples)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdBatch:
    """The ids of a batch for every stack of a plan, and what preprocessing met.

    Attributes:
      stacks: ``{stack name: StackIds}``.
      statistics: counts by feature; under ``preprocess_traced`` the only sign of a bad id.
    """

    stacks: dict[str, StackIds]
    statistics: Statistics


def bucket(count: int) -> int:
    """Returns the capacity for ``count`` ids: the next multiple of an eighth of the power of two below.

    At most an eighth is wasted, and counts that vary by less seldom change the shape:

    >>> [bucket(n) for n in (0, 7, 9, 1000, 1025, 163_000, 165_000)]
    [8, 8, 9, 1024, 1152, 163840, 180224]
    """
    count = max(count, 8)
    step = 1 << max(count.bit_length() - 4, 0)
    return -(-count // step) * step
