"""One pass of ``embax train`` over a file that is larger than the memory it may have.

    python -m benchmarks.large_file [--rows 50000000] [--cap-gb 4] [--folder FOLDER] [--keep]

Makes a Parquet set without compression, 228 bytes a row (11 GB at 50 million): 13 numbers, 18 columns of 64-bit
integers and 2 of text with 10 to 2,000,000 values of power-law frequency, a label that depends on some of them. Trains
a click model on it for one epoch, tests it, and watches the memory of the process and its children: more resident than
the cap, pages of files not counted, kills the run. Prints the peak, samples/s of training, and the time of each part.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

GROUP = 1 << 17
FILES = 10
SIZES = [10, 20, 50, 100, 300, 1_000, 3_000, 10_000, 20_000, 50_000, 100_000, 100_000, 200_000, 200_000, 500_000]
SIZES += [1_000_000, 1_000_000, 2_000_000]
TEXTS = [1_000, 100_000]


def main() -> None:
    """Prints what a run takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--cap-gb", type=float, default=4.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave data and run where they are")
    parser.add_argument("--options", default="", help="further options of embax train")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    try:
        data = make(folder / "data", args.rows)
        run(data, folder / "run", args)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def make(folder: Path, rows: int) -> Path:
    """Writes the set, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-rows // FILES)
    for number in range(FILES):
        path = folder / f"{number}.parquet"
        if path.exists():
            continue
        with pq.ParquetWriter(path.with_suffix(".part"), _table(1, 0).schema, **PLAIN) as writer:
            for first in range(0, each, GROUP):
                count = min(GROUP, each - first, rows - number * each - first)
                if count > 0:
                    writer.write_table(_table(count, number * each + first), row_group_size=GROUP)
        path.with_suffix(".part").rename(path)
    size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    print(f"{rows:,} rows, {size / 1e9:.2f} GB in {FILES} files", flush=True)
    return folder


PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}


def _table(rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    numbers = {f"n{i}": rng.standard_normal(rows, np.float32) for i in range(13)}
    columns = {f"c{i}": _drawn(rng, rows, size) for i, size in enumerate(SIZES)}
    texts = {f"t{i}": _drawn(rng, rows, size) for i, size in enumerate(TEXTS)}
    logit = numbers["n0"] - 0.5 * numbers["n1"] + ((columns["c3"] % 7 == columns["c5"] % 7) - 0.14) * 3
    logit = logit + np.sin(columns["c9"] * 1.7) - 1.0
    label = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    words = {name: pc.binary_join_element_wise("v", pa.array(v).cast(pa.string()), "") for name, v in texts.items()}
    return pa.table({"label": label, **numbers, **columns, **words})


def _drawn(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Returns ids below ``size`` of power-law frequency: log-uniform, spread by a multiplication."""
    drawn = (np.exp(rng.random(rows) * np.log(size)) - 1).astype(np.int64)
    return drawn * 2_654_435_761 % (1 << 40)


def run(data: Path, output: Path, args: argparse.Namespace) -> None:
    """Trains under the cap, and prints what was measured."""
    command = [sys.executable, "-m", "embax.cli", "train", str(data), "--label", "label", "--output", str(output)]
    command += ["--epochs", "1", "--batch-size", "8192", "--test-fraction", "0.02", "--mixed-rows", str(1 << 18)]
    command += ["--baseline", "rate", "--overwrite", *args.options.split()]
    process, peak, begun = subprocess.Popen(command), 0, time.perf_counter()
    while process.poll() is None:
        now = _resident(process.pid)
        peak = max(peak, now)
        if now > args.cap_gb * 1e9:
            process.kill()
            sys.exit(f"killed: {now / 1e9:.2f} GB resident, more than {args.cap_gb} GB")
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    print(f"peak {peak / 1e9:.2f} GB resident of {args.cap_gb} GB, {time.perf_counter() - begun:.0f} s in all")
    rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    print(f"samples/s, median: {np.median(rates):,.0f}")
    for line in lines:
        if line["kind"] in ("evaluation", "timing"):
            print(line)


def _resident(pid: int) -> int:
    """Returns bytes of memory of a process and its children that no file stands behind."""
    total = 0
    for one in [pid, *_children(pid)]:
        try:
            text = Path(f"/proc/{one}/status").read_text()
        except OSError:
            continue
        total += sum(
            int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(("RssAnon", "RssShmem"))
        )
    return total


def _children(pid: int) -> list[int]:
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [grandchild for child in own for grandchild in _children(child)]


if __name__ == "__main__":
    main()
