"""Results as JSON and as Markdown: what was measured, beside the bytes, the published figures and the targets."""

from benchmarks.cpu.report import milliseconds
from benchmarks.gpu import cases
from benchmarks.gpu.cases import PASSES

CUDA, PLAIN = "embax cuda", "embax reference"
CASES = {
    "a": "10 tables of 1,677,721 rows, one id of each a sample, unpooled",
    "b": "26 tables of 1,000,000 rows, one id of each a sample",
    "c": "32 tables of 100,000 rows, 512 samples of 20 ids, pooled by sum",
    "d": "one table of 10,000,000 rows, 65,536 samples of 20 ids, pooled by sum",
    "e": "26 tables with the sizes of Criteo-1TB, 204,184,588 rows, one id of each a sample",
}


def share(row: dict, what: str, ms: float, bandwidth: float | None) -> float | None:
    """Returns the bytes that must move, by the time that it took, as a share of the copy bandwidth."""
    return row["bytes"][what] / (ms / 1e3) / bandwidth if bandwidth and ms else None


def cell(row: dict, name: str, what: str, bandwidth: float | None) -> str:
    """Returns what stands in the table for one contender and pass."""
    times = row["contenders"].get(name, {}).get(what)
    if not times or "median" not in times:
        return "-"
    part = share(row, what, times["median"], bandwidth)
    text = f"{milliseconds(times['median'])} ({milliseconds(times['min'])})"
    text += f" {100 * part:.0f} %" if part is not None else ""
    return text + (" host" if times["host_bound"] else "")


def names_of(rows: list[dict]) -> list[str]:
    """Returns the contenders that were measured at least once, embax first."""
    found = {name: 0 for row in rows for name, result in row["contenders"].items() if "error" not in result}
    first = [name for name in found if name.startswith("embax")]
    return first + [name for name in found if name not in first]


def label(row: dict) -> str:
    """Returns the first cell of a line."""
    return f"{row['case']}: {row['optimizer']} {row['dtype']} x {row['dim']}"


def table(rows: list[dict], bandwidth: float | None) -> list[str]:
    """Returns the lines of the table of times."""
    names = names_of(rows)
    head = ["case", "pass", "must move", "at copy bandwidth", *names, "reference / cuda", "published"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        known = cases.PUBLISHED.get((row["case"], row["optimizer"]), {}) if not row.get("scaled") else {}
        for what in PASSES:
            if not any(what in row["contenders"].get(name, {}) for name in names):
                continue
            bytes_moved = row["bytes"][what]
            bound = milliseconds(1e3 * bytes_moved / bandwidth) if bandwidth else "-"
            published = "; ".join(f"{who}: {ms[what]:.3g} ms" for who, ms in known.items() if what in ms)
            cells = [label(row), what, f"{bytes_moved / 1e6:.1f} MB", bound]
            cells += [cell(row, name, what, bandwidth) for name in names]
            ratio = _ratio(row, what)
            cells += [f"{ratio:.2f}" if ratio else "-", published or "-"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ratio(row: dict, what: str) -> float | None:
    own, plain = (row["contenders"].get(name, {}).get(what, {}).get("median") for name in (CUDA, PLAIN))
    return plain / own if own and plain else None


def errors(rows: list[dict]) -> list[str]:
    """Returns who failed or did not take part, and why, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, result in row["contenders"].items():
            if "error" in result:
                found.setdefault((name, result["error"]), []).append(label(row))
    return [f"- {name}: {why} ({'; '.join(where)})" for (name, why), where in found.items()]


def targets(rows: list[dict], card: str, bandwidth: float | None) -> list[dict]:
    """Returns every target with what was found and whether it is met, None where that cannot be said."""
    found = []
    for row in rows:
        times = row["contenders"].get(CUDA, {}).get("step", {})
        ms, key = times.get("median"), (row["case"], row["optimizer"])
        part = share(row, "step", ms, bandwidth) if ms else None
        full = not row.get("scaled")
        if key in cases.TARGET_MS:
            judged = ms is not None and full and cases.TARGET_CARD in card
            wanted = f"a step of at most {cases.TARGET_MS[key]} ms on an {cases.TARGET_CARD}"
            met = ms <= cases.TARGET_MS[key] if judged else None
            found.append(_target(row, wanted, milliseconds(ms), met))
            met = part >= cases.TARGET_SHARE if part is not None and full else None
            found.append(_target(row, f"at least {cases.TARGET_SHARE:.0%} of the copy bandwidth", _percent(part), met))
        if row["case"] in ("b", "c"):
            ratio = _ratio(row, "step")
            wanted = f"{cases.TARGET_RATIO:g} times the XLA path, or {cases.BOUND_SHARE:.0%} of the copy bandwidth"
            value = f"{ratio:.2f} times, {_percent(part)}" if ratio else "-"
            fast = ratio is not None and ratio >= cases.TARGET_RATIO
            met = fast or (part or 0) >= cases.BOUND_SHARE if ms and full else None
            found.append(_target(row, wanted, value, met))
    return found


def _target(row: dict, wanted: str, value: str, met: bool | None) -> dict:
    return {"case": label(row), "wanted": wanted, "found": value, "met": met}


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"


def target_table(found: list[dict]) -> list[str]:
    """Returns the lines of the table of targets."""
    lines = ["| case | wanted | found | |", "|---|---|---|---|"]
    for one in found:
        verdict = "not judged here" if one["met"] is None else "met" if one["met"] else "missed"
        lines.append(f"| {one['case']} | {one['wanted']} | {one['found']} | {verdict} |")
    return lines


def markdown(found: dict) -> str:
    """Returns the whole report."""
    machine, rows = found["machine"], found["rows"]
    bandwidth = found["bandwidth"].get("bytes_per_second")
    parts = [f"# {machine.get('card', 'no card')}, {found['date']}", ""]
    parts += [f"- {key}: {_shown(value)}" for key, value in machine.items() if key != "event"]
    if bandwidth:
        parts.append(f"- copy bandwidth: {bandwidth / 1e9:.0f} GB/s (x + 1 in place, read and write counted)")
    if found["scale"] != 1:
        parts.append(
            f"- **tables and batches are {found['scale']:g} of their size: these are no figures of the cases**"
        )
    parts += ["", *_checked(found), ""]
    parts += [f"- {case}: {text}" for case, text in CASES.items() if any(row["case"] == case for row in rows)]
    parts += ["", EXPLAINED, "", *table(rows, bandwidth), ""]
    if any("error" in result for row in rows for result in row["contenders"].values()):
        parts += ["Not measured:", "", *errors(rows), ""]
    if found["left out"]:
        parts += ["Left out:", "", *(f"- {one['job']}: {one['why']}" for one in found["left out"]), ""]
    return "\n".join(parts + target_table(found["targets"])) + "\n"


EXPLAINED = (
    "Median (least) of a pass, and the bytes that must move by that time, of the copy bandwidth. Forward: lookup. "
    'Update: from given gradients. Step: both. "host": starting took most of the time. Contenders of one framework '
    "take turns; torch and FBGEMM run in a process of their own, after JAX."
)


def _checked(found: dict) -> list[str]:
    check = found["check"]
    lines = [f"- checked against float64, {name}: {_shown(counts)}" for name, counts in check["counts"].items()]
    return lines + [f"- **wrong: {text}**" for text in check["wrong"]]


def _shown(value: object) -> str:
    return ", ".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, dict) else str(value)
