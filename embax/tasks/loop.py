"""The loop of a run: batches prepared ahead, steps, checkpoints, measures; it can be stopped and goes on.

What a step needs is prepared by a thread while the step before is under way, and nothing here waits for a result but
the progress bar, now and then.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from typing import Any

import jax
from tqdm import tqdm

from embax.checkpoint import Checkpoints
from embax.data.files import DataError
from embax.data.loader import ahead, batches
from embax.data.split import TRAIN
from embax.tasks.journal import Journal
from embax.tasks.table_facts import Touched
from embax.tasks.training import DIVERGED, State, train_step

SHOW_EVERY = 1.0  # seconds between lines of losses


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
      state: tables and parameters.
      data: where the batches go on; None at the beginning.
      touched: the rows that training has met.
      interrupted: whether it was asked to stop before the end.
    """

    state: State
    data: Any
    touched: Touched
    interrupted: bool = False


def dense_of(state: State, touched: Touched) -> dict[str, Any]:
    """Returns what checkpoints have beside tables."""
    return {"params": state.params, "optimizer": state.dense, "step": state.step, "touched": touched.taken()}


class Loop:
    """Trains, and can be stopped.

    Args:
      work: with a trainer, its data (``prepared``), ``settings``, ``draw`` and ``evaluated(state, part)``.
      journal: that is told losses.
    """

    def __init__(self, work: Any, journal: Journal):
        self.work, self.trainer, self.settings, self.journal = work, work.trainer, work.settings, journal
        self.rows = work.prepared.rows("train")
        self.steps = steps_of(self.settings, self.rows)
        self.stopped = False

    def run(self, progress: Progress, checkpoints: Checkpoints) -> Progress:
        """Returns where training ends: at the last step, or where it was interrupted; the last state is saved."""
        iterator = iter(self._batches())
        if progress.data is not None:
            iterator.set_state(progress.data)
        first = step = int(progress.state.step)
        title, unit = f"{self.settings.model}, seed {self.settings.seed}", {"unit": " samples", "unit_scale": True}
        every = 0.1 if sys.stderr.isatty() else 10.0  # seconds: a log keeps every line that a terminal overwrites
        size, total = self.settings.batch_size, self.steps * self.settings.batch_size
        meter = Meter(self.journal, size, self.rows)
        bar = tqdm(total=total, initial=first * size, desc=title, mininterval=every, **unit)
        key, saved_at = jax.random.key(self.settings.seed), time.perf_counter()
        with bar:
            while step < self.steps and not self.stopped:
                with self.journal.timed("waiting for data"):
                    ids, batch = next(iterator)
                with self.journal.timed("compilation and first step" if step == first else "steps"):
                    progress.state, losses = train_step(self.trainer, progress.state, batch, key)
                    if step == first:
                        jax.block_until_ready(losses)
                step += 1
                bar.update(size)
                progress.touched.see(ids)
                with self.journal.timed("steps"):
                    meter.seen(step, losses, bar)
                epoch_ends = step == self.steps or step * size // self.rows > (step - 1) * size // self.rows
                # Measured first: who dies in between does it again, from the checkpoint before.
                if epoch_ends and self.work.prepared.rows("validation"):
                    self._measure(progress.state, step, "validation", bar)
                if epoch_ends or time.perf_counter() - saved_at > self.settings.save_every:
                    progress.data = iterator.get_state()
                    self._save(progress, checkpoints, step)
                    saved_at = time.perf_counter()
            with self.journal.timed("steps"):
                jax.block_until_ready(progress.state)
            meter.last(step)
        progress.interrupted, progress.data = step < self.steps, iterator.get_state()
        if step > first and step not in checkpoints.steps():
            self._save(progress, checkpoints, step)
        return progress

    def _batches(self) -> Any:
        """Returns a dataset of (ids by column, batch); (None, None) for the rows at the end that are too few."""
        groups, encode = self.work.prepared.encode(TRAIN, shuffled=True)
        s = self.settings
        shared = {"epochs": s.epochs, "seed": s.seed, "workers": s.workers, "mixed_rows": s.mixed_rows}
        data = batches(groups, encode, s.batch_size, **shared)
        if self.work.draw is not None:
            data = data.seed(s.seed).random_map(self.work.draw)

        def prepared(rows: Any) -> Any:
            return (rows.ids, self.trainer.batch(rows)) if len(rows) == s.batch_size else (None, None)

        return ahead(data, prepared, s.ahead) if s.ahead else data.map(prepared)

    def _save(self, progress: Progress, checkpoints: Checkpoints, step: int) -> None:
        with self.journal.timed("checkpoints"):
            state = progress.state
            tables = checkpoints.save(
                step,
                self.trainer.plan,
                state.tables,
                dense=dense_of(state, progress.touched),
                data={"batches": progress.data},
            )
            progress.state = state._replace(tables=tables)

    def _measure(self, state: State, step: int, part: str, bar: Any) -> None:
        with self.journal.timed("evaluation"):
            found = self.work.evaluated(state, part)
        self.journal.write(
            "evaluation", split=part, step=step, epoch=step * self.settings.batch_size / self.rows, **found
        )
        bar.write(f"step {step}, {part}: {shown(found)}", file=sys.stderr)

    def interruptible(self) -> contextlib.AbstractContextManager:
        """Returns a context in which Ctrl-C, or a polite kill, ends ``run`` after the step; a second one at once."""
        return _Signals(self)


def steps_of(settings: Any, rows: int) -> int:
    """Returns the steps of a run; rows left over at the end of the last epoch are too few for a batch."""
    return rows * settings.epochs // settings.batch_size


def shown(measures: dict[str, Any]) -> str:
    """Returns measures in one line."""
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in measures.items())


class Meter:
    """Writes losses and the rate of samples, from the device now and then alone.

    A loss is read when it is a while old, so that nobody waits for the newest step.
    """

    def __init__(self, journal: Journal, size: int, rows: int):
        self.journal, self.size, self.rows = journal, size, rows
        self.begun = self.at = time.perf_counter()
        self.step: int | None = None
        self.waiting: tuple[int, Any] | None = None
        self.newest: Any = None

    def seen(self, step: int, losses: Any, bar: Any) -> None:
        """Takes the losses of a step."""
        now, self.newest = time.perf_counter(), losses
        if self.step is None:
            self.step, self.at = step, now  # the first one was compiled
        if self.waiting is None:
            self.waiting = (step, losses)
        elif now - self.at >= SHOW_EVERY and step > self.step:
            self._write(step, now, bar)
            self.waiting = (step, losses)

    def last(self, step: int) -> None:
        """Writes what is left; DataError where the newest losses are no numbers."""
        if self.waiting is not None and self.step is not None:
            self.waiting = (step, self.newest)
            self._write(step, time.perf_counter(), None)

    def _write(self, step: int, now: float, bar: Any) -> None:
        assert self.waiting is not None and self.step is not None  # seen() came first
        of, losses = self.waiting
        values = self._check(of, losses)
        rate = (step - self.step) * self.size / max(now - self.at, 1e-9)
        numbers = {"epoch": of * self.size / self.rows, "samples": of * self.size, **values}
        rated = {"samples_per_second": rate} if step > self.step else {}
        self.journal.write("train", step=of, **numbers, **rated, seconds=now - self.begun)
        if bar is not None:
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.step, self.at = step, now

    def _check(self, step: int, losses: Any) -> dict[str, float]:
        """Returns losses as numbers; DataError where they are none."""
        values = {name: float(value) for name, value in losses.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                self.journal.write("train", step=step, epoch=step * self.size / self.rows, **values)
                raise DataError(f"step {step}: {name} is {value}: {DIVERGED}")
        return values


class _Signals(contextlib.AbstractContextManager):
    """Ctrl-C, or a polite kill, ends the loop after the step; a second one ends it at once."""

    def __init__(self, loop: Loop):
        self.loop = loop

    def __enter__(self) -> None:
        def stop(number, frame):
            if self.loop.stopped:
                raise KeyboardInterrupt
            self.loop.stopped = True
            print("\nembax: stopping after this step, and saving; once more to stop at once", file=sys.stderr)

        self.old = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.old[number] = signal.signal(number, stop)
            except ValueError:  # not the main thread, where nobody can be interrupted
                break

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
