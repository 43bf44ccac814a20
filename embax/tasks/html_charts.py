"""Charts of a run as inline SVG: text as text, colours by the page's CSS, the same numbers the same bytes.

No chart holds a text of the run: labels are fixed, and legends are the page's own. So nothing has to be escaped or
measured in a font that lacks it.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator

BINS = 400  # a curve keeps two points of each: its page is a few hundred pixels wide
LARGEST = 1e100  # beyond it axes overflow

_STEPS = (1, 2, 5, 10)  # of ticks

# matplotlib knows no CSS: these stand for what the page's style sheet says.
INK, GRID = "#010101", "#010102"
COLOURS = {INK: "currentColor", GRID: "var(--grid)"} | {f"#01020{i}": f"var(--c{i})" for i in (1, 2, 3, 4)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Args:
      label: its name in the page's legend.
      x, y: its points, finite, by ascending x.
      colour: 1 to 4, a colour of the page.
      look: ``line``, with markers where points are few; ``thin``; ``smooth``; or ``dashed`` or ``dotted``, for what is
        compared with.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 1
    look: str = "line"


_LOOKS = {
    "line": {"linewidth": 1.6},
    "smooth": {"linewidth": 1.6},
    "thin": {"linewidth": 0.6, "alpha": 0.45, "zorder": 1.5},  # below the others
    "dashed": {"linewidth": 1.3, "linestyle": (0, (4, 2))},
    "dotted": {"linewidth": 1.3, "linestyle": (0, (1, 1.6))},
}


def curves(
    name: str, drawn: Sequence[Curve], y_label: str, from_zero: bool = False, broken: float | None = None
) -> str:
    """Returns the SVG of curves over training steps.

    Args:
      name: differs from that of any other chart of the page.
      drawn: the curves; one with few points gets markers.
      y_label: what the upright axis shows, with its unit.
      from_zero: whether that axis begins at zero.
      broken: a step to mark by an upright line, of something that went wrong there.
    """

    def draw(axes: Axes) -> None:
        for curve in drawn:
            x, y = thinned(curve.x, curve.y)
            marker = "o" if len(x) <= 40 and curve.look not in ("thin", "smooth") else ""
            axes.plot(x, y, color=_colour(curve.colour), marker=marker, markersize=3.5, **_LOOKS[curve.look])
        low, high = _limits(drawn)
        pad = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        axes.set_ylim(min(0.0, low) if from_zero else low - pad, high + pad)
        if broken is not None:
            axes.axvline(broken, color=_colour(4), linewidth=1.2, linestyle=(0, (2, 2)))
        axes.set_xlabel("training step")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))

    return _svg(name, (4.8, 2.8), f"{y_label} over training steps", draw)


def histogram(name: str, edges: np.ndarray, counts: np.ndarray) -> str:
    """Returns the SVG of how many rows have a norm between each two edges."""

    def draw(axes: Axes) -> None:
        axes.stairs(counts, edges, fill=True, color=_colour(1), linewidth=0)
        axes.set_ylim(0, max(float(counts.max()), 1.0) * 1.05)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("L2 norm of a row")
        axes.set_ylabel("rows")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))

    return _svg(name, (4.8, 2.1), "rows by their L2 norm", draw)


def thinned(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least and the greatest point of each of ``bins`` runs of points, in order; of few points all."""
    if len(x) <= 2 * bins:
        return x, y
    bounds = np.linspace(0, len(x), bins + 1).astype(np.int64)
    kept = set()
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        kept |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
    order = np.array(sorted(kept | {0, len(x) - 1}))
    return x[order], y[order]


def smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the means of overlapping windows of points, and how many points a window has: a fortieth, at least 5."""
    # Sums of each window by itself, not differences of running sums: a far point would drown what follows it.
    window = min(max(len(y) // 40, 5), len(y))
    starts = slice(None, None, max(window // 4, 1))
    middle, mean = (np.lib.stride_tricks.sliding_window_view(a, window)[starts].mean(axis=1) for a in (x, y))
    return middle, mean, window


def compact(value: float, decimals: int | None = None) -> str:
    """Returns a tick's text: ``0.25``, ``1200``, ``40k``, ``2.5M``; ``decimals`` are kept where there is no unit."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if least <= abs(value) < 1e12:
            return f"{value / unit:.6g}{letter}".replace("-", "−")
    if abs(value) >= 1e4 or (decimals or 0) > 6 or 0 < abs(value) < 1e-6:
        return f"{value:.3g}".replace("-", "−")
    return (f"{value:.6g}" if decimals is None else f"{value:.{decimals}f}").replace("-", "−")


class _Ticks(Formatter):
    """Writes all ticks of an axis with as many decimals as tell them apart."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return compact(x)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        steps = np.diff(values)
        step = float(steps.min()) if len(steps) else 0.0
        decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else None
        return [compact(value, decimals) for value in values]


def _limits(drawn: Sequence[Curve]) -> tuple[float, float]:
    """Returns the range to show: all of it, unless a few far points would flatten the rest to a fourth."""
    aside = {"thin": 0.5, "smooth": 3.0}  # percent of the points, on either side: a far point is in several means
    core = np.concatenate([np.percentile(c.y, (aside.get(c.look, 0.0), 100 - aside.get(c.look, 0.0))) for c in drawn])
    whole = np.concatenate([c.y for c in drawn])
    low, high = float(core.min()), float(core.max())
    room = 3 * (high - low) or math.inf
    return max(float(whole.min()), low - room), min(float(whole.max()), high + room)


def _colour(number: int) -> str:
    return f"#01020{number}"


def _svg(name: str, inches: tuple[float, float], said: str, draw: Callable[[Axes], None]) -> str:
    """Draws on axes of a new figure and returns the ``svg`` element, without what differs from run to run."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's own style
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["svg.hashsalt"] = ascii(name)
        figure = Figure(figsize=inches)
        width, height = inches
        axes = figure.add_axes((0.8 / width, 0.52 / height, 1 - 0.96 / width, 1 - 0.62 / height))
        axes.xaxis.set_major_formatter(_Ticks())
        axes.yaxis.set_major_formatter(_Ticks())
        draw(axes)
        axes.yaxis.set_label_coords(-0.6 / (width - 0.96), 0.5)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(text.getvalue(), said)


def _inline(svg: str, said: str) -> str:
    """Returns the element alone: sized by the page, without ids that other charts have too."""
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index("</defs>", svg.index("<style")) + len("</defs>") :]
    body = re.sub(r' id="[^"]*_[0-9]+"', "", body)  # figure_1, line2d_7; what is referred to has a hash for its id
    body = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^\"]*\"", "", body)
    body = re.sub(r"\n *", " ", body).replace("> <", "><")
    body = re.sub("|".join(COLOURS), lambda match: COLOURS[match.group()], body)
    return f'<svg {box.group() if box else ""} role="img" aria-label="{said}">{body.strip()}'
