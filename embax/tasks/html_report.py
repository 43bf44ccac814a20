"""One self-contained HTML page of a run: what came out, how it went, what was in it.

``write_report(folder)`` reads ``run.json`` and ``metrics.jsonl`` there and writes ``report.html`` beside them.
The page loads nothing, runs no script, and is the same to the byte for the same run.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from embax.tasks import html_charts
from embax.tasks.html_charts import Curve

FORMAT = 1
DETAILED = 60  # tables with a histogram; each takes 10 KB of the page and some of a second
FEW_LINES = 20  # with fewer, the curve is shown as it is

_NAMES = {"auc": "AUC", "logloss": "log loss"}
_SHAPES = {"settings": dict, "columns": dict, "rows": dict, "tables": list}
_LINES = {
    "train": {"step": int},
    "evaluation": {"step": int, "split": str},
    "timing": {"parts": dict},
    "tables": {"tables": list},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder says of its run.

    Args:
      document: ``run.json``.
      train: the lines of training by ascending step; of lines of one step the last.
      evaluations: those of evaluations, alike for each split.
      parts: seconds of each part, of the last line of timing.
      tables: what the last line of tables says of each, by name.
    """

    document: Mapping[str, Any]
    train: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    parts: Mapping[str, float]
    tables: Mapping[str, Mapping[str, Any]]


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` of a run folder and returns its path; an older one is replaced when it is complete.

    Args:
      folder: has ``run.json`` and, unless nothing has been measured yet, ``metrics.jsonl``.

    Raises:
      ValueError: one of the two is missing, damaged or of another format; the text says where, and what to do.
    """
    folder = Path(folder)
    page = _page(read_run(folder))
    path = folder / "report.html"
    part = path.with_name(path.name + ".part")
    part.write_bytes(page.encode("utf-8", "replace"))  # half of a surrogate pair is valid in JSON
    os.replace(part, path)
    return path


def read_run(folder: Path) -> Run:
    """Reads ``run.json`` and ``metrics.jsonl`` of a run folder. Raises as ``write_report`` does."""
    document = _read_document(folder / "run.json")
    train, evaluations, parts, tables = {}, {}, {}, []
    for number, line in _read_lines(folder / "metrics.jsonl"):
        where = f"{folder / 'metrics.jsonl'}, line {number}"
        kind = line.get("kind")
        for key, shape in _LINES.get(kind, {}).items() if isinstance(kind, str) else ():
            if not isinstance(line.get(key), shape):
                raise ValueError(
                    f'{where}: "{key}" of a "{kind}" line must be of type {shape.__name__}; delete the line'
                )
        if kind == "train":
            train[line["step"]] = line
        elif kind == "evaluation":
            evaluations[line["split"], line["step"]] = line
        elif kind == "timing":
            parts = {part: seconds for part, value in line["parts"].items() if (seconds := _number(value)) >= 0}
        elif kind == "tables":
            tables = _tables(line["tables"], where)
    return Run(
        document,
        [train[step] for step in sorted(train)],
        sorted(evaluations.values(), key=lambda line: line["step"]),
        parts,
        {table["name"]: table for table in tables},
    )


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{path}: {reason}; name the folder that `embax train --output` wrote") from None
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path}, line {line}: not JSON ({error}); restore the file or train again") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT or isinstance(found, bool):
        raise ValueError(f"{path}: format is {found!r}, and this embax reads {FORMAT}; use the embax that wrote it")
    for key, shape in _SHAPES.items():
        if not isinstance(document.setdefault(key, shape()), shape):
            raise ValueError(f'{path}: "{key}" must be of type {shape.__name__}; restore the file or train again')
    _tables(document["tables"], str(path))
    return document


def _read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns the numbered lines of the file; without the last one if it is cut off, as where a run was ended."""
    if not path.exists():
        return []
    lines = [(number, text) for number, text in enumerate(path.read_bytes().split(b"\n"), 1) if text.strip()]
    read = []
    for number, text in lines:
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == lines[-1][0]:
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error}); delete the line") from None
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object; delete the line")
        read.append((number, line))
    return read


def _tables(tables: list[Any], where: str) -> list[Any]:
    for table in tables:
        if not (isinstance(table, dict) and isinstance(table.get("name"), str)):
            raise ValueError(
                f'{where}: each of "tables" must be an object with a "name"; restore the file or train again'
            )
    return tables


def _number(value: Any) -> float:
    """Returns a JSON number as a float; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _page(run: Run) -> str:
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "count": count,
        "size": size,
        "duration": duration,
        "share": share,
        "shown": shown,
        "metric": _metric_name,
        "fixed": fixed,
    }
    tables = _table_rows(run)
    known = sorted((table for table in tables if table["name"] in run.tables), key=_extent, reverse=True)
    detailed = {table["name"] for table in known[:DETAILED]}
    return environment.from_string(source).render(
        run=run.document,
        last=run.train[-1] if run.train else None,
        resume=_resume(run.document),
        result=_result(run.evaluations),
        notes=_broken(run.train)[1],
        charts=[*_loss(run.train), *_metrics(run.evaluations), *_throughput(run.train)],
        parts=run.parts,
        seconds=sum(run.parts.values()),
        tables=tables,
        details=[table | _details(table) for table in tables if table["name"] in detailed],
        left_out=len(known) - len(detailed),
    )


def _resume(document: Mapping[str, Any]) -> str | None:
    """Returns the command that goes on with the run; None if it is finished or unknown."""
    command = document.get("command")
    if document.get("status") == "finished" or not isinstance(command, str):
        return None
    return command if "--resume" in command.split() else f"{command} --resume"


def _result(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the last evaluation on the test split, else on any other, each metric beside its baseline."""
    chosen = [line for line in evaluations if line["split"] == "test"] or evaluations
    if not chosen:
        return None
    line = chosen[-1]
    return {"line": line, "metrics": [_compared(line, name) for name in _metric_names(line)]}


def _compared(line: Mapping[str, Any], name: str) -> dict[str, Any]:
    value, baseline = _number(line[name]), _number(line.get(f"baseline_{name}"))
    compared = {"name": name, "value": value, "baseline": baseline, "lower": _lower_is_better(name)}
    if f"baseline_{name}" not in line or not math.isfinite(value - baseline):
        return compared
    difference = value - baseline
    sign = "+" if difference > 0 else "−" if difference < 0 else "±"
    verdict = "equal" if not difference else "better" if (difference < 0) == compared["lower"] else "worse"
    by = f"{abs(difference):.4f}" if abs(difference) >= 1e-4 else fixed(abs(difference))  # as the two are shown
    return compared | {"difference": sign + by, "verdict": verdict}


def _metric_names(line: Mapping[str, Any]) -> list[str]:
    """Returns the keys of an evaluation whose values are numbers, or null for what is none, and measure the model."""
    other = ("kind", "split", "step", "epoch", "samples", "rows", "users", "seconds", "baseline")
    found = [key for key, value in line.items() if value is None or isinstance(value, int | float)]
    return [key for key in found if key not in other and not key.startswith("baseline_")]


def _lower_is_better(name: str) -> bool:
    return name.endswith("loss")


def _metric_name(name: str) -> str:
    return _NAMES.get(name, name.replace("ndcg", "NDCG"))


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of the lines that have a value that can be drawn."""
    found = [(line["step"], value) for line in lines if abs(value := _number(line.get(key))) < html_charts.LARGEST]
    x, y = np.array(found, np.float64).reshape(-1, 2).T
    return x, y


def _broken(train: Sequence[Mapping[str, Any]]) -> tuple[float | None, list[str]]:
    """Returns the step at which the loss stopped being a number, and notes of that and of the baseline's."""
    step, notes = None, []
    for key, of in (("loss", "the loss"), ("baseline_loss", "the baseline's loss")):
        bad = next((line for line in train if key in line and not math.isfinite(_number(line[key]))), None)
        if bad is not None:
            became = "infinite" if math.isinf(_number(bad[key])) else "NaN"
            notes.append(f"{of} became {became} at step {count(bad['step'])}")
            step = float(bad["step"]) if key == "loss" else step
    return step, notes


def _loss(train: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the chart of the losses, if there are two points to draw a line between."""
    drawn = []
    for key, label, colour in (("loss", "train loss", 1), ("baseline_loss", "baseline", 2)):
        # Two jagged curves hide each other: of the baseline's many points only their means are drawn.
        drawn += _smoothed(*_points(train, key), label, colour)[-1 if key != "loss" else 0 :]
    if not drawn:
        return []
    svg = html_charts.curves("loss", drawn, "loss", broken=_broken(train)[0])
    return [{"id": "loss", "title": "Loss in training", "svg": svg, "curves": drawn, "note": _thinning(len(train))}]


def _smoothed(x: np.ndarray, y: np.ndarray, label: str, colour: int) -> list[Curve]:
    """Returns the curve as it is and a smooth one over it; the former alone of few points, none of fewer than two."""
    if len(x) < FEW_LINES:
        return [Curve(label, x, y, colour)] if len(x) > 1 else []
    middle, mean, window = html_charts.smoothed(x, y)
    smooth = Curve(f"{label}, mean of {count(window)}", middle, mean, colour, "smooth")
    return [Curve(f"{label}, as logged", x, y, colour, "thin"), smooth]


def _thinning(lines: int) -> str:
    kept = html_charts.BINS
    return f"of {count(lines)} logged values the extremes in each of {kept} runs are drawn" if lines > 2 * kept else ""


def _metrics(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a chart for each metric that some split has twice."""
    charts = []
    splits = list(dict.fromkeys(line["split"] for line in evaluations))
    for name in dict.fromkeys(name for line in evaluations for name in _metric_names(line)):
        drawn = []
        for place, split in enumerate(splits):
            lines = [line for line in evaluations if line["split"] == split]
            baseline = next((str(line["baseline"]) for line in lines[::-1] if line.get("baseline")), "baseline")
            against = Curve(
                f"{baseline}, {split}", *_points(lines, f"baseline_{name}"), 2, ("dashed", "dotted")[place % 2]
            )
            drawn += [Curve(split, *_points(lines, name), (1, 3, 4)[place % 3]), against]
        drawn = [curve for curve in drawn if len(curve.x)]
        if max((len(curve.x) for curve in drawn), default=0) < 2:
            continue
        title = _metric_name(name)
        better = "lower is better" if _lower_is_better(name) else "higher is better"
        svg = html_charts.curves(f"metric {len(charts)}", drawn, "log loss" if name == "logloss" else _axis(name))
        charts.append({"id": f"metric-{len(charts)}", "title": f"{title} ({better})", "svg": svg, "curves": drawn})
    return charts


def _axis(name: str) -> str:
    """Returns the label of a metric's axis: its name only if it is one that embax knows."""
    known = name.partition("@")
    return _metric_name(name) if known[0] in ("auc", "recall", "ndcg") and (known[2] or "0").isdecimal() else "value"


def _throughput(train: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    x, y = _points(train, "samples_per_second")
    drawn = _smoothed(x, y, "samples a second", 1)
    if not drawn:
        return []
    svg = html_charts.curves("throughput", drawn, "samples per second", from_zero=True)
    note = f"median: {count(float(np.median(y)))} samples per second"
    return [{"id": "throughput", "title": "Throughput", "svg": svg, "curves": drawn, "note": note}]


def _table_rows(run: Run) -> list[dict[str, Any]]:
    """Returns what is known of each table, those of run.json first."""
    known = {table["name"]: table for table in run.document["tables"]}
    rows = []
    for name in dict.fromkeys([*known, *run.tables]):
        table = {"touched": None} | known.get(name, {}) | run.tables.get(name, {})
        rows.append(table | {"share": _number(table["touched"]) / max(_number(table.get("rows")), 1.0)})
    return rows


def _extent(table: Mapping[str, Any]) -> float:
    """Returns a table's bytes, or about that: what the largest tables are chosen by."""
    found = _number(table.get("bytes"))
    found = 4 * _number(table.get("rows")) * _number(table.get("dim")) if math.isnan(found) else found
    return 0.0 if math.isnan(found) else found


def _details(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the histogram of a table's norms, if it has one, and its hottest values: value, times, norm."""
    norms, hottest = table.get("norms"), table.get("hottest")
    svg = None
    if isinstance(norms, dict) and all(isinstance(norms.get(key), list) for key in ("edges", "counts")):
        edges, counts = (np.array([_number(value) for value in norms[key]]) for key in ("edges", "counts"))
        fits = len(edges) == len(counts) + 1 > 1 and counts.sum() > 0 and table["touched"] != 0
        # Edges between norms that hardly differ may have been rounded to the same number.
        if fits and np.isfinite([*edges, *counts]).all() and (np.diff(edges) >= 0).all() and edges[-1] > edges[0]:
            svg = html_charts.histogram(f"norms {table['name']}", edges, counts)
    rows = [row for row in hottest if isinstance(row, list) and len(row) == 3] if isinstance(hottest, list) else []
    return {"svg": svg, "hottest": rows}


def count(value: Any) -> str:
    """Returns a number with its thousands apart, ``1,234``."""
    number = _number(value)
    return f"{number:,.0f}" if math.isfinite(number) else "–"


def fixed(value: Any) -> str:
    """Returns a number with four decimals, or three digits if it is that small."""
    number = _number(value)
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "infinite"
    return f"{number:.4f}" if abs(number) >= 0.001 or number == 0 else f"{number:.3g}"


def share(value: Any) -> str:
    """Returns a part of one in percent, ``41.0 %``."""
    number = _number(value)
    return f"{100 * number:.1f} %" if math.isfinite(number) else "–"


def size(value: Any) -> str:
    """Returns bytes in the unit that suits, ``154.2 KiB``."""
    number = _number(value)
    if not math.isfinite(number):
        return "–"
    power = next((power for power in range(4) if number < 1000 * 1024**power), 4)
    return f"{number:,.0f} B" if power == 0 else f"{number / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def duration(value: Any) -> str:
    """Returns seconds as people say them, ``12.3 s``, ``4 min 5 s``, ``2 h 10 min``."""
    number = _number(value)
    if not math.isfinite(number):
        return "–"
    if number < 60:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def shown(value: Any) -> str:
    """Returns a value of JSON for people: texts as they are, lists with commas, nothing as a dash."""
    if value is None or value == [] or value == "" or isinstance(value, jinja2.Undefined):
        return "–"
    if isinstance(value, list):
        return ", ".join(shown(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
