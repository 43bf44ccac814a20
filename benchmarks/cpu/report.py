"""Results as a Markdown table and as a picture."""

import math

NAMES = ("embax", "reference", "flax + optax", "torch", "FBGEMM", "limit")
PEERS = ("flax + optax", "torch", "FBGEMM")
HEADER = ("workload", "pass", "threads", *NAMES, "best peer / embax", "embax / limit")


def milliseconds(value: float | None) -> str:
    """Returns a time with three digits: 45.1 µs, 3.21 ms.

    >>> milliseconds(0.0451), milliseconds(321.0), milliseconds(None)
    ('45.1 µs', '321 ms', '-')
    """
    if value is None:
        return "-"
    value, unit = (value, "ms") if value >= 1 else (1e3 * value, "µs")
    return f"{value:.{max(0, 2 - max(0, math.floor(math.log10(value))))}f} {unit}" if value > 0 else f"0 {unit}"


def best_peer(ms: dict[str, float]) -> float | None:
    """Returns the time of the fastest contender that is not ours, if there is one."""
    return min((ms[name] for name in PEERS if name in ms), default=None)


def label(row: dict) -> str:
    return row["workload"] + ("" if row["tuned"] else ", default allocator")


def line(row: dict) -> str:
    """Returns a row as a line of a Markdown table."""
    ms, peer = row["ms"], best_peer(row["ms"])
    cells = [label(row), row["what"], str(row["threads"]), *(milliseconds(ms.get(name)) for name in NAMES)]
    cells.append(f"{peer / ms['embax']:.2f}" if peer and "embax" in ms else "-")
    cells.append(f"{ms['embax'] / ms['limit']:.2f}" if "limit" in ms and "embax" in ms else "-")
    return "| " + " | ".join(cells) + " |"


def heading() -> str:
    return "| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER)


def reasons(rows: list[dict]) -> list[str]:
    """Returns why contenders are missing, each reason once, with the rows that it is about."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["skipped"].items():
            places = found.setdefault((name, reason), [])
            places += [where for where in (f"{label(row)} {row['what']}",) if where not in places]
    shown = []
    for (name, reason), places in found.items():
        more = f" and {len(places) - 2} more" if len(places) > 2 else ""
        shown.append(f"{name}: {reason} ({'; '.join(places[:2])}{more})")
    return shown


def markdown(machine: dict, rows: list[dict], claims: list[dict]) -> str:
    """Returns the whole report."""
    parts = [", ".join(f"{key} {value}" for key, value in machine.items()), "", heading()]
    parts += [line(row) for row in rows if row["ms"]]
    if any(row["skipped"] for row in rows):
        parts += ["", "Not measured:", ""] + [f"- {reason}" for reason in reasons(rows)]
    parts += ["", *claims_table(claims)]
    return "\n".join(parts) + "\n"


def claims_table(claims: list[dict]) -> list[str]:
    """Returns the lines of a table of the ratios."""
    found = ["| wanted | threads | rows | worst | where | |", "|---|---|---|---|---|---|"]
    for claim in claims:
        worst = "-" if claim["worst"] is None else f"{claim['worst']:.2f}"
        verdict = "not measured" if claim["met"] is None else "met" if claim["met"] else "missed"
        cells = [claim["wanted"], str(claim["threads"]), str(claim["rows"]), worst, claim["where"], verdict]
        found.append("| " + " | ".join(cells) + " |")
    return found


def picture(rows: list[dict], path: str) -> None:
    """Draws the time of an id, on a logarithmic axis: a panel for each pass, at the most threads measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads and row["ms"] and row["what"] != "preprocess"]
    rows = [row for row in rows if "embax" in row["ms"] and row["tuned"]]
    passes = list(dict.fromkeys(row["what"] for row in rows))
    if not passes:
        return
    colors = dict(zip(NAMES, ("#1f5fa8", "#8fb4dc", "#b9a37e", "#d9822b", "#7a5195", "#222222"), strict=True))
    heights = [max(2, sum(row["what"] == what for row in rows)) for what in passes]
    figure, axes = pyplot.subplots(
        len(passes), 1, figsize=(9, 1.2 + 0.42 * sum(heights)), height_ratios=heights, squeeze=False, sharex=True
    )
    for axis, what in zip(axes[:, 0], passes, strict=True):
        shown = [row for row in rows if row["what"] == what][::-1]
        for name in NAMES:
            found = [
                (1e6 * row["ms"][name] / row["ids_per_step"], i) for i, row in enumerate(shown) if name in row["ms"]
            ]
            marker = "|" if name == "limit" else "o"
            axis.scatter([x for x, _ in found], [y for _, y in found], 70, colors[name], marker, label=name, zorder=3)
        axis.set_yticks(range(len(shown)), [row["workload"] for row in shown], fontsize=8)
        axis.set(xscale="log", title=what, ylim=(-0.7, len(shown) - 0.3))
        axis.grid(axis="both", color="#dddddd", zorder=0)
    axes[-1, 0].set_xlabel(f"nanoseconds for each id, {threads} threads (less is better)")
    handles = {
        name: handle for axis in axes[:, 0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=len(handles), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))
    figure.savefig(path, dpi=110)
