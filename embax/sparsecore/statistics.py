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

from embax.specs import StackedTableSpec

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

    def get_required_buffer_size_per_device(self, table_name: str, num_sc_per_device: int | None = None) -> int | None:
        """Returns the buffer that a stack needs on a device: of its largest SparseCore, times their number.

        Args:
          table_name: of the stack; None is returned where there are no statistics of it.
          num_sc_per_device: SparseCores of a device; None for as many as the statistics have.
        """
        sizes = self.required_buffer_size_per_sc.get(table_name)
        if sizes is None or not np.size(sizes):
            return None
        return int(np.max(sizes)) * (num_sc_per_device or np.size(sizes))

    def set_required_buffer_size_per_device(
        self, table_name: str, required_buffer_size_per_device: int, num_sc_per_device: int | None = None
    ) -> None:
        """Sets the buffer that a stack needs on a device, in place; what its SparseCores share is rounded up.

        Args:
          table_name: of the stack.
          required_buffer_size_per_device: in ids.
          num_sc_per_device: SparseCores of a device; None for as many as the statistics have.

        Raises:
          ValueError: there are no statistics of the stack, and no number of SparseCores.
        """
        count = num_sc_per_device or np.size(self.required_buffer_size_per_sc.get(table_name, ()))
        if not count:
            raise ValueError(
                f'stack "{table_name}": there are no statistics of it that say how many SparseCores a device has; '
                "pass num_sc_per_device"
            )
        each = -(-required_buffer_size_per_device // count)
        self.required_buffer_size_per_sc[table_name] = np.full(count, each, np.int32)


class Statistics:
    """What was counted of every stack.

    Args:
      specs: the stacks.
      counts: int32 ``[stacks, local SparseCores, 2, SparseCores]``: ids that each needs of each, and distinct rows.
      cores: the SparseCores.
    """

    def __init__(self, specs: list[StackedTableSpec], counts: np.ndarray, cores: Any):
        self.specs, self.counts, self.cores = specs, counts, cores
        limits = [(spec.max_ids_per_partition, spec.max_unique_ids_per_partition) for spec in specs]
        self.limits = np.array(limits, np.int64)
        self.most = counts.max((1, 3))

    def check(self, what: str) -> None:
        """Says which limit is exceeded: not at all ("ignore"), by a warning ("warn") or a ValueError ("error")."""
        if what == "ignore":
            return
        for number, kind in np.argwhere(self.most > self.limits):
            field = ("max_ids_per_partition", "max_unique_ids_per_partition")[kind]
            text = (
                f'stack "{self.specs[number].stack_name}": {self.most[number, kind]} ids go from one SparseCore to '
                f"another, and {field} is {self.limits[number, kind]}: a TPU would drop or refuse them (embax loses "
                "none); raise the limit by update_preprocessing_parameters"
            )
            if what == "error":
                raise ValueError(text)
            warnings.warn(text, UserWarning, stacklevel=5)

    def minibatches(self) -> int:
        """Returns into how many parts a TPU would cut the batch: a power of two."""
        parts = max(1, int((-(-self.most // self.limits)).max()))
        return 1 << (parts - 1).bit_length()

    def result(self) -> SparseDenseMatmulInputStats:
        """Returns what was counted, by stack."""
        ids, by_device = self.counts[:, :, 0], (len(self.specs), self.cores.local_devices, self.cores.per_device, 2, -1)
        most = self.counts.reshape(by_device).max(2)
        buffers = (-(-ids // ALIGNED) * ALIGNED).sum(2, dtype=np.int32)
        dropped = np.maximum(ids - self.limits[:, :1, None], 0).sum((1, 2)).tolist()
        names = [spec.stack_name for spec in self.specs]
        each = [dict(zip(names, most[:, :, kind].reshape(len(names), -1), strict=True)) for kind in (0, 1)]
        return SparseDenseMatmulInputStats(
            each[0],
            each[1],
            dict(zip(names, buffers, strict=True)),
            dict.fromkeys(names, 0),
            dict(zip(names, dropped, strict=True)),
        )
