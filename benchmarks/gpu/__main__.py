"""Steps of large tables on a GPU: embax beside its XLA path, a dense gradient, torch and FBGEMM, and the bandwidth.

    python -m benchmarks.gpu [--big] [--seconds 420] [--scale 1.0] [--cases a,b,c,d] [--results FOLDER]

From the root of a checkout; needs no network. First every backend's small steps are compared with a float64 oracle,
and before a case is timed some rows of a full-size step: what is wrong ends the run with status 1 (``--no-check`` goes
on).
Then the card's copy bandwidth, then the cases, in the time that there is; what was left out is said. Results go into
``gpu-CARD-DATE.json`` and ``.md``. ``--install`` builds the checkout first, ``--wheel FILE`` unpacks a wheel; without
them the checkout or an installed embax is taken, whichever has GPU kernels. ``--scale`` makes everything smaller,
to try the program itself.
"""

import argparse
import datetime
import fnmatch
import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu import cases, install

RESULTS = Path(__file__).parents[1] / "results"
MOST_ON_CPU = 0.02  # of the cases' size
MODULES = {"fbgemm": "fbgemm_gpu", "torch": "torch"}
SHARES = {"jax": 0.7, "fbgemm": 0.6, "torch": 1.0}  # of the time that is left when a framework's turn comes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", action="store_true", help="case e too: 105 GB of tables")
    parser.add_argument("--seconds", type=float, default=420.0, help="time for everything after the installation")
    parser.add_argument("--scale", type=float, default=1.0, help="of rows and batches")
    parser.add_argument("--cases", default="a,b,c,d")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help='such as "a-*" or "*-sgd"')
    parser.add_argument("--frameworks", default="jax,fbgemm,torch")
    parser.add_argument("--dims", default="", help="widths of the small checks, such as 4,128; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-check", action="store_true", help="go on where results are wrong")
    parser.add_argument("--install", action="store_true", help="build the checkout first")
    parser.add_argument("--wheel", type=Path, help="measure this wheel")
    parser.add_argument("--one-process", action="store_true", help="JAX in this process, for a profiler or debugger")
    parser.add_argument("--list", action="store_true", help="print the names of the jobs and stop")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Failed(Exception):
    """A result is wrong."""


class NoCard(Exception):
    """There is nothing to measure on."""


class Findings:
    """What the events say, in the form that is written."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        now = datetime.datetime.now(datetime.UTC)
        self.date = now.date().isoformat()
        self.machine, self.bandwidth, self.check = {}, {}, {"counts": {}, "wrong": []}
        self.rows: dict[str, dict] = {}
        self.left_out: list[dict] = []
        self.deaths: list[dict] = []

    def add(self, event: dict) -> None:
        """Takes in an event, and tells of it."""
        from benchmarks.gpu import report

        event = dict(event)  # in one process it is the measurement's own
        kind = event.pop("event")
        if kind == "machine":
            self.machine = event
            print("\n".join(f"{key}: {value}" for key, value in event.items()), flush=True)
            why_not = event["backends"].get("cuda", "this embax has none")
            if event["platform"] != "cpu" and why_not != "available":
                print(f"note: embax's GPU kernels are not measured: {why_not}", flush=True)
            if event["platform"] == "cpu" and self.options.scale > MOST_ON_CPU:
                raise NoCard("JAX sees no GPU here (--scale 0.001 tries the program on a CPU)")
        elif kind == "bandwidth":
            self.bandwidth = event
            print(f"copy bandwidth: {event['bytes_per_second'] / 1e9:.0f} GB/s", flush=True)
        elif kind == "check":
            self.check = event
            print(f"small checks: {event['counts']}", *event["wrong"], sep="\n  ", flush=True)
        elif kind == "row":
            self._add_row(event)
            row = self.rows[event["job"]]
            print("\n".join(report.table([row], self.bandwidth.get("bytes_per_second"))), flush=True)
            print("\n".join(report.errors([row])), flush=True)
        elif kind == "left out":
            self.left_out.append(event)
            print(f"left out: {event['job']}: {event['why']}", flush=True)
        elif kind == "died":
            self.deaths.append(event)
            print(f"died: {event['contender']} in {event['job']}: {event['error']}", flush=True)
            if event["job"] in ("start", "check"):
                self.check["wrong"].append(f"{event['contender'] or 'the first worker'}: {event['error']}")
        if self.check["wrong"] and not self.options.no_check:
            raise Failed("\n".join(self.check["wrong"]))

    def _add_row(self, event: dict) -> None:
        contenders = event.pop("contenders")
        row = self.rows.setdefault(event["job"], {**event, "contenders": {}, "scaled": self.options.scale != 1})
        row["contenders"] |= contenders
        self.check["wrong"] += [
            f"{event['job']}: {name}: {result['error']}"
            for name, result in contenders.items()
            if result.get("error", "").startswith("Wrong:")
        ]

    def written(self) -> dict:
        """Returns everything."""
        from benchmarks.gpu import report

        for death in self.deaths:
            if death["job"] in self.rows:
                self.rows[death["job"]]["contenders"][death["contender"]] = {"error": death["error"]}
        rows = list(self.rows.values())
        card, bandwidth = self.machine.get("card", ""), self.bandwidth.get("bytes_per_second")
        return {
            "date": self.date,
            "scale": self.options.scale,
            "machine": self.machine,
            "bandwidth": self.bandwidth,
            "check": self.check,
            "rows": rows,
            "left out": self.left_out,
            "deaths": self.deaths,
            "targets": report.targets(rows, card, bandwidth),
        }


def measured(options: argparse.Namespace, jobs: list[cases.Job]) -> Iterator[dict]:
    """Yields the events of all frameworks, one after another."""
    from benchmarks.gpu import children, measure

    deadline = time.monotonic() + options.seconds
    wanted = [name for name in SHARES if name in options.frameworks.split(",")]
    tasks = ["machine", "check", "bandwidth"]
    checked = {"dims": [int(dim) for dim in options.dims.split(",")]} if options.dims else {}
    for place, framework in enumerate(wanted):
        why = None if framework == "jax" else _missing(framework)
        if why:
            yield {"event": "left out", "job": framework, "why": why}
            continue
        alone = all(other != "jax" and _missing(other) for other in wanted[place + 1 :])
        seconds = (deadline - time.monotonic()) * (1.0 if alone else SHARES[framework])
        own = [job for job in jobs if framework == "jax" or job.case != "e"]
        mine = {"tasks": tasks if framework == "jax" else [], "jobs": own, "folder": str(options.results)}
        request = measure.Request(framework, seconds=seconds, scale=options.scale, checked=checked, **mine)
        if options.one_process and framework == "jax":
            yield from measure.run(request)
        else:
            yield from children.persistent(request, time.monotonic() + seconds)


def _missing(framework: str) -> str | None:
    module = MODULES[framework]
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def write(found: dict, folder: Path) -> Path:
    """Writes the results, and returns the path of the Markdown file."""
    from benchmarks.gpu import report

    folder.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^A-Za-z0-9]+", "-", found["machine"].get("card", "none")).strip("-").lower()
    stem = f"gpu-{card}-{found['date']}"
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    path = folder / f"{stem}.md"
    path.write_text(report.markdown(found))
    for rows in folder.glob("rows-*.npz"):
        rows.replace(folder / f"{stem}-{rows.name}")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the results and returns the exit status."""
    options = parse(arguments)
    named = options.cases.split(",") + (["e"] if options.big else [])
    jobs = cases.jobs(",".join(named), options.scale)
    jobs = [job for job in jobs if any(fnmatch.fnmatch(job.name, glob) for glob in options.only)]
    if options.list:
        print("\n".join(job.name for job in jobs))
        return 0
    if "embax" not in sys.modules:
        if options.wheel:
            install.unpack(options.wheel)
        elif options.install:
            install.build()
        install.choose()
    if options.worker:
        from benchmarks.gpu import children

        children.work()
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    findings, status, begin = Findings(options), 0, time.monotonic()
    try:
        for event in measured(options, jobs):
            findings.add(event)
    except NoCard as failed:
        print(failed, file=sys.stderr)
        return 1
    except Failed as failed:
        print(f"\nstopped (--no-check goes on where results are wrong):\n{failed}", file=sys.stderr)
        status = 1
    path = write(findings.written(), options.results)
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{path.read_text()}\n{minutes:.1f} minutes; written to {path.with_suffix('')}.*")
    return status


if __name__ == "__main__":
    sys.exit(main())
