"""The sequence-aware loss against DDPM's, written out with alpha-bars, and on Gaussian data."""

import math

import pytest
import torch as th
from torch import nn

from cm.diffusion import ddpm_schedule
from cm.diffusion.noise_sampling import DDPMSampler, LogNormalSampler
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.objectives.edm import EDM
from cm.objectives.sadpm import SADPM
from cm.random_util import SampleStreams
from cm.tensors import mean_flat
from cm.types import Batch, Networks
from support.gaussian import Gaussian, column

F64 = th.float64


class EpsilonNet(nn.Module):
    """Predicts noise from DDPM's x_t and t; remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(th.tensor(0.7, dtype=F64))
        self.shown = []

    def forward(self, x, timesteps, **cond):
        self.shown.append((x.detach(), timesteps, cond))
        return self.a * x + (timesteps.to(x.dtype)[:, None] / 500 - 1).sin()


def ddpm(**options):
    return SADPM.of(KarrasDenoiser(precond="ddpm", weight_schedule="snr"), DDPMSampler(), options)


def nets_of(net):
    return Networks(KarrasDenoiser(precond="ddpm").bind(net), net)


def images(n=64, d=5):
    return th.randn(n, d, generator=th.Generator().manual_seed(0), dtype=F64) * 0.5


def draws_of(n, K, d=5):
    """What the objective draws from the streams of the samples 0..n-1: timesteps, then the noise of each level."""
    rng = SampleStreams(7, range(n))
    t = rng.randint(0, 1000, (n,))
    return t, [rng.randn(n, d, dtype=F64) for _ in range(K)]


def published_loss(net, x0, t, noises, sa_lambda):
    """Written in alpha-bars: residuals eps_k - eps_theta(x_{t-k}, t-k), those with t < k left out of the sum."""
    K, abar = len(noises), ddpm_schedule.alpha_bars()
    residuals = []
    for k, eps in enumerate(noises):
        timestep = (t - k).clamp(min=0)
        kept = abar[timestep][:, None]
        x_t = kept.sqrt() * x0 + (1 - kept).sqrt() * eps
        residuals.append((eps - net(x_t, timestep)) * (t >= k)[:, None])
    return mean_flat(residuals[0].square()) + sa_lambda / K**2 * mean_flat(sum(residuals).square())


def run(objective, nets, x0, seed=7, cond=None):
    return objective(nets, Batch(x0, cond or {}), 0, SampleStreams(seed, range(len(x0))))


@pytest.mark.parametrize("K, sa_lambda", [(1, 0.0), (2, 0.0), (1, 0.5), (2, 0.2), (4, 1.0)])
def test_it_is_the_published_loss(K, sa_lambda):
    """And so DDPM's own for sa_lambda 0."""
    net, x0 = EpsilonNet(), images()
    terms = run(ddpm(num_consecutive_steps=K, sa_lambda=sa_lambda), nets_of(net), x0)
    t, noises = draws_of(len(x0), K)
    # float32 levels carry 1e-7 of their value, over 1000 timesteps' ratio of level to error of the image.
    th.testing.assert_close(terms.loss, published_loss(net, x0, t, noises, sa_lambda), rtol=1e-5, atol=1e-7)
    th.testing.assert_close(terms.logs["mse"], published_loss(net, x0, t, noises, 0.0), rtol=1e-5, atol=1e-7)
    th.testing.assert_close(terms.sigma, ddpm_schedule.sigmas()[t], rtol=1e-6, atol=0)


def test_one_step_scales_ddpms_loss():
    net, x0 = EpsilonNet(), images()
    plain, scaled = (
        run(ddpm(num_consecutive_steps=1, sa_lambda=weight), nets_of(net), x0).loss for weight in (0.0, 0.35)
    )
    th.testing.assert_close(scaled, 1.35 * plain, rtol=1e-12, atol=0)


def test_no_steps_stand_for_ddpms_loss_as_in_the_authors_commands():
    made = [SADPM.of(KarrasDenoiser(loss_norm="l2", precond="ddpm"), LogNormalSampler(),
                     {"num_consecutive_steps": K, "sa_lambda": 0.0}) for K in (0, 1)]
    batch = Batch(th.randn(4, 3, 4, 4), {}, th.arange(4))
    first, second = (each(Networks(lambda x, sigma: 0.5 * x, None), batch, 0, SampleStreams(0, batch.positions))
                     for each in made)
    assert th.equal(first.loss, second.loss)
    with pytest.raises(UserError, match="--num_consecutive_steps 0 leaves nothing to sum, but --sa_lambda 0.2"):
        SADPM.of(KarrasDenoiser(loss_norm="l2", precond="ddpm"), LogNormalSampler(),
                 {"num_consecutive_steps": 0, "sa_lambda": 0.2})


def test_every_noisy_image_has_the_alpha_bar_of_the_timestep_that_is_told():
    net, x0, K = EpsilonNet(), images(), 4
    run(ddpm(num_consecutive_steps=K), nets_of(net), x0, cond={"y": th.arange(64)})
    t, noises = draws_of(len(x0), K)
    assert len(net.shown) == K                                      # the cost: K evaluations
    for k, (x, told, cond) in enumerate(net.shown):
        assert th.equal(told, (t - k).clamp(min=0).to(F64)) and cond["y"].shape == (64,)
        kept = ddpm_schedule.alpha_bars()[told.long()][:, None]
        th.testing.assert_close(x, kept.sqrt() * x0 + (1 - kept).sqrt() * noises[k], rtol=1e-6, atol=1e-6)


def test_steps_before_the_first_are_left_out():
    """At timestep 0 the sum over three steps is the one residual that there is."""
    sigma = ddpm_schedule.sigmas()[[0, 1, 500]]
    net, x0, z = EpsilonNet(), images(3), th.randn(4, 3, 5, generator=th.Generator().manual_seed(1), dtype=F64)

    class Rest:
        draws = [z[1], z[2]]

        def randn_like(self, x):
            return self.draws.pop(0)

    terms = ddpm(num_consecutive_steps=3, sa_lambda=1.0).terms(nets_of(net), Batch(x0), z[0], sigma, Rest())
    assert terms.logs["sequence"][0].item() == pytest.approx(terms.logs["mse"][0].item() / 9, rel=1e-9)
    expected = published_loss(net, x0, th.tensor([0, 1, 500]), list(z[:3]), 1.0)
    th.testing.assert_close(terms.loss, expected, rtol=1e-8, atol=0)


def test_the_gradient_is_that_of_the_published_loss():
    net, x0 = EpsilonNet(), images()
    run(ddpm(num_consecutive_steps=3, sa_lambda=0.5), nets_of(net), x0).loss.mean().backward()
    found, net.a.grad = net.a.grad, None
    published_loss(net, x0, *draws_of(len(x0), 3), 0.5).mean().backward()
    th.testing.assert_close(found, net.a.grad, rtol=1e-6, atol=0)


def karras(sa_lambda, K=2, weight="karras"):
    diffusion = KarrasDenoiser(weight_schedule=weight)
    return diffusion, SADPM.of(diffusion, LogNormalSampler(), {"sa_lambda": sa_lambda, "num_consecutive_steps": K})


def test_without_the_sum_the_karras_form_is_edm():
    bed, x0 = Gaussian(0.0, 0.5), images()
    diffusion, objective = karras(0.0)
    nets = Networks(lambda x, sigma: 0.8 * bed.D(x, sigma), nn.Module())
    edm = run(EDM(diffusion.weight), nets, x0)
    sadpm = run(objective, nets, x0)
    th.testing.assert_close(sadpm.loss, edm.loss, rtol=1e-9, atol=0)
    assert th.equal(sadpm.sigma, edm.sigma)


def test_the_sum_over_karras_levels_on_gaussian_data():
    """With EDM's weight the exact denoiser's errors have mean 0 and variance 1, if s is sigma_data. At neighbouring
    levels they share x0 and not the noise: (D - x0) = (s^2 t z - t^2 x0) / v. So the sum of two has a known variance.
    """
    bed, n, sigma, sa_lambda = Gaussian(0.0, 0.5), 20_000, 0.4, 0.8
    diffusion, objective = karras(sa_lambda)
    x0 = 0.5 * th.randn(n, 1, generator=th.Generator().manual_seed(2), dtype=F64)
    rng, level = SampleStreams(3, range(n)), th.full((n,), sigma, dtype=F64)
    terms = objective.terms(Networks(bed.D, nn.Module()), Batch(x0), rng.randn(n, 1, dtype=F64), level, rng)
    below, _ = objective.earlier(level[:1], 1)

    def of_image(t):                                                # the coefficient of x0 in sqrt(weight) (D - x0)
        return -(t**2) / (0.25 + t**2) * math.sqrt(t**-2 + 4)

    t2 = below.item()
    assert sigma * 0.98 < t2 < sigma
    expected = (2 + 2 * of_image(sigma) * of_image(t2) * 0.25) / 4
    assert terms.logs["sequence"].mean().item() == pytest.approx(expected, rel=0.04)        # 20,000 draws: 1%
    assert terms.loss.mean().item() == pytest.approx(1 + sa_lambda * expected, rel=0.04)


def test_a_ddpm_network_of_gaussian_data_is_the_optimal_denoiser():
    bed = Gaussian(0.0, 0.5)

    def eps(x, timesteps):
        kept = column(ddpm_schedule.alpha_bars()[timesteps.long()], x)
        return (1 - kept).sqrt() * x / (kept * 0.25 + 1 - kept)

    sigma, x = ddpm_schedule.sigmas()[[3, 300, 900]], th.ones(3, 2, dtype=F64)
    th.testing.assert_close(KarrasDenoiser(precond="ddpm").bind(eps)(x, sigma), bed.D(x, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sa_lambda", [0.0, 0.2, 1.0])
def test_the_sum_moves_the_optimum_by_the_known_amount(sa_lambda):
    """Neighbouring residuals share x0, so the least loss is not the optimal denoiser's. For Gaussian data, K = 2 and
    one level t twice, it is that of data whose variance is (1 + sa_lambda) / (1 + sa_lambda / 2) times as large.
    """
    s, t = 0.5, 0.7
    # Orthogonal patterns: their means of squares and products are the distribution's, exactly.
    x0, z0, z1 = th.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]], dtype=F64)[:, None]

    class Second:
        def randn_like(self, x):
            return z1

    objective = SADPM(th.ones_like, sa_lambda=sa_lambda, earlier=lambda sigma, k: (sigma, sigma > 0))
    moved = s**2 * (1 + sa_lambda) / (1 + sa_lambda / 2)
    slope = th.tensor(moved / (moved + t**2), dtype=F64, requires_grad=True)
    nets = Networks(lambda x, sigma: slope * x, nn.Module())
    loss = objective.terms(nets, Batch(s * x0), z0, th.tensor([t], dtype=F64), Second()).loss
    first, = th.autograd.grad(loss.sum(), slope, create_graph=True)
    second, = th.autograd.grad(first, slope)
    assert abs(first.item()) < 1e-12 and second > 0
