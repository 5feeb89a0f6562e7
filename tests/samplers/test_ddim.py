"""`ddim`: its noise levels, its steps beside DDPM's, and the law of its results on Gaussian data."""

import math

import numpy as np
import pytest
import torch as th

from cm.diffusion import ddpm_schedule
from cm.diffusion.schedules import append_zero
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.samplers import integrate
from cm.samplers.ddim import DDIM, timestep_grid
from cm.samplers.sample import SampleOptions, sample
from support.gaussian import Gaussian, Mixture, Scripted, levels_of, stored

ALL = (0.0, math.inf)                                               # sigma_min and sigma_max that cut nothing off
BED = Gaussian(mu=0.3, s=0.5)


# --- DDIM and DDPM ---------------------------------------------------------------------------------------------------


def test_the_levels_are_those_of_evenly_spaced_timesteps():
    grid = DDIM().grid(1000, *ALL, 7.0)
    assert th.equal(grid, append_zero(ddpm_schedule.sigmas().flip(0)))
    told = ddpm_schedule.timestep_of(timestep_grid(10, *ALL))
    assert told.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    cut = timestep_grid(5, 0.002, 80.0)                             # a network that knows no more than this
    levels = ddpm_schedule.sigmas()
    assert cut[0] <= 80 < levels[int(ddpm_schedule.timestep_of(cut[:1])) + 1] and cut[-1] == levels[0]
    with pytest.raises(UserError, match="--steps 3: only 1 of the 1000 timesteps .* 0.01 and sigma_max 0.012"):
        timestep_grid(3, 0.01, 0.012)


def test_the_timesteps_of_the_published_code():
    """For 10 of 1000 steps: range(0, 1000, 100), and int(linspace(0, sqrt(800), 10)^2)."""
    def told(spacing, steps=10):
        return ddpm_schedule.timestep_of(timestep_grid(steps, *ALL, spacing)).tolist()

    assert told("uniform") == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert told("quad") == [int(step) for step in np.linspace(0, np.sqrt(800), 10) ** 2][::-1]
    assert told("quad", 2) == [800, 0] or told("quad", 2) == [799, 0]
    grid = DDIM(spacing="uniform").grid(10, *ALL, 7.0)
    assert len(grid) == 11 and grid[0] == ddpm_schedule.sigmas()[900] and grid[-1] == 0
    with pytest.raises(UserError, match="--spacing quad names some of the 1000 timesteps twice"):
        timestep_grid(500, *ALL, "quad")
    with pytest.raises(ValueError, match="spacing"):
        DDIM(spacing="cosine")


def test_a_network_of_ddpm_is_told_whole_timesteps():
    told = []

    class Network(th.nn.Module):
        def forward(self, x, timesteps):
            told.append(timesteps[0].item())
            return 0 * x

    diffusion = KarrasDenoiser(precond="ddpm", loss_norm="l2", sigma_max=200.0)
    sample(diffusion, Network(), (2, 3, 4, 4), SampleOptions(5, "ddim", sigma_max=200.0))
    assert told == [999, 749, 499, 250, 0]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_is_ddpms_posterior_in_other_words(eta):
    """x_t = sqrt(abar_t) x in DDIM's equation 12 with its own sigma_t, from timestep 700 to 650."""
    x, z = stored("st_x")[0], stored("st_z1")
    D, (abar, abar_next) = Mixture.stored().D, ddpm_schedule.alpha_bars()[[700, 650]]
    sigma, sigma_next = ddpm_schedule.sigmas()[[700, 650]].tolist()
    s = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
    x0 = D(x, sigma)
    epsilon = (abar.sqrt() * x - abar.sqrt() * x0) / (1 - abar).sqrt()
    expected = abar_next.sqrt() * x0 + (1 - abar_next - s**2).sqrt() * epsilon + s * z
    moved = DDIM(eta).step(D, x, *levels_of(x, sigma, sigma_next), Scripted(z))
    th.testing.assert_close(abar_next.sqrt() * moved, expected, rtol=1e-10, atol=1e-11)


def test_ddim_converges_to_the_closed_form():
    """Halving the step halves the distance from the end of the flow, from starts of size 100."""
    x = 100 * stored("st_x")[0]
    exact = BED.flow(x, timestep_grid(1, *ALL).item(), 0.0)
    errors = [(integrate(DDIM(), BED.D, x, DDIM().grid(steps, *ALL, 7.0), Scripted()) - exact).abs().max().item()
              for steps in (50, 100, 200)]
    assert errors[2] < 0.06 and all(a / b == pytest.approx(2, abs=0.15) for a, b in zip(errors, errors[1:]))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddpm_converges_to_the_marginals(eta):
    """A step is linear here: mean and variance follow exactly, without a draw. At timestep 0 noise of 0.01 is left."""
    def end(steps):
        mean, variance = th.full((1, 1), BED.mu, dtype=th.float64), None
        levels = DDIM().grid(steps, *ALL, 7.0).tolist()[:-1]
        variance = BED.variance(levels[0])
        unit = th.ones(1, 1, dtype=th.float64)
        for sigma, sigma_next in zip(levels, levels[1:]):
            def step(x, z):
                return DDIM(eta).step(BED.D, x, *levels_of(x, sigma, sigma_next), Scripted(z)).item()  # noqa: B023

            middle = step(mean, 0 * unit)
            slope, noise = step(mean + 1, 0 * unit) - middle, step(mean, unit) - middle
            mean, variance = middle * unit, slope**2 * variance + noise**2
        return mean.item(), variance, BED.variance(levels[-1])

    errors = []
    for steps in (100, 200, 400):
        mean, variance, exact = end(steps)
        assert mean == pytest.approx(BED.mu, abs=1e-12)
        errors.append(abs(variance / exact - 1))
    assert errors[2] < 0.05 and errors[0] / errors[2] == pytest.approx(4, abs=0.8)


# --- predictor-corrector ---------------------------------------------------------------------------------------------


def test_an_eta_without_sense():
    with pytest.raises(UserError, match="eta=2 must lie between 0"):
        DDIM(2.0)
