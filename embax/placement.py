"""Which devices hold the tables and the batch, and which device holds which row.

A mesh of devices may have several axes. The batch is split along some of them, the tables along some; an axis may do
both::

    Devices(mesh)                                             both along every axis
    Devices(mesh, batch_axes="data", table_axes="model")      each data group has the tables once
    Devices(mesh, batch_axes="data", table_axes=("data", "model"))

A table's placement says how it lies on the devices of the table axes. Six rows on 2 devices::

    row         device 0: rows 0 2 4      device 1: rows 1 3 5      row r on device r % 2
    table       device 0: rows 0 .. 5     device 1: another table
    column      device 0: the left halves of all rows, device 1: the right halves
    replicated  device 0: rows 0 .. 5     device 1: rows 0 .. 5

A table of its own, without a plan (``embax.Table.on_mesh``, ``Embed``), keeps its rows in their order::

    block       device 0: rows 0 1 2      device 1: rows 3 4 5
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

EXCHANGES = ("gather", "route")
PLACEMENTS = ("row", "table", "column", "replicated")
ORDERED_PLACEMENTS = ("block", "column", "replicated")


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh, and the axes along which the batch and the tables are split.

    Attributes:
      mesh: of Auto or Explicit axes. An AbstractMesh will do for planning.
      batch_axes: names of axes; None for all of the mesh.
      table_axes: likewise.
      exchange: how rows dealt out over devices come to the samples: "gather" (ids to everybody, partial sums home),
        "route" (each distinct row once to whoever needs it), "auto" for what moves fewer bytes.
      wire_dtype: bfloat16 or float16, to which activations and gradients are rounded while they travel; None for no
        rounding. Rows travel as they are stored.

    Raises:
      ValueError: an axis that the mesh does not have, or named twice; an unknown exchange or dtype.

    >>> import jax, embax
    >>> embax.Devices(jax.make_mesh((1,), ("x",))).table_axes
    ('x',)
    """

    mesh: Any
    batch_axes: Any = None
    table_axes: Any = None
    exchange: str = "auto"
    wire_dtype: Any = None

    def __post_init__(self):
        if not isinstance(self.mesh, (Mesh, AbstractMesh)):
            raise TypeError(f"Devices: mesh is a {type(self.mesh).__name__}; give a jax.sharding.Mesh")
        for name in ("batch_axes", "table_axes"):
            object.__setattr__(self, name, self._axes(name))
        if any(kind == AxisType.Manual for kind in self.mesh.axis_types):
            raise ValueError("Devices: the mesh has Manual axes; give the mesh that the shard_map was called with")
        if self.exchange == "route" and self.table_only_axes:
            raise ValueError(
                f'Devices: exchange="route" needs a batch that is split along every axis of the tables, and along '
                f'{self.table_only_axes} it is not; use exchange="gather", or name those axes in batch_axes too'
            )
        if self.exchange not in ("auto", *EXCHANGES):
            raise ValueError(f'Devices: exchange={self.exchange!r} must be "auto", {", ".join(map(repr, EXCHANGES))}')
        if self.wire_dtype is not None:
            try:
                name = jnp.dtype(self.wire_dtype).name
            except TypeError:
                name = repr(self.wire_dtype)
            if name not in ("bfloat16", "float16"):
                raise ValueError(f"Devices: wire_dtype={name} must be bfloat16 or float16, or None for no rounding")
            object.__setattr__(self, "wire_dtype", name)

    def _axes(self, name: str) -> tuple[str, ...]:
        given = getattr(self, name)
        if given is not None and not isinstance(given, (str, tuple, list)):
            raise TypeError(f"Devices: {name}={given!r} must be the name of an axis of the mesh, or several in a tuple")
        axes = self.mesh.axis_names if given is None else (given,) if isinstance(given, str) else tuple(given)
        unknown = [axis for axis in axes if axis not in self.mesh.axis_names]
        if unknown or len(set(axes)) != len(axes) or not axes:
            raise ValueError(
                f"Devices: {name}={given!r} must name axes of the mesh, each once; it has {self.mesh.axis_names}"
            )
        return axes

    def size(self, axes: Sequence[str]) -> int:
        """Returns how many devices there are along ``axes``."""
        total = 1
        for axis in axes:
            total *= self.mesh.shape[axis]
        return total

    @property
    def batch_shards(self) -> int:
        """Parts that the batch is split into."""
        return self.size(self.batch_axes)

    @property
    def table_shards(self) -> int:
        """Parts that a table is split into."""
        return self.size(self.table_axes)

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """Axes along which both the batch and the tables are split."""
        return tuple(axis for axis in self.batch_axes if axis in self.table_axes)

    @property
    def copies_axes(self) -> tuple[str, ...]:
        """Axes along which the batch is split and the tables are copies of each other."""
        return tuple(axis for axis in self.batch_axes if axis not in self.table_axes)

    @property
    def table_only_axes(self) -> tuple[str, ...]:
        """Axes along which the tables are split and everybody has the same part of the batch."""
        return tuple(axis for axis in self.table_axes if axis not in self.batch_axes)

    @property
    def explicit(self) -> bool:
        """Whether axes of the mesh are Explicit: arrays then have their sharding in their type."""
        return AxisType.Explicit in self.mesh.axis_types

    def inside(self) -> bool:
        """Returns whether the caller is inside of a shard_map or pmap over all axes in use: arrays are shards then."""
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        return {*self.batch_axes, *self.table_axes} <= manual

    def whole(self, array: jax.Array) -> jax.Array:
        """Returns ``array`` whole on every device: what is cut unevenly cannot be split evenly."""
        everywhere = self.sharding(P())
        if self.explicit:
            return jax.sharding.reshard(array, everywhere)
        return jax.lax.with_sharding_constraint(array, everywhere)

    def batch_spec(self) -> P:
        """Returns how arrays that lead with samples, or with shards of the batch, are split."""
        return P(self.batch_axes)

    def sharding(self, spec: P) -> NamedSharding:
        """Returns the sharding of that spec on the mesh."""
        return NamedSharding(self.mesh, spec)


def as_devices(mesh: Any) -> Devices | None:
    """Returns ``mesh``, a Mesh, Devices or None, as Devices; None for one device without a mesh."""
    return mesh if mesh is None or isinstance(mesh, Devices) else Devices(mesh)


def sums_travel(rows: int, samples: int, devices: int) -> bool:
    """Returns whether the gradient of a replicated table is better summed on each device and sent whole.

    That is less than the gradients of all samples where the table has fewer rows than a fraction of them.
    """
    return 2 * rows <= samples * devices


def checked_placements(placement: Any, names: Sequence[str], devices: Devices | None) -> dict[str, str]:
    """Returns the placement of each table: one for all, or a mapping from names, "row" for tables left out.

    Raises:
      ValueError: an unknown placement or table, or a placement without a mesh.
    """
    if devices is None:
        if placement != "row":
            raise ValueError(f"plan: placement={placement!r} needs devices to place tables on; pass mesh=")
        return dict.fromkeys(names, "row")
    given: dict[str, Any] = dict(placement) if isinstance(placement, Mapping) else dict.fromkeys(names, placement)
    for name, value in given.items():
        if name not in names:
            raise ValueError(f'plan: placement names table "{name}", which no feature uses')
        if value not in PLACEMENTS:
            raise ValueError(
                f'plan: placement of table "{name}" is {value!r}; it must be one of {", ".join(PLACEMENTS)}'
            )
    return {name: given.get(name, "row") for name in names}


def chosen_exchange(devices: Devices | None, valencies: Sequence[int | None]) -> str:
    """Returns how the rows of a stack travel; "auto" chooses by bytes.

    With "gather" a device receives a partial sum of each of its samples from every other device; with "route" the rows
    of its distinct ids, at most ``valency`` for a sample.
    """
    if devices is None:
        return "gather"
    if devices.exchange != "auto":
        return devices.exchange
    ids = max((1 if valency is None else valency for valency in valencies), default=1)
    return "gather" if devices.table_shards <= max(ids, 4) or devices.table_only_axes else "route"
