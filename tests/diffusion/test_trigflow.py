"""TrigFlow's clock: an EDM network is a TrigFlow network."""

import pytest
import torch as th

from cm.diffusion import trigflow
from cm.diffusion.denoiser import Diffusion
from support.gaussian import column

SIGMA = th.tensor([0.01, 0.4, 30.0], dtype=th.float64)


def net(x, time, y=None):
    shift = 0 if y is None else column(y.double(), x)
    return (3 * x + column(time, x) / 10 + shift).sin()


@pytest.mark.parametrize("cond", [{}, {"y": th.tensor([1, 2, 3])}])
def test_the_denoiser_is_trigflows_consistency_function(cond):
    diffusion = Diffusion(time_scale=3.0)
    x = th.randn(3, 3, 2, 2, dtype=th.float64, generator=th.Generator().manual_seed(0))
    x = x * column(SIGMA, x)
    t = column(trigflow.angle(SIGMA, 0.5), x)
    F = trigflow.network_of(diffusion, net, cond)
    x_t = t.cos() * x
    f = t.cos() * x_t - 0.5 * t.sin() * F(x_t / 0.5, SIGMA.log())
    th.testing.assert_close(f, diffusion.denoise(net, x, SIGMA, **cond)[1], rtol=1e-12, atol=1e-12)


def test_the_angle_is_that_of_noise_over_data():
    th.testing.assert_close(trigflow.angle(SIGMA, 0.5).tan() * 0.5, SIGMA)
