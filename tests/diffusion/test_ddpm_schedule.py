"""DDPM's discrete schedule as noise levels, and its network as a denoiser."""

import numpy as np
import pytest
import torch as th
from torch import nn

from cm.diffusion import ddpm_schedule
from cm.karras_diffusion import KarrasDenoiser

F64 = th.float64


def published_alpha_bars():
    """The running product in plain Python, from the published betas."""
    product, values = 1.0, []
    for t in range(1000):
        product *= 1 - (1e-4 + t * (0.02 - 1e-4) / 999)
        values.append(product)
    return np.array(values)


def test_the_table_is_the_published_one():
    abar = published_alpha_bars()
    np.testing.assert_allclose(ddpm_schedule.alpha_bars().numpy(), abar, rtol=1e-12)
    np.testing.assert_allclose(ddpm_schedule.sigmas().numpy(), np.sqrt(1 / abar - 1), rtol=1e-10)


@pytest.mark.parametrize("dtype", [th.float32, F64])
def test_levels_of_the_table_are_told_as_their_own_timestep(dtype):
    assert th.equal(ddpm_schedule.timestep_of(ddpm_schedule.sigmas().to(dtype)), th.arange(1000, dtype=F64))


def test_between_and_outside():
    between = (ddpm_schedule.sigmas()[10] * ddpm_schedule.sigmas()[11]).sqrt()
    t = ddpm_schedule.timestep_of(th.stack([between, th.tensor(0.002), th.tensor(500.0)]))
    assert t.tolist() == pytest.approx([10.5, 0, 999], abs=1e-9)
    fine = ddpm_schedule.timestep_of(th.logspace(-2, 2, 4000, dtype=F64))
    assert (fine.diff() >= 0).all()


def test_earlier_timesteps():
    sigma, there = ddpm_schedule.earlier(ddpm_schedule.sigmas()[[0, 1, 2, 999]].float(), 2)
    assert sigma.tolist() == ddpm_schedule.sigmas()[[0, 0, 0, 997]].float().tolist()
    assert there.tolist() == [False, False, True, True]


class Spy(nn.Module):
    """Predicts noise and remembers what it was shown."""

    def forward(self, x, timesteps):
        self.x, self.timesteps = x, timesteps
        return 0.3 * x + timesteps[:, None] / 1000


def test_a_ddpm_network_is_a_denoiser():
    """Told DDPM's x_t and t; answers with x0 from its own noise, (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    rng, t = th.Generator().manual_seed(0), th.tensor([0, 1, 500, 999])
    x0, z = th.randn(2, 4, 5, generator=rng, dtype=F64)
    net, abar, sigma = Spy(), ddpm_schedule.alpha_bars()[t][:, None], ddpm_schedule.sigmas()[t]
    denoised = KarrasDenoiser(precond="ddpm").bind(net)(x0 + sigma[:, None] * z, sigma)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * z
    th.testing.assert_close(net.x, x_t, rtol=1e-12, atol=1e-12)
    assert th.equal(net.timesteps, t.to(F64))
    eps = 0.3 * x_t + t.to(F64)[:, None] / 1000
    th.testing.assert_close(denoised, (x_t - (1 - abar).sqrt() * eps) / abar.sqrt(), rtol=1e-10, atol=1e-10)
