"""What a TPU would have to make room for, counted as it counts.

Between two SparseCores go the rows that one's samples need of the other, a row of a sample once, however often it is
named there. Two SparseCores, the sample 0 0 0 2 4 1 on the first and 1 1 1 3 3 5 5 7 7 0 on the second::

    to SparseCore        0                 1
    from 0               0 2 4             1              3 and 1 ids
    from 1               0                 1 3 5 7        1 and 4 ids
    most ids             3                 4
    buffer of 0 and 1    8 + 8             8 + 8          every count rounded up to a multiple of 8
"""

import dataclasses
import warnings
from typing import Any

import jax
import numpy as np

from embax.kernels import host

ALIGNED = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseDenseMatmulInputStats:
    """Statistics of a batch by the name of the stack. A pytree, changed by ``replace``.

    Attributes:
      max_ids_per_partition: int32 ``[local devices * SparseCores]``: for each device, the most ids that one of its
        SparseCores needs of every SparseCore there is.
      max_unique_ids_per_partition: likewise, of distinct rows.
      required_buffer_size_per_sc: int32 ``[local SparseCores]``.
      id_drop_counters: 0: no id is ever dropped.
      would_drop: ids above ``max_ids_per_partition``, which a TPU would drop or refuse.
    """

    max_ids_per_partition: dict[str, Any]
    max_unique_ids_per_partition: dict[str, Any]
    required_buffer_size_per_sc: dict[str, Any] = dataclasses.field(default_factory=dict)
    id_drop_counters: dict[str, Any] = dataclasses.field(default_factory=dict)
    would_drop: dict[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> "SparseDenseMatmulInputStats":
        """Returns the statistics with some fields changed."""
        return dataclasses.replace(self, **changes)


class Statistics:
    """Counts stack after stack.

    Args:
      cores: the SparseCores.
      limits: "ignore", "warn" or "error": what to do where a stack's limits are exceeded.
    """

    def __init__(self, cores: Any, limits: str):
        self.cores, self.limits = cores, limits
        self.most: dict[str, Any] = {}
        self.unique: dict[str, Any] = {}
        self.buffers: dict[str, Any] = {}
        self.dropped: dict[str, int] = {}
        self.parts = 1

    def add(self, stack: Any, parts: list[Any]) -> None:
        """Counts the rows of a stack, those of each local SparseCore apart.

        Raises:
          ValueError: a limit is exceeded, and that was to be an error.
        """
        counted = [_counted(stack, part, self.cores.all) for part in parts]
        ids, unique = (np.array([one[kind] for one in counted], np.int32) for kind in (0, 1))
        name, by_device = stack.spec.stack_name, (self.cores.local_devices, self.cores.per_device, -1)
        self.most[name] = ids.reshape(by_device).max(1).reshape(-1)
        self.unique[name] = unique.reshape(by_device).max(1).reshape(-1)
        self.buffers[name] = (-(-ids // ALIGNED) * ALIGNED).sum(1, dtype=np.int32)
        self.dropped[name] = int(np.maximum(ids - stack.spec.max_ids_per_partition, 0).sum())
        for kind, most in (("max_ids_per_partition", ids), ("max_unique_ids_per_partition", unique)):
            limit, found = getattr(stack.spec, kind), int(most.max(initial=0))
            self.parts = max(self.parts, -(-found // limit))
            if found > limit and self.limits != "ignore":
                text = (
                    f'stack "{name}": {found} ids go from one SparseCore to another, and {kind} is {limit}: a TPU '
                    "would drop or refuse them (embax loses none); raise the limit by update_preprocessing_parameters"
                )
                if self.limits == "error":
                    raise ValueError(text)
                warnings.warn(text, UserWarning, stacklevel=6)

    def minibatches(self, enabled: bool) -> int:
        """Returns into how many parts a TPU would cut the batch: a power of two."""
        return 1 << (self.parts - 1).bit_length() if enabled else 1

    def result(self) -> SparseDenseMatmulInputStats:
        """Returns what was counted."""
        nothing = dict.fromkeys(self.most, 0)
        return SparseDenseMatmulInputStats(self.most, self.unique, self.buffers, nothing, self.dropped)


def _counted(stack: Any, part: Any, num_sc: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many ids, and how many distinct rows, one SparseCore needs of each."""
    return host.partitions(part.rows, part.offsets, stack.spec.stack_vocab_size // num_sc, num_sc)
