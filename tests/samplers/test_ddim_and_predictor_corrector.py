"""`ddim` and `pc`: their noise levels, and the law of their results on Gaussian data."""

import math

import pytest
import torch as th

from cm.diffusion import ddpm_schedule
from cm.diffusion.schedules import append_zero
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.samplers import CountingDenoiser, integrate, make_sampler
from cm.samplers.ddim import DDIM, timestep_grid
from cm.samplers.predictor_corrector import PredictorCorrector, _norm
from cm.samplers.sample import SampleOptions, sample
from support.gaussian import Gaussian, Mixture, Scripted, stored

ALL = (0.0, math.inf)                                               # sigma_min and sigma_max that cut nothing off
BED = Gaussian(mu=0.3, s=0.5)


def levels_of(x, *levels):
    return (th.full((len(x),), level, dtype=x.dtype) for level in levels)


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


@pytest.mark.parametrize("process", ["ve", "vp"])
def test_pc_draws_from_the_data(process):
    """64 images of 400 numbers: their spread errs by 0.5 %, and by what snr 0.1 adds: 1 / (1 - snr^2), 0.5 %."""
    rng = th.Generator().manual_seed(0)
    sampler = PredictorCorrector(process, snr=0.1)
    grid = sampler.grid(300, 0.005, 80.0, 7.0)
    x = BED.mu + math.sqrt(BED.variance(grid[0].item())) * th.randn(64, 400, generator=rng, dtype=th.float64)

    class Source:
        def randn_like(self, like):
            return th.randn(like.shape, generator=rng, dtype=like.dtype)

    end = integrate(sampler, BED.D, x, grid, Source())
    assert end.mean().item() == pytest.approx(BED.mu, abs=0.02)
    assert end.std().item() == pytest.approx(BED.s, rel=0.025)


def test_the_corrector_alone_comes_to_rest_at_the_predicted_variance():
    """v / (1 - snr^2): the step is z's share of the noise over the score's, and Langevin's bias grows with it."""
    rng, sigma, snr = th.Generator().manual_seed(0), 0.7, 0.4
    x = th.zeros(16, 1000, dtype=th.float64)

    class Source:
        def randn_like(self, like):
            return th.randn(like.shape, generator=rng, dtype=like.dtype)

    for _ in range(60):
        x = PredictorCorrector(snr=snr).correct(BED.D, x, *levels_of(x, 0.8, sigma), Source())
    assert x.var().item() == pytest.approx(BED.variance(sigma) / (1 - snr**2), rel=0.03)


def test_one_predictor_step_is_reverse_diffusion():
    """VE, Song et al. equation 46: x + (u - u') score + sqrt(u - u') z. VP: as its own forward step of variance beta
    in y = x / sqrt(1 + u), where score_y = sqrt(1 + u) score."""
    x, z, t, r = stored("st_x")[1], stored("st_z1"), 2.0, 1.7
    D = Mixture.stored().D
    score = (D(x, t) - x) / t**2
    sampler = PredictorCorrector("ve", corrector_steps=0)
    moved = sampler.step(D, x, *levels_of(x, t, r), Scripted(z))
    th.testing.assert_close(moved, x + (t**2 - r**2) * score + math.sqrt(t**2 - r**2) * z)
    beta = 1 - (1 + r**2) / (1 + t**2)
    y, score_y = x / math.sqrt(1 + t**2), score * math.sqrt(1 + t**2)
    y = (2 - math.sqrt(1 - beta)) * y + beta * score_y + math.sqrt(beta) * z
    moved = PredictorCorrector("vp", corrector_steps=0).step(D, x, *levels_of(x, t, r), Scripted(z))
    th.testing.assert_close(moved, y * math.sqrt(1 + r**2))


def test_every_sample_has_its_own_step_size():
    x, z = stored("st_x")[1], stored("st_z1")
    whole = PredictorCorrector().step(Mixture.stored().D, x, *levels_of(x, 2.0, 1.7), Scripted(z, z))
    half = PredictorCorrector().step(Mixture.stored().D, x[:3], *levels_of(x[:3], 2.0, 1.7), Scripted(z[:3], z[:3]))
    th.testing.assert_close(half, whole[:3])
    assert _norm(th.ones(2, 3, 2, 2)).tolist() == pytest.approx([math.sqrt(12)] * 2)


@pytest.mark.parametrize("corrector_steps", [0, 1, 3])
def test_evaluations_of_pc(corrector_steps):
    D, sampler = CountingDenoiser(BED.D), PredictorCorrector(corrector_steps=corrector_steps)
    integrate(sampler, D, th.randn(2, 4, dtype=th.float64), sampler.grid(6, 0.01, 80.0, 7.0), th)
    assert D.calls == 5 * (1 + corrector_steps) + 1


def test_the_grid_of_ve_is_geometric():
    grid = PredictorCorrector().grid(5, 0.01, 100.0, 7.0)
    th.testing.assert_close(grid, th.tensor([100.0, 10.0, 1.0, 0.1, 0.01, 0.0], dtype=th.float64))


@pytest.mark.parametrize("options, message", [
    ({"pc_sde": "sub-vp"}, "unknown pc_sde 'sub-vp'; choose one of: ve, vp"),
    ({"snr": 1.0}, "snr=1 must lie between 0 and 1; the usual value is 0.16"),
    ({"corrector_steps": -1}, "corrector_steps=-1 must not be negative"),
])
def test_options_without_sense(options, message):
    with pytest.raises(UserError, match=message):
        make_sampler("pc", options)
    with pytest.raises(UserError, match="eta=2 must lie between 0"):
        DDIM(2.0)
