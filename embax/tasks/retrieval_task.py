"""The retrieval task of a run: its catalogue of items, its test by ranking all of them."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import embax
from embax.data.blocks import Rows, joined, padded
from embax.data.files import DataError
from embax.data.split import TEST, TRAIN, VALIDATION
from embax.id_forms import RaggedIds
from embax.tasks.prepare import Prepared
from embax.tasks.ranking import NOTHING, Taken, most_popular, ranked
from embax.tasks.retrieval import SIDES, Loss, RetrievalTask
from embax.tasks.training import State, Trainer

BLOCK = 8192  # vectors that are made at once


def retrieval_task(settings: Any, prepared: Prepared) -> RetrievalTask:
    """Returns the task that ``Settings.of_task`` asks for."""

    def cards(names):
        return tuple((name, prepared.scanned.card(name)) for name in names)

    loss = Loss(settings.loss, settings.score, settings.temperature, settings.margin, settings.negative_weight)
    return RetrievalTask(
        cards(settings.user),
        cards(settings.item),
        loss,
        settings.model == "two-tower",
        settings.embedding_dim,
        settings.hidden,
        settings.optimizer,
        settings.learning_rate,
        settings.l2,
    )


def catalogue(prepared: Prepared, key: str, names: tuple[str, ...]) -> Rows:
    """Returns the columns of every value of a key, in the order of its rows: those of the first row that has it.

    What has no row in training is as row 0: all columns 0, bags empty.
    """
    count = prepared.scanned.card(key)
    if names == (key,):
        return Rows(
            {key: np.arange(count, dtype=np.int32)}, np.zeros((count, 0), np.float32), np.ones(count, np.float32)
        )
    groups, encode = prepared.encode(TRAIN)
    found, seen = [], np.zeros(count, bool)
    for group in groups:
        rows = encode.rows_of(group)
        own, first = np.unique(rows.ids[key], return_index=True)
        new = ~seen[own] & (own > 0)
        seen[own[new]] = True
        found.append(_only(rows.taken(np.sort(first[new])), names))
    whole = joined(found)
    order = np.full(count, -1, np.int64)
    order[whole.ids[key]] = np.arange(len(whole))
    blank = Rows({name: _blank(ids) for name, ids in whole.ids.items()}, whole.numbers[:1] * 0, whole.labels[:1])
    order[order < 0] = len(whole)
    made = joined([whole, blank]).taken(order)
    made.ids[key] = np.arange(count, dtype=np.int32)
    return made


def _only(rows: Rows, names: tuple[str, ...]) -> Rows:
    return rows._replace(ids={name: rows.ids[name] for name in names})


def _blank(ids: Any) -> Any:
    return RaggedIds.from_lengths(ids.values[:0], np.zeros(1, np.int64)) if isinstance(ids, RaggedIds) else ids[:1] * 0


@functools.partial(jax.jit, static_argnums=(0, 1))
def vector_step(trainer: Trainer, side: str, tables: Any, params: Any, ids: Any) -> jax.Array:
    """Returns the vectors of one side of a batch."""
    activations, _ = embax.lookup(trainer.plan, tables, ids)
    return trainer.task.vectors(params, activations[side], side)


def vectors(trainer: Trainer, state: State, side: str, rows: Rows) -> np.ndarray:
    """Returns the vector of each row on a side, float32 ``[rows, embedding_dim]``."""
    found = []
    empty = RaggedIds.from_lengths(np.zeros(0, np.int32), np.zeros(BLOCK, np.int64))
    for first in range(0, len(rows), BLOCK):
        part = rows.part(first, min(first + BLOCK, len(rows)))
        own = padded(part, BLOCK).ids
        ids = {
            other: {name: own[name] if other == side else empty for name, _ in trainer.task.side(other)}
            for other in SIDES
        }
        made = vector_step(trainer, side, state.tables, state.params, embax.preprocess(trainer.plan, ids))
        found.append(np.asarray(made)[: len(part)])
    return np.concatenate(found)


class Ranker:
    """Tests a retrieval model by ranking all items.

    Args:
      prepared: the data.
      user: columns of users, key first.
      item: columns of items.
    """

    def __init__(self, prepared: Prepared, user: tuple[str, ...], item: tuple[str, ...]):
        self.prepared, self.user, self.item = prepared, user, item
        self.catalogue = catalogue(prepared, item[0], item)
        self._users: Rows | None = None
        self._pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def users(self) -> Rows:
        """The columns of every user."""
        if self._users is None:
            self._users = catalogue(self.prepared, self.user[0], self.user)
        return self._users

    def evaluated(self, trainer: Trainer, state: State, part: str) -> dict[str, Any]:
        """Returns Recall@20 and NDCG@20 of a part, beside those of the most popular items.

        Users without a training row are left out; items without one count, and cannot be found.
        """
        known, test = self._asked(part)
        popular = ranked(most_popular(len(self.catalogue) - 1), known, test)
        rank = self.rank(trainer, state)
        found = ranked(rank, known, test)
        return found | {"baseline": "most popular items"} | {f"baseline_{k}": v for k, v in popular.items()}

    def rank(self, trainer: Trainer, state: State, k: int = 20) -> Any:
        """Returns what ranks items for users, as ``ranked`` asks for."""
        users = vectors(trainer, state, "user", self.users)
        items = jnp.asarray(vectors(trainer, state, "item", self.catalogue))

        def rank(own: np.ndarray, known: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            scores = np.array(_scores(jnp.asarray(users[own]), items))
            inside = known[1] < scores.shape[1]
            scores[known[0][inside], known[1][inside]] = -np.inf
            scores[:, 0] = -np.inf
            top = np.argpartition(scores, -k, axis=1)[:, -k:] if k < scores.shape[1] else np.argsort(scores, axis=1)
            order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
            best = np.take_along_axis(top, order, axis=1)
            return np.where(np.isneginf(np.take_along_axis(scores, best, axis=1)), -1, best)[:, :k]

        return rank

    def check(self, part: str) -> None:
        """Raises DataError where a part has nothing to rank for."""
        known, test = self._asked(part)
        if not test.without(known).counts().any():
            raise DataError(NOTHING)

    def _asked(self, part: str) -> tuple[Taken, Taken]:
        """Returns what users are known to have, and what is to be found."""
        number = {"validation": VALIDATION, "test": TEST}[part]
        seen = [TRAIN] + [VALIDATION] * (number == TEST and self.prepared.rows("validation") > 0)
        return self._taken(seen), self._taken([number])

    def _taken(self, parts: Iterable[int]) -> Taken:
        """Returns who took what. An item without a row gets a number past all rows, each time another one."""
        pairs = [self._read(part) for part in parts]
        users, items = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        items = np.where(items > 0, items, len(self.catalogue) + np.arange(len(items)))
        kept = users > 0
        return Taken.of(users[kept], items[kept], len(self.users))

    def _read(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        if part not in self._pairs:
            groups, encode = self.prepared.encode(part)
            keys = (self.user[0], self.item[0])
            found = [[rows.ids[key] for key in keys] for rows in map(encode.rows_of, groups)]
            users, items = (np.concatenate([pair[i] for pair in found]) for i in (0, 1))
            self._pairs[part] = users, items
        return self._pairs[part]


@jax.jit
def _scores(users: jax.Array, items: jax.Array) -> jax.Array:
    return users @ items.T
