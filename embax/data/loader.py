"""Batches from files, by Grain: row groups are read, encoded and shuffled by workers, and cut into batches here.

Rows are shuffled among as many as ``mixed_rows``: blocks of row groups in an order of their own at every epoch, and the
rows of each block. What fits into one block is shuffled as a whole.

An iterator's state is a small dictionary; a new one that is given it goes on with the very next batch.
"""

import dataclasses
import signal
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from embax.data.blocks import Rows, encoded, joined
from embax.data.columns import Columns
from embax.data.files import Group, read
from embax.data.scan import ALL, Scanned, chosen
from embax.data.split import TRAIN, Split

MIXED_ROWS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Encode(grain.transforms.RandomMap):
    """Reads row groups, and gives their rows in another order at every epoch.

    Args:
      columns: what columns are for.
      scanned: vocabularies and scales.
      split: which row is for what.
      part: the part that is wanted: TRAIN, VALIDATION or TEST.
      shuffled: whether the order changes.
    """

    columns: Columns
    scanned: Scanned
    split: Split = ALL
    part: int = TRAIN
    shuffled: bool = True

    def random_map(self, element: Sequence[Group], rng: np.random.Generator) -> Rows:
        """Returns the rows of row groups."""
        rows = joined([self.rows_of(group) for group in element])
        return rows.taken(rng.permutation(len(rows))) if self.shuffled else rows

    def rows_of(self, group: Group) -> Rows:
        """Returns the wanted rows of one row group, in their order."""
        table = read(group, sorted({*self.columns.all, *self.split.columns}))
        table = chosen(table, self.split.parts(table, group) == self.part)
        return encoded(table, self.columns, self.scanned, group)


def batches(
    groups: Sequence[Group],
    encode: Encode,
    batch_size: int,
    *,
    epochs: int = 1,
    seed: int = 0,
    workers: int = 0,
    mixed_rows: int = MIXED_ROWS,
) -> grain.IterDataset:
    """Returns a dataset of batches: ``iter`` of it is a Grain iterator, with ``get_state`` and ``set_state``.

    ``.map``, ``.random_map`` and ``ahead`` go on from it. Where an epoch ends the next one begins, within the batch.

    Args:
      groups: row groups of ``Files``.
      encode: what is made of each.
      batch_size: rows of a batch; the last one has what is left.
      epochs: how often every row comes.
      seed: of the order of row groups and of rows.
      workers: processes that read and encode; 0 for none but this one.
      mixed_rows: as many rows are shuffled at once; each worker and this process hold about twice as many.
    """
    dataset = grain.MapDataset.source(list(groups)).seed(seed)
    if encode.shuffled:
        dataset = dataset.shuffle()
    most = max(group.rows for group in groups)
    blocks = dataset.batch(max(1, mixed_rows // most), batch_fn=list).repeat(epochs).random_map(encode)
    blocks = blocks.to_iter_dataset(grain.ReadOptions(1, 1))
    if workers:
        _without_flags()
        blocks = blocks.mp_prefetch(grain.MultiprocessingOptions(workers, 1), worker_init_fn=_deaf)
    return Cut(blocks, batch_size)


def ahead(dataset: grain.IterDataset, prepare: Callable[[Any], Any], depth: int = 2) -> grain.IterDataset:
    """Returns a dataset whose elements are prepared by a thread while the step before is under way.

    Args:
      dataset: of batches.
      prepare: what is done to each: ``embax.preprocess`` validates, sorts and finds the distinct rows, in native code
        that leaves Python's lock alone; on one device ``jax.device_put`` brings them there, on a mesh they are there.
      depth: batches that are ready at most.
    """
    return grain.experimental.ThreadPrefetchIterDataset(dataset.map(prepare), prefetch_buffer_size=depth)


def _deaf(number: int, count: int) -> None:
    """Leaves Ctrl-C, which all processes of a terminal get, to the one that they work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _without_flags() -> None:
    # Grain's workers read flags of Abseil, which exist from when a command line was parsed, or was said to have none.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class Cut(grain.IterDataset):
    """Blocks of rows as batches of one size, across the ends of blocks.

    Args:
      blocks: a dataset of Rows.
      size: of a batch.
    """

    def __init__(self, blocks: grain.IterDataset, size: int):
        super().__init__(blocks)
        self.size = size

    def __iter__(self) -> "CutIterator":
        return CutIterator(iter(self._parent), self.size)


class CutIterator(grain.DatasetIterator):
    """Iterates over ``Cut``. Its state is that of the blocks before the first row that is not yet given out."""

    def __init__(self, blocks: grain.DatasetIterator, size: int):
        super().__init__(blocks)
        self.size = size
        self._held: deque[tuple[Any, Rows]] = deque()  # blocks, and the state before each
        self._at = 0  # rows of the first one that are given out

    def __next__(self) -> Rows:
        parts, wanted = [], self.size
        while wanted:
            if not self._held and not self._more():
                break
            block = self._held[0][1]
            taken = block.part(self._at, min(self._at + wanted, len(block)))
            parts.append(taken)
            wanted -= len(taken)
            self._at += len(taken)
            if self._at == len(block):
                self._held.popleft()
                self._at = 0
        if not any(map(len, parts)):
            raise StopIteration
        return joined(parts)

    def _more(self) -> bool:
        state = self._parent.get_state()
        try:
            self._held.append((state, next(self._parent)))
        except StopIteration:
            return False
        return True

    def get_state(self) -> dict[str, Any]:
        """Returns the place of the next batch."""
        return {"blocks": self._held[0][0] if self._held else self._parent.get_state(), "at": self._at}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on at a place that ``get_state`` gave."""
        self._parent.set_state(state["blocks"])
        self._held.clear()
        self._at = 0
        if state["at"]:
            self._more()
            self._at = state["at"]
