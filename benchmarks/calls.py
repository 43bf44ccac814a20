"""What one call costs before it looks anything up, and what the width of a row costs; in turns, minimum and median.

    python -m benchmarks.calls [--turns 300] [--markdown FILE]

Calls: a jitted function of one array that does nothing; a jitted lookup of embax's native backend of 64 empty bags, of
64 bags of one id and of 64 bags of 20, in a table of 1,000,000 rows x 64 and, for the 20, in one of 1,000 rows; torch's
``embedding_bag`` of the same ids and tables. In a turn everybody makes one call that is not counted and then 20, whose
mean is noted; eight batches of ids take turns too, so that their rows stay in a cache. Widths: rows of 128, 256 and 512
bytes in tables of the same bytes, 8,192 bags of 20 ids, one call in a turn after one that is not counted. What is not
installed is left out, and the reason is printed.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import embax
from benchmarks.cpu.__main__ import cpu_name
from benchmarks.cpu.peers import import_torch
from benchmarks.cpu.workloads import Skip
from embax import kernels

BAGS, DIM, ROWS, FEW_ROWS = 64, 64, 1_000_000, 1000
BATCHES = 8
CALLS = 20  # of a turn
WIDE_BAGS, WIDE_BYTES = 8192, 256_000_000
THREADS = 2


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=300, help="of each call; a tenth of it for the widths")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    embax.tune_allocator()
    lines = [f"{cpu_name()}, Python {platform.python_version()}, jax {jax.__version__}, {args.turns} turns", ""]
    why_not = kernels.get("cpu").unavailable()
    if why_not:
        print(f"(skipped: embax: no native backend: {why_not})")
    calls = {"an empty jitted call": empty_call()} | ({} if why_not else native_calls()) | torch_calls()
    lines += report("call", in_turns(calls, args.turns, CALLS)) + [""]
    if not why_not:
        lines += report("row of", in_turns(width_calls(), max(3, args.turns // 10), 1), per="128 bytes")
    text = "\n".join(lines)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")


def in_turns(calls: dict, turns: int, times: int) -> dict[str, list[float]]:
    """Returns the seconds of a call, one number for each turn, the first two turns left out."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            call(turn)
            begin = time.perf_counter()
            for number in range(times):
                call(turn + 1 + number)
            took[name].append((time.perf_counter() - begin) / times)
    return {name: seconds[2:] for name, seconds in took.items()}


def report(what: str, took: dict[str, list[float]], per: str = "") -> list[str]:
    """Returns the lines of a table; with ``per``, ratios to that call."""
    lines = [f"| {what} | minimum | median |" + (f" / {per}, minimum, median |" if per else "")]
    lines.append("|---|---|---|" + ("---|" if per else ""))
    for name, seconds in took.items():
        figures = min(seconds), statistics.median(seconds)
        cells = [name, *(f"{1e6 * figure:.1f} µs" for figure in figures)]
        if per:
            cells.append(f"{figures[0] / min(took[per]):.2f}, {figures[1] / statistics.median(took[per]):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def empty_call():
    """Returns a call of a jitted function that gives its argument back."""
    nothing, argument = jax.jit(lambda x: x), jnp.zeros((8,), jnp.float32)
    return lambda number: jax.block_until_ready(nothing(argument))


def drawn(rows: int, bags: int, valency: int) -> list[np.ndarray]:
    """Returns batches of uniform ids ``[bags, valency]``, the same at every call."""
    rng = np.random.default_rng(rows + valency)
    return [rng.integers(0, rows, (bags, valency), np.int32) for _ in range(BATCHES)]


def lookup(rows: int, dim: int, ids: list[np.ndarray]):
    """Returns a call of embax's jitted lookup in a table of ones."""
    table = embax.TableSpec(
        name="table",
        vocabulary_size=rows,
        embedding_dim=dim,
        combiner="sum",
        initializer=jax.nn.initializers.ones,
        optimizer=embax.SGD(0.1),
    )
    shapes = {"input_shape": (None, ids[0].shape[1]), "output_shape": (None, dim)}
    feature = embax.FeatureSpec(name="x", table_spec=table, padding_id=-1, **shapes)
    plan = embax.plan(feature, backend="cpu")
    tables = embax.init(plan, jax.random.key(0))
    batches = [jax.device_put(embax.preprocess(plan, some)) for some in ids]
    look = jax.jit(lambda tables, batch: embax.lookup(plan, tables, batch)[0])
    return lambda number: jax.block_until_ready(look(tables, batches[number % BATCHES]))


def native_calls() -> dict:
    """Returns the calls of the native backend."""
    absent = [np.full((BAGS, 1), -1, np.int32)] * BATCHES
    return {
        "embax, 64 empty bags": lookup(ROWS, DIM, absent),
        "embax, 64 ids": lookup(ROWS, DIM, drawn(ROWS, BAGS, 1)),
        "embax, 1,280 ids": lookup(ROWS, DIM, drawn(ROWS, BAGS, 20)),
        "embax, 1,280 ids of 1,000 rows": lookup(FEW_ROWS, DIM, drawn(FEW_ROWS, BAGS, 20)),
    }


def torch_calls() -> dict:
    """Returns torch's calls; none, with a printed reason, where it is not installed."""
    try:
        torch = import_torch()
    except Skip as reason:
        print(f"(skipped: torch: {reason})")
        return {}
    torch.set_num_threads(THREADS)

    def call(rows, valency):
        table = torch.ones(rows, DIM)
        ids = [torch.from_numpy(some.astype(np.int64)) for some in drawn(rows, BAGS, valency)]

        def bags(number):
            with torch.no_grad():
                torch.nn.functional.embedding_bag(ids[number % BATCHES], table, mode="sum")

        return bags

    return {
        "torch, 64 ids": call(ROWS, 1),
        "torch, 1,280 ids": call(ROWS, 20),
        "torch, 1,280 ids of 1,000 rows": call(FEW_ROWS, 20),
    }


def width_calls() -> dict:
    """Returns lookups of as many ids in tables of as many bytes, whose rows are narrow and wide."""
    calls = {}
    for width in (128, 256, 512):
        rows = WIDE_BYTES // width
        calls[f"{width} bytes"] = lookup(rows, width // 4, drawn(rows, WIDE_BAGS, 20))
    return calls


if __name__ == "__main__":
    main()
