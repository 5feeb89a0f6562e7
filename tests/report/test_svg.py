"""A drawing says what its numbers are: places of points, ticks, and what is left of long curves."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from cm.report import svg as svg_plot
from cm.report.svg import BOTTOM, HEIGHT, LEFT, RAW, TOP, Curve, log_ticks, moving_mean, plot, short, thinned

LAST = svg_plot.WIDTH - svg_plot.RIGHT


def drawn(curves, x_range=(0, 10), **how):
    """The elements of an SVG by class, and its data."""
    svg, script = re.fullmatch(r"(<svg.*</svg>)<script.*?>(.*)</script>", plot(
        curves, "Loss", "step", x_range, **({"log": False, "smooth": False, "stairs": False} | how)
    )).groups()
    return ET.fromstring(svg), json.loads(script)


def numbers(path):
    return [float(word) for word in re.findall(r"-?[\d.]+", path)]


def curve_paths(svg):
    return [each.get("d") for each in svg.iter("path") if each.get("class").startswith("curve")]


def test_points_stand_at_their_places():
    svg, data = drawn([Curve(0, "a", [(0, 1.0), (5, 3.0), (10, 2.0)])])
    x0, y0, x1, y1, x2, y2 = numbers(curve_paths(svg)[0])
    assert (x0, x2) == (LEFT, LAST) and x1 == (x0 + x2) / 2
    assert TOP < y1 < y2 < y0 < HEIGHT - BOTTOM
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1), "a linear axis"
    assert data[0]["x"] == [x0, x1, x2] and data[0]["value"] == ["1", "3", "2"] and data[0]["at"] == ["0", "5", "10"]


def test_equal_factors_are_equal_distances_on_a_logarithmic_axis():
    svg, _ = drawn([Curve(0, "a", [(0, 100.0), (5, 1.0), (10, 0.01)])], log=True)
    _, y0, _, y1, _, y2 = numbers(curve_paths(svg)[0])
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    svg, _ = drawn([Curve(0, "a", [(0, 100.0), (5, 0.0), (10, 50.0)])], log=True)
    _, y0, _, y1, _, y2 = numbers(curve_paths(svg)[0])
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1), "zero has no logarithm: linear"


def test_stairs_keep_a_value_until_the_next():
    svg, _ = drawn([Curve(0, "a", [(0, 1.0), (10, 2.0)])], stairs=True)
    assert re.fullmatch(r"M[\d.]+ [\d.]+H[\d.]+V[\d.]+", curve_paths(svg)[0])


def test_a_rough_curve_has_a_smooth_one_over_it():
    points = [(x, 1.0 + x % 2) for x in range(48)]
    svg, _ = drawn([Curve(0, "a", points), Curve(1, "b", points[:20])], (0, 47), smooth=True)
    assert len(curve_paths(svg)) == 3, "the second has few points"
    middle = moving_mean(points, log=False)[24][1]
    assert middle == pytest.approx(1.4, abs=1e-9), "of 5 neighbours: 1 2 1 2 1"
    assert moving_mean(points, log=False)[0] == points[0], "no neighbours before the first"
    assert moving_mean(points, log=False)[-1][1] == pytest.approx(5 / 3, abs=1e-9), "of the last 3: 2 1 2"


def test_the_best_is_ringed_and_names_are_escaped():
    svg, data = drawn([Curve(9, '<b>"&', [(0, 1.0), (10, 2.0)], best=(0, 1.0))])
    rings = [each for each in svg.iter("circle") if each.get("class").startswith("ring")]
    assert [float(ring.get("cx")) for ring in rings] == [LEFT] and data[0]["name"] == '<b>"&'
    assert data[0]["run"] == 1 and "dash-1" in rings[0].get("class"), "colours come again, dashed"


def test_long_curves_keep_their_ends_and_extremes():
    points = [(x, float(x % 100)) for x in range(10_000)]
    points[4321] = (4321, 5000.0)
    points[777] = (777, -5000.0)
    few = thinned(points)
    assert len(few) <= RAW and few == sorted(few)
    assert {points[0], points[-1], points[4321], points[777]} <= set(few)


@pytest.mark.parametrize("points", [[(3, 2.0)], [(3, 0.0)], [(1, 5.0), (2, 5.0)], [(1, 1e-30), (2, 1e30)]])
@pytest.mark.parametrize("log", [False, True])
def test_any_points_can_be_drawn(points, log):
    svg, _ = drawn([Curve(0, "a", points)], (points[0][0], points[-1][0]), log=log)
    for each in curve_paths(svg):
        xs, ys = numbers(each)[::2], numbers(each)[1::2]
        assert all(LEFT <= x <= LAST for x in xs) and all(TOP <= y <= HEIGHT - BOTTOM for y in ys)


@pytest.mark.parametrize("low, high, expected", [
    (0.4, 7, [0.5, 1, 2, 3, 5]),
    (1, 1000, [1, 3, 10, 30, 100, 300, 1000]),
    (1e-4, 1e3, [1e-4, 1e-2, 1, 100]),
    (7, 45, [10, 20, 30]),
    (5, 6, [5, 5.2, 5.4, 5.6, 5.8, 6]),
])
def test_ticks_of_a_logarithmic_axis(low, high, expected):
    assert log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value, text", [
    (0, "0"), (200, "200"), (9999, "9999"), (20_000, "20k"), (1.5e6, "1.5M"), (3e-5, "3e-5"), (-2.5e-7, "-2.5e-7"),
    (0.05, "0.05"), (0.30000000000000004, "0.3"), (2e9, "2G"),
])
def test_short_numbers(value, text):
    assert short(value) == text
