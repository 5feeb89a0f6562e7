"""`pc`: one step of each kind against the paper's words, and the law of its results on Gaussian data."""

import math

import pytest
import torch as th

from cm.errors import UserError
from cm.samplers import CountingDenoiser, integrate, make_sampler
from cm.samplers.predictor_corrector import PredictorCorrector, _norm
from support.gaussian import Gaussian, Mixture, Scripted, levels_of, stored

BED = Gaussian(mu=0.3, s=0.5)


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


@pytest.mark.parametrize("process", ["ve", "vp"])
def test_one_corrector_step_is_langevins_with_the_papers_step_size(process):
    """Song et al., algorithms 4 and 5: y + epsilon score_y + sqrt(2 epsilon) z, where epsilon is
    2 alpha (snr |z| / |score_y|)^2. VE: y = x, alpha = 1. VP: y = x / sqrt(1 + u'), alpha = 1 - beta of the step."""
    x, z, t, r, snr = stored("st_x")[1], stored("st_z1"), 2.0, 1.7, 0.3
    D = Mixture.stored().D
    scale, alpha = (1.0, 1.0) if process == "ve" else (math.sqrt(1 + r**2), (1 + r**2) / (1 + t**2))
    y, score_y = x / scale, (D(x, r) - x) / r**2 * scale
    expected = []
    for own, s, noise in zip(y, score_y, z):
        epsilon = 2 * alpha * (snr * noise.square().sum().sqrt() / s.square().sum().sqrt()) ** 2
        expected.append(scale * (own + epsilon * s + (2 * epsilon).sqrt() * noise))
    moved = PredictorCorrector(process, snr).correct(D, x, *levels_of(x, t, r), Scripted(z))
    th.testing.assert_close(moved, th.stack(expected), rtol=1e-12, atol=1e-12)


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
