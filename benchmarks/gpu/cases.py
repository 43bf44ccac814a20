"""What is measured: tables, batches, the bytes that a step must move, figures published by others, targets."""

import dataclasses
import functools

import numpy as np

from benchmarks.cpu.workloads import spread

BATCHES = 8  # made ahead and used in turn
POWER = 1.05
SLOT_NUMBERS = {"sgd": 0, "rowwise": 0, "adagrad": 1, "adam": 2}  # float32 numbers beside each number of a row
PASSES = ("forward", "update", "step")

# Criteo-1TB as torchrec's DLRM and MLPerf's DLRM-DCNv2 hash it, at most 40,000,000 rows a table (their
# --num_embeddings_per_feature): 204,184,588 rows.
# fmt: off
CRITEO = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)
# fmt: on

# Milliseconds on an H100 80 GB, published by NVIDIA's recsys-examples for its dynamicemb and FBGEMM: 10 tables of
# 1,677,721 rows of 128 float32, 1,048,570 ids a step, power law 1.05, unpooled. Update: backward with the optimizer.
PUBLISHED = {
    ("a", "sgd"): {
        "FBGEMM on an H100": {"forward": 0.345, "update": 0.614, "step": 0.96},
        "dynamicemb on an H100": {"step": 1.92},
    },
    ("a", "adam"): {
        "FBGEMM on an H100": {"forward": 0.347, "update": 1.005, "step": 1.35},
        "dynamicemb on an H100": {"step": 2.19},
    },
}
TARGET_CARD = "H200"
TARGET_MS = {("a", "sgd"): 0.65, ("a", "adam"): 0.95}  # of a step, on that card
TARGET_SHARE = 0.6  # of the copy bandwidth, in case a
TARGET_RATIO = 5.0  # over the plain XLA path, in cases b and c ...
BOUND_SHARE = 0.8  # ... or at the bandwidth bound, which we call reached from this share of it on


@dataclasses.dataclass(frozen=True)
class Job:
    """One table of results: tables, batch, optimizer. Every table has one feature of ``batch`` x ``valency`` ids.

    ``unroll`` steps are one program where a step is shorter than what it takes to start one; ``weight`` is the share
    of the time that it gets, relative to others.
    """

    case: str
    optimizer: str
    tables: tuple[int, ...]
    dim: int
    batch: int
    valency: int = 1
    dtype: str = "float32"
    pooled: bool = True
    unroll: int = 1
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.case}-{self.dtype}-{self.dim}-{self.optimizer}"

    @property
    def rows(self) -> int:
        return sum(self.tables)

    @property
    def ids(self) -> int:
        return len(self.tables) * self.batch * self.valency

    @property
    def row_bytes(self) -> int:
        return self.dim * (2 if self.dtype == "bfloat16" else 4)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots of one row, which are float32 whatever the table's dtype."""
        return 4 * SLOT_NUMBERS[self.optimizer] * self.dim + (4 if self.optimizer == "rowwise" else 0)

    @property
    def state_bytes(self) -> int:
        return self.rows * (self.row_bytes + self.slot_bytes)

    @property
    def activation_bytes(self) -> int:
        return len(self.tables) * self.batch * self.row_bytes

    def must_move(self, distinct: float) -> dict[str, float]:
        """Returns the bytes that each pass has to read and write where ``distinct`` rows are touched.

        Forward: the ids (int32) and each distinct row read once, the activations written. Update: the gradients read,
        each distinct row and its slots read and written. What a kernel moves beyond that (sorted ids, a row read again
        for each of its occurrences, whole sectors for short rows) is its own affair.

        >>> job = Job("x", "adagrad", (100,), dim=4, batch=8, valency=2)
        >>> job.must_move(10)  # 16 ids, 10 rows of 16 bytes with slots of 16, 8 activations of 16
        {'forward': 352, 'update': 768, 'step': 1120}
        """
        forward = 4 * self.ids + distinct * self.row_bytes + self.activation_bytes
        update = self.activation_bytes + 2 * distinct * (self.row_bytes + self.slot_bytes)
        return {"forward": forward, "update": update, "step": forward + update}

    def scaled(self, scale: float) -> "Job":
        """Returns the job with fewer rows and samples."""
        if scale == 1:
            return self
        tables = tuple(max(min(rows, 8), round(rows * scale)) for rows in self.tables)
        unroll = self.unroll if scale >= 0.1 else min(self.unroll, 2)
        return dataclasses.replace(self, tables=tables, batch=max(8, round(self.batch * scale)), unroll=unroll)


def jobs(cases: str, scale: float) -> list[Job]:
    """Returns the jobs of the cases named, the most wanted first."""
    a = Job("a", "sgd", (1_677_721,) * 10, 128, 104_857, pooled=False)
    b = Job("b", "sgd", (1_000_000,) * 26, 64, 65_536)
    c = Job("c", "rowwise", (100_000,) * 32, 128, 512, 20, unroll=8)
    found = [_with(a, "sgd", 2), _with(a, "adam", 2), _with(b, "sgd", 1.5), _with(c, "rowwise", 1.5)]
    found += [_with(b, "adam", 1.5), _with(a, "rowwise"), _with(a, "adagrad"), _with(b, "adagrad")]
    for dtype in ("float32", "bfloat16"):
        for dim in (4, 16, 64, 128):
            d = Job("d", "sgd", (10_000_000,), dim, 65_536, 20, dtype)
            found += [_with(d, "sgd", 0.5), _with(d, "rowwise", 0.5)]
    found += [Job("e", "rowwise", CRITEO, 128, 65_536, weight=3.0)]
    return [job.scaled(scale) for job in found if job.case in cases]


def _with(job: Job, optimizer: str, weight: float = 1.0) -> Job:
    return dataclasses.replace(job, optimizer=optimizer, weight=weight)


def power_law(rng: np.random.Generator, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns ids whose rank x has a density proportional to x ** -1.05 in 1..rows + 1, rounded down.

    By the inverse of the distribution, so no table of probabilities is needed. In case a this touches about 350,000
    distinct rows, as the published benchmark does. Ranks are spread over the table: hot rows are no neighbours.
    """
    power, end = 1 - POWER, rows + 1.0
    ranks = ((end**power - 1.0) * rng.random(shape) + 1.0) ** (1 / power) - 1.0
    return spread(np.minimum(ranks.astype(np.int64), rows - 1), rows)


def draw(job: Job) -> tuple[list[list[np.ndarray]], float]:
    """Returns the batches, ``[batch, valency]`` int32 for each table, and the mean number of distinct rows in one."""
    return _drawn(job.tables, job.batch, job.valency)


@functools.lru_cache(maxsize=2)
def _drawn(tables: tuple[int, ...], batch: int, valency: int) -> tuple[list[list[np.ndarray]], float]:
    rng = np.random.default_rng([sum(tables), len(tables), batch, valency])
    batches = [[power_law(rng, rows, (batch, valency)) for rows in tables] for _ in range(BATCHES)]
    counted = batches[:3]  # they differ by a fraction of a percent, and sorting a million ids takes its time
    distinct = np.mean([sum(np.unique(ids).size for ids in one) for one in counted])
    return batches, float(distinct)
