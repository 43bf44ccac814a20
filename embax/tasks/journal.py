"""What a run tells while it goes: lines of JSON, TensorBoard events, and the time that each part took."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Numbers of a run, as they come.

    Args:
      folder: of the run.
      since: the step that the run goes on from, whose numbers so far are kept; None for a run that begins.
    """

    def __init__(self, folder: Path, since: int | None = None):
        from tensorboardX import SummaryWriter

        path = folder / "metrics.jsonl"
        if since is None:
            for old in (folder / "tensorboard").glob("events.*"):
                old.unlink()
        kept = [] if since is None or not path.exists() else _lines(path, since)
        path.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._events = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
        self.parts: dict[str, float] = {}

    def write(self, kind: str, **numbers: Any) -> None:
        """Adds a line; of numbers with a ``step``, TensorBoard gets those that are floats."""
        self._file.write(json.dumps(_plain({"kind": kind, **numbers}), ensure_ascii=False) + "\n")
        self._file.flush()
        group = str(numbers.get("split", kind))
        for name, value in numbers.items():
            if "step" in numbers and isinstance(value, float) and name != "epoch":
                self._events.add_scalar(f"{group}/{name}", value, numbers["step"])

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds what is done within to the time of a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

    def close(self) -> None:
        """Writes what the parts took, and lets go of the files."""
        self.write("timing", parts={name: round(seconds, 3) for name, seconds in self.parts.items()})
        self._file.close()
        self._events.close()


def _plain(value: Any) -> Any:
    """Returns what JSON has: null for a number that is infinite or none."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path, since: int) -> list[str]:
    """Returns the lines up to a step; not what a run wrote that died before its next checkpoint, nor half a line."""
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if found.get("step", 0) <= since:
            kept.append(line)
    return kept
