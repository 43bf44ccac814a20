"""The ratios that embax is to reach, each found in the rows of one run and compared with what was measured."""

import fnmatch
from collections.abc import Callable, Iterable

from benchmarks.cpu.report import best_peer, label

MAIN = tuple(f"{rows}x{dim} {ids}" for rows in ("1e6", "1e7") for dim in (16, 64, 128) for ids in ("uniform", "zipf"))
WIDE = {rows: (f"{rows}x64 uniform", f"{rows}x128 uniform") for rows in ("1e6", "1e7")}
STEPS = ("sgd", "rowwise", "adagrad", "adam")
Ratio = Callable[[dict], float | None]


def over(name: str) -> Ratio:
    """Returns embax's time over that of ``name``: small is good."""
    return lambda row: row["ms"]["embax"] / row["ms"][name] if name in row["ms"] and "embax" in row["ms"] else None


def times_faster(name: str | None = None) -> Ratio:
    """Returns the time of ``name``, or else of the best peer, over embax's: large is good."""

    def ratio(row):
        peer = row["ms"].get(name) if name else best_peer(row["ms"])
        return peer / row["ms"]["embax"] if peer and "embax" in row["ms"] else None

    return ratio


def microseconds(row: dict) -> float | None:
    return 1e3 * row["ms"]["embax"] if "embax" in row["ms"] else None


class Claims:
    """Collects verdicts about the rows of one run."""

    def __init__(self, rows: list[dict]):
        self.rows, self.found = rows, []

    def select(self, workloads: Iterable[str], passes: Iterable[str], threads: int) -> list[dict]:
        passes, patterns = tuple(passes), tuple(workloads)
        return [
            row
            for row in self.rows
            if row["threads"] == threads
            and row["what"] in passes
            and any(fnmatch.fnmatch(row["workload"], pattern) for pattern in patterns)
        ]

    def judge(self, wanted: str, threads: int, ratios: list[tuple[float | None, str]], at_most=None, at_least=None):
        """Adds a verdict on the worst of the ratios, each given with where it was found."""
        measured = [(ratio, where) for ratio, where in ratios if ratio is not None]
        worst, where, met = None, "", None
        if measured:
            worst, where = max(measured) if at_most is not None else min(measured)
            met = worst <= at_most if at_most is not None else worst >= at_least
        verdict = {"worst": worst, "where": where, "met": met, "rows": len(measured)}
        self.found.append({"wanted": wanted, "threads": threads, **verdict})

    def rows_at(self, wanted: str, threads: int, workloads, passes, ratio: Ratio, **bound: float) -> None:
        """Adds a verdict on the worst of the rows of these workloads and passes."""
        rows = self.select(workloads, passes, threads)
        self.judge(wanted, threads, [(ratio(row), f"{label(row)} {row['what']}") for row in rows], **bound)


def judge(rows: list[dict]) -> list[dict]:
    """Returns the verdicts on all that is wanted, measured or not."""
    claims = Claims(rows)
    at = claims.rows_at
    at("forward / torch <= 1.05", 2, ["*"], ["forward"], over("torch"), at_most=1.05)
    wide = WIDE["1e6"] + WIDE["1e7"]
    at("forward / gather limit <= 1.2, D >= 64 uniform", 2, wide, ["forward"], over("limit"), at_most=1.2)
    for threads, wanted in ((2, {"sgd": 3.3, "rowwise": 2.0}), (1, {"sgd": 1.9, "rowwise": 1.3, "adagrad": 3.8})):
        for what, bound in wanted.items():
            at(f"{what}, best peer / embax >= {bound}", threads, MAIN, [what], times_faster(), at_least=bound)
    for ids, bound in (("uniform", 6.5), ("zipf", 5.0)):
        chosen = [name for name in MAIN if name.endswith(ids)]
        at(f"adagrad {ids}, best peer / embax >= {bound}", 2, chosen, ["adagrad"], times_faster(), at_least=bound)
    at("adam, SparseAdam / embax >= 5", 2, MAIN, ["adam"], times_faster("torch"), at_least=5.0)
    for size, bound in (("1e6", 1.4), ("1e7", 1.6)):
        wanted = f"step / step limit <= {bound}, {size} rows, D >= 64 uniform"
        at(wanted, 2, WIDE[size], STEPS, over("limit"), at_most=bound)
    narrow = [f"1e7x{dim} *" for dim in (1, 2, 4, 8)]
    for passes, wanted in ((("forward",), "forward"), (STEPS, "step")):
        at(f"{wanted} / line limit <= 1.5, D in 1, 2, 4, 8", 2, narrow, passes, over("limit"), at_most=1.5)
    for what, bound in (("sgd", 2.3), ("rowwise", 1.6), ("adagrad", 3.8)):
        many = ["26 tables*"]
        at(f"26 tables, {what}, best peer / embax >= {bound}", 2, many, [what], times_faster(), at_least=bound)
    ratio = times_faster("flax + optax")
    at("adagrad, flax + optax / embax >= 80, 1e7 rows", 2, ["1e7x*"], ["adagrad"], ratio, at_least=80.0)
    _flat(claims)
    for ids, step, preprocess in ((64, 60, 20), (1280, 130, 60)):
        small = [f"batch of {ids},*"]
        at(f"step of {ids} ids <= {step} microseconds", 2, small, STEPS, microseconds, at_most=step)
        at(
            f"preprocess {ids} ids <= {preprocess} microseconds",
            2,
            small,
            ["preprocess"],
            microseconds,
            at_most=preprocess,
        )
    _low_precision(claims)
    return claims.found


def _flat(claims: Claims) -> None:
    by_name = {row["workload"]: row["ms"].get("embax") for row in claims.select(MAIN, ["adagrad"], 2)}
    ratios = []
    for dim in (16, 64, 128):
        small, large = by_name.get(f"1e6x{dim} uniform"), by_name.get(f"1e7x{dim} uniform")
        ratios.append((large / small if small and large else None, f"D = {dim} uniform"))
    claims.judge("adagrad, time at 1e7 rows / at 1e6 <= 1.3", 2, ratios, at_most=1.3)


def _low_precision(claims: Claims) -> None:
    rows = {row["workload"].split()[-1]: row["ms"] for row in claims.select(["lookup*"], ["forward"], 2)}
    full = rows.get("float32", {}).get("embax")
    halves = [(rows.get(dtype, {}).get("embax"), dtype) for dtype in ("bfloat16", "float16")]
    ratios = [(full / half if full and half else None, dtype) for half, dtype in halves]
    claims.judge("16-bit forward, float32 time / 16-bit time >= 1.8", 2, ratios, at_least=1.8)
    for threads, bound in ((2, 2.0), (1, 1.2)):
        wanted = f"int8 lookup, FBGEMM / embax >= {bound}"
        claims.rows_at(wanted, threads, ["lookup* int8"], ["forward"], times_faster("FBGEMM"), at_least=bound)
