"""The martingale regulariser on Gaussian data, where every expectation along a walk is a product of numbers.

A linear denoiser D(x, s) = alpha(s) x keeps walks linear: x' = m x + noise. It violates by (alpha(s') m - alpha(s)) x.
"""

import pytest
import torch as th
from torch import nn

from cm.diffusion.noise_sampling import UniformSampler
from cm.diffusion.schedules import karras_grid
from cm.objectives.cdm import CDM, LONGEST, LOWEST
from cm.objectives.edm import EDM
from cm.random_util import SampleStreams
from cm.samplers import CountingDenoiser
from cm.types import Batch, Networks
from support.gaussian import Gaussian, column

F64 = th.float64
BED = Gaussian(0.0, 0.5)


def plain(sigma):
    return th.ones_like(sigma)


class Scripted:
    """Hands out draws in order, whatever their kind: the walk's length, then the noise of each step."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def rand(self, *shape, device=None):
        return self.draws.pop(0)

    def randn_like(self, x):
        return self.draws.pop(0)


def alpha(sigma, scale=1.0):
    return scale * BED.s**2 / (BED.s**2 + sigma**2)


def linear(scale):
    return lambda x, sigma: column(alpha(sigma, scale), x) * x


def walk_factor(sde, levels, scale=1.0):
    """m of the walk's mean, by the textbook's step for the score (D - x) / t^2."""
    m = 1.0
    for t, t2 in zip(levels, levels[1:]):
        score = (alpha(t, scale) - 1) / t**2                        # times x
        m *= 1 + 2 * t * score * (t - t2) if sde == "t" else 1 + score * (t**2 - t2**2)
    return m


def violation(sde, sigma, length, scale=1.0, steps=6):
    """(alpha(s') m - alpha(s)), in plain numbers."""
    end = max(sigma - length, LOWEST)
    return alpha(end, scale) * walk_factor(sde, karras_grid(steps, end, sigma).tolist(), scale) - alpha(sigma, scale)


def regulariser(D, x, sigma, rng, **options):
    sigma = th.full((len(x),), sigma, dtype=F64)
    return CDM(plain, **options).violation(D, x, sigma, D(x, sigma), rng)


def without_noise(x, length, steps=6):
    return Scripted(th.full((len(x),), length / LONGEST, dtype=F64), *[th.zeros_like(x)] * 2 * (steps - 1))


@pytest.mark.parametrize("sigma, length", [(0.06, 0.05), (0.5, 0.03), (0.03, 0.05), (20.0, 0.04)])
def test_in_u_the_exact_denoiser_is_a_martingale(sigma, length):
    x = th.linspace(-2, 2, 12, dtype=F64).reshape(3, 4)
    value = regulariser(BED.D, x, sigma, without_noise(x, length), martingale_sde="u")
    th.testing.assert_close(value, th.zeros(3, dtype=F64), rtol=0, atol=1e-28)


def test_in_t_the_steps_bias_the_exact_denoiser_by_the_known_amount():
    assert violation("t", 0.06, 0.05) == pytest.approx(-0.0023, abs=5e-5)
    x = th.linspace(-2, 2, 12, dtype=F64).reshape(3, 4)
    value = regulariser(BED.D, x, 0.06, without_noise(x, 0.05), martingale_sde="t")
    th.testing.assert_close(value, violation("t", 0.06, 0.05) ** 2 * x.square().mean(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("drawn, length", [(0.0, 0.0), (0.5, 0.025), (1.0, 0.05)])
def test_a_walk_is_as_long_as_published(drawn, length):
    """s - s' is uniform in 0..0.05; both walks end there, and the network is asked about no level beyond."""
    told, x = [], th.ones(3, 2, dtype=F64)

    def D(x, sigma):
        told.append(sigma[0].item())
        return linear(0.9)(x, sigma)

    rng = Scripted(th.full((3,), drawn, dtype=F64), *[th.zeros_like(x)] * 10)
    regulariser(D, x, 0.3, rng)
    assert told[-2:] == pytest.approx([0.3 - length] * 2, abs=1e-12)
    assert min(told) == pytest.approx(0.3 - length, abs=1e-12) and max(told) == 0.3


@pytest.mark.parametrize("sde", ["t", "u"])
@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_the_estimate_is_unbiased(sde, scale):
    """Its mean over many walks is the square of the violation: 0 in u without a defect, else positive as predicted."""
    n, sigma, length, generator = 40_000, 0.3, 0.05, th.Generator().manual_seed(1)
    draws = [th.randn(n, 1, generator=generator, dtype=F64) for _ in range(10)]
    x = th.full((n, 1), 0.7, dtype=F64)
    values = regulariser(linear(scale), x, sigma, Scripted(th.full((n,), length / LONGEST, dtype=F64), *draws),
                         martingale_sde=sde)
    expected, error = (violation(sde, sigma, length, scale) * 0.7) ** 2, (values.std() / n**0.5).item()
    assert values.min() < 0 < values.max()
    assert values.mean().item() == pytest.approx(expected, abs=4 * error)
    assert scale == 1.0 or expected > 5 * error                     # so that the test sees the defect


def test_the_two_walks_use_noise_of_their_own():
    """One step each: the value is the product of two sums, each with its own noise."""
    generator, sigma = th.Generator().manual_seed(2), 0.3
    x, z1, z2 = th.randn(3, 5, 4, generator=generator, dtype=F64)
    rng = Scripted(th.full((5,), 0.8, dtype=F64), z1, z2)
    value = regulariser(linear(0.9), x, sigma, rng, martingale_sde="u", martingale_steps=2)
    length = 0.8 * LONGEST
    mean = violation("u", sigma, length, 0.9, steps=2) * x
    spread = alpha(sigma - length, 0.9) * (sigma**2 - (sigma - length) ** 2) ** 0.5
    th.testing.assert_close(value, ((mean + spread * z1) * (mean + spread * z2)).mean(1), rtol=1e-9, atol=1e-15)
    assert not rng.draws


class Slope(nn.Module):
    """D(x, s) = a alpha(s) x, and every place where it was called."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(th.tensor(0.9, dtype=F64))
        self.calls = []

    def forward(self, x, sigma, **cond):
        self.calls.append((x.detach(), sigma, th.is_grad_enabled(), cond))
        return self.a * column(alpha(sigma), x) * x


def test_gradients_flow_through_the_ends_and_not_through_the_walks():
    net, x = Slope(), th.full((2, 3), 0.4, dtype=F64)
    sigma, rng = th.full((2,), 0.3, dtype=F64), SampleStreams(0, [0, 1])
    CDM(plain).violation(net, x, sigma, net(x, sigma), rng).sum().backward()
    (first, end, *_), (second, *_) = net.calls[-2:]
    # With the ends x', x'' as constants each D is a known factor times a.
    now, later1, later2 = column(alpha(sigma), x) * x, column(alpha(end), x) * first, column(alpha(end), x) * second
    expected = 2 * 0.9 * ((later1 - now) * (later2 - now)).mean(1).sum()
    th.testing.assert_close(net.a.grad, expected, rtol=1e-10, atol=0)
    assert not th.equal(first, second)
    assert [is_on for *_, is_on, _ in net.calls] == [True, *[False] * 8, True, True]


def test_conditioning_reaches_every_call_and_the_first_is_shared():
    net = Slope()
    batch = Batch(th.zeros(2, 3, dtype=F64), {"y": th.tensor([4, 5]), "augment_labels": th.ones(2, 9)})
    CDM(plain, UniformSampler([0.3]))(nets_of(net), batch, 0, SampleStreams(0, [0, 1]))
    assert len(net.calls) == 1 + 2 * 4 + 2                          # both walks start from D(x, s)
    for *_, cond in net.calls:
        assert cond["y"] is batch.cond["y"] and cond["augment_labels"] is batch.cond["augment_labels"]


def nets_of(D):
    return Networks(D, nn.Module())


def test_it_is_edms_loss_plus_the_weighted_regulariser():
    batch, law = Batch(th.ones(3, 4, dtype=F64)), UniformSampler([0.1, 0.5])
    edm, none, some = (
        kind(nets_of(linear(0.9)), batch, 0, SampleStreams(0, [0, 1, 2]))
        for kind in (EDM(plain, law), CDM(plain, law, 0.0), CDM(plain, law, 2.5))
    )
    assert th.equal(none.loss, edm.loss)
    th.testing.assert_close(some.loss, edm.loss + 2.5 * some.logs["martingale"])
    assert set(some.logs) == {"xs_mse", "mse", "martingale"} and th.equal(some.logs["mse"], edm.logs["mse"])


@pytest.mark.parametrize("sigma", [1e-4, LOWEST, 0.003])
@pytest.mark.parametrize("dtype", [th.float32, F64])
def test_levels_at_the_bottom_are_finite(sigma, dtype):
    """Below the lowest level there is nowhere to walk to, and nothing to penalise."""
    x = th.ones(2, 3, dtype=dtype)
    D, levels = CountingDenoiser(linear(0.9)), th.full((2,), sigma, dtype=dtype)
    value = CDM(plain).violation(D, x, levels, D(x, levels), SampleStreams(0, [0, 1]))
    assert value.isfinite().all() and (sigma > LOWEST or (value == 0).all())
