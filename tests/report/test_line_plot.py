"""The plot shows every point, and marks the lowest."""

import numpy as np
import pytest

from cm.report.line_plot import COLOURS, line_plot, log_ticks, span, ticks


def pixels_of(picture, colour):
    rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (np.asarray(picture) == rgb).all(2)


def test_each_curve_is_drawn_in_its_colour_and_the_lowest_point_is_ringed():
    curve = [(0, 3.0), (10, 1.0), (20, 2.0)]
    picture = line_plot({"one": curve, "two": [(x, y + 5) for x, y in curve]}, "index", "FID")
    for colour in COLOURS[:2]:
        rows, columns = np.nonzero(pixels_of(picture, colour)[80:])          # without the legend
        lowest = columns[rows == rows.max()].mean()
        assert abs(lowest - picture.width / 2 - 30) < 20, "the lowest point is the middle one"
    assert pixels_of(picture, COLOURS[1]).nonzero()[0].max() < pixels_of(picture, COLOURS[0]).nonzero()[0].max()


@pytest.mark.parametrize("points", [[(5, 2.0)], [(5, 0.0)], [(5, 2.0), (6, 2.0)], [(1, 1e9), (2, 1e9 + 1)]])
def test_points_that_span_nothing_can_be_drawn(points):
    assert pixels_of(line_plot({"one": points}, "index", "FID"), COLOURS[0]).any()


@pytest.mark.parametrize("series", [{}, {"one": []}, {"one": [(0, 1)], "two": []}])
def test_nothing_to_plot_is_an_error(series):
    with pytest.raises(ValueError, match="every curve needs a point"):
        line_plot(series, "index", "FID")


@pytest.mark.parametrize("low, high, expected", [
    (0, 39, [0, 5, 10, 15, 20, 25, 30, 35]),
    (0.175, 0.303, [0.18, 0.2, 0.22, 0.24, 0.26, 0.28, 0.3]),
    (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (120, 460, [150, 200, 250, 300, 350, 400, 450]),
])
def test_ticks_are_round(low, high, expected):
    np.testing.assert_allclose(ticks(low, high), expected, rtol=1e-12, atol=1e-12)
    assert span([low, high])[0] < low and span([low, high])[1] > high


def test_a_power_law_is_straight_on_logarithmic_axes():
    picture = line_plot({"one": [(n, n**-1.5) for n in (4, 8, 16, 32, 64)]}, "steps", "error", log=True)
    rows, columns = np.nonzero(pixels_of(picture, COLOURS[0])[60:])                  # without the legend
    assert np.abs(np.polyval(np.polyfit(columns, rows, 1), columns) - rows).max() < 8
    with pytest.raises(ValueError, match="positive numbers only"):
        line_plot({"one": [(1, 0.0)]}, "steps", "error", log=True)


def test_ticks_of_logarithmic_axes():
    np.testing.assert_allclose(10 ** np.array(log_ticks(0.0, 1.5)), [1, 2, 5, 10, 20])
    assert log_ticks(-3.5, 0.2) == [-3, -2, -1, 0]
