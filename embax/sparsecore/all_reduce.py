"""What processes agree by about minibatches, on a TPU. Here a batch is never cut; nothing is sent, no port opened."""

import dataclasses
import numbers
from collections.abc import Sequence

import jax


@dataclasses.dataclass(frozen=True)
class AllReduceInterface:
    """Who would have to agree. ``preprocess_sparse_dense_matmul_input`` takes it, and its numbers do not change.

    Attributes:
      peer_addresses: "host:port" of the other processes.
      minibatching_port: of this one.
      host_id: this process.
      host_count: of all.
    """

    peer_addresses: tuple[str, ...]
    minibatching_port: int
    host_id: int
    host_count: int


def get_all_reduce_interface(
    peer_addresses: Sequence[str], minibatching_port: int, host_id: int | None = None, host_count: int | None = None
) -> AllReduceInterface:
    """Returns what ``all_reduce_interface=`` takes; opens nothing.

    Args:
      peer_addresses: "host:port" of the other processes.
      minibatching_port: of this one.
      host_id: None for ``jax.process_index()``.
      host_count: None for ``jax.process_count()``.

    Raises:
      ValueError: an address that is no text, a port or a process that cannot be.

    >>> get_all_reduce_interface(["10.0.0.2:8476"], 8476, host_id=0, host_count=2).host_count
    2
    """
    count = jax.process_count() if host_count is None else host_count
    number = jax.process_index() if host_id is None else host_id
    if isinstance(peer_addresses, str) or not all(isinstance(address, str) for address in peer_addresses):
        raise ValueError(
            f"get_all_reduce_interface: peer_addresses={peer_addresses!r} must be a sequence of texts host:port"
        )
    if not _is_whole(minibatching_port) or not 0 <= minibatching_port < 2**16:
        raise ValueError(
            f"get_all_reduce_interface: minibatching_port={minibatching_port!r} must be an integer from 0 to 65535"
        )
    if not _is_whole(count) or not _is_whole(number) or not 0 <= number < count:
        raise ValueError(
            f"get_all_reduce_interface: host_id={number!r} of host_count={count!r}: processes are numbered from 0 to "
            "host_count - 1"
        )
    return AllReduceInterface(tuple(peer_addresses), int(minibatching_port), int(number), int(count))


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
