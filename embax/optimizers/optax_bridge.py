"""Any optax transformation that treats rows one by one, as a table optimizer.

optax states hold arrays shaped like the parameters, which become slot variables, and scalars, which for
row-local transformations count steps. A scalar is therefore not stored: it is ``initial + step``, which is
what dense optax would hold after as many updates. Whether a transformation is row-local is not written on
it, so construction probes it: two rows stepped together must move as they do apart.
"""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax.optimizers.base import Optimizer, Slot, step_or_zero


class OptaxHyperparameters(NamedTuple):
    """The step, from which the transformation's own counters are set."""

    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Optax(Optimizer):
    """Runs an ``optax.GradientTransformation`` on the touched rows.

    Args:
      learning_rate: left alone, or the transformation itself as the only argument.
      transformation: row-local, with its learning rate inside: ``optax.adam(1e-3)``, ``optax.rmsprop(1e-2)``.

    Raises:
      ValueError: the transformation mixes rows (global-norm clipping, LAMB), keeps a state that is neither
        table-shaped nor a count of steps, or a rate or decoupled decay is set outside of it.

    >>> import optax
    >>> len(Optax(optax.adam(1e-3)).slots())
    2
    """

    learning_rate: object = 1.0
    transformation: Any = None

    def __post_init__(self):
        if self.transformation is None and hasattr(self.learning_rate, "update"):
            # Optax(optax.adam(0.1)) is what one writes.
            object.__setattr__(self, "transformation", self.learning_rate)
            object.__setattr__(self, "learning_rate", 1.0)
        super().__post_init__()
        if not (hasattr(self.transformation, "init") and hasattr(self.transformation, "update")):
            raise ValueError(
                f"Optax: transformation={self.transformation!r} has no init and update; pass an optax transformation"
            )
        self._require("learning_rate", self.learning_rate == 1.0, "belongs into the transformation")
        self._require(
            "decoupled_weight_decay",
            not self.decoupled_weight_decay,
            "belongs there too (optax.add_decayed_weights)",
        )
        with jax.ensure_compile_time_eval():
            _check_state(self.transformation)
            _check_row_local(self.transformation)

    def slots(self) -> tuple[Slot, ...]:
        return _slots(self.transformation)

    def hyperparameters(self, step) -> OptaxHyperparameters:
        return OptaxHyperparameters(step_or_zero(step))

    def update_rows(self, rows, gradients, slots, hyper):
        state = self._state(rows, slots, hyper.step)
        changes, state = _update(self.transformation, gradients, state, rows)
        new_slots = [leaf for leaf in jax.tree.leaves(state) if _is_slot(leaf, rows)]
        return rows + changes, tuple(new_slots)

    def _state(self, rows, slots, step):
        """Returns the optax state: slots in their places, counters set to the step."""
        remaining = list(slots)

        def fill(leaf):
            if _is_slot(leaf, rows):
                return remaining.pop(0)
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                return leaf + step.astype(leaf.dtype)
            return leaf

        return jax.tree.map(fill, _init(self.transformation, rows))


@functools.lru_cache(maxsize=256)
def _slots(transformation) -> tuple[Slot, ...]:
    with jax.ensure_compile_time_eval():
        state = _init(transformation, jnp.zeros((2, 3), jnp.float32))
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.shape(leaf) == (2, 3)]
    return tuple(Slot(float(leaf[0, 0]), dtype=str(leaf.dtype)) for leaf in leaves)


def _init(transformation, rows):
    with _optax_promotion():
        return transformation.init(rows)


def _update(transformation, gradients, state, rows):
    with _optax_promotion():
        return transformation.update(gradients, state, rows)


@contextlib.contextmanager
def _optax_promotion():
    # optax mixes dtypes and ranks; whoever forbids that for their own code means their own code.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _is_slot(leaf, rows) -> bool:
    return jnp.ndim(leaf) == 2 and leaf.shape == rows.shape


# Long enough to see a counter that starts again, and a clip that only large gradients meet.
PROBE_STEPS = 9


def _probe(transformation, rows):
    """Returns the rows and the state after a few steps with fixed gradients of 1e-3 to 1e5, others for each row."""
    first = rows
    state = _init(transformation, rows)
    for step in range(PROBE_STEPS):
        gradients = jnp.sin(first * (7.0 + step)) * 10.0 ** (step - 3)
        changes, state = _update(transformation, gradients, state, rows)
        rows = rows + changes
    return rows, state


def _check_state(transformation) -> None:
    rows = jnp.array([[0.5, -1.0, 2.0], [3.0, 0.25, -4.0]], jnp.float32)
    before = _init(transformation, rows)
    after = _probe(transformation, rows)[1]
    uneven = _init(transformation, rows * 3.0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        name = jax.tree_util.keystr(path)
        final = dict(jax.tree_util.tree_leaves_with_path(after))[path]
        other = dict(jax.tree_util.tree_leaves_with_path(uneven))[path]
        if jnp.shape(leaf) == rows.shape:
            if np.ptp(leaf) != 0 or not np.array_equal(leaf, other):
                raise ValueError(f"Optax: state {name} does not start from one number; such slots are not supported")
        elif jnp.shape(leaf) != ():
            raise ValueError(
                f"Optax: state {name} has shape {jnp.shape(leaf)} for a table of {rows.shape}; only states shaped like "
                "the table, or counts of steps, can be kept per row"
            )
        elif not (leaf == final or (jnp.issubdtype(leaf.dtype, jnp.integer) and final == leaf + PROBE_STEPS)):
            raise ValueError(
                f"Optax: state {name} goes from {leaf} to {final} in {PROBE_STEPS} steps; a scalar state must stay or "
                "count the steps, for it is computed from the step and not stored"
            )


def _check_row_local(transformation) -> None:
    rows = jnp.array([[0.5, -1.0, 2.0], [30.0, 2.5, -40.0]], jnp.float32)
    together = _probe(transformation, rows)[0]
    apart = jnp.concatenate([_probe(transformation, rows[i : i + 1])[0] for i in range(2)])
    if not np.allclose(together, apart, rtol=1e-5, atol=1e-6, equal_nan=True):
        raise ValueError(
            "Optax: the transformation steps two rows together otherwise than apart (global-norm clipping, LAMB and "
            "the like mix rows); use row_clip_norm=, or clip the row gradients before the update"
        )
