"""A dot plot: a row for each contestant, a dot for each seed, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

ROW, LEFT, RIGHT, TOP, BOTTOM, WIDTH, DOT = 24, 300, 30, 16, 56, 900, 5
DOT_COLOUR, SPAN_COLOUR, GRID_COLOUR = "#1f77b4", "#9ec5e8", "#dddddd"
FACTORS = (1, 2, 5)                                         # a tick stands at these times a power of ten


def dot_plot(rows: Mapping[str, Sequence[float]], x_label: str) -> Image.Image:
    """Positive values on a logarithmic axis.

    :raises ValueError: if there is nothing to plot, or a value is not positive.
    """
    values = [value for row in rows.values() for value in row]
    if not values or min(values) <= 0:
        raise ValueError("a dot plot on a logarithmic axis needs positive values")
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05
    sheet = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + BOTTOM), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    bottom = TOP + ROW * len(rows)

    def across(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    for tick in ticks(10**low, 10**high):
        draw.line([(across(tick), TOP), (across(tick), bottom)], fill=GRID_COLOUR)
        draw.text((across(tick), bottom + 6), f"{tick:g}", fill="black", font=font, anchor="ma")
    for number, (name, row) in enumerate(rows.items()):
        y = TOP + ROW * (number + 0.5)
        draw.text((LEFT - 12, y), name, fill="black", font=font, anchor="rm")
        draw.line([(across(min(row)), y), (across(max(row)), y)], fill=SPAN_COLOUR, width=4)
        for value in row:
            x = across(value)
            draw.ellipse([x - DOT, y - DOT, x + DOT, y + DOT], fill=DOT_COLOUR)
    draw.text(((LEFT + WIDTH) / 2, sheet.height - 8), x_label, fill="black", font=font, anchor="mb")
    return sheet


def ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in FACTORS if low <= factor * 10.0**power <= high]
