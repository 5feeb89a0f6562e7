"""Guidance by a worse denoiser against its formula on Gaussian data: every sampler, intervals, and evaluations."""

from functools import partial

import pytest
import torch as th

from cm.diffusion.denoiser import Diffusion
from cm.networks.jvp import evaluations_of_a_call, jvp
from cm.random_util import SampleStreams
from cm.samplers import SAMPLERS, CountingDenoiser, integrate, make_sampler
from cm.samplers.guidance import guided
from cm.samplers.network_guidance import (
    Guidance,
    NetworkGuidedDenoiser,
    NetworkGuidedDiffusion,
    unguided,
    without_class,
)
from cm.samplers.sample import SampleOptions, sample
from support.gaussian import Gaussian, Mixture, stored

GOOD, BAD = Gaussian(0.3, 0.5), Gaussian(-0.2, 0.8)
STEPS, W = 6, 1.7
OPTIONS = {"ts": (0, 2, STEPS - 1), "snr": 0.1}
CASES = {name: {} for name in SAMPLERS if name != "flowmap"}        # whose models cannot be guided when sampled
CASES |= {"ito taylor": {"ito_form": "taylor"}, "ito eta 0.5": {"eta": 0.5}}


class Watched:
    """A denoiser that keeps the noise levels it is asked about, and the cost of each call."""

    def __init__(self, D):
        self.D, self.levels, self.costs = D, [], []

    def __call__(self, x, sigma, **cond):
        self.levels.append(sigma.double().tolist())
        self.costs.append(evaluations_of_a_call())
        return self.D(x, sigma, **cond)

    def cost(self, lowest=0.0, highest=float("inf")):
        """Of the calls with all levels above the first and up to the second."""
        return sum(cost for levels, cost in zip(self.levels, self.costs)
                   if all(lowest < level <= highest for level in levels))


def formula(x, sigma, w=W, lowest=0.0, highest=float("inf")):
    """D_g = D_bad + w (D - D_bad) inside the interval, D outside, written down once more."""
    good, bad = GOOD.D(x, sigma), BAD.D(x, sigma)
    inside = ((sigma > lowest) & (sigma <= highest)).reshape(-1, *[1] * (x.ndim - 1))
    return th.where(inside, bad + w * (good - bad), good)


def run(name, D):
    sampler = make_sampler(name.split()[0], {**OPTIONS, **CASES[name]})
    rng = SampleStreams(0, range(4))
    x = 80 * rng.randn(4, 2, dtype=th.float64)
    return integrate(sampler, D, x, sampler.grid(STEPS, 0.01, 80.0, 7.0), rng)


def by_network(D=GOOD.D, bad=BAD.D, w=W, *interval):
    return NetworkGuidedDenoiser(D, Guidance(lambda D: bad, w, *interval))


@pytest.mark.parametrize("interval", [(), (0.2, 20.0)])
@pytest.mark.parametrize("name", CASES)
def test_every_sampler_takes_the_guided_denoiser_and_counts_its_evaluations(name, interval):
    good, bad = Watched(GOOD.D), Watched(BAD.D)
    counted = CountingDenoiser(by_network(good, bad, W, *interval))
    th.testing.assert_close(run(name, counted), run(name, lambda x, sigma: formula(x, sigma, W, *interval)),
                            rtol=1e-9, atol=1e-10)
    lowest, highest = interval or (0.0, float("inf"))
    inside = [levels for levels in good.levels if lowest < levels[0] <= highest]
    assert bad.levels == inside, "not where it must not act"
    assert counted.calls == good.cost() + good.cost(lowest, highest) == good.cost() + bad.cost()
    if interval and name not in ("onestep", "multistep"):
        assert 0 < len(bad.levels) < len(good.levels)


@pytest.mark.parametrize("name", ["heun", "ito"])
def test_scale_one_is_the_unguided_image_to_the_last_bit(name):
    bad = Watched(BAD.D)
    D = CountingDenoiser(by_network(bad=bad, w=1))
    assert th.equal(run(name, D), run(name, GOOD.D)) and bad.levels == []
    plain = CountingDenoiser(GOOD.D)
    run(name, plain)
    assert D.calls == plain.calls


def test_the_lower_end_is_outside_and_the_upper_end_is_inside():
    x, sigma = th.randn(5, 2, generator=th.Generator().manual_seed(0)), th.tensor([0.1, 0.100001, 1.0, 3.0, 3.000001])
    bad = Watched(BAD.D)
    denoised = by_network(GOOD.D, bad, W, 0.1, 3.0)(x, sigma)
    assert th.tensor(bad.levels[0]).tolist() == pytest.approx([0.100001, 1.0, 3.0])
    th.testing.assert_close(denoised, formula(x, sigma, W, 0.1, 3.0))
    assert th.equal(denoised[[0, 4]], GOOD.D(x, sigma)[[0, 4]])


def test_conditioning_follows_the_samples():
    """Of several noise levels only some samples reach the guide, each with its own class."""
    told = []

    def bad(x, sigma, y):
        told.append(y.tolist())
        return x

    D = by_network(lambda x, sigma, y: x + y[:, None], bad, 3.0, 0.5, 2.0)
    x, sigma, y = th.zeros(4, 2), th.tensor([0.1, 1.0, 5.0, 2.0]), th.tensor([1, 2, 3, 4])
    assert D(x, sigma, y=y)[:, 0].tolist() == [1, 3 * 2, 3, 3 * 4] and told == [[2, 4]]


@pytest.mark.parametrize("inference", [False, True])
def test_a_forward_mode_pass_goes_through_an_interval(inference):
    """In x and in sigma, over samples inside and outside; a central difference errs by about 1e-9."""
    x, v = (SampleStreams(seed, range(4)).randn(4, 2, dtype=th.float64) for seed in (0, 1))
    sigma, slope = th.tensor([0.1, 0.9, 1.5, 7.0], dtype=th.float64), th.tensor([1.0, 2, -1, 1], dtype=th.float64)
    D, h = by_network(GOOD.D, BAD.D, W, 0.5, 3.0), 1e-5
    with th.inference_mode(inference):
        value, change = jvp(lambda z, level: D(z, level), (x, sigma), (v, slope))
        ends = [D(x + s * h * v, sigma + s * h * slope) for s in (1, -1)]
    th.testing.assert_close(value, formula(x, sigma, W, 0.5, 3.0))
    th.testing.assert_close(change, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_without_its_class_an_exact_model_is_guided_as_by_the_exact_classifier(w):
    """Classifier-free guidance of strength w is classifier guidance of the unconditional model with scale w."""
    bed, x = Mixture.stored(), stored("st_x")[1]
    sigma, y = th.linspace(0.1, 5, len(x), dtype=x.dtype), th.arange(len(x)) % 3

    def D(x, sigma, y):
        each = th.stack([Gaussian(bed.mu[k], bed.s[k].item()).D(x, sigma) for k in range(3)] + [bed.D(x, sigma)])
        return each[y, th.arange(len(x))]

    def log_posterior(x, sigma):
        v = bed.s**2 + sigma.reshape(-1, 1) ** 2
        return bed.w.log() - x.shape[1] / 2 * v.log() - (x[:, None] - bed.mu).square().sum(2) / (2 * v)

    free = NetworkGuidedDenoiser(D, Guidance(partial(without_class, null_class=3), w))
    th.testing.assert_close(free(x, sigma, y=y), guided(bed.D, log_posterior, w, class_cond=False)(x, sigma, y=y),
                            rtol=1e-9, atol=1e-10)


class Scaled(th.nn.Module):
    """A network with one number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = th.nn.Parameter(th.tensor(factor))

    def forward(self, x, timesteps):
        return self.factor * x


def test_a_sampled_image_reports_both_networks():
    """3 steps of Heun are 5 evaluations, 2 of them at the lowest level, which is below 1."""
    diffusion = Diffusion(sigma_min=0.1, loss_norm="l2")
    by = diffusion.bind(Scaled(0.2))
    both = NetworkGuidedDiffusion(diffusion, Guidance(lambda D: by, 2.0, 1.0))
    options, rng = SampleOptions(3, sigma_min=0.1), SampleStreams(0, range(2))
    result = sample(both, Scaled(0.5), (2, 3, 4, 4), options, generator=rng)
    assert result.evaluations == 5 + 3 and result.images.isfinite().all()
    assert sample(diffusion, Scaled(0.5), (2, 3, 4, 4), options, generator=rng).evaluations == 5
    assert both.scaling is diffusion.scaling


def test_the_unguided_denoiser_is_still_there():
    assert unguided(by_network()) == GOOD.D and unguided(GOOD.D) == GOOD.D
