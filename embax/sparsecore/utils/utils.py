"""SparseCores of a device, as many as one says, for here they are a way to lay rows out; a single table laid out so."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax.sparsecore.layout import Member, StackLayout

NUM_SC_PER_DEVICE_MAP = {
    "TPU v5": 4,
    "TPU v5p": 4,
    "TPU v5 lite": 4,
    "TPU v6 lite": 2,
    "TPU v6e": 2,
    "TPU7x": 2,
}


def num_sparsecores_per_device(device: Any = None) -> int:
    """Returns the SparseCores of a device: those of the chip on a TPU, else 1.

    >>> num_sparsecores_per_device() >= 1
    True
    """
    device = jax.devices()[0] if device is None else device
    return NUM_SC_PER_DEVICE_MAP.get(device.device_kind, 1)


def checked(num_sc_per_device: Any) -> int:
    """Returns a given number of SparseCores of a device, or that of this machine for None.

    Raises:
      ValueError: not an integer of at least 1.
    """
    if num_sc_per_device is None:
        return num_sparsecores_per_device()
    return counted("num_sc_per_device", num_sc_per_device)


def counted(name: str, value: Any) -> int:
    """Returns a number of devices or SparseCores; ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


def all_cores(global_device_count: Any, num_sc_per_device: Any) -> int:
    """Returns the SparseCores of all devices; ValueError unless both are integers of at least 1."""
    return counted("global_device_count", global_device_count) * checked(num_sc_per_device)


def check_strategy(strategy: Any) -> None:
    """Raises ValueError for another way to share rows than "MOD"."""
    if str(strategy).upper() != "MOD":
        raise ValueError(f"sharding_strategy={strategy!r} is not supported; it must be MOD")


def shard_emb_table(table: Any, *, num_devices: int, num_sc_per_device: int, sharding_strategy: str = "MOD") -> Any:
    """Returns a table's rows as SparseCores hold them, ``[devices, rows of a device, embedding_dim]``.

    Args:
      table: ``[rows, embedding_dim]``, rows a multiple of all SparseCores.
      num_devices: devices.
      num_sc_per_device: SparseCores of each.
      sharding_strategy: "MOD".

    Raises:
      ValueError: rows that the SparseCores do not divide, another strategy.

    >>> import numpy as np
    >>> shard_emb_table(np.arange(6)[:, None], num_devices=2, num_sc_per_device=1)[..., 0].tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    check_strategy(sharding_strategy)
    table = _array(table)
    layout = _alone(table.shape, 2, counted("num_devices", num_devices) * checked(num_sc_per_device))
    return layout.lay([table]).reshape(num_devices, -1, table.shape[-1])


def unshard_emb_table(sharded_table: Any, num_sc_per_device: int, sharding_strategy: str = "MOD") -> Any:
    """Returns a table of which ``shard_emb_table`` made the argument.

    Args:
      sharded_table: ``[devices, rows of a device, embedding_dim]``.
      num_sc_per_device: SparseCores of each.
      sharding_strategy: "MOD".

    Raises:
      ValueError: rows that the SparseCores do not divide, another strategy.
    """
    check_strategy(sharding_strategy)
    table = _array(sharded_table)
    layout = _alone(table.shape, 3, (table.shape or (1,))[0] * checked(num_sc_per_device))
    return layout.take(layout.members[0], table)


def embedding_table_format(mesh: Any, partition_spec: Any) -> jax.sharding.Sharding:
    """Returns where a table lies, for ``jax.jit`` or ``jax.device_put``: a NamedSharding, rows as they lie by default.

    Args:
      mesh: of the table.
      partition_spec: of its rows and columns.
    """
    return embedding_table_format_with_sharding(jax.sharding.NamedSharding(mesh, partition_spec))


def embedding_table_format_with_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns where a table of a sharding lies: there; no layout of a TPU's SparseCores is asked for."""
    return sharding


def _array(table: Any) -> Any:
    return table if isinstance(table, (np.ndarray, jax.Array)) else jnp.asarray(table)


def _alone(shape: tuple[int, ...], rank: int, num_sc: int) -> StackLayout:
    """Returns the layout of a table that has an array to itself, without padding."""
    wanted = "[rows, embedding_dim]" if rank == 2 else "[devices, rows of a device, embedding_dim]"
    if len(shape) != rank:
        raise ValueError(f"the table has shape {list(shape)}; it must be {wanted}")
    rows, dim = int(np.prod(shape[:-1])), shape[-1]
    if num_sc < 1 or rows % num_sc:
        raise ValueError(
            f"the table has {rows} rows, and {num_sc} SparseCores cannot share them evenly; pad it to a multiple of "
            "them"
        )
    return StackLayout("table", rows, dim, num_sc, (Member("table", rows, dim, 0, 0),))
