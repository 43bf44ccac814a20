"""What became of the tables of a run: rows met, norms, the hottest values."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

import embax
from embax.data.vocabulary import Vocabulary
from embax.id_forms import RaggedIds

BLOCK = 16_384  # rows of every table that are looked at at once
BINS = 20
HOTTEST = 10


class Touched:
    """Which rows of each column's table training has met."""

    def __init__(self, cards: dict[str, int]):
        self.rows = {name: np.zeros(count, bool) for name, count in cards.items()}

    def taken(self) -> list[np.ndarray]:
        """Returns a byte for each row, by column, as checkpoints have it."""
        return [own.astype(np.uint8) for own in self.rows.values()]

    def put(self, rows: list[Any]) -> None:
        """Takes what ``taken`` returned."""
        self.rows = {name: np.array(own, bool) for name, own in zip(self.rows, rows, strict=True)}

    def see(self, ids: dict[str, Any]) -> None:
        """Notes the ids of a batch, by column."""
        for name, own in ids.items():
            self.rows[name][own.values if isinstance(own, RaggedIds) else own] = True


@functools.partial(jax.jit, static_argnums=0)
def _looked_up(plan: embax.Plan, tables: Any, batch: Any) -> list[jax.Array]:
    activations, _ = embax.lookup(plan, tables, batch)
    return jax.tree.leaves(jax.tree.map(lambda rows: jax.numpy.linalg.norm(rows, axis=-1), activations))


def norms(plan: embax.Plan, tables: Any) -> dict[str, np.ndarray]:
    """Returns the L2 norm of every row of every table, float32, by the table's name.

    Rows are looked up as a batch is, so it works wherever tables lie, in the memory of a few batches.
    """
    own: dict[str, int] = {}  # the feature that asks for a table's rows; others of it ask for nothing
    for number, feature in enumerate(plan.features):
        own.setdefault(feature.table.name, number)
    sizes = {feature.table.name: feature.table.vocabulary_size for feature in plan.features}
    found: dict[str, list[np.ndarray]] = {name: [] for name in own}
    for first in range(0, max(sizes.values()), BLOCK):
        counts = {name: min(max(size - first, 0), BLOCK) for name, size in sizes.items()}
        leaves = []
        for number, feature in enumerate(plan.features):
            count = counts[feature.table.name] if own[feature.table.name] == number else 0
            lengths = (np.arange(BLOCK) < count).astype(np.int64)
            leaves.append(RaggedIds.from_lengths(np.arange(first, first + count, dtype=np.int32), lengths))
        batch = embax.preprocess(plan, jax.tree.unflatten(plan.structure, leaves))
        made = _looked_up(plan, tables, batch)
        for name, number in own.items():
            found[name].append(np.asarray(made[number])[: counts[name]])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def facts(plan: embax.Plan, columns: dict[str, str]) -> list[dict[str, Any]]:
    """Returns what is known of tables beforehand.

    Args:
      plan: of the tables.
      columns: the column of each table by its name.
    """
    return [
        {
            "name": table.name,
            "column": columns[table.name],
            "rows": table.vocabulary_size,
            "dim": stack.embedding_dim,
            "dtype": stack.dtype,
            "optimizer": type(stack.optimizer).__name__,
            "bytes": _bytes(stack, (table.vocabulary_size, stack.embedding_dim)),
        }
        for stack in plan.stacks
        for table in stack.tables
    ]


def _bytes(stack: Any, shape: tuple[int, int]) -> int:
    """Bytes of the rows and slots of a table."""
    slots = [math.prod(slot.shape(shape)) * np.dtype(slot.dtype).itemsize for slot in stack.optimizer.slots()]
    return math.prod(shape) * np.dtype(stack.dtype).itemsize + sum(slots)


def statistics(
    plan: embax.Plan, tables: Any, columns: dict[str, str], vocabularies: Mapping[str, Vocabulary], touched: Touched
) -> Iterator[dict[str, Any]]:
    """Yields what became of each table.

    Args:
      plan: of the tables.
      tables: trained.
      columns: the column of each table by its name.
      vocabularies: by column.
      touched: by column.
    """
    for name, own in norms(plan, tables).items():
        column = columns[name]
        met = touched.rows[column]
        shown = own[met] if met.any() else own
        counts, edges = np.histogram(shown[np.isfinite(shown)], bins=BINS)
        vocabulary = vocabularies[column]
        hottest = [
            [str(vocabulary.value(row)), vocabulary.counts[row - 1].as_py(), round(float(own[row]), 6)]
            for row in range(1, min(HOTTEST, vocabulary.rows - 1) + 1)
        ]
        yield {
            "name": name,
            "column": column,
            "rows": len(own),
            "touched": int(met.sum()),
            "norms": {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()},
            "hottest": hottest,
        }
