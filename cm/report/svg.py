"""Plots of curves for a web page: inline SVG that takes its colours from the page's style sheet.

A plot has classes `run-0`, `run-1`, ... for its curves, and carries its points as JSON beside it, so that a page can
show values under the pointer.
"""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from cm.report.plots import Points

WIDTH, HEIGHT = 460, 270                                            # in units of the drawing
LEFT, TOP, RIGHT, BOTTOM = 54, 10, 14, 40                           # margins
COLOURS, DASHES = 8, 4                                              # of runs, in the style sheet
RAW, SMOOTH_FROM = 240, 40                                          # points drawn at most; points from which to smooth
MAX_TICKS = 7


@dataclass(frozen=True)
class Curve:
    run: int                                                        # its number, which chooses colour and dashes
    name: str
    points: Points                                                  # not empty; x rises
    best: tuple[float, float] | None = None                         # a point to be ringed


@dataclass(frozen=True)
class Axis:
    """Values to places: linear, or logarithmic where all are positive."""

    low: float
    high: float
    start: float                                                    # place of `low`
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def plot(
    curves: Sequence[Curve], title: str, x_label: str, x_range: tuple[float, float], *,
    log: bool, smooth: bool, stairs: bool,
) -> Markup:
    """An SVG element and its data.

    :param x_range: lowest and highest x, that several plots may share.
    :param log: draw y logarithmically, if every value is positive.
    :param smooth: draw a moving mean over the points, where there are many.
    :param stairs: a value stays until the next one.
    """
    ys = [y for curve in curves for _, y in curve.points]
    log = log and min(ys) > 0
    x = Axis(x_range[0], x_range[1] if x_range[1] > x_range[0] else x_range[0] + 1, LEFT, WIDTH - RIGHT)
    y = Axis(*(log_span(ys) if log else span(ys)), HEIGHT - BOTTOM, TOP, log)
    parts = [*grid_lines(x, y), label(WIDTH / 2 + LEFT / 2, HEIGHT - 4, "middle", x_label, "axis")]
    data = []
    for curve in curves:
        shown = thinned(curve.points)
        rough = smooth and len(curve.points) >= SMOOTH_FROM
        colour, dash = curve.run % COLOURS, curve.run // COLOURS % DASHES
        kind = f"run-{colour} dash-{dash}"
        parts.append(f'<g data-run="{curve.run}">')
        parts.append(f'<path class="curve {kind}{" rough" if rough else ""}" d="{path(shown, x, y, stairs)}"/>')
        if rough:
            parts.append(f'<path class="curve {kind}" d="{path(thinned(moving_mean(curve.points, log)), x, y)}"/>')
        if len(shown) <= 12 and not stairs or len(shown) == 1:
            parts += [dot(point, x, y, f"dot {kind}", 3) for point in shown]
        if curve.best is not None:
            parts.append(dot(curve.best, x, y, f"ring {kind}", 6))
        parts.append("</g>")
        data.append({
            "number": curve.run, "run": colour, "dash": dash, "name": curve.name,
            "x": [round(x.place(a), 1) for a, _ in shown],
            "y": [round(y.place(b), 1) for _, b in shown], "at": [short(a) for a, _ in shown],
            "value": [f"{b:.4g}" for _, b in shown],
        })
    parts.append('<g class="pointer"></g>')
    spoken = "; ".join(f"{curve.name} from {curve.points[0][1]:.4g} to {curve.points[-1][1]:.4g}" for curve in curves)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{title}: {spoken}")}">'
        f'{"".join(parts)}</svg><script type="application/json">{as_script(data)}</script>'
    )


def grid_lines(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in y.ticks():
        at = f"{y.place(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(label(LEFT - 8, float(at) + 4, "end", short(value)))
    for value in x.ticks():
        at = x.place(value)
        parts.append(f'<path class="tick" d="M{at:.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(label(at, HEIGHT - BOTTOM + 17, "middle", short(value)))
    return [*parts, f'<path class="frame" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>']


def label(x: float, y: float, anchor: str, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def dot(point: tuple[float, float], x: Axis, y: Axis, kind: str, radius: float) -> str:
    return f'<circle class="{kind}" cx="{x.place(point[0]):.1f}" cy="{y.place(point[1]):.1f}" r="{radius}"/>'


def path(points: Points, x: Axis, y: Axis, stairs: bool = False) -> str:
    places = [(x.place(a), y.place(b)) for a, b in points]
    first = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    if stairs:
        return first + "".join(f"H{a:.1f}V{b:.1f}" for a, b in places[1:])
    return first + "".join(f"L{a:.1f} {b:.1f}" for a, b in places[1:])


def thinned(points: Points) -> Points:
    """At most RAW points: the lowest and the highest of each run of neighbours, and the two ends."""
    if len(points) <= RAW:
        return list(points)
    size = math.ceil((len(points) - 2) / (RAW / 2 - 1))
    kept = [points[0], points[-1]]
    for start in range(1, len(points) - 1, size):
        part = points[start : min(start + size, len(points) - 1)]
        kept += {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def moving_mean(points: Points, log: bool) -> Points:
    """Each value with its neighbours', a twelfth of the curve in all; geometric on a logarithmic axis."""
    reach = max(1, len(points) // 24)
    values = [math.log(value) if log else value for _, value in points]
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    mean = []
    for place, (x, _) in enumerate(points):
        near = min(reach, place)                                     # fewer at the start, where losses fall steeply
        stop = min(place + near + 1, len(points))
        value = (sums[stop] - sums[place - near]) / (stop - place + near)
        mean.append((x, math.exp(value) if log else value))
    return mean


# --- numbers -------------------------------------------------------------------------------------------------------


def span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value with a margin, never the same."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or max(abs(low) * 0.05, 0.5)
    return low - margin, high + margin


def log_span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value of a logarithmic axis with a margin, never the same."""
    low, high = span([math.log10(value) for value in values])
    if max(values) == min(values):
        low, high = math.log10(values[0]) - 0.2, math.log10(values[0]) + 0.2
    return 10.0**low, 10.0**high


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, evenly spaced."""
    from matplotlib.ticker import MaxNLocator  # matplotlib is slow to import

    return between(MaxNLocator(MAX_TICKS - 1, steps=[1, 2, 5, 10]).tick_values(low, high), low, high)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with multiples of them where there is room; plain ticks within a small factor."""
    from matplotlib.ticker import LogLocator

    for factors in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        most = MAX_TICKS if factors == (1,) else sys.maxsize        # in the end, powers are left out
        found = between(LogLocator(subs=factors, numticks=most).tick_values(low, high), low, high)
        if len(found) <= MAX_TICKS:
            break
    return found if len(found) >= 3 else ticks(low, high)


def between(values: Iterable[float], low: float, high: float) -> list[float]:
    """The values that an axis from `low` to `high` shows."""
    rounding = 1e-9 * (high - low)
    return [float(value) for value in values if low - rounding <= value <= high + rounding]


def short(value: float) -> str:
    """A short number for an axis: 0.05, 200, 20k, 1.5M, 3e-5."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= (1e4 if unit == "k" else size):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def as_script(data: Any) -> str:
    """JSON that cannot end the script element that contains it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def is_constant(points: Points) -> bool:
    return all(a[1] == b[1] for a, b in pairwise(points))
