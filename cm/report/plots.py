"""Plots as PNG files, drawn by matplotlib: curves through points, and rows of dots.

matplotlib is imported when something is drawn, so that no command waits for it before. It draws into memory: no window
system is asked for, and no state is shared with the plots of a caller.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#000000",
           "#bcbd22", "#1b1464", "#ff9896")
SPAN_COLOUR, GRID_COLOUR = "#9ec5e8", "#dddddd"
DPI = 100                                                           # pixels of an inch, the unit of sizes here
LINE_PLOT_SIZE, LEGEND_LINE = (7.2, 4.0), 0.2                       # without the legend; one line of the legend
DOT_PLOT_WIDTH, DOT_PLOT_ROW, DOT_PLOT_AXIS = 9.0, 0.24, 0.8

Points = Sequence[tuple[float, float]]


def line_plot(series: Mapping[str, Points], x_label: str, y_label: str, log: bool = False) -> bytes:
    """Named curves through their points, in the order given; the lowest point of each has a ring.

    :param log: both axes are logarithmic, and a curve's lowest point has no ring.
    :return: a PNG file.
    :raises ValueError: if a curve has no point, or there is none, and for numbers that have no logarithm.
    """
    if not series or not all(series.values()):
        raise ValueError("there is nothing to plot: every curve needs a point")
    if log and min(number for curve in series.values() for point in curve for number in point) <= 0:
        raise ValueError("logarithmic axes show positive numbers only")
    from matplotlib.figure import Figure

    width, height = LINE_PLOT_SIZE
    figure = Figure((width, height + LEGEND_LINE * len(series)), DPI, layout="constrained")
    axes = figure.subplots()
    lines = []
    for number, curve in enumerate(series.values()):
        colour, (xs, ys) = COLOURS[number % len(COLOURS)], zip(*curve)
        lines += axes.plot(xs, ys, color=colour, marker="o", markersize=5, linewidth=1.5)
        if not log:
            lowest = min(curve, key=lambda point: point[1])
            axes.plot(*lowest, color=colour, marker="o", markersize=11, fillstyle="none")
    if log:
        for place, set_scale, axis in ((0, axes.set_xscale, axes.xaxis), (1, axes.set_yscale, axes.yaxis)):
            set_scale("log")
            label_log_axis(axis, [point[place] for curve in series.values() for point in curve])
    axes.grid(axis="y", color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.set_xlabel(plain(x_label))
    axes.set_ylabel(plain(y_label), wrap=True)
    figure.legend(lines, [plain(name) for name in series], loc="outside upper left", frameon=False, fontsize="small")
    return png(figure)


def dot_plot(rows: Mapping[str, Sequence[float]], x_label: str) -> bytes:
    """A named row of positive values each, from above, with a dot for each value and a bar from the lowest to the
    highest, on a logarithmic axis.

    :return: a PNG file.
    :raises ValueError: if there is nothing to plot, or a value is not positive.
    """
    if not rows or not all(rows.values()) or min(value for row in rows.values() for value in row) <= 0:
        raise ValueError("a dot plot on a logarithmic axis needs positive values in every row")
    from matplotlib.figure import Figure

    figure = Figure((DOT_PLOT_WIDTH, DOT_PLOT_ROW * len(rows) + DOT_PLOT_AXIS), DPI, layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows.values()):
        low, high = min(row), max(row)
        axes.errorbar([low], [place], xerr=[[0], [high - low]], fmt="none", ecolor=SPAN_COLOUR, elinewidth=4)
        axes.plot(row, [place] * len(row), color=COLOURS[0], marker="o", markersize=7, linestyle="none")
    axes.set_xscale("log")
    label_log_axis(axes.xaxis, [value for row in rows.values() for value in row])
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.set_xlabel(plain(x_label))
    return png(figure)


def label_log_axis(axis: Axis, values: Sequence[float]) -> None:
    """Ticks with numbers at 1, 2 and 5 times powers of ten; over more than three decades only at powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(values) <= 1000 * min(values):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def plain(text: str) -> str:
    """Text in which matplotlib finds no formulas."""
    return text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
