"""Saving and loading a table: bytes a second beside a plain copy of as many on the same disk, memory, and the stall.

``python -m benchmarks.checkpoints [--gigabytes 4] [--devices 1] [--folder DIR]``. The copy is of one file, by
``shutil.copyfile`` and ``os.fsync``, for checkpoints are on the disk when they are done. Reads come from the page cache
in both, unless there is less memory than twice the table. The stall is how long an asynchronous ``save`` holds up
training; in the meantime training steps are timed beside those without a save. Then, of a tracked table: the step that
marks rows beside one that does not, in turns; a save of what 8 steps wrote, its stall, restoring the table with it, and
the compaction. ``embax.tune_allocator()`` is on.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import numpy as np  # noqa: E402

import embax  # noqa: E402
from benchmarks.mesh_memory import forget_peak, peak_bytes  # noqa: E402
from embax.checkpoint import Checkpoints  # noqa: E402

DIM, SAMPLES, VALENCY = 64, 8192, 20


def main():
    """Measures one table on one number of devices."""
    args = _arguments()
    embax.tune_allocator()
    rows = int(args.gigabytes * 1e9) // (4 * DIM)
    table = embax.TableSpec(
        name="table",
        vocabulary_size=rows,
        embedding_dim=DIM,
        combiner="sum",
        initializer=jax.nn.initializers.uniform(1.0),
        optimizer=embax.SGD(0.1),
    )
    feature = embax.FeatureSpec(name="x", table_spec=table, input_shape=(None, VALENCY), output_shape=(None, DIM))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: args.devices]), ("x",)) if args.devices > 1 else None
    plan = embax.plan(feature, mesh=mesh)
    tables = embax.init(plan, jax.random.key(0))
    size = rows * DIM * 4
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(f"{size / 1e9:.2f} GB, {rows:,} rows x {DIM}, {args.devices} devices")
        took = _copy(Path(folder), size)
        print(f"plain copy, fsync          {size / took / 1e9:6.2f} GB/s")
        took, more = _timed(lambda: _save(folder, plan, tables, False))
        print(f"save, synchronous          {size / took / 1e9:6.2f} GB/s, {more / 1e6:6.0f} MB more memory")
        with Checkpoints(folder) as checkpoints:
            took, more = _timed(lambda: jax.block_until_ready(checkpoints.restore(plan).tables))
        print(
            f"restore                    {size / took / 1e9:6.2f} GB/s, {(more - size) / 1e6:6.0f} MB beyond the table"
        )
        tables = _asynchronous(folder, plan, tables, size)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _incremental(folder, plan, tables, size)


def _copy(folder, size):
    source, target = folder / "source", folder / "target"
    block = np.random.default_rng(0).integers(0, 256, 1 << 26, np.uint8).tobytes()
    with source.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    took = time.perf_counter() - begin
    source.unlink(), target.unlink()
    return took


def _save(folder, plan, tables, asynchronous):
    with Checkpoints(folder, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(0, plan, tables)


def _timed(action):
    before, begin = forget_peak() or peak_bytes(), time.perf_counter()
    action()
    return time.perf_counter() - begin, peak_bytes() - before


def _asynchronous(folder, plan, tables, size):
    step = jax.jit(lambda tables, batch: _trained(plan, tables, batch), donate_argnums=0)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, plan.stacks[0].rows, (SAMPLES, VALENCY)).astype(np.int32)
    batch = embax.preprocess(plan, ids)
    tables, alone = _steps(step, tables, batch, 30)
    with Checkpoints(folder, keep=1) as checkpoints:
        stalls, beside, spans = [], [], []
        for number in (1, 2):
            begin = time.perf_counter()
            checkpoints.save(number, plan, tables)
            stalls.append(time.perf_counter() - begin)
            tables, some = _steps(step, tables, batch, 30)
            beside += some
            checkpoints.wait()
            spans.append(time.perf_counter() - begin)
    print(f"save, asynchronous         {size / min(spans) / 1e9:6.2f} GB/s, stall {min(stalls):.2f} s")
    print(
        f"a step alone {1e3 * statistics.median(alone):.1f} ms, during a save {1e3 * statistics.median(beside):.1f} ms"
    )
    return tables


def _incremental(folder, plan, tables, size):
    step = jax.jit(lambda tables, batch: _trained(plan, tables, batch), donate_argnums=0)
    rng, stack = np.random.default_rng(1), plan.stacks[0]
    batches = [
        embax.preprocess(plan, rng.integers(0, stack.rows, (SAMPLES, VALENCY)).astype(np.int32)) for _ in range(8)
    ]
    marks, ratios = embax.track(plan, tables)[stack.name].touched, []
    for turn in range(24):
        took = {}
        for tracked in (turn % 2 == 0, turn % 2 == 1):
            state = tables[stack.name]._replace(touched=marks if tracked else None)
            begin = time.perf_counter()
            tables = jax.block_until_ready(step({stack.name: state}, batches[turn % 8]))
            took[tracked] = time.perf_counter() - begin
            marks = tables[stack.name].touched if tracked else marks
        ratios.append(took[True] / took[False])
    print(f"a step that marks rows     {statistics.median(ratios[4:]):6.2f} of one that does not, lookup and update")
    tables = embax.track(plan, tables)
    with Checkpoints(folder, keep=None) as checkpoints:
        tables = checkpoints.save(0, plan, tables)
        checkpoints.wait()
        for batch in batches:
            tables = step(tables, batch)
        jax.block_until_ready(tables)
        begin = time.perf_counter()
        tables = checkpoints.save(1, plan, tables)
        stall = time.perf_counter() - begin
        checkpoints.wait()
        took = time.perf_counter() - begin
        written = sum(p.stat().st_size for p in Path(folder, "1", "tables", "delta.0").rglob("0") if p.is_file())
        print(f"save of 8 steps' rows      {took:6.2f} s for {written / 1e9:.2f} GB, stall {stall:.2f} s")
        took, _ = _timed(lambda: jax.block_until_ready(checkpoints.restore(plan).tables))
        print(f"restore with them          {size / took / 1e9:6.2f} GB/s")
        took, more = _timed(lambda: checkpoints.compact())
        print(f"compaction                 {size / took / 1e9:6.2f} GB/s, {more / 1e6:6.0f} MB more memory")


def _steps(step, tables, batch, count):
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        tables = jax.block_until_ready(step(tables, batch))
        times.append(time.perf_counter() - begin)
    return tables, times[2:]


def _trained(plan, tables, batch):
    activations, residuals = embax.lookup(plan, tables, batch)
    return embax.update(plan, tables, residuals, activations, step=0)


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--folder", help="where to write; the system's folder for temporary files if not given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
