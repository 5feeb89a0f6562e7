"""A small line plot as a picture, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 400                                            # of the picture without its legend, in pixels
LEFT, TOP, RIGHT, BOTTOM = 80, 30, 20, 60                           # margins
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#000000",
           "#bcbd22", "#1b1464", "#ff9896")
TEXT, LINE, DOT = 14, 18, 4                                         # letters, a line of the legend, radius of a point

Points = Sequence[tuple[float, float]]


def line_plot(series: Mapping[str, Points], x_label: str, y_label: str, log: bool = False) -> Image.Image:
    """Named curves through their points, in the order given; the lowest point of each has a ring.

    :param log: both axes are logarithmic, and a curve's lowest point has no ring.
    :raises ValueError: if a curve has no point, or there is none, and for numbers that have no logarithm.
    """
    if not series or not all(series.values()):
        raise ValueError("there is nothing to plot: every curve needs a point")
    if log:
        if min(number for curve in series.values() for point in curve for number in point) <= 0:
            raise ValueError("logarithmic axes show positive numbers only")
        series = {name: [(math.log10(x), math.log10(y)) for x, y in curve] for name, curve in series.items()}
    shown = (lambda power: f"{10 ** power:.3g}") if log else (lambda number: f"{number:.6g}")
    head = TOP + LINE * len(series)
    sheet = Image.new("RGB", (WIDTH, HEIGHT - TOP + head), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    left, top, right, bottom = LEFT, head, WIDTH - RIGHT, sheet.height - BOTTOM
    x_low, x_high = span([x for curve in series.values() for x, _ in curve])
    y_low, y_high = span([y for curve in series.values() for _, y in curve])

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def down(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    marks = log_ticks if log else ticks
    for y in marks(y_low, y_high):
        draw.line([(left, down(y)), (right, down(y))], fill="#dddddd")
        draw.text((left - 8, down(y)), shown(y), fill="black", font=font, anchor="rm")
    for x in marks(x_low, x_high):
        draw.line([(across(x), bottom), (across(x), bottom + 5)], fill="black")
        draw.text((across(x), bottom + 8), shown(x), fill="black", font=font, anchor="ma")
    draw.rectangle([left, top, right, bottom], outline="black")
    draw.text(((left + right) / 2, sheet.height - 10), x_label, fill="black", font=font, anchor="mb")
    draw.text((10, 8), y_label, fill="black", font=font, anchor="lt")
    for number, (name, curve) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(across(x), down(y)) for x, y in curve]
        draw.line(places, fill=colour, width=2)
        for place in places:
            draw.ellipse(box(place, DOT), fill=colour)
        if not log:
            draw.ellipse(box(max(places, key=lambda place: place[1]), 2 * DOT), outline=colour, width=2)
        draw.text((left, TOP + LINE * number), name, fill=colour, font=font, anchor="lt")
    return sheet


def span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value with a little air, never the same."""
    low, high = min(values), max(values)
    air = (high - low) * 0.05 or max(abs(low) * 0.05, 0.5)
    return low - air, high + air


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= (high - low) / 4)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten between the two; over more than three decades only of the powers."""
    factors = (1, 2, 5) if high - low <= 3 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    places = [power + math.log10(factor) for power in powers for factor in factors]
    return [place for place in places if low <= place <= high]


def box(centre: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
