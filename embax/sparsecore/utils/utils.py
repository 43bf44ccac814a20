"""SparseCores of a device: as many as one says, for here they are a way to lay rows out."""

from typing import Any

import jax

NUM_SC_PER_DEVICE_MAP = {"TPU v5": 4, "TPU v5p": 4, "TPU v6 lite": 2, "TPU v6e": 2, "TPU7x": 4}


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
    if isinstance(num_sc_per_device, bool) or not isinstance(num_sc_per_device, int) or num_sc_per_device < 1:
        raise ValueError(f"num_sc_per_device={num_sc_per_device!r} must be an integer of at least 1")
    return num_sc_per_device
