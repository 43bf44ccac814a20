"""What a sparse layer keeps in a model: no ``nnx.Param`` but one scalar, so that dense optimizers pass its rows by."""

import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from embax.gradients.primitive import SparseGradientError
from embax.gradients.table import Prefetched
from embax.gradients.table import Table as TableLeaf


class Table(nnx.Variable):
    """The rows of a table, ``[vocabulary_size, embedding_dim]``.

    Its metadata: ``optimizer`` steps the rows, ``home`` says where they lie on a mesh.
    """

    def table_arrays(self) -> list[Any]:
        """Returns the array, for ``check_step``."""
        return [self.get_raw_value()]


class Slots(nnx.Variable):
    """The slot variables of a table."""

    def table_arrays(self) -> list[Any]:
        """Returns the arrays, for ``check_step``."""
        return jax.tree.leaves(self.get_raw_value())


class Marks(nnx.Variable):
    """Which rows of a table were written since a checkpoint."""


class Pending(nnx.Variable):
    """What gradient accumulation keeps, and the number of updates made."""


class Frozen(nnx.Variable):
    """The rows of a table that is not trained."""


class Sentinel(nnx.Param):
    """A zero that nothing is computed from: a plain nnx.grad over the parameters differentiates it, and is told."""


class PrefetchedValues(nnx.Param):
    """The distinct rows of a table that a batch looks up: an ordinary small parameter."""


class PrefetchedRows(nnx.Variable):
    """Which rows those are; its metadata ``vocabulary_size`` says out of how many."""


class TableGradient(nnx.Param):
    """The RowGradients of a table, where a dense gradient would stand.

    An ``nnx.Param``, so that an optimizer over parameters stumbles over it instead of leaving its table untrained.
    """

    @property
    def row_gradients(self) -> Any:
        """The RowGradients."""
        return super().get_raw_value()

    def get_raw_value(self) -> Any:
        """Returns the RowGradients; to ``nnx.Optimizer``, which would fail on them obscurely, says what to use."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _PLAIN_UPDATE:
                raise SparseGradientError(
                    f'table "{self.get_metadata("table_name")}": its gradient is RowGradients, which nnx.Optimizer '
                    "cannot apply; use embax.nnx.Optimizer in its place"
                )
            frame = frame.f_back
        return super().get_raw_value()


_PLAIN_UPDATE = inspect.unwrap(nnx.Optimizer.update).__code__


def sentinel() -> Sentinel:
    """Returns a fresh sentinel."""
    return Sentinel(jnp.zeros((), jnp.float32))


def leaf(variable: Any, rows: Any, name: str) -> TableLeaf | Prefetched:
    """Returns a table's variables as what the core looks up in.

    Args:
      variable: a Table, or PrefetchedValues.
      rows: PrefetchedRows beside PrefetchedValues, else None.
      name: of the table.
    """
    if isinstance(variable, PrefetchedValues):
        home = rows.get_metadata("home", None)
        return Prefetched(rows.get_value(), variable.get_value(), rows.get_metadata("vocabulary_size"), name, home)
    return table_leaf(variable, name)


def table_leaf(variable: Table, name: str) -> TableLeaf:
    """Returns a Table variable as the core's Table."""
    optimizer = variable.get_metadata("optimizer")
    home = variable.get_metadata("home", None)
    return TableLeaf.tree_unflatten((optimizer, name, home), (variable.get_value(),))


def with_value(variable: Any, value: Any) -> Any:
    """Returns a new Variable of the same type and metadata."""
    return type(variable).from_metadata(value, variable.get_metadata())
