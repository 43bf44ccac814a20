"""The workloads: their tables and features, and their ids, the same ones at every run.

Zipf ids have the rank r in 1..V with a probability proportional to r ** -1.05; rank r is row (r * m) mod V, with a
fixed m that has no divisor in common with V, so that the hot rows are spread over the table.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

BATCH, VALENCY = 8192, 20
ALL, EXACT = ("sgd", "rowwise", "adagrad", "adam"), ("sgd", "rowwise", "adagrad")
Batch = list[np.ndarray]  # one [batch, valency] int32 array for each feature


class Skip(Exception):
    """A contender or workload that cannot be measured here, and why."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tables, the table of each feature, and how its ids are drawn (``uniform``, ``zipf``, or a data set's name)."""

    name: str
    tables: tuple[int, ...]
    dim: int
    features: tuple[int, ...] = (0,)
    batch: int = BATCH
    valency: int = VALENCY
    pooled: bool = True
    ids: tuple[str, ...] = ("uniform", "zipf")
    optimizers: tuple[str, ...] = EXACT
    turn: int = 4  # consecutive steps of one contender
    dense: bool = False  # whether flax + optax takes part
    untuned: bool = False  # whether it is measured without the allocator setting too

    @property
    def rows(self) -> int:
        return sum(self.tables)

    @property
    def offsets(self) -> list[int]:
        """The first row of each table where they stand one behind another."""
        return [sum(self.tables[:t]) for t in range(len(self.tables))]

    @property
    def ids_per_step(self) -> int:
        return len(self.features) * self.batch * self.valency

    def table_bytes(self, optimizer: str) -> int:
        full_slots = {"adagrad": 1, "adam": 2}.get(optimizer, 0)
        return 4 * self.rows * (self.dim * (1 + full_slots) + (optimizer == "rowwise"))


def workloads() -> list[Workload]:
    """Returns every workload that trains."""
    found = []
    for rows, label in ((10**6, "1e6"), (10**7, "1e7")):
        for dim in (16, 64, 128):
            found.append(Workload(f"{label}x{dim}", (rows,), dim, optimizers=ALL, dense=rows == 10**6 or dim <= 64))
    for dim in (1, 2, 4, 8):
        found.append(Workload(f"1e7x{dim}", (10**7,), dim, optimizers=("sgd", "adagrad")))
    many = tuple(range(26))
    found.append(Workload("26 tables 1e6x64", (10**6,) * 26, 64, many, valency=1, untuned=True))
    found.append(Workload("1e7x64", (10**7,), 64, ids=("dlrm",)))
    for valency in (1, 20):
        small = Workload(f"batch of {64 * valency}, 1e6x64", (10**6,), 64, batch=64, valency=valency, turn=100)
        found.append(dataclasses.replace(small, ids=("uniform",), optimizers=("sgd", "adagrad")))
    found.append(Workload("unpooled 1e6x64", (10**6,), 64, pooled=False))
    gowalla = Workload("Gowalla x64", (29_858, 40_981), 64, (0, 1, 1), 2048, 1, ids=("gowalla",), turn=20, dense=True)
    found.append(dataclasses.replace(gowalla, optimizers=("sgd", "adagrad", "adam")))
    fields = tuple(range(18))
    journey = Workload("Complete Journey x16", JOURNEY_CARDS, 16, fields, 2048, 1, ids=("completejourney",), turn=20)
    found.append(dataclasses.replace(journey, dense=True))
    return found


# fmt: off
JOURNEY_CARDS = (2470, 68510, 458, 8, 25, 5310, 31, 3, 303, 2243, 3063, 7, 13, 5, 3, 6, 5, 5)
# fmt: on


def batches(workload: Workload, ids: str, count: int, data: Path) -> list[Batch]:
    """Returns ``count`` batches, the same ones at every call."""
    rng = np.random.default_rng([workload.rows, workload.dim, workload.batch, len(workload.features)])
    readers = {"gowalla": _gowalla, "completejourney": _journey}
    if ids in readers:
        return readers[ids](workload, count, rng, data)
    shape, draw = (workload.batch, workload.valency), _draw(ids, data)
    return [[draw(rng, workload.tables[table], shape) for table in workload.features] for _ in range(count)]


def _draw(ids: str, data: Path) -> Callable[[np.random.Generator, int, tuple[int, int]], np.ndarray]:
    if ids == "uniform":
        return lambda rng, rows, shape: rng.integers(0, rows, shape, np.int32)
    if ids == "zipf":
        return lambda rng, rows, shape: spread(_zipf_ranks(rng, rows, shape), rows)
    if ids == "dlrm":
        histogram = reuse_histogram(data)
        return lambda rng, rows, shape: _reused(rng, rows, shape, histogram)
    raise ValueError(f"ids {ids!r} is none of uniform, zipf, dlrm")


def spread(ranks: np.ndarray, rows: int) -> np.ndarray:
    """Returns a row for each rank 0..rows - 1: one to one, with neighbours far apart."""
    factor = int(rows * 0.6180339887)
    while math.gcd(factor, rows) > 1:
        factor += 1
    return (ranks.astype(np.int64) * factor % rows).astype(np.int32)


def _zipf_ranks(rng: np.random.Generator, rows: int, shape: tuple[int, int]) -> np.ndarray:
    shares = _zipf_shares(rows)
    return np.minimum(np.searchsorted(shares, rng.random(shape) * shares[-1], side="right"), rows - 1)


@functools.lru_cache(maxsize=1)
def _zipf_shares(rows: int) -> np.ndarray:
    return np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -1.05)


def reuse_histogram(data: Path) -> list[tuple[float, float]]:
    """Returns (share of the accesses, accesses to each row) of the bins of the first trace, the hottest bin first.

    The file has, for bins of rows by how often a batch accesses them, the share of rows and the share of accesses.
    """
    path = data / "dlrm_locality" / "locality_stats_2022.txt"
    if not path.exists():
        raise Skip(f"{path.name} is not in {path.parent}")
    first = path.read_text().split("\n\n")[0]
    mean = float(re.search(r"Avg col size: ([\d.]+)", first).group(1))
    by_row, by_access = first.split("Ratio of index distribution")
    rows, accesses = (
        [(int(a), float(s)) for a, s in re.findall(r"\((\d+)[^:]*: ([\d.]+)", t)] for t in (by_row, by_access)
    )
    bins = []
    for (low, row_share), (_, share) in zip(rows, accesses, strict=True):
        middle = 1.0 if low == 0 else math.sqrt(2) * low
        exact = mean * share / row_share if row_share >= 0.01 else middle  # three digits only: coarse for few rows
        bins.append((share, min(max(exact, low + 1), 2 * low + 1)))
    return bins[::-1]


def _reused(rng: np.random.Generator, rows: int, shape: tuple[int, int], histogram: list) -> np.ndarray:
    """Returns ids whose reuse within the batch has that histogram; rows used more than 64 times are always the same."""
    total = shape[0] * shape[1]
    parts, hot = [], 0
    for share, reuse in histogram:
        accesses = round(share * total)
        distinct = max(1, round(accesses / reuse))
        if reuse > 64:
            ranks, hot = np.arange(hot, hot + distinct), hot + distinct
        else:
            ranks = rng.integers(hot, rows, distinct)
        parts.append(np.resize(ranks, accesses))
    ranks = np.resize(np.concatenate(parts), total)
    rng.shuffle(ranks)
    return spread(ranks, rows).reshape(shape)


def _gowalla(workload: Workload, count: int, rng: np.random.Generator, data: Path) -> list[Batch]:
    """Users, an item of each, and a random item: the ids of a step of Bayesian personalized ranking."""
    with np.load(_existing(data / "gowalla" / "gowalla.npz")) as arrays:
        users, items = arrays["train_user"], arrays["train_item"]
    found = []
    for _ in range(count):
        lines = rng.integers(0, len(users), workload.batch)
        others = rng.integers(0, workload.tables[1], workload.batch)
        found.append([a.astype(np.int32)[:, None] for a in (users[lines], items[lines], others)])
    return found


def _journey(workload: Workload, count: int, rng: np.random.Generator, data: Path) -> list[Batch]:
    """The categorical fields of random lines of the transactions."""
    with np.load(_existing(data / "completejourney" / "cj_fields.npz")) as arrays:
        if tuple(arrays["cards"]) != workload.tables:
            raise Skip(f"cj_fields.npz has tables of {arrays['cards'].tolist()} rows")
        fields = [arrays[str(name)] for name in arrays["fields"]]
    found = []
    for _ in range(count):
        lines = rng.integers(0, len(fields[0]), workload.batch)
        found.append([field[lines].astype(np.int32)[:, None] for field in fields])
    return found


def _existing(path: Path) -> Path:
    if not path.exists():
        raise Skip(f"{path.name} is not in {path.parent}")
    return path
