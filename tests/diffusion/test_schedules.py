"""Grids of noise levels: golden numbers, exact ends, one formula for numbers and tensors."""

import pytest
import torch as th

from cm.diffusion.schedules import (
    append_zero,
    get_sigmas_karras,
    karras_between,
    karras_earlier,
    karras_grid,
    karras_sigma,
)
from support import golden
from support.gaussian import stored


@pytest.mark.parametrize("n", [1, 2, 5, 10, 18, 40])
def test_golden_grids(n):
    golden.assert_close(get_sigmas_karras(n, 0.002, 80.0), f"sigmas_karras/n{n}")


def test_golden_grid_of_other_parameters():
    golden.assert_close(get_sigmas_karras(12, 0.01, 50.0, rho=5.0), "sigmas_karras/n12_min0.01_max50_rho5")


@pytest.mark.parametrize("n", [2, 18, 40])
def test_golden_neighbours(n):
    grid = karras_grid(n, dtype=th.float32)
    golden.assert_close(grid[:-1], f"consistency_grid/scales{n}/t")
    golden.assert_close(grid[1:], f"consistency_grid/scales{n}/t2")


def test_float64_grid():
    th.testing.assert_close(karras_grid(18), stored("g_traj_t"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [2, 3, 17, 1281])
@pytest.mark.parametrize("sigma_min, sigma_max, rho", [(0.002, 80.0, 7.0), (0.01, 50.0, 5.0), (1e-3, 1.0, 1.0)])
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_grids_fall_and_their_ends_are_exact(n, sigma_min, sigma_max, rho, dtype):
    grid = karras_grid(n, sigma_min, sigma_max, rho, dtype=dtype)
    assert grid.dtype == dtype and len(grid) == n
    assert (grid[1:] < grid[:-1]).all()
    assert grid[0] == th.tensor(sigma_max, dtype=dtype) and grid[-1] == th.tensor(sigma_min, dtype=dtype)


def test_a_number_and_a_tensor_follow_one_formula():
    positions = th.linspace(0, 1, 9, dtype=th.float64)
    expected = [karras_sigma(p, 0.01, 50.0, 5.0) for p in positions.tolist()]
    th.testing.assert_close(karras_sigma(positions, 0.01, 50.0, 5.0).tolist(), expected, rtol=1e-13, atol=0)
    assert karras_sigma(positions.float()).dtype == th.float32


def test_every_second_level_of_a_grid_of_double_fineness():
    th.testing.assert_close(karras_grid(17)[::2], karras_grid(9), rtol=1e-12, atol=0)


def test_append_zero():
    assert append_zero(th.tensor([2.0, 1.0])).tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0.002, 80.0), "at least 1 noise level, got n=0"),
        ((5, 0.0, 80.0), "0 < sigma_min <= sigma_max, got 0.0 and 80.0"),
        ((5, 80.0, 0.002), "0 < sigma_min <= sigma_max, got 80.0 and 0.002"),
        ((5, 0.002, 80.0, 0.0), "rho must be positive, got 0.0"),
    ],
)
def test_impossible_grids(arguments, message):
    with pytest.raises(ValueError, match=message):
        karras_grid(*arguments)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_grids_between_pairs_of_levels(dtype):
    """Each column is `karras_grid` between its own ends; ends that touch give one level, ends an ulp apart fall."""
    start = th.tensor([80.0, 0.5, 0.002, 0.3], dtype=dtype)
    end = th.tensor([0.002, 0.45, 0.002, 0.3], dtype=dtype)
    end[3] = th.nextafter(start[3], th.zeros((), dtype=dtype))
    grid = karras_between(start, end, 6)
    for column, high, low in list(zip(grid.T, start.tolist(), end.tolist()))[:2]:
        th.testing.assert_close(column, karras_grid(6, low, high, dtype=dtype))
    assert th.equal(grid[0], start) and th.equal(grid[-1], end)
    assert (grid.diff(dim=0) <= 0).all() and th.equal(grid[:, 2], start[2].expand(6))
    assert th.equal(karras_between(start, end, 2), th.stack([start, end]))


def test_levels_a_step_earlier():
    """From one level of a grid to the next; below the grid's end there is none."""
    grid = karras_grid(10, 0.01, 5.0)
    for k in range(4):
        level, is_there = karras_earlier(grid, k, 10, 0.01, 5.0)
        th.testing.assert_close(level[: 10 - k], grid[k:])
        assert is_there[: 9 - k].all() and not is_there[10 - k :].any()
        assert (level[10 - k :] == 0.01).all()
