"""What a child process does: builds all contenders of a workload, and times them in turns."""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.cpu import contenders, peers
from benchmarks.cpu.limits import Limit
from benchmarks.cpu.memory import Memory
from benchmarks.cpu.workloads import Skip, Workload, batches

NAMES = ("embax", "reference", "flax + optax", "torch", "FBGEMM", "limit")
BATCHES = 12  # each contender goes through all of them, so no turn finds its rows in the cache
DENSE_ARRAYS = 3  # beside table and slots: the gradient, and room for what XLA keeps of it
MARGIN = 1 << 30


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure: ``repeats`` counted turns, fewer for a contender that has used up ``seconds``."""

    repeats: int
    seconds: float
    data: Path
    threads: int
    library: str  # the compiled limits, or nothing


def build(workload: Workload, optimizer: str, memory: Memory, effort: Effort) -> tuple[dict, dict]:
    """Returns the contenders by name, and why the others are not there."""
    makers: dict[str, Callable] = {
        "embax": lambda: contenders.Embax(workload, optimizer, memory),
        "reference": lambda: contenders.Embax(workload, optimizer, memory, "reference"),
        "flax + optax": lambda: _dense(workload, optimizer, memory),
        "torch": lambda: peers.Torch(workload, optimizer, memory),
        "FBGEMM": lambda: peers.Fbgemm(workload, optimizer, memory),
        "limit": lambda: Limit(workload, memory, effort.threads, effort.library),
    }
    found, skipped = {}, {}
    for name, maker in makers.items():
        try:
            found[name] = maker()
        except Skip as reason:
            skipped[name] = str(reason)
        except (RuntimeError, AssertionError, MemoryError) as error:
            if name == "embax":
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found, skipped


def _dense(workload: Workload, optimizer: str, memory: Memory) -> contenders.Dense:
    if not workload.dense:
        raise Skip("it does not take part in this workload")
    if workload.rows > 10**6 and optimizer != "adagrad":
        raise Skip("with more than a million rows it is measured with Adagrad only")
    need = DENSE_ARRAYS * 4 * workload.rows * workload.dim + MARGIN
    if need > contenders.available_bytes():
        raise Skip(f"needs {need / 2**30:.0f} GiB more, {contenders.available_bytes() / 2**30:.0f} are free")
    return contenders.Dense(workload, optimizer, memory)


def in_turns(operations: dict[str, Callable], turn: int, effort: Effort, after: Callable) -> dict[str, float]:
    """Returns the median milliseconds of each operation, a function of the number of a batch.

    Turns of consecutive calls; the first call of a turn and the whole first turn are not counted. ``after`` is called
    after every turn.
    """
    times: dict[str, list[float]] = {name: [] for name in operations}
    spent, took_last, next_batch = dict.fromkeys(operations, 0.0), dict.fromkeys(operations, 0.0), 0
    for number in range(effort.repeats + 1):
        for name, function in operations.items():
            if number > 2 and spent[name] > 1e3 * effort.seconds:
                continue
            slow = number == 0 or turn * took_last[name] > 1e3 * effort.seconds
            for call in range(2 if slow else turn):
                took = took_last[name] = timed(function, next_batch % BATCHES)
                next_batch += 1
                if number:
                    spent[name] += took
                    times[name] += [took] if call else []
            after()
    return {name: statistics.median(values) for name, values in times.items()}


def timed(function: Callable, index: int) -> float:
    """Returns the milliseconds of one call."""
    start = time.perf_counter()
    function(index)
    return 1e3 * (time.perf_counter() - start)


def train(workload: Workload, optimizer: str, forward: bool, effort: Effort) -> Iterator[dict]:
    """Yields a row of results for the forward pass, for preprocessing, and for the step, of every kind of ids."""
    need = workload.table_bytes(optimizer) + MARGIN
    if need > contenders.available_bytes():
        raise Skip(f"needs {need / 2**30:.0f} GiB, {contenders.available_bytes() / 2**30:.0f} are free")
    memory = Memory(workload, contenders.OPTIMIZERS[optimizer])
    found, skipped = build(workload, optimizer, memory, effort)
    for ids in workload.ids:
        try:
            drawn = batches(workload, ids, BATCHES, effort.data)
        except Skip as reason:
            yield {"ids": ids, "what": optimizer, "ms": {}, "skipped": {"all": str(reason)}}
            continue
        here, missing = dict(found), dict(skipped)
        if ids == "zipf" and "flax + optax" in here:
            del here["flax + optax"]
            missing["flax + optax"] = "its step does not depend on the ids: see uniform"
        for contender in here.values():
            contender.prepare(drawn)

        def bind():
            if memory.moved():
                for contender in found.values():
                    contender.rebind()

        bind()
        for method in ("forward", "preprocess", "step") if forward else ("step",):
            takes_part = [name for name in here if method != "preprocess" or name == "embax"]
            operations = {name: getattr(here[name], method) for name in takes_part}
            yield {
                "ids": ids,
                "what": optimizer if method == "step" else method,
                "ms": in_turns(operations, workload.turn, effort, bind),
                "skipped": {} if method == "preprocess" else missing,
                "shared": memory.shared,
                "moves": memory.moves,
            }


def check() -> str:
    """Compares activations and rows after one step of all contenders on small tables; raises if they differ."""
    pooled = Workload("check", (997, 701), 8, (0, 1, 1), batch=32, valency=4, dense=True)
    flat = dataclasses.replace(pooled, tables=(997,), features=(0,), pooled=False)
    said = []
    for workload in (pooled, flat):
        for optimizer in contenders.OPTIMIZERS:
            said.append(
                f"{optimizer}{'' if workload.pooled else ' unpooled'}: {', '.join(_compare(workload, optimizer))}"
            )
    return "; ".join(said)


def _compare(workload: Workload, optimizer: str) -> list[str]:
    memory = Memory(workload, contenders.OPTIMIZERS[optimizer])
    found, _ = build(workload, optimizer, memory, Effort(0, 0, Path(), 1, ""))
    if not memory.shared:
        return ["not compared, for embax keeps rows in a form of its own"]
    drawn = batches(workload, "uniform", 1, Path())
    rng = np.random.default_rng(0)
    memory.moved()
    start = [rng.random(view.shape, np.float32) if i == 0 else view.copy() for i, view in enumerate(memory.views())]
    expected, names = None, []
    for name, contender in found.items():
        if name == "limit":
            continue
        memory.moved()
        for view, values in zip(memory.views(), start, strict=True):
            view[:] = values
        contender.rebind()
        contender.prepare(drawn)
        outputs = [np.array(output) for output in contender.outputs(0)]
        contender.step(0)
        memory.moved()
        result = outputs + [np.array(view) for view in memory.views()]
        expected = expected or result
        for ours, theirs in zip(expected, result, strict=True):
            if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
                raise RuntimeError(f"{name} and {names[0]} differ after one step of {optimizer}")
        names.append(name)
    return names


def set_up(threads: int, tuned: bool) -> None:
    """Gives torch its threads, and calls embax's allocator setting where there is one."""
    import embax

    if tuned and hasattr(embax, "tune_allocator"):
        embax.tune_allocator()
    try:
        peers.import_torch().set_num_threads(threads)
    except Skip:
        pass
    jax.devices()


def versions() -> dict:
    """Returns the versions of all that is measured, and whether embax has an allocator setting of its own."""
    import importlib.metadata

    import embax

    found: dict = {"python": platform.python_version(), "tune_allocator": hasattr(embax, "tune_allocator")}
    for name in ("jax", "flax", "optax", "torch", "fbgemm_gpu-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
