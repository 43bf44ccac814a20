"""Steps per second of the click model with batches prepared ahead of the step, and without.

    python -m benchmarks.overlap [--rows 400000] [--turns 7] [--batch-size 2048]

Data are Complete Journey's. Both contenders take the same batches through the same program: one by ``ahead``, which
prepares the next batch (rows cut, ids validated, sorted, distinct rows found, placed on the device) in a thread while
the step is under way, the other each when its turn comes and waits for the step. A third waits for nothing but prepares
in the same thread: what JAX's own asynchronous calls hide. Segments of as many steps in turns; medians and minima.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import jax

import embax
from embax.data.loader import ahead, batches
from embax.data.split import TRAIN
from embax.tasks import completejourney
from embax.tasks.prepare import prepare
from embax.tasks.run_folder import RunFolder
from embax.tasks.settings import Settings
from embax.tasks.training import train_step
from embax.tasks.work import Work

STEPS = 60  # of a segment


def main() -> None:
    """Prints steps per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=2048)
    args = parser.parse_args()
    embax.tune_allocator()
    with tempfile.TemporaryDirectory() as made:
        folder = RunFolder(Path(made))
        given = Settings("", limit_rows=args.rows, batch_size=args.batch_size, epochs=1000)
        settings = completejourney.settings(folder, given, ()).of_task()
        work = Work(settings, prepare(settings, folder))
        for name, times in measured(work, args.turns).items():
            best, usual = STEPS / min(times), STEPS / statistics.median(times)
            print(f"{name:<28}{best:>8.1f} steps/s at best, {usual:>8.1f} median")


def measured(work: Work, turns: int) -> dict[str, list[float]]:
    """Returns the seconds of every segment, by contender."""
    groups, encode = work.prepared.encode(TRAIN, shuffled=True)
    size, epochs = work.settings.batch_size, work.settings.epochs

    def rows():
        return batches(groups, encode, size, epochs=epochs)

    contenders = {
        "prepared ahead": (iter(ahead(rows(), work.trainer.batch)), False),
        "in the same thread": (iter(rows().map(work.trainer.batch)), False),
        "one after the other": (iter(rows().map(work.trainer.batch)), True),
    }
    state, key = work.trainer.init(0), jax.random.key(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn, (name, (iterator, waits)) in itertools.product(range(turns + 1), contenders.items()):
        next(iterator)
        begun = time.perf_counter()
        for _ in range(STEPS):
            state, _ = train_step(work.trainer, state, next(iterator), key)
            if waits:
                jax.block_until_ready(state)
        jax.block_until_ready(state)
        if turn:
            times[name].append(time.perf_counter() - begun)
    return times


if __name__ == "__main__":
    main()
