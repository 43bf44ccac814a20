"""What a user says about tables and features, checked when it is said."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from embax.combiners import check_combiner
from embax.optimizers.base import Optimizer

TABLE_DTYPES = ("float32", "bfloat16", "float16")
OUT_OF_RANGE = ("error", "drop")
TRUNCATE = ("error", "keep_first", "keep_last")

# Fields that stacking writes, and those whose change after stacking has a function of its own.
_STACKING_FIELDS = ("_stacked_table_spec", "_setting_in_stack")
_LIMIT_FIELDS = (
    "max_ids_per_partition",
    "max_unique_ids_per_partition",
    "suggested_coo_buffer_size_per_device",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Looked-up rows are clipped to [min_value, max_value] and rounded to num_buckets even levels.

    The stored table stays float; the gradient passes straight through.

    Raises:
      ValueError: fewer than 2 levels, or an empty range.

    >>> QuantizationConfig(min_value=-1.0, max_value=1.0, num_buckets=256).as_tuple()
    (-1.0, 1.0, 256)
    """

    min_value: float
    max_value: float
    num_buckets: int

    def __post_init__(self):
        if not _is_int(self.num_buckets) or self.num_buckets < 2:
            raise ValueError(f"QuantizationConfig: num_buckets={self.num_buckets!r} must be an integer of at least 2")
        for field in ("min_value", "max_value"):
            value = getattr(self, field)
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"QuantizationConfig: {field}={value!r} must be a finite number")
        if not self.min_value < self.max_value:
            raise ValueError(f"QuantizationConfig: min_value={self.min_value} must be below max_value={self.max_value}")

    def as_tuple(self) -> tuple[float, float, int]:
        """Returns (min_value, max_value, num_buckets)."""
        return (self.min_value, self.max_value, self.num_buckets)


@dataclasses.dataclass(frozen=True)
class FeatureIdTransformation:
    """Where the ids of a feature lie in a stack of the SparseCore layout."""

    row_offset: int = 0
    col_offset: int = 0
    col_shift: int = 0


@dataclasses.dataclass(frozen=True)
class TableSettingInStack:
    """Where a table lies in its stack of the SparseCore layout."""

    stack_name: str
    padded_vocab_size: int
    padded_embedding_dim: int
    row_offset_in_shard: int = 0
    shard_rotation: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StackedTableSpec:
    """A stack of the SparseCore layout: what its tables share, and its limits. A pytree, changed by ``replace``."""

    stack_name: str
    stack_vocab_size: int
    stack_embedding_dim: int
    optimizer: Any
    combiner: str
    total_sample_count: int
    max_ids_per_partition: int = 256
    max_unique_ids_per_partition: int = 256
    activation_mem_bytes_limit: int = 2048 * 1024
    suggested_coo_buffer_size_per_device: int | None = None
    quantization_config: QuantizationConfig | None = None
    # Devices, and SparseCores of each: rows and samples stand as these have them. None where nobody has said.
    made_for: tuple[int, int] | None = dataclasses.field(default=None, compare=False)

    def replace(self, **changes: Any) -> "StackedTableSpec":
        """Returns the stack with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(kw_only=True, eq=True, unsafe_hash=True)
class TableSpec:
    """One table: vocabulary_size rows of embedding_dim numbers, and how they start and learn.

    Args:
      name: unique among the tables of a plan.
      vocabulary_size: number of rows; ids are 0 .. vocabulary_size - 1.
      embedding_dim: length of a row, from 1.
      initializer: ``(key, shape, dtype) -> array``, as in ``jax.nn.initializers``.
      optimizer: how touched rows move, e.g. ``embax.Adagrad(0.1)``.
      combiner: "sum", "mean" or "sqrtn".
      max_ids_per_partition: a limit of TPU SparseCores; kept, and never a reason to lose an id.
      max_unique_ids_per_partition: likewise.
      suggested_coo_buffer_size_per_device: likewise.
      quantization_config: rounds looked-up rows, or None.
      dtype: of the stored rows: float32, bfloat16 or float16; arithmetic is float32.

    Raises:
      ValueError, TypeError: naming the table, the value and the rule.
      AttributeError: a field is set after the table was stacked in the SparseCore layout.
    """

    name: str
    vocabulary_size: int
    embedding_dim: int
    initializer: Callable[..., jax.Array]
    optimizer: Optimizer
    combiner: str
    max_ids_per_partition: int = 256
    max_unique_ids_per_partition: int = 256
    suggested_coo_buffer_size_per_device: int | None = None
    quantization_config: QuantizationConfig | None = None
    dtype: Any = "float32"
    _stacked_table_spec: Any = dataclasses.field(default=None, compare=False, repr=False)
    _setting_in_stack: TableSettingInStack | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"TableSpec: name={self.name!r} must be a string of at least one character")
        owner = f'table "{self.name}"'
        for field in ("vocabulary_size", "embedding_dim"):
            object.__setattr__(self, field, _positive_int(owner, field, getattr(self, field)))
        if not callable(self.initializer):
            raise TypeError(
                f"{owner}: initializer={self.initializer!r} must be a callable (key, shape, dtype) -> array"
            )
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"{owner}: optimizer={self.optimizer!r} must be an embax optimizer, such as embax.Adagrad(0.1)"
            )
        check_combiner(self.combiner, owner)
        object.__setattr__(self, "dtype", float_dtype(owner, "dtype", self.dtype))
        self._check_settings(owner)

    def _check_settings(self, owner: str) -> None:
        if self.quantization_config is not None and not isinstance(self.quantization_config, QuantizationConfig):
            raise TypeError(f"{owner}: quantization_config={self.quantization_config!r} must be a QuantizationConfig")
        for field in _LIMIT_FIELDS:
            value = getattr(self, field)
            if value is not None or not field.startswith("suggested"):
                _positive_int(owner, field, value)

    def __setattr__(self, field: str, value: Any) -> None:
        if field not in _STACKING_FIELDS and getattr(self, "_setting_in_stack", None) is not None:
            fix = (
                "use update_preprocessing_parameters"
                if field in _LIMIT_FIELDS
                else "make another with dataclasses.replace"
            )
            raise AttributeError(f'table "{self.name}" is stacked, {field} can no longer be set; {fix}')
        object.__setattr__(self, field, value)

    @property
    def setting_in_stack(self) -> TableSettingInStack:
        """Where the table lies in its SparseCore stack; AssertionError while it is not stacked."""
        if self._setting_in_stack is None:
            raise AssertionError(f'table "{self.name}" is not stacked')
        return self._setting_in_stack

    @property
    def stacked_table_spec(self) -> Any:
        """The SparseCore stack of the table; AssertionError while it is not stacked."""
        if self._stacked_table_spec is None:
            raise AssertionError(f'table "{self.name}" is not stacked')
        return self._stacked_table_spec

    def is_stacked(self) -> bool:
        """Returns whether the table was put into a stack of the SparseCore layout."""
        return self._setting_in_stack is not None


@dataclasses.dataclass(kw_only=True, eq=True, unsafe_hash=True)
class FeatureSpec:
    """One feature: ids that are looked up in a table, and the shapes of both ends.

    ========================  ==========================  ==========================================
    input_shape               output_shape                meaning
    ========================  ==========================  ==========================================
    ``(B,)`` or ``(B, n)``    ``(B, D)``                  ids of a sample are pooled (ragged allowed)
    ``(B, T)``                ``(B, T, D)``               sequence, one activation per position
    ``(B, T, n)``             ``(B, T, D)``               sequence, pooled at each position
    ========================  ==========================  ==========================================

    Args:
      name: unique among the features of a plan.
      table_spec: the table; several features may share one.
      input_shape: of the global batch; B may be None for any batch size.
      output_shape: the input's leading dimensions and the table's embedding_dim.
      padding_id: an id that means "nothing here": it adds nothing, trains nothing, and does not count for
        the mean. Any integer; None for no such id.
      out_of_range: "error": `preprocess` raises on an id outside of the vocabulary; "drop": such an id is
        treated like padding, and counted.
      truncate: what becomes of a ragged sequence longer than its T positions: "error", "keep_first" or
        "keep_last"; a shorter one leaves its last positions empty (activation 0).
    """

    name: str
    table_spec: TableSpec
    input_shape: tuple[int | None, ...]
    output_shape: tuple[int | None, ...]
    padding_id: int | None = None
    out_of_range: str = "error"
    truncate: str = "error"
    _id_transformation: FeatureIdTransformation | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"FeatureSpec: name={self.name!r} must be a string of at least one character")
        owner = f'feature "{self.name}"'
        if not isinstance(self.table_spec, TableSpec):
            raise TypeError(f"{owner}: table_spec={self.table_spec!r} must be an embax.TableSpec")
        for field in ("input_shape", "output_shape"):
            shape = getattr(self, field)
            if not isinstance(shape, (tuple, list)):
                raise TypeError(f"{owner}: {field}={shape!r} must be a tuple of integers, such as (None, 3)")
            dims = [d if d is None and i == 0 else _positive_int(owner, field, d) for i, d in enumerate(shape)]
            object.__setattr__(self, field, tuple(dims))
        self._check_shapes(owner)
        for field, allowed in (("out_of_range", OUT_OF_RANGE), ("truncate", TRUNCATE)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{owner}: {field}={getattr(self, field)!r} is not one of {', '.join(allowed)}")
        if self.padding_id is not None and not _is_int(self.padding_id):
            raise TypeError(f"{owner}: padding_id={self.padding_id!r} must be an integer or None")

    def _check_shapes(self, owner: str) -> None:
        inputs, outputs, dim = self.input_shape, self.output_shape, self.table_spec.embedding_dim
        leading = outputs[:-1]
        if len(outputs) < 2 or inputs[: len(leading)] != leading or len(inputs) > len(leading) + 1:
            raise ValueError(
                f"{owner}: input_shape {inputs} does not fit output_shape {outputs}; the output is the input's batch "
                "(and positions) followed by embedding_dim: [B, n] -> [B, D], [B, T] -> [B, T, D], [B, T, n] -> "
                "[B, T, D]"
            )
        if outputs[-1] != dim:
            raise ValueError(
                f'{owner}: output_shape {outputs} ends in {outputs[-1]}, and table "{self.table_spec.name}" has '
                f"embedding_dim {dim}; they must be equal"
            )

    @property
    def id_transformation(self) -> FeatureIdTransformation | None:
        """Where the ids lie in a SparseCore stack; None while the table is not stacked."""
        return self._id_transformation


def float_dtype(owner: str, field: str, dtype: Any) -> str:
    """Returns the name of a dtype that tables and activations can have; ValueError for any other."""
    try:
        name = "None" if dtype is None else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in TABLE_DTYPES:
        raise ValueError(f"{owner}: {field} {name} is not one of {', '.join(TABLE_DTYPES)}; choose one of them")
    return name


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _positive_int(owner: str, field: str, value: Any) -> int:
    if not _is_int(value) or value < 1:
        raise ValueError(f"{owner}: {field}={value!r} must be an integer of at least 1")
    return int(value)
