"""Scalings against golden numbers, limits and closed forms on Gaussian data, for every preconditioning."""

import math

import pytest
import torch as th
from torch import nn

from cm.config.flags import parse
from cm.config.schema import DiffusionConfig, ModelConfig, TrainConfig
from cm.diffusion.noise_sampling import create_named_schedule_sampler
from cm.diffusion.preconditioning import PRECONDS, ConsistencyPrecond, EDMPrecond
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.random_util import SampleStreams
from cm.samplers.sample import SampleOptions, sample
from cm.setup.objective import apply_precond_defaults
from support import golden
from support.gaussian import Gaussian


@pytest.mark.parametrize("name, table", [("edm", "edm"), ("boundary", "consistency")])
def test_golden_scalings(name, table):
    scalings = PRECONDS[table]().scalings(golden.tensor("denoise/sigmas"))
    for field, value in scalings._asdict().items():
        golden.assert_close(value, f"denoise/{name}/{field}")


def test_golden_time():
    golden.assert_close(1000 * EDMPrecond().c_noise(golden.tensor("denoise/sigmas")), "denoise/rescaled_t")


def test_noise_zero_is_finite():
    assert EDMPrecond().c_noise(th.zeros(1)).item() == pytest.approx(math.log(1e-44) / 4, rel=1e-12)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_the_boundary_is_exact(dtype):
    sigma = th.full((1,), 0.002, dtype=dtype)
    c_skip, c_out, _ = ConsistencyPrecond(sigma_min=0.002).scalings(sigma)
    assert c_skip.item() == 1 and c_out.item() == 0


def test_consistency_scalings_without_a_lowest_level_are_edms():
    sigma = th.logspace(-2, 2, 9, dtype=th.float64)
    for a, b in zip(ConsistencyPrecond(0.7, sigma_min=0.0).scalings(sigma), EDMPrecond(0.7).scalings(sigma)):
        th.testing.assert_close(a, b)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_keeps_unit_variance(sigma_data):
    """Input c_in x and target (x0 - c_skip x) / c_out have variance 1 for data of variance sigma_data^2."""
    sigma = th.logspace(-2, 2, 9, dtype=th.float64)
    c_skip, c_out, c_in = EDMPrecond(sigma_data).scalings(sigma)
    variance = sigma_data**2 + sigma**2
    th.testing.assert_close(c_in**2 * variance, th.ones_like(sigma))
    th.testing.assert_close(((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2, th.ones_like(sigma))


# --- every preconditioning on Gaussian data, where its own paper says what the best network answers ------------------

BED = Gaussian(0.1, 0.2)                                            # narrow: clamping images to [-1, 1] changes nothing


class Wanted(nn.Module):
    """The optimal network, which knows of the noise level only what it is told, and remembers that."""

    def forward(self, x, told):
        self.told = told
        return self.answer(x, told.double().reshape(-1, 1, 1, 1))


class OfEDM(Wanted):
    """Raw output F = (E[x0 | x] - c_skip x) / c_out, where the network input has variance 1."""

    def answer(self, x, told):
        sigma = (4 * told).exp()
        skip, x_t = 0.25 / (sigma**2 + 0.25), x * (sigma**2 + 0.25).sqrt()
        return (BED.D(x_t, sigma.flatten()) - skip * x_t) * (sigma**2 + 0.25).sqrt() / (0.5 * sigma)


class OfVE(Wanted):
    """sigma times the score of x0 + sigma z."""

    def answer(self, x, told):
        sigma = 2 * told.exp()
        return sigma * (BED.mu - x) / BED.variance(sigma)


class OfNoise(Wanted):
    """E[z | x_t] of x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) z."""

    def answer(self, x, told):
        alpha_bar = self.alpha_bar(told)
        residual = x - alpha_bar.sqrt() * BED.mu
        return (1 - alpha_bar).sqrt() * residual / (alpha_bar * BED.s**2 + 1 - alpha_bar)


class OfVP(OfNoise):
    def alpha_bar(self, told):
        t = told / 999
        return (-19.9 / 2 * t**2 - 0.1 * t).exp()                   # exp(- integral of beta)


class OfIDDPM(OfNoise):
    def __init__(self):
        super().__init__()
        cosine = [math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(1001)]
        betas = [min(1 - b / a, 0.999) for a, b in zip(cosine, cosine[1:])]
        self.table = th.tensor([1 - beta for beta in betas], dtype=th.float64).cumprod(0)

    def alpha_bar(self, told):
        assert th.equal(told, told.round())
        return self.table[told.long()]


WANTED = {"edm": OfEDM, "vp": OfVP, "ve": OfVE, "iddpm": OfIDDPM}


def known_levels(name):
    """Noise levels all over the range of a preconditioning; for iDDPM those of its table, from Nichol and Dhariwal."""
    if name == "iddpm":
        alpha_bar = OfIDDPM().table[[0, 1, 10, 300, 500, 900, 998, 999]]
        return (1 / alpha_bar - 1).sqrt()
    lowest, highest = PRECONDS[name]().levels
    return th.logspace(math.log10(max(lowest, 1e-3)), math.log10(min(highest, 200)), 9, dtype=th.float64)


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_the_network_of_its_paper_gives_the_optimal_denoiser(name, time_scale):
    diffusion, network = KarrasDenoiser(precond=name, time_scale=time_scale), WANTED[name]()
    counts_steps = PRECONDS[name].counts_steps
    scaled = network if counts_steps else lambda x, told: network(x, told / time_scale)
    sigma = known_levels(name)
    x = th.randn(len(sigma), 3, 4, 4, generator=th.Generator().manual_seed(0), dtype=th.float64)
    x = 0.1 + x * (0.04 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    denoised = diffusion.denoise(scaled, x, sigma)[1]
    # At sigma 2e4 the noise, known to 1e-16 of itself, is subtracted from x: an image is left with 4e-12 of error.
    th.testing.assert_close(denoised, BED.D(x, sigma), rtol=0, atol=1e-10)
    if counts_steps:
        assert network.told.min() >= 0 and network.told.max() < 999 + 1e-9      # the times of a guided-diffusion U-Net


@pytest.mark.parametrize("name", ["vp", "ve", "iddpm"])
def test_the_loss_of_the_optimal_network_is_its_closed_form(name):
    """E (D - x0)^2 / sigma^2 = s^2 / (s^2 + sigma^2) at every level, so E loss is its mean over the law."""
    diffusion, n = KarrasDenoiser(precond=name, weight_schedule="snr", time_scale=1.0), 4000
    law = create_named_schedule_sampler(name, diffusion)
    streams = SampleStreams(0, range(n))
    sigma = law.draw(streams, n, "cpu").sigma.double()
    x0 = BED.mu + BED.s * streams.randn(n, 1, 4, 4, dtype=th.float64)
    terms = diffusion.training_losses(WANTED[name](), x0, sigma, noise=streams.randn_like(x0))
    expected = BED.s**2 / (BED.s**2 + sigma**2)
    # Each loss is a mean of 16 squares: relative error sqrt(2 / 16), and 4000 of them together 0.6 %; four times that.
    assert terms["loss"].mean().item() == pytest.approx(expected.mean().item(), rel=0.025)


def test_iddpm_tells_the_nearest_step_and_its_grids_hold_known_levels():
    precond = PRECONDS["iddpm"]()
    table = precond.table
    assert table[0].item() == pytest.approx(precond.levels[0]) and (table.diff() > 0).all()
    between = th.cat([table * 0.999, table * 1.0001, th.tensor([0.0, 1e9])]).double()
    slow = (between[:, None] - table).abs().argmin(1)
    assert th.equal(precond.c_noise(between), slow.double())
    grid = precond.grid(th.tensor([80.0, 3.0, 2.9999999, 0.0], dtype=th.float64))
    assert len(grid) == 3 and grid[-1] == 0 and set(grid[:2].tolist()) < set(table.tolist())


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm"])
def test_sampling_stays_within_the_levels_that_the_network_knows(name):
    """Heun through the optimal network of each: 60 steps carry noise to the data's own mean and deviation."""
    diffusion = KarrasDenoiser(precond=name, time_scale=1.0, sigma_min=1e-4, sigma_max=1e3)
    lowest, highest = diffusion.scaling.levels
    assert (diffusion.sigma_min, diffusion.sigma_max) == (max(lowest, 1e-4), min(highest, 1e3))
    images = sample(
        diffusion, WANTED[name](), (500, 1, 2, 2),
        SampleOptions(60, sigma_min=1e-4, sigma_max=1e3, clip_denoised=False), generator=SampleStreams(0, range(500)),
    ).images
    assert images.mean().item() == pytest.approx(0.1, abs=0.02)     # standard error 0.2 / sqrt(2000) = 0.0045
    assert images.std().item() == pytest.approx(0.2, abs=0.015)


def test_the_published_law_and_weight_come_with_the_precond():
    def resolved(*argv):
        settings = parse("", ModelConfig, DiffusionConfig, TrainConfig, argv=argv)
        apply_precond_defaults(settings)
        return settings.values["schedule_sampler"], settings.values["weight_schedule"]

    assert resolved() == ("lognormal", "karras")
    assert [resolved("--precond", name) for name in ("vp", "ve", "iddpm")] == [
        ("vp", "snr"), ("ve", "snr"), ("iddpm", "snr")
    ]
    assert resolved("--precond", "vp", "--schedule_sampler", "lognormal") == ("lognormal", "snr")


@pytest.mark.parametrize("name", ["vp", "ve", "iddpm", "ddpm"])
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_any_network_can_become_a_consistency_model(name, dtype):
    """The boundary is exact at the lowest level, and far above it the student starts as its teacher."""
    student, teacher = KarrasDenoiser(precond=name, distillation=True), KarrasDenoiser(precond=name)
    sigma = th.tensor([student.sigma_min, 1e4 * student.sigma_min], dtype=dtype)
    x = th.ones(2, 3, dtype=dtype)
    identity, far = student.bind(lambda x, t: 0.7 * x)(x, sigma)
    assert th.equal(identity, x[0])
    th.testing.assert_close(far, teacher.bind(lambda x, t: 0.7 * x)(x, sigma)[1], rtol=3e-4, atol=0)
    assert th.equal(student.scaling.c_noise(sigma), teacher.scaling.c_noise(sigma))
    assert student.time_scale == teacher.time_scale


def test_a_precond_that_is_none_is_named():
    with pytest.raises(UserError, match="unknown precond 'vpp'.*Did you mean 'vp'"):
        KarrasDenoiser(precond="vpp")
