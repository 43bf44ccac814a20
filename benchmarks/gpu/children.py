"""Workers in processes of their own: a kernel that reads astray, or a pool of memory, ends with its process."""

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from benchmarks.gpu.measure import Request, run

MARK = "@event "
GRACE = 45.0  # seconds beyond its time after which a worker is ended: it may be compiling
MOST_DEATHS = 6


def work() -> None:
    """Does what standard input asks for, and prints the events."""
    request = Request.read(json.loads(sys.stdin.read()))
    for event in run(request):
        print(MARK + json.dumps(event), flush=True)


def events(request: Request, seconds: float) -> Iterator[dict]:
    """Yields the events of a worker, then {"event": "ended"} with its exit code, None where it had to be ended."""
    environment = {**os.environ}
    # Workers run one after another, so each may have the card; the rest is for the context and the libraries.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    request = dataclasses.replace(request, seconds=seconds)
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in child.stdout] + [lines.put(None)])
    reader.daemon = True
    reader.start()
    try:
        child.stdin.write(json.dumps(dataclasses.asdict(request)))
        child.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; its exit code says so
    deadline, code = time.monotonic() + seconds + GRACE, None
    try:
        while True:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is None:
                code = child.wait()
                break
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                print(line, end="", flush=True)
    except queue.Empty:
        pass
    finally:  # also where nobody wants to hear more
        child.kill()
        child.wait()
    yield {"event": "ended", "code": code}


def persistent(request: Request, deadline: float) -> Iterator[dict]:
    """Yields the events of as many workers as it takes: when one dies, another goes on without what killed it."""
    excluded = {job: list(names) for job, names in request.excluded.items()}
    tasks, jobs, deaths = list(request.tasks), list(request.jobs), 0
    while (jobs or tasks) and deaths <= MOST_DEATHS and time.monotonic() < deadline:
        running, why = ("", ""), ""
        left = dataclasses.replace(request, tasks=tasks, jobs=jobs, excluded=excluded)
        for event in events(left, deadline - time.monotonic()):
            kind = event["event"]
            if kind == "begin":
                running = event["job"], event["contender"]
            elif kind in ("row", "left out"):
                jobs = [job for job in jobs if job.name != event["job"]]
            elif kind in tasks:
                tasks = [task for task in tasks if task != kind]
            elif kind == "broken":
                why = event["error"]
            if kind == "ended":
                if event["code"] == 0 and not why:
                    return
                ended = "took too long" if event["code"] is None else f"its process ended ({event['code']})"
                why = why or ended
            else:
                yield event
        deaths += 1
        job, contender = running
        if job in ("", "check"):
            if not tasks:
                break  # it does not even start
            tasks = []  # what began before the jobs is not tried again
            yield {"event": "died", "job": job or "start", "contender": contender, "error": why}
            continue
        if contender == "all":
            jobs = [one for one in jobs if one.name != job]
        excluded.setdefault(job, []).append(contender)
        yield {"event": "died", "job": job, "contender": contender, "error": why}
    for job in jobs:
        yield {"event": "left out", "job": job.name, "why": f"no time or too many deaths ({request.framework})"}
