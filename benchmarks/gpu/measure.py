"""What a worker does: checks, the copy bandwidth, and the jobs, each with its contenders in turns.

Everything is told as events (dicts), as it happens, so that a worker that dies leaves behind what it has found, and
the name of the contender that was running.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases
from benchmarks.gpu.cases import PASSES, Job

# Calls that are started before the first one is waited for. JAX itself waits from 32 on, which would be counted.
MOST_CALLS = 20
CHUNK_SECONDS = 0.1
TURNS = 9
CHECK_SHARE = 0.25  # of the time that is left
DENSE = "optax dense"


@dataclasses.dataclass
class Request:
    """What one worker is to do. ``excluded`` are contenders that killed a worker before, by job."""

    framework: str
    tasks: list[str]
    jobs: list[Job]
    seconds: float
    scale: float = 1.0
    excluded: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    checked: dict[str, Any] = dataclasses.field(default_factory=dict)  # "dims": widths of the small checks
    folder: str = ""

    @classmethod
    def read(cls, found: dict) -> "Request":
        jobs = [Job(**{**job, "tables": tuple(job["tables"])}) for job in found["jobs"]]
        return cls(**{**found, "jobs": jobs})


def run(request: Request) -> Iterator[dict]:
    """Yields events until everything is done or the time is over."""
    deadline = time.monotonic() + request.seconds
    if request.framework != "jax":
        from benchmarks.gpu import peers

        yield from _jobs(request, deadline, functools.partial(peers.contenders, request.framework))
        return
    from benchmarks.gpu import machine

    if "machine" in request.tasks:
        yield {"event": "machine", **machine.describe()}
    if "check" in request.tasks:
        yield from _checks(request, deadline)
    if "bandwidth" in request.tasks:
        yield {"event": "bandwidth", **machine.copy_bandwidth(request.scale)}
    yield from _jobs(request, deadline, _jax_contenders)


def backends() -> list[str]:
    """Returns the backends of embax that can run here, in the order of preference."""
    from embax import kernels

    return [name for name in kernels.REGISTRY if kernels.get(name).unavailable() is None]


def _checks(request: Request, deadline: float) -> Iterator[dict]:
    from benchmarks.gpu import checks

    until = time.monotonic() + CHECK_SHARE * (deadline - time.monotonic())
    todo = checks.combinations(backends(), tuple(request.checked.get("dims", checks.DIMS)))
    counts: dict[str, dict[str, int]] = {}
    wrong = []
    for said, one, why in checks.run(todo, until):
        if said == "begin":
            yield {"event": "begin", "job": "check", "contender": str(one)}
            continue
        mine = counts.setdefault(one.backend, {"right": 0, "wrong": 0, "left out": 0})
        mine[said] += 1
        if said == "wrong":
            wrong.append(f"{one}: {why}")
            if _card_is_lost():
                yield {"event": "check", "counts": counts, "wrong": wrong}
                yield {"event": "broken", "job": "check", "contender": str(one), "error": why}
                return
    yield {"event": "check", "counts": counts, "wrong": wrong}


def _jobs(request: Request, deadline: float, make: Any) -> Iterator[dict]:
    todo = list(request.jobs)
    while todo:
        left, job = deadline - time.monotonic(), todo[0]
        until = time.monotonic() + left * job.weight / sum(other.weight for other in todo)
        todo.pop(0)
        if left <= 0:
            yield {"event": "left out", "job": job.name, "why": f"no time left for {request.framework}"}
            continue
        for event in _one_job(job, request, until, make):
            yield event
            if event["event"] == "broken":
                return


def _one_job(job: Job, request: Request, until: float, make: Any) -> Iterator[dict]:
    """Yields what happens while the contenders of one job are made, checked and measured."""
    begun, asked, found, errors = time.monotonic(), job.name, {}, {}
    gc.collect()  # the last job's tables: a jitted function that refers to its object is freed by nothing else
    yield {"event": "begin", "job": asked, "contender": "all"}
    try:
        job = _fitting(job, request.framework)
        shared, makers = make(job, request.excluded.get(asked, []))
        for name, maker in makers.items():
            _caught(errors, name, lambda maker=maker, name=name: found.setdefault(name, maker()))
        _compile(found, errors)
        for name in list(found):
            yield {"event": "begin", "job": asked, "contender": name}
            _caught(errors, name, lambda name=name: _warm_up(found[name], errors, name, request.folder))
            broken = _after_error(errors, name, found, shared)
            if broken:
                yield {"event": "broken", "job": asked, "contender": name, "error": errors[name]["error"]}
                return
        for event in _turns(job, shared, found, errors, until):
            yield {**event, "job": asked}
            if event["event"] == "broken":
                return
    except Exception as error:  # the tables themselves do not fit, or every contender's state is lost
        errors.setdefault("all", {"error": _text(error)})
    _, distinct = cases.draw(job)
    row = {"event": "row", "job": asked, **dataclasses.asdict(job), "contenders": errors, "ids": job.ids}
    row |= {"rows": job.rows, "distinct": distinct, "bytes": job.must_move(distinct), "state_bytes": job.state_bytes}
    yield {**row, "seconds": time.monotonic() - begun}


def _fitting(job: Job, framework: str) -> Job:
    """Returns the job, the one of all of Criteo in bfloat16 where the card is too small for float32."""
    if framework != "jax" or job.case != "e":
        return job
    from benchmarks.gpu import machine

    fits = job.state_bytes + 6 * job.activation_bytes < machine.memory_limit()
    return job if fits else dataclasses.replace(job, dtype="bfloat16")


def _jax_contenders(job: Job, excluded: list[str]) -> tuple[Any, dict[str, Any]]:
    """Returns what they share, and functions that make them, by name."""
    from benchmarks.gpu import contenders, dense, machine

    if job.state_bytes + 4 * job.activation_bytes > machine.memory_limit():
        limit = machine.memory_limit() / 1e9
        raise contenders.Skip(f"tables and slots take {job.state_bytes / 1e9:.0f} GB, and there are {limit:.0f}")
    names = backends()
    shared = contenders.Shared(job, names[0])
    found: dict[str, Any] = {f"embax {name}": lambda name=name: contenders.Embax(shared, name) for name in names}
    found[DENSE] = lambda: dense.Dense(shared)
    return shared, {name: maker for name, maker in found.items() if name not in excluded}


def _caught(errors: dict, name: str, call: Any) -> None:
    """Calls, and keeps the first line of an error in place of the contender's times."""
    try:
        call()
    except Exception as error:  # a contender that fails must not stop the others
        errors[name] = {"error": _text(error)}


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = (lines[0] if lines else "")[:300]
    return text if type(error).__name__ == "Skip" else f"{type(error).__name__}: {text}"


def _compile(found: dict, errors: dict) -> None:
    """Compiles the programs of all contenders, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1))) as pool:
        waiting = []
        for name, contender in found.items():
            if hasattr(contender, "programs"):
                _caught(errors, name, lambda c=contender, n=name: waiting.extend(_lowered(pool, n, c)))
        for name, what, future in waiting:
            _caught(errors, name, lambda n=name, w=what, f=future: found[n].compiled.update({w: f.result()}))
    for name in [name for name in found if "error" in errors.get(name, {})]:
        del found[name]


def _lowered(pool: Any, name: str, contender: Any) -> list[tuple]:
    return [
        (name, what, pool.submit(function.lower(*arguments).compile))
        for what, (function, *arguments) in contender.programs().items()
    ]


def _warm_up(contender: Any, errors: dict, name: str, folder: str) -> None:
    """Checks a step at full size where that can be asked, and runs every pass."""
    result = errors.setdefault(name, {"note": getattr(contender, "note", "")})
    if hasattr(contender, "one_step"):
        from benchmarks.gpu import sampled

        big = contender.shared.job.case == "e"
        save = Path(folder) / f"rows-{name.replace(' ', '-')}.npz" if big and folder else None
        result["rows_checked"] = sampled.check(contender, big, save)
    for what in getattr(contender, "passes", PASSES):
        chunk(contender, what, 0, 1)
        seconds, _ = chunk(contender, what, 1, 2)
        calls = int(max(2, min(MOST_CALLS, CHUNK_SECONDS / (seconds / 2))))
        result[what] = {"calls": calls, "ms": [], "start_ms": [], "estimate": seconds / 2 * calls}
    for what, compiled in getattr(contender, "compiled", {}).items():
        if what in result:
            result[what]["temporary_bytes"] = _temporary_bytes(compiled)


def _temporary_bytes(compiled: Any) -> int | None:
    try:
        return int(compiled.memory_analysis().temp_size_in_bytes)
    except Exception:  # not every platform says
        return None


def _after_error(errors: dict, name: str, found: dict, shared: Any) -> bool:
    """Removes a contender that failed, makes the tables anew if it took them along; says whether the card is lost."""
    if "error" not in errors.get(name, {}):
        return False
    del found[name]
    if shared is None:
        return False
    if _card_is_lost():
        return True
    if shared.lost():
        shared.remake()
    return False


def _card_is_lost() -> bool:
    """Says whether nothing can be computed any more: a kernel that read or wrote astray ends the process's context."""
    import jax
    import jax.numpy as jnp

    try:
        return int(jax.block_until_ready(jnp.arange(3, dtype=jnp.int32)).sum()) != 3
    except Exception:
        return True


def chunk(contender: Any, what: str, index: int, calls: int) -> tuple[float, float]:
    """Returns the seconds until so many passes are done, and until the last of them is started."""
    begin = time.perf_counter()
    for call in range(calls):
        contender.run(what, index + call)
    started = time.perf_counter() - begin
    contender.wait()
    return time.perf_counter() - begin, started


def _turns(job: Job, shared: Any, found: dict, errors: dict, until: float) -> Iterator[dict]:
    """Measures in turns; who begins changes from turn to turn."""
    index = 0
    for turn in range(TURNS):
        names = list(found)
        if not names or (turn and time.monotonic() + _expected(errors, names) > until):
            break
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for what in PASSES:
            for name in order:
                if name not in found or what not in errors[name]:
                    continue
                yield {"event": "begin", "contender": name}
                _caught(errors, name, lambda n=name, w=what, i=index: _timed(job, found[n], errors[n][w], w, i))
                index += 1
                if _after_error(errors, name, found, shared):
                    yield {"event": "broken", "contender": name, "error": errors[name]["error"]}
                    return
    for name in found:
        _summarize(errors[name])


def _expected(errors: dict, names: list[str]) -> float:
    return sum(errors[name][what]["estimate"] for name in names for what in PASSES if what in errors[name])


def _timed(job: Job, contender: Any, result: dict, what: str, index: int) -> None:
    steps = result["calls"] * job.unroll
    seconds, started = chunk(contender, what, index, result["calls"])
    result["ms"].append(1e3 * seconds / steps)
    result["start_ms"].append(1e3 * started / steps)


def _summarize(result: dict) -> None:
    for what in PASSES:
        if what in result:
            times = result[what]
            starts = times.pop("start_ms")
            del times["estimate"]
            times |= {"median": statistics.median(times["ms"]), "min": min(times["ms"])}
            times["start"] = statistics.median(starts)
            # Where starting takes most of the time, the card waits for the host: not a figure of the kernels.
            times["host_bound"] = times["start"] > 0.8 * times["median"]
