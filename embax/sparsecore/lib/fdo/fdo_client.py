"""What keeps the statistics of batches, so that limits can be set from what was seen."""

import abc
from typing import Any


class FDOClient(abc.ABC):
    """Collects the statistics of a process's batches, and gives those of all processes."""

    @abc.abstractmethod
    def record(self, data: Any) -> None:
        """Adds the statistics of a batch, as preprocessing returns them."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Writes what this process has collected."""

    @abc.abstractmethod
    def load(self) -> Any:
        """Returns what all processes have published, and goes on from it."""
