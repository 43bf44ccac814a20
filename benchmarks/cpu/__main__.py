"""The embedding step on a CPU: embax, its peers, and the machine's limits, in one run.

    python -m benchmarks.cpu [--only GLOB ...] [--threads 1 2] [--repeats 5] [--json F] [--markdown F] [--png F]
    python -m benchmarks.cpu --list

Contenders: embax; embax's reference backend; flax.linen.Embed under optax with dense gradients; torch's EmbeddingBag
with sparse gradients under torch.optim (SGD, Adagrad, SparseAdam); FBGEMM's SplitTableBatchedEmbeddingBagsCodegen on
CPU; and the limit, plain C++ loops that read the rows, or read and write them, and do nothing else (see ``limits``).
Before anything is timed, all of them are compared on small tables. A contender that is not installed, or that has no
such optimizer, or no memory, is left out, and the reason is printed. Linux only.

A step is forward, backward from a given gradient of the activations, and optimizer; it gives the activations. embax's
is one donated jitted step on a preprocessed batch; preprocessing is timed apart. Every workload and optimizer is
measured in a process of its own, which has one or two cores before anything is imported; different kinds of ids follow
each other there. Contenders take turns of consecutive steps, each turn on other batches than the one before; the first
step of a turn and the whole first turn are not counted; figures are medians. All contenders of a process train the same
memory, embax's arrays (``memory``), and run under the same allocator setting; workloads marked "default allocator" run
without it.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cpu import claims, limits, report
from benchmarks.cpu.workloads import Skip, Workload, workloads

MALLOC = "glibc.malloc.mmap_threshold=134217728:glibc.malloc.trim_threshold=1073741824"
MARK = "RESULT "
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
LOOKUPS = [f"lookup 1e6x64 {dtype}" for dtype in ("float32", "bfloat16", "float16", "int8")]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one child process measures: one of ``workloads()``, the lookups or the check, and an optimizer."""

    workload: str
    ids: tuple[str, ...] = ()
    optimizer: str = ""
    threads: int = 1
    forward: bool = False
    tuned: bool = True


def jobs(threads: list[int], patterns: list[str]) -> list[Job]:
    """Returns what is to be measured, in order."""
    found = []
    for count in threads:
        for workload in workloads():
            for tuned in (True, False) if workload.untuned else (True,):
                found += _jobs_of(workload, count, tuned, patterns)
        if any(_wanted(name, "forward", patterns) for name in LOOKUPS):
            found.append(Job("lookups", optimizer="forward", threads=count))
    return found


def _jobs_of(workload: Workload, threads: int, tuned: bool, patterns: list[str]) -> Iterator[Job]:
    forward = True  # with the first optimizer only: the forward pass does not depend on it
    for optimizer in workload.optimizers:
        ids = tuple(ids for ids in workload.ids if _wanted(f"{workload.name} {ids}", optimizer, patterns))
        if ids:
            yield Job(f"{workload.name}|{','.join(workload.ids)}", ids, optimizer, threads, forward, tuned)
            forward = False


def _wanted(name: str, optimizer: str, patterns: list[str]) -> bool:
    labels = (name, f"{name}/{optimizer}")
    return not patterns or any(fnmatch.fnmatch(label, pattern) for label in labels for pattern in patterns)


def run_child(job: Job, arguments: argparse.Namespace, malloc: bool, library: str = "") -> Iterator[dict]:
    """Yields the results that a child process prints, and raises RuntimeError with its exit code if it fails."""
    effort = {"repeats": arguments.repeats, "seconds": arguments.seconds, "library": library}
    request = json.dumps(dataclasses.asdict(job) | effort)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "2", "JAX_PLATFORMS": "cpu"}
    if malloc:
        environment["GLIBC_TUNABLES"] = MALLOC
    command = [sys.executable, "-m", "benchmarks.cpu", "--data", str(arguments.data), "--child", request]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        for line in child.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
    if child.returncode:
        raise RuntimeError(f"its process ended with exit code {child.returncode}")


def be_child(request: dict, data: Path) -> None:
    """Measures one job and prints its results; nothing heavy is imported before the cores are chosen."""
    cores = sorted(os.sched_getaffinity(0))[-request["threads"] :]
    os.sched_setaffinity(0, cores)
    from benchmarks.cpu import lookups, measure

    measure.set_up(request["threads"], request["tuned"])
    if request["workload"] == "check":
        _print({"check": measure.check(), **measure.versions()})
        return
    effort = measure.Effort(request["repeats"], request["seconds"], data, request["threads"], request["library"])
    if request["workload"] == "lookups":
        results, ids_per_step, name = lookups.look_up(effort), lookups.WORKLOAD.ids_per_step, lookups.WORKLOAD.name
    else:
        by_name = {f"{workload.name}|{','.join(workload.ids)}": workload for workload in workloads()}
        workload = dataclasses.replace(by_name[request["workload"]], ids=tuple(request["ids"]))
        results = measure.train(workload, request["optimizer"], request["forward"], effort)
        ids_per_step, name = workload.ids_per_step, workload.name
    common = {"threads": request["threads"], "tuned": request["tuned"], "ids_per_step": ids_per_step}
    try:
        for result in results:
            _print({"workload": f"{name} {result.pop('ids')}", **common, **result})
    except Skip as reason:
        for ids in request["ids"]:
            missing = {"what": request["optimizer"], "ms": {}, "skipped": {"all": str(reason)}}
            _print({"workload": f"{name} {ids}", **common, **missing})


def _print(result: dict) -> None:
    print(MARK + json.dumps(result), flush=True)


def cpu_name() -> str:
    """Returns the processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parse() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="GLOB", help='such as "1e7x64*" or "*/adagrad"')
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.5, help="after so long a contender takes fewer turns")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the data sets")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--list", action="store_true", help="print the names of the workloads and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace, todo: list[Job], tunes: bool, library: str) -> list[dict]:
    """Returns all rows, printing each as it comes."""
    rows: list[dict] = []
    told: set[tuple[str, str]] = set()
    print(report.heading())
    for job in todo:
        name = job.workload.split("|")[0]
        if job.threads > len(os.sched_getaffinity(0)):
            print(f"(skipped: {name} {job.optimizer}: there are no {job.threads} cores)")
            continue
        try:
            for row in run_child(job, arguments, job.tuned and not tunes, library):
                rows.append(row)
                if row["ms"]:
                    print(report.line(row), flush=True)
                for contender, reason in row["skipped"].items():
                    if (contender, reason) not in told:
                        told.add((contender, reason))
                        print(f"({report.label(row)} {row['what']}, skipped: {contender}: {reason})", flush=True)
        except RuntimeError as error:
            print(f"(skipped: {name} {job.optimizer} at {job.threads} threads: {error})", flush=True)
    return rows


def main() -> None:
    """Runs the children and reports."""
    arguments = parse()
    if arguments.child:
        be_child(json.loads(arguments.child), arguments.data)
        return
    todo = jobs(arguments.threads, arguments.only)
    if arguments.list:
        names = [f"{job.workload.split('|')[0]} {ids}/{job.optimizer}" for job in todo for ids in job.ids]
        names += [f"{name}/forward" for name in LOOKUPS] if any(job.workload == "lookups" for job in todo) else []
        print("\n".join(dict.fromkeys(names)))
        return
    start = time.monotonic()
    check = next(run_child(Job("check", threads=min(2, len(os.sched_getaffinity(0)))), arguments, malloc=False))
    print(f"same activations and rows after one step: {check.pop('check')}\n")
    tunes = check.pop("tune_allocator")
    setting = "embax.tune_allocator()" if tunes else f"GLIBC_TUNABLES={MALLOC}"
    machine = {"CPU": cpu_name(), "cores": len(os.sched_getaffinity(0)), **check, "allocator": setting}
    with tempfile.TemporaryDirectory() as folder:
        library = ""
        try:
            library = limits.compile_library(folder)
        except Skip as reason:
            print(f"(skipped: limit: {reason})")
        rows = measure_all(arguments, todo, tunes, library)
    verdicts = claims.judge(rows)
    print("\n" + "\n".join(report.claims_table(verdicts)))
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes")
    if arguments.json:
        found = {"machine": machine, "rows": rows, "claims": verdicts}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(report.markdown(machine, rows, verdicts))
    if arguments.png and rows:
        report.picture(rows, str(arguments.png))


if __name__ == "__main__":
    main()
