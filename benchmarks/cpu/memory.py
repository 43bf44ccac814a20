"""One memory for all contenders: embax's own arrays, seen by torch, FBGEMM and the limits through their addresses.

So tables and slots exist once, however large, and no contender has better pages than another. The addresses stay the
same as long as donated steps work in place; where they do not, the others are bound to the new ones between turns.
"""

import ctypes

import jax
import numpy as np

import embax
from benchmarks.cpu.workloads import Workload


def make_features(workload: Workload, optimizer: embax.Optimizer, dtype: str = "float32") -> list[embax.FeatureSpec]:
    """Returns the feature specs of a workload."""
    tables = [
        embax.TableSpec(
            name=f"t{index:02d}",
            vocabulary_size=rows,
            embedding_dim=workload.dim,
            initializer=jax.nn.initializers.zeros,
            optimizer=optimizer,
            combiner="sum",
            dtype=dtype,
        )
        for index, rows in enumerate(workload.tables)
    ]
    input_shape = (workload.batch, workload.valency)
    output_shape = (workload.batch, workload.dim) if workload.pooled else (*input_shape, workload.dim)
    return [
        embax.FeatureSpec(
            name=f"f{index:02d}", table_spec=tables[table], input_shape=input_shape, output_shape=output_shape
        )
        for index, table in enumerate(workload.features)
    ]


class Memory:
    """The state that every contender trains: ``state`` for those in JAX, ``views()`` for the others."""

    def __init__(self, workload: Workload, optimizer: embax.Optimizer):
        self.workload = workload
        plan = embax.plan(make_features(workload, optimizer))
        self.state = jax.block_until_ready(embax.init(plan, jax.random.key(0)))
        self.name = plan.stacks[0].name
        offsets = [table.row_offset for table in plan.stacks[0].tables]
        arrays = jax.tree.leaves(self.state)
        wide, thin = (workload.rows, workload.dim), (workload.rows, 1)
        fits = all(array.shape in (wide, thin) and array.dtype == np.float32 for array in arrays)
        self.shared = len(plan.stacks) == 1 and offsets == workload.offsets and arrays[0].shape == wide and fits
        if not self.shared:  # embax keeps rows in a form that the others cannot read: they share a memory of their own
            slots = [slot for slot in jax.tree.leaves(optimizer.slots())]
            self._own = [np.full(wide, 0.0, np.float32)]
            self._own += [np.full(slot.shape(wide), slot.initial_value, np.float32) for slot in slots]
        self.moves = -1  # how often the arrays have been found elsewhere
        self._seen: tuple[int, ...] = ()
        self._views: list[np.ndarray] = []

    def pointers(self) -> tuple[int, ...]:
        """Returns the addresses of the table and its slots."""
        return tuple(array.unsafe_buffer_pointer() for array in jax.tree.leaves(self.state))

    def moved(self) -> bool:
        """Says whether the arrays have moved since the last call; waits for them."""
        jax.block_until_ready(self.state)
        if not self.shared:
            changed, self._views = not self._views, self._own
            return changed
        pointers = self.pointers()
        if pointers == self._seen:
            return False
        shapes = [array.shape for array in jax.tree.leaves(self.state)]
        self._views = [_view(pointer, shape) for pointer, shape in zip(pointers, shapes, strict=True)]
        self._seen = pointers
        self.moves += 1
        return True

    def views(self) -> list[np.ndarray]:
        """Returns the table and its slots as arrays that write into them, as ``moved`` last found them."""
        if not self._views:
            self.moved()
        return self._views


def _view(pointer: int, shape: tuple[int, ...]) -> np.ndarray:
    floats = ctypes.c_float * int(np.prod(shape))
    return np.ctypeslib.as_array(floats.from_address(pointer)).reshape(shape)
