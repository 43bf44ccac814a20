"""A run from beginning to end: data, training, test, report; begun anew or gone on with."""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
from tqdm import tqdm

import embax
from embax import kernels
from embax.checkpoint import CheckpointError, Checkpoints
from embax.checkpoint.tables import folder_of
from embax.data.blocks import Rows
from embax.data.files import DataError
from embax.data.loader import batches
from embax.data.split import PARTS
from embax.tasks.click import Fields
from embax.tasks.click_task import EVALUATION_BATCH, click_task, evaluated
from embax.tasks.journal import Journal
from embax.tasks.loop import Loop, Progress, dense_of, shown, steps_of
from embax.tasks.prepare import Prepared, again, known, prepare
from embax.tasks.retrieval import Draw
from embax.tasks.retrieval_task import Ranker, retrieval_task
from embax.tasks.run_folder import RunFolder
from embax.tasks.settings import Settings
from embax.tasks.table_facts import Touched, facts, statistics
from embax.tasks.training import State, Trainer

FEW_STEPS = 100
FREE = ("epochs", "save_every", "workers", "ahead", "devices", "data", "test")  # what may change when a run goes on


class Work:
    """A task with its data, its trainer and its test.

    Args:
      settings: with the task's defaults.
      prepared: the data.
    """

    def __init__(self, settings: Settings, prepared: Prepared):
        self.settings, self.prepared = settings, prepared
        if settings.task == "click":
            columns, scanned = prepared.columns, prepared.scanned

            def cards(names):
                return tuple((name, scanned.card(name)) for name in names)

            fields = Fields(cards(columns.categorical), cards(columns.bags), settings.wide, len(columns.numeric))
            task: Any = click_task(settings, fields)
        else:
            task = retrieval_task(settings, prepared)
        steps = steps_of(settings, prepared.rows("train"))
        self.trainer = Trainer.create(task, steps, settings.dense_rate, not settings.constant_rate, settings.devices)

    @functools.cached_property
    def ranker(self) -> Ranker:
        """What ranks items for users (retrieval)."""
        user, item = (tuple(name for name, _ in self.trainer.task.side(side)) for side in ("user", "item"))
        return Ranker(self.prepared, user, item)

    @functools.cached_property
    def draw(self) -> Any:
        """What draws the negatives of each batch (retrieval); None for a click model."""
        return Draw(self.ranker.catalogue, self.settings.negatives) if self.settings.task == "retrieval" else None

    def check(self) -> None:
        """Raises DataError for a test that nobody can pass, before anything is trained."""
        for part in ("validation", "test"):
            if self.settings.task == "retrieval" and self.prepared.rows(part):
                self.ranker.check(part)

    @functools.cached_property
    def columns(self) -> dict[str, str]:
        """The column of each table, by the table's name."""
        names = [table.name for stack in self.trainer.plan.stacks for table in stack.tables]
        return {name: name if self.settings.task == "retrieval" else name.split("/", 1)[1] for name in names}

    def evaluated(self, state: State, part: str) -> dict[str, Any]:
        """Returns the measures of a part of the data."""
        if self.settings.task == "retrieval":
            return self.ranker.evaluated(self.trainer, state, part)
        rate = self.prepared.scanned.positive / self.prepared.scanned.rows["train"]
        return evaluated(self.trainer, state, self.batches_of(part), rate)

    def batches_of(self, part: str) -> Iterable[Rows]:
        """Returns the rows of a part in their order."""
        groups, encode = self.prepared.encode(PARTS[part])
        return batches(groups, encode, EVALUATION_BATCH, mixed_rows=1)

    def statistics(self, progress: Progress) -> Iterable[dict[str, Any]]:
        """Yields what became of each table."""
        known = self.prepared.scanned.vocabularies
        return statistics(self.trainer.plan, progress.state.tables, self.columns, known, progress.touched)

    def document(self, command: str) -> dict[str, Any]:
        """Returns the record of the run as it begins."""
        prepared, backend = self.prepared, kernels.choose(self.trainer.plan.backend)
        columns, scanned = prepared.columns, prepared.scanned
        return {
            **{"embax": embax.__version__, "jax": jax.__version__, "backend": backend.name},
            "backend_reason": backend.reason,
            **{"devices": self.settings.devices, "task": self.settings.task, "model": self.settings.model},
            **{"data": self.settings.data, "command": command, "settings": dataclasses.asdict(self.settings)},
            "columns": columns._asdict() | {"wide": list(self.settings.wide)},
            "rows": {part: prepared.rows(part) for part in PARTS},
            "positive": scanned.positive / scanned.rows["train"] if columns.label is not None else None,
            "seen": {"scales": scanned.scales, "positive": scanned.positive},
            "split": prepared.split._asdict(),
            "fingerprint": prepared.fingerprint(),
            "tables": facts(self.trainer.plan, self.columns),
        }


def run(
    settings: Settings, folder: RunFolder, command: str, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Trains, tests, and writes everything into the folder; returns the test's measures, and how the run ended.

    Args:
      settings: of the run.
      folder: where it is, or will be.
      command: that asks for it.
      resume: whether it goes on where the one in the folder stopped.
      overwrite: whether another one in the folder is thrown away, once the data are read.

    Raises:
      DataError: whatever is wrong with settings, data or the folder.
    """
    from embax.tasks import html_report  # before the work: a package that it lacks is missed at once

    begun = time.perf_counter()
    work = _resumed(settings, folder) if resume else _begun(settings, folder, overwrite)
    document = work.document(command)
    journal = Journal(folder.path, _since(folder) if resume else None)
    journal.parts["reading columns"] = time.perf_counter() - begun
    ended: dict[str, Any] = {"status": "interrupted"}
    found, steps = {}, 0
    try:
        folder.write(document | {"status": "running", "seconds": 0.0})
        progress, found = _trained(work, folder, journal, resume)
        steps = int(progress.state.step)
        ended["status"] = "interrupted" if progress.interrupted else "finished"
    except KeyboardInterrupt:  # in a test, or the second one
        steps = _since(folder)
    finally:
        journal.close()
        ended["seconds"] = time.perf_counter() - begun
        folder.write(document | ended)
        try:
            html_report.write_report(folder.path)
        except (ValueError, OSError) as error:
            print(f"embax: report.html was not written: {' '.join(str(error).split())}", file=sys.stderr)
    return found | ended | {"steps": steps}


def _begun(settings: Settings, folder: RunFolder, overwrite: bool) -> Work:
    """Returns the work of a run that begins, whose folder is then its own."""
    settings = settings.of_task()
    if not overwrite:
        _free(folder)
    folder.make()
    bar = tqdm(desc="reading columns", unit=" rows", unit_scale=True, mininterval=1.0)
    with bar:
        prepared = prepare(settings, folder, bar.update)
    work = _work(settings, prepared, folder)
    folder.clear()
    folder.keep(prepared.scanned)
    return work


def _resumed(given: Settings, folder: RunFolder) -> Work:
    """Returns the work of a run to go on with; DataError where settings or data are others."""
    settings = _same(given, folder)
    return _work(settings, again(settings, folder), folder)


def _work(settings: Settings, prepared: Prepared, folder: RunFolder) -> Work:
    """Returns the work; DataError for tables that cannot be, or be saved."""
    try:
        work = Work(settings, prepared)
        for name in work.columns:
            folder_of(folder.checkpoints, name, "table")
        work.check()
    except ValueError as error:
        raise DataError(str(error)) from error
    return work


def _trained(work: Work, folder: RunFolder, journal: Journal, resume: bool) -> tuple[Progress, dict[str, Any]]:
    """Returns where training ended, and the measures of the test unless it was interrupted."""
    found: dict[str, Any] = {}
    touched = Touched({name: vocabulary.rows for name, vocabulary in work.prepared.scanned.vocabularies.items()})
    loop = Loop(work, journal)
    with Checkpoints(folder.checkpoints, keep=3) as checkpoints, loop.interruptible():
        progress = loop.run(_begin(work, checkpoints, resume, touched), checkpoints)
    if not progress.interrupted and work.prepared.rows("test"):
        with journal.timed("evaluation"):
            found = work.evaluated(progress.state, "test")
        step = int(progress.state.step)
        epoch = step * work.settings.batch_size / work.prepared.rows("train")
        journal.write("evaluation", split="test", step=step, epoch=epoch, **found)
    with journal.timed("table statistics"):
        known = work.statistics(progress)
        journal.write("tables", tables=list(known))
    return progress, found


def _begin(work: Work, checkpoints: Checkpoints, resume: bool, touched: Touched) -> Progress:
    """Returns fresh tables, or those of the last checkpoint."""
    if not resume or not checkpoints.steps():
        return Progress(work.trainer.init(work.settings.seed), None, touched)
    dense = dense_of(work.trainer.init_dense(work.settings.seed), touched)
    try:
        found = checkpoints.restore(work.trainer.plan, dense=dense)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    touched.put(found.dense["touched"])
    restored = State(found.tables, found.dense["params"], found.dense["optimizer"], found.dense["step"])
    return Progress(restored, found.data["batches"], touched)


def _since(folder: RunFolder) -> int:
    """Returns the step of the newest whole checkpoint; 0 where there is none."""
    try:
        with Checkpoints(folder.checkpoints) as checkpoints:
            return max(checkpoints.steps(), default=0)
    except ValueError as error:
        raise DataError(f"{error} (--output)") from None


def _same(given: Settings, folder: RunFolder) -> Settings:
    """Returns the settings of the run to go on with; DataError where others are given now."""
    kept, given = folder.settings(), given.of_task()
    changed = [
        name for name, value in dataclasses.asdict(given).items() if name not in FREE and value != getattr(kept, name)
    ]
    if changed:
        name = changed[0]
        raise DataError(
            f"--{name.replace('_', '-')} was {getattr(kept, name)!r} when {folder.path} was begun and is "
            f"{getattr(given, name)!r}; --resume goes on with the settings of the beginning: leave it out, or begin a "
            "new run with another --output"
        )
    return given


def _free(folder: RunFolder) -> None:
    """Raises DataError where another run's checkpoints are: they would be taken for this one's."""
    if _since(folder):
        raise DataError(
            f"--output {folder.path} has the checkpoints of a run; --resume goes on with it, another folder keeps it, "
            "and --overwrite throws it away"
        )


def summary(found: dict[str, Any], folder: RunFolder) -> list[str]:
    """Returns the lines that a run ends with."""
    measures = {
        k: v for k, v in found.items() if isinstance(v, float) and not k.startswith("baseline") and k != "seconds"
    }
    lines = [f"test: {shown(measures)}"] if measures else []
    if "baseline" in found:
        base = {k.removeprefix("baseline_"): v for k, v in found.items() if k.startswith("baseline_")}
        lines.append(f"{found['baseline']}: {shown(base)}")
    if found["steps"] < FEW_STEPS:
        lines.append(f"these were only {found['steps']} steps; a smaller --batch-size or more --epochs may learn more")
    return [*lines, f"{folder.path / 'report.html'}: {found['steps']} steps, {found['seconds']:.1f} s", *_left(found)]


def opened(folder: RunFolder, step: int | None = None) -> tuple[Work, State, int]:
    """Returns the work of a run, its tables and parameters at a step (None for the newest), and that step.

    There are no slot variables: for looking up and predicting, not for training.

    Raises:
      DataError: no such step, or a damaged one.
    """
    settings = dataclasses.replace(folder.settings(), devices=1)
    work = Work(settings, known(folder))
    touched = Touched({name: vocabulary.rows for name, vocabulary in work.prepared.scanned.vocabularies.items()})
    with Checkpoints(folder.checkpoints) as checkpoints:
        try:
            dense = dense_of(work.trainer.init_dense(settings.seed), touched)
            found = checkpoints.restore(work.trainer.plan, step=step, dense=dense, serving=True)
        except CheckpointError as error:
            raise DataError(str(error)) from None
    return work, State(found.tables, found.dense["params"], None, found.dense["step"]), found.step


def _left(found: dict[str, Any]) -> list[str]:
    return ["interrupted; the same command with --resume goes on"] if found["status"] == "interrupted" else []
