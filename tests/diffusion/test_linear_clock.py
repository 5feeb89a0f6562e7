"""The linear clock: an EDM network is the velocity field of flow matching, and a flow map with a second time."""

import torch as th

from cm.diffusion import linear_clock
from cm.diffusion.denoiser import Diffusion
from support.gaussian import Gaussian, column

F64 = th.float64
S, R = th.tensor([0.05, 0.4, 0.97], dtype=F64), th.tensor([0.01, 0.1, 0.6], dtype=F64)


def net(x, time, gap, y=None):
    shift = 0 if y is None else column(y.double(), x)
    return (3 * x + column(time, x) / 10 + column(gap, x) + shift).sin()


def test_time_and_level_are_inverse():
    th.testing.assert_close(linear_clock.time(linear_clock.level(S)), S)
    assert linear_clock.level(th.tensor(0.5)) == 1


def test_the_velocity_is_that_of_the_denoiser():
    diffusion, cond = Diffusion(time_scale=3.0), {"y": th.tensor([1, 2, 3])}
    y = th.randn(3, 3, 2, 2, dtype=F64, generator=th.Generator().manual_seed(0))
    u = linear_clock.mean_velocity_of(diffusion, net, cond)(y, S, R)
    x, sigma = y / column(1 - S, y), linear_clock.level(S)
    denoised = diffusion.denoise(net, x, sigma, gap=S - R, **cond)[1]
    th.testing.assert_close(u, linear_clock.mean_velocity(y, denoised, S), rtol=1e-10, atol=1e-10)


def test_the_exact_denoiser_gives_the_slope_of_the_ode():
    bed, h = Gaussian(0.3, 0.7), 1e-6
    y = th.randn(3, 1, 2, 2, dtype=F64, generator=th.Generator().manual_seed(0))
    x, sigma = y / column(1 - S, y), linear_clock.level(S)

    def at(s):
        return bed.flow(x, sigma, linear_clock.level(s)) * column(1 - s, y)

    slope = (at(S + h) - at(S - h)) / (2 * h)
    th.testing.assert_close(linear_clock.mean_velocity(y, bed.D(x, sigma), S), slope, rtol=1e-6, atol=1e-6)
