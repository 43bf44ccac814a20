"""Predictions of a trained run for the rows of a file: probabilities of a label, scores of pairs, items for users."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embax.data.blocks import Rows, codes_of, encoded
from embax.data.columns import Columns
from embax.data.files import DataError, Files
from embax.tasks.click_task import EVALUATION_BATCH, predicted
from embax.tasks.retrieval_task import vectors
from embax.tasks.training import State
from embax.tasks.work import Work

SCORE = "score"
TOP = ("items", "scores")
BLOCK = 8192  # rows that are looked at at once


def predict(work: Work, state: State, files: Files, path: Path, progress: Any = None) -> int:
    """Writes the rows of files with their scores as Parquet, row group by row group; returns how many rows.

    A click model's score is the probability of label 1; a retrieval model's is that of the pair, the product by
    which training ranked (see ``retrieval.Loss``). Values that training did not know count as the unseen.

    Args:
      work: of the run.
      state: trained.
      files: with the columns that training had; a label is not needed.
      path: of the file to write; one that is there is replaced when the new one is whole.
      progress: called with the rows that are done, or None.

    Raises:
      DataError: a column that is missing or of another type, a column ``score`` that is there already.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = work.prepared.columns
    _check(work, files)
    schema = files.schema.append(pa.field(SCORE, pa.float32()))
    unfinished, done = path.with_name(path.name + ".unfinished"), 0
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for group in files.groups:
                table = files.read(group)
                rows = encoded(table.select(columns.inputs), columns, work.prepared.scanned, group)
                scores = np.concatenate([scored(work, state, part) for part in _parts(rows)])
                writer.write_table(table.append_column(SCORE, pa.array(scores, pa.float32())).cast(schema))
                done += len(rows)
                if progress is not None:
                    progress(len(rows))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return done


def types_of(work: Work) -> dict[str, Any]:
    """Returns the types that training had, by column: a CSV is read so, whatever its first rows look like."""
    columns, known = work.prepared.columns, work.prepared.scanned.vocabularies
    return {name: known[name].values.type for name in columns.categorical}


def scored(work: Work, state: State, rows: Rows) -> np.ndarray:
    """Returns the score of each row, float32."""
    if work.settings.task == "click":
        return predicted(work.trainer, state, rows)["model"].astype(np.float32)
    users, items = (vectors(work.trainer, state, side, rows) for side in ("user", "item"))
    return (users * items).sum(axis=1)


def recommend(work: Work, state: State, files: Files, path: Path, count: int) -> int:
    """Writes the best items for the user of each row, as columns ``items`` and ``scores``; returns how many rows.

    All items that training knows are ranked, those that the user has too. For a user that training did not know the
    lists are empty. Only for models of keys alone (--model mf).

    Raises:
      DataError: no retrieval model, or one whose items have more columns than a key.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if work.settings.task != "retrieval" or work.trainer.task.towers:
        raise DataError("--top is for --task retrieval --model mf: other models have no vector for an item's key alone")
    user, item = work.settings.user[0], work.settings.item[0]
    _check_columns(work.prepared.columns, files, [user])
    _check_new(files, TOP)
    known = work.prepared.scanned.vocabularies
    every = Rows({item: np.arange(1, known[item].rows, dtype=np.int32)}, *_nothing(known[item].rows - 1))
    items = vectors(work.trainer, state, "item", every)
    count = min(count, len(items))
    unfinished, done = path.with_name(path.name + ".unfinished"), 0
    values = known[item].values
    fields = [pa.field(name, pa.list_(kind)) for name, kind in zip(TOP, (values.type, pa.float32()), strict=True)]
    try:
        with pq.ParquetWriter(unfinished, pa.schema([*files.schema, *fields])) as writer:
            for group in files.groups:
                table = files.read(group)
                ids = codes_of(known[user], table[user], user, group)
                for first in range(0, len(ids), BLOCK):
                    own = ids[first : first + BLOCK]
                    best, scores = best_of(work, state, own, items, count)
                    best, scores = best[own > 0], scores[own > 0]
                    starts = pa.array(np.concatenate([[0], np.cumsum((own > 0) * count)]).astype(np.int32))
                    part = table.slice(first, len(own))
                    for field, one in zip(fields, (values.take(pa.array(best.ravel())), scores.ravel()), strict=True):
                        part = part.append_column(field, pa.ListArray.from_arrays(starts, pa.array(one)))
                    writer.write_table(part)
                done += len(ids)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return done


def best_of(
    work: Work, state: State, users: np.ndarray, items: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the best items for users, the best first, and their scores, ``[users, count]`` each."""
    distinct, where = np.unique(users, return_inverse=True)
    scores = (
        vectors(work.trainer, state, "user", Rows({work.settings.user[0]: distinct}, *_nothing(len(distinct))))
        @ items.T
    )
    best = np.argpartition(scores, -count, axis=1)[:, -count:] if count < len(items) else np.argsort(scores, axis=1)
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    best = np.take_along_axis(best, order, axis=1)
    return best[where], np.take_along_axis(scores, best, axis=1)[where].astype(np.float32)


def _nothing(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((count, 0), np.float32), np.ones(count, np.float32)


def _parts(rows: Rows) -> Iterator[Rows]:
    for first in range(0, len(rows), EVALUATION_BATCH):
        yield rows.part(first, min(first + EVALUATION_BATCH, len(rows)))


def _check(work: Work, files: Files) -> None:
    _check_new(files, [SCORE])
    _check_columns(work.prepared.columns, files, work.prepared.columns.inputs)


def _check_new(files: Files, names: Iterable[str]) -> None:
    for name in names:
        if name in files.schema.names:
            raise DataError(f'{files.paths[0]}: there is a column "{name}" already; rename or drop it')


def _check_columns(columns: Columns, files: Files, needed: Any) -> None:
    import pyarrow.types as types

    for name in needed:
        if name not in files.schema.names:
            raise DataError(f'{files.paths[0]}: column "{name}" is missing, which the model was trained with')
        kind = files.schema.field(name).type
        listed = types.is_list(kind) or types.is_large_list(kind)
        if listed != (name in columns.bags):
            was = "lists" if name in columns.bags else "single values"
            raise DataError(f'{files.paths[0]}: column "{name}" is {kind}, and training had {was}')
