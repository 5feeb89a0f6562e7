"""The plots show every point, and mark the lowest."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cm.report.plots import COLOURS, SPAN_COLOUR, dot_plot, line_plot


def pixels_of(png, colour):
    """Where a picture [H,W] has exactly this colour."""
    rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) == rgb).all(2)


def test_each_curve_is_drawn_in_its_colour_and_the_lowest_point_is_ringed():
    curve = [(0, 3.0), (10, 1.0), (20, 2.0)]
    picture = line_plot({"one": curve, "two": [(x, y + 5) for x, y in curve]}, "index", "FID")
    lowest = []
    for colour in COLOURS[:2]:
        rows, columns = np.nonzero(pixels_of(picture, colour)[80:])          # without the legend
        middle = (columns.min() + columns.max()) / 2
        assert abs(columns[rows == rows.max()].mean() - middle) < 40, "the middle one of 3 over 600 pixels"
        lowest.append(rows.max())
        marked = columns[rows > rows.max() - 12]
        assert np.ptp(marked) >= 10, "a ring is wider than a point"
    assert lowest[1] < lowest[0]


@pytest.mark.parametrize("points", [[(5, 2.0)], [(5, 0.0)], [(5, 2.0), (6, 2.0)], [(1, 1e9), (2, 1e9 + 1)]])
def test_points_that_span_nothing_can_be_drawn(points):
    assert pixels_of(line_plot({"one": points}, "index", "FID"), COLOURS[0]).any()


@pytest.mark.parametrize("series", [{}, {"one": []}, {"one": [(0, 1)], "two": []}])
def test_nothing_to_plot_is_an_error(series):
    with pytest.raises(ValueError, match="every curve needs a point"):
        line_plot(series, "index", "FID")


def test_a_power_law_is_straight_on_logarithmic_axes():
    picture = line_plot({"one": [(n, n**-1.5) for n in (4, 8, 16, 32, 64)]}, "steps", "error", log=True)
    rows, columns = np.nonzero(pixels_of(picture, COLOURS[0])[60:])                  # without the legend
    assert np.abs(np.polyval(np.polyfit(columns, rows, 1), columns) - rows).max() < 8
    with pytest.raises(ValueError, match="positive numbers only"):
        line_plot({"one": [(1, 0.0)]}, "steps", "error", log=True)


@pytest.mark.parametrize("name", ["$x", "a $\\frac{$ b", "_hidden", "<b>&", "\u00e9\u03c3"])
def test_any_name_is_drawn_as_it_is(name):
    assert line_plot({name: [(0, 1.0)]}, name, name).startswith(b"\x89PNG")
    assert dot_plot({name: [1.0]}, name).startswith(b"\x89PNG")


def test_a_dot_plot_has_a_row_for_each_name_and_a_bar_over_its_values():
    picture = dot_plot({"near": [1.0, 1.5], "far": [100.0, 200.0]}, "distance")
    assert Image.open(io.BytesIO(picture)).size == (900, 128)
    rows, columns = np.nonzero(pixels_of(picture, COLOURS[0]))
    middle = (rows.min() + rows.max()) / 2
    assert columns[rows < middle].max() < columns[rows > middle].min()
    bar = np.nonzero(pixels_of(picture, SPAN_COLOUR))
    assert (bar[1][bar[0] > middle]).min() > (bar[1][bar[0] < middle]).max()


def test_a_dot_plot_of_nothing_or_of_values_without_a_logarithm_is_an_error():
    for rows in ({}, {"a": []}, {"a": [1.0, 0.0]}):
        with pytest.raises(ValueError, match="positive"):
            dot_plot(rows, "x")


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, cm.report.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
