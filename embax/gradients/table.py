"""A table as a leaf of any pytree: the array, and beside it its name and the optimizer of its rows.

``Table`` is what a model holds; ``Prefetched`` is what ``embax.prefetch`` makes of it for one batch. Both answer
``table[ids]``. A table's leading axes, if any, are those of a scan or vmap over layers: ``[L, V, D]`` is L tables.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax import kernels
from embax.exchange.one_stack import Home
from embax.exchange.ordered import ordered_home, stored
from embax.gradients.forms import Pool, Take
from embax.gradients.mesh_form import MeshPool, MeshTake
from embax.gradients.primitive import SparseGradientError, lookup, whole
from embax.id_batch import StackIds
from embax.kernels import differentiable
from embax.optimizers.base import Optimizer
from embax.placement import ORDERED_PLACEMENTS
from embax.planning import StackPlan
from embax.row_gradients import RowGradients, sum_rows
from embax.take import rows_of


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Table:
    """A table that gets row gradients, as a leaf of any pytree.

    Args:
      value: float ``[vocabulary_size, embedding_dim]``; leading axes are layers.
      optimizer: of the rows, such as ``embax.Adagrad(0.1)``.
      name: for messages, and for ``prefetch``; None for the path in its pytree.
      home: the stack and the devices of a table on a mesh; ``on_mesh`` and layers fill it in.

    Raises:
      TypeError: an optimizer that is not an ``embax.Optimizer``, or values that are not floating point.

    >>> import jax.numpy as jnp, embax
    >>> word = embax.Table(jnp.arange(6.0).reshape(3, 2), embax.SGD(1.0))
    >>> word[jnp.array([2, 0])].tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    >>> loss, gradient = embax.value_and_grad(lambda t: t[jnp.array([2, 0, 2])].sum())(word)
    >>> gradient.rows.tolist(), gradient.values.tolist()
    ([0, 2, 3], [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    """

    value: Any
    optimizer: Optimizer
    name: str | None = None
    home: Home | None = None

    def __post_init__(self):
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"table {self.name!r}: optimizer={self.optimizer!r} must be an embax optimizer, such as "
                "embax.Adagrad(0.1); embax.Optax(...) wraps one of optax"
            )
        if self.home is not None and self.home.stack.optimizer != self.optimizer:
            stack = dataclasses.replace(self.home.stack, optimizer=self.optimizer)
            object.__setattr__(self, "home", dataclasses.replace(self.home, stack=stack))
        if isinstance(self.value, (jax.Array, np.ndarray)):
            if self.value.ndim < 2 or not jnp.issubdtype(self.value.dtype, jnp.floating):
                raise TypeError(
                    f"table {self.name!r}: the value is {self.value.dtype}{list(self.value.shape)}; a table with an "
                    "optimizer must be floating point [vocabulary_size, embedding_dim]"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return jnp.shape(self.value)

    @property
    def dtype(self) -> Any:
        """The dtype of the value."""
        return self.value.dtype

    def __getitem__(self, ids: Any) -> jax.Array:
        """Returns the rows at ``ids``, as ``embax.take``."""
        return self.lookup_rows(ids)

    def lookup_rows(self, ids: Any, sentinel: Any = None) -> jax.Array:
        """Returns the rows at ``ids``; a ``sentinel`` is a scalar of the dense parameters beside the table."""
        sentinel = jnp.zeros((), jnp.float32) if sentinel is None else sentinel
        if self.value.ndim != 2:
            raise ValueError(
                f'table "{self.name}" {list(self.shape)} is {self.shape[0]} layers; look up in one layer: scan or vmap '
                "over the table"
            )
        if self.home is not None:
            home = self._ordered_home()
            home.check(self.shape, self.name)
            form = MeshTake(self.name or "unnamed", home, kernels.choose().name)
            return lookup(form, self.value, home.named(sentinel), rows_of(ids, home.stack.rows))
        form = Take(self.name or "unnamed")
        return lookup(form, self.value, sentinel, rows_of(ids, self.shape[-2]))

    def lookup_pooled(self, stack: StackPlan, backend: str, ids: StackIds, sentinel: Any = None) -> jax.Array:
        """Returns the activations of a stack whose rows these are."""
        sentinel = jnp.zeros((), jnp.float32) if sentinel is None else sentinel
        gains = () if ids.gains is None else (ids.gains,)
        if self.home is not None:
            self.home.check(self.shape, self.name)
            form = MeshPool(self.name or stack.name, self.home, backend, ids.samples, ids.valencies, bool(gains))
            return lookup(form, self.value, sentinel, ids.ids, ids.offsets, *gains)
        form = Pool(self.name or stack.name, stack, backend, ids.samples, ids.valencies, bool(gains))
        return lookup(form, self.value, sentinel, ids.ids, ids.offsets, *gains)

    def whole(self, sentinel: Any = None) -> jax.Array:
        """Returns all rows, for uses without a gradient; asking for one raises.

        Of a table on a mesh all rows that are stored: behind the last id there may be rows of zeros.
        """
        sentinel = jnp.zeros((), jnp.float32) if sentinel is None else sentinel
        if self.home is not None:
            self.home.check(self.shape, self.name)
        return whole(self.name or "unnamed", self.value, sentinel)

    def on_mesh(self, mesh: Any, placement: str = "block") -> "Table":
        """Returns the table with its rows split over the devices of a mesh, in their order.

        Args:
          mesh: a ``jax.sharding.Mesh``, or ``embax.Devices``.
          placement: "block" (neighbouring rows together, filled up with rows of zeros where the devices do not divide
            them), "column" or "replicated".

        Raises:
          ValueError: layers of tables, another placement, or columns that the devices cannot share.

        >>> import jax, jax.numpy as jnp, embax
        >>> word = embax.Table(jnp.arange(6.0).reshape(3, 2), embax.SGD(1.0))
        >>> word.on_mesh(jax.make_mesh((1,), ("x",)))[jnp.array([2, 0])].tolist()
        [[4.0, 5.0], [0.0, 1.0]]
        """
        if self.value.ndim != 2 or self.home is not None:
            raise ValueError(
                f'table "{self.name}" {list(self.shape)}: on_mesh takes one table [vocabulary_size, embedding_dim] '
                "that is on no mesh yet"
            )
        home = ordered_home(self.name or "table", self.shape, self.dtype, self.optimizer, mesh, placement)  # type: ignore
        return self.tree_unflatten((self.optimizer, self.name, home), (stored(home, self.value),))

    def off_mesh(self) -> "Table":
        """Returns the table ``[vocabulary_size, embedding_dim]`` on one device: the inverse of ``on_mesh``.

        Raises:
          ValueError: a table that is on no mesh, or one of a FeatureEmbed, whose rows are in the order of their owners.
        """
        if self.home is None or self.home.stack.placement not in ORDERED_PLACEMENTS:
            raise ValueError(
                f'table "{self.name}" {list(self.shape)}: off_mesh takes a table that on_mesh or an Embed has put on a '
                "mesh; for those of a plan there is embax.to_arrays"
            )
        self.home.check(self.shape, self.name)
        rows = jnp.asarray(np.asarray(self.value)[: self.home.stack.rows])
        return self.tree_unflatten((self.optimizer, self.name, None), (rows,))

    def _ordered_home(self) -> Home:
        assert self.home is not None
        if self.home.stack.placement not in ORDERED_PLACEMENTS:
            raise NotImplementedError(
                f'table "{self.name}": it lies on a mesh in the order of its owners; look up through its FeatureEmbed'
            )
        return self.home

    def table_arrays(self) -> list[Any]:
        """Returns the array, for ``check_step``."""
        return [self.value]

    def tree_flatten_with_keys(self):
        """Returns the value as the only leaf."""
        return [(jax.tree_util.GetAttrKey("value"), self.value)], (self.optimizer, self.name, self.home)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        """Returns a table of whatever the leaf has become; nothing is checked."""
        table = object.__new__(cls)
        for field, value in zip(("value", "optimizer", "name", "home"), (*leaves, *static), strict=True):
            object.__setattr__(table, field, value)
        return table

    def with_value(self, value: Any, name: str | None = None) -> "Table":
        """Returns the table with another value, and with ``name`` if it had none; nothing is checked."""
        return self.tree_unflatten((self.optimizer, self.name or name, self.home), (value,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefetched:
    """The rows of a table that a batch looks up, each once: a small array that any JAX transformation may see.

    Lookups go by ``table[ids]`` as before. An id that was not prefetched has NaN as its activation (outside of jit: an
    error), never another id's row.

    Attributes:
      rows: int32 ``[capacity]``, rising, filled up with ``vocabulary_size``; leading axes are layers.
      values: ``[capacity, embedding_dim]``: differentiate with respect to these.
      vocabulary_size: rows of the table (static).
      name: the table's (static).
      home: of a table on a mesh (static); rows and vocabulary_size are then those of the stored array.
    """

    rows: Any
    values: Any
    vocabulary_size: int = dataclasses.field(metadata={"static": True})
    name: str | None = dataclasses.field(default=None, metadata={"static": True})
    home: Home | None = dataclasses.field(default=None, metadata={"static": True})

    def __getitem__(self, ids: Any) -> jax.Array:
        """Returns the rows at ``ids``, as ``embax.take``."""
        return self.lookup_rows(ids)

    def lookup_rows(self, ids: Any, sentinel: Any = None) -> jax.Array:
        """Returns the rows at ``ids``; the sentinel is not needed, for plain derivatives are right here."""
        del sentinel
        if self.home is None:
            return jnp.take(self.values, self.places(rows_of(ids, self.vocabulary_size)), axis=0, mode="fill")
        rows = self.home.stored_numbers(rows_of(ids, self.home.stack.rows))
        return jnp.take(self.values, self.places(rows), axis=0, mode="fill")

    def lookup_pooled(self, stack: StackPlan, backend: str, ids: StackIds, sentinel: Any = None) -> jax.Array:
        """Returns the activations of a stack whose rows these are; a sample with an id that is not here is NaN."""
        del sentinel
        capacity, present = self.rows.shape[-1], (ids.ids >= 0) & (ids.ids < stack.rows)
        stored = jnp.where(present, ids.ids, stack.rows) if self.home is None else self.home.stored_numbers(ids.ids)
        places = self.places(stored)
        # Row `capacity` is NaN, for what was not prefetched; one past that is absent, as ever.
        values = jnp.concatenate([self.values, jnp.full_like(self.values[:1], jnp.nan, shape=(1, stack.embedding_dim))])
        stack = dataclasses.replace(stack, rows=capacity + 1)
        ids = dataclasses.replace(ids, ids=jnp.where(present, places, capacity + 1))
        if self.home is not None:
            return self.home.lookup_among(backend, values, ids)
        return jnp.concatenate(differentiable.gather_pool(backend, stack, values, ids))

    def whole(self, sentinel: Any = None) -> jax.Array:
        """Raises: the other rows are not here."""
        raise self._only_these()

    @property
    def value(self) -> Any:
        """Raises: a Table has all rows in it, and the others are not here."""
        raise self._only_these()

    def _only_these(self) -> SparseGradientError:
        return SparseGradientError(
            f'table "{self.name}": only the prefetched rows are here, and the loss uses the whole table (its value, or '
            "attend without candidates); use attend(query, candidates=ids)"
        )

    def places(self, rows: jax.Array) -> jax.Array:
        """Returns where each of the int32 ``rows`` stands among the prefetched, capacity for nowhere."""
        capacity = self.rows.shape[-1]
        if not capacity:
            return jnp.zeros(rows.shape, jnp.int32)
        places = jnp.searchsorted(self.rows, rows).astype(jnp.int32)
        found = (self.rows[jnp.minimum(places, capacity - 1)] == rows) & (rows < self.vocabulary_size)
        self._check_covered(rows, found)
        return jnp.where(found, places, capacity)

    def row_gradients(self, gradients: Any) -> RowGradients:
        """Returns the gradient of the table, given that of ``values``."""
        if isinstance(gradients, Prefetched):
            gradients = gradients.values
        rows, layers = self.rows, self.rows.size // max(self.rows.shape[-1], 1)
        if rows.ndim == 1:
            return RowGradients(rows, gradients, self.vocabulary_size)
        total = layers * self.vocabulary_size
        first = jnp.arange(layers, dtype=jnp.int32)[:, None] * self.vocabulary_size
        rows = rows.reshape(layers, -1)
        rows = jnp.where(rows < self.vocabulary_size, rows + first, total).reshape(-1)
        return sum_rows(rows, gradients.reshape(-1, gradients.shape[-1]), total)

    def _check_covered(self, rows: jax.Array, found: jax.Array) -> None:
        if any(isinstance(x, Tracer) for x in (rows, found)):
            return
        missing = np.asarray(rows)[~np.asarray(found) & (np.asarray(rows) < self.vocabulary_size)]
        if missing.size:
            raise ValueError(
                f'table "{self.name}": id {missing.flat[0]} is looked up, and embax.prefetch was not given it; '
                "prefetch every id that the loss looks up"
            )


def check_optimizer(owner: str, optimizer: Any, dtype: Any) -> None:
    """Raises unless ``optimizer`` is one of embax's, and ``dtype`` is floating point."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{owner}: optimizer={optimizer!r} must be an embax optimizer, such as embax.Adagrad(0.1); "
            "embax.Optax(...) wraps one of optax"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{owner}: param_dtype={jnp.dtype(dtype).name} cannot be trained; leave optimizer= out")
