"""The backends: who does the row work, and why that one.

A backend is a module with the names of ``Backend``. The registry is explicit and ordered: the first one that is
available is used. ``EMBAX_BACKEND`` forces one for every plan that does not name its own.
"""

import importlib
import os
from typing import Any, NamedTuple, Protocol

import jax

from embax.id_batch import StackIds
from embax.optimizers.base import Optimizer
from embax.planning import StackPlan
from embax.row_gradients import RowGradients
from embax.table_state import TableState

# In order of preference; each is for one platform, but reference, which is always available and comes last.
REGISTRY = {"cpu": "embax.kernels.cpu", "cuda": "embax.kernels.cuda", "reference": "embax.kernels.reference"}


class Backend(Protocol):
    """What a backend offers: see ``embax.kernels.reference``, which defines the meaning of each."""

    NAME: str

    def unavailable(self) -> str | None:
        """Returns why this backend cannot run here, or None if it can."""
        ...

    def reason(self) -> str:
        """Returns what this backend runs on, where it is available."""
        ...

    def gather_pool(self, stack: StackPlan, table: jax.Array, ids: StackIds) -> tuple[jax.Array, ...]:
        """Returns the activations of each feature of a stack."""
        ...

    def take(self, table: jax.Array, rows: jax.Array) -> jax.Array:
        """Returns rows one by one."""
        ...

    def distinct_rows(self, ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """Returns the distinct rows among ids, and each id's place among them."""
        ...

    def row_products(self, stack: StackPlan, table: jax.Array, ids: StackIds, gradients: jax.Array) -> jax.Array:
        """Returns the derivatives of the gains."""
        ...

    def update(
        self,
        stack: StackPlan,
        state: TableState,
        ids: StackIds,
        token: jax.Array,
        gradients: tuple,
        hyper: Any,
    ) -> TableState:
        """Returns the state after one step on the rows that ``ids`` touch."""
        ...

    def apply(self, optimizer: Optimizer, state: TableState, gradient: RowGradients, hyper: Any) -> TableState:
        """Returns the state after one step on the rows of ``gradient``."""
        ...

    def row_gradients(self, stack: StackPlan, ids: StackIds, token: jax.Array, gradients: tuple) -> RowGradients:
        """Returns the gradient of a stack's table."""
        ...

    def sum_rows(
        self, rows: jax.Array, values: jax.Array, samples: Any, gains: Any, vocabulary_size: int
    ) -> RowGradients:
        """Returns the row gradients of occurrences."""
        ...


class Choice(NamedTuple):
    """A backend's name and the reason for it."""

    name: str
    reason: str


def choose(name: str | None = None) -> Choice:
    """Returns the backend to use, and why.

    Args:
      name: a plan's own wish, which goes before EMBAX_BACKEND; None for the best one available.

    Raises:
      ValueError: the wanted backend does not exist or cannot run here.
    """
    wanted, wish = (name, "named in the plan") if name else (os.environ.get("EMBAX_BACKEND"), "forced by EMBAX_BACKEND")
    if wanted:
        if wanted not in REGISTRY:
            raise ValueError(f"backend {wanted!r} ({wish}) does not exist; there are {', '.join(REGISTRY)}")
        why_not = get(wanted).unavailable()
        if why_not:
            raise ValueError(f"backend {wanted!r} ({wish}) cannot run here: {why_not}; leave it out, or use reference")
        return Choice(wanted, wish)
    reasons = []
    for candidate in REGISTRY:
        why_not = get(candidate).unavailable()
        if why_not is None:
            return Choice(candidate, "; ".join(reasons) or "the fastest for this platform")
        reasons.append(f"not {candidate}: {why_not}")
    raise AssertionError("the reference backend is always available")


def chosen() -> str:
    """Returns which backend is used and why, as a line to read."""
    return "backend: {} ({})".format(*choose())


def described() -> list[str]:
    """Returns a line for each backend: what it runs on here, or why it cannot.

    >>> described()[-1]
    'reference: plain XLA, on every platform'
    """
    lines = []
    for name in REGISTRY:
        backend = get(name)
        why_not = backend.unavailable()
        lines.append(f"{name}: off: {why_not}" if why_not else f"{name}: {backend.reason()}")
    return lines


def get(name: str) -> Backend:
    """Returns the backend module of that name."""
    return importlib.import_module(REGISTRY[name])  # type: ignore[return-value]
