"""Easy consistency tuning: where it begins, where it leads, and how its result is sampled."""

import pytest
import torch as th
from torch import nn

from cm.errors import UserError
from cm.objectives.distances import get_distance
from cm.objectives.ect import ECT
from cm.objectives.pairs import ShrinkingPairs
from cm.types import Batch, Networks
from support.gaussian import Gaussian, Scripted, column
from support.objectives import F64, levels, nets_of, objective_of, plain


def made(pairs, distance=None):
    return ECT(lambda step: (0.0, 2), levels, plain, distance or get_distance("pseudo-huber", 1e-8), drawn=pairs)


@pytest.fixture
def drawn():
    """Images, noise, and the normal number behind t."""
    generator = th.Generator().manual_seed(1)
    x0, noise = (th.randn(3, 1, 2, 2, dtype=F64, generator=generator) for _ in range(2))
    return x0, noise, th.tensor([-0.5, 0.2, 1.0], dtype=F64)


def test_it_begins_as_a_denoiser(drawn):
    """With r = 0 the loss is |D(x_t, t) - x0| / t, and D is not asked at level 0."""
    x0, noise, z = drawn
    bed, asked = Gaussian(0.3, 0.5), []

    def D(x, sigma):
        asked.append(sigma)
        return bed.D(x, sigma)

    terms = made(ShrinkingPairs(q=1 + 1e-9))(nets_of(D), Batch(x0), 0, Scripted(noise, z))
    t = (2.0 * z - 1.1).exp()
    expected = (bed.D(x0 + noise * column(t, x0), t) - x0).flatten(1).norm(dim=1) / t
    th.testing.assert_close(terms.loss, expected, rtol=1e-6, atol=0)
    assert all((sigma > 0).all() for sigma in asked) and len(asked) == 2


def test_it_ends_as_a_consistency_loss(drawn):
    x0, noise, z = drawn
    bed, pairs = Gaussian(0.3, 0.5), ShrinkingPairs(q=256)

    def f(x, sigma):                                                # the exact consistency function down to 0
        return bed.flow(x, sigma, 0.0)

    terms = made(pairs)(nets_of(f), Batch(x0), 0, Scripted(noise, z))
    t = (2.0 * z - 1.1).exp()
    r = pairs.lower(t, 0)
    gap = f(x0 + noise * column(t, x0), t) - f(x0 + noise * column(r, x0), r)
    th.testing.assert_close(terms.loss, gap.flatten(1).norm(dim=1) / (t - r), rtol=1e-5, atol=0)


class Curve(nn.Module):
    """EDM's scalings around a small network, for which torch.func differentiates."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(th.randn(4, 4, dtype=F64, generator=th.Generator().manual_seed(2)))

    def forward(self, x, sigma):
        variance = column(sigma, x) ** 2 + 1
        inside = (x / variance.sqrt()).flatten(1) @ self.weight + sigma.log()[:, None] / 4
        return x / variance + column(sigma, x) / variance.sqrt() * inside.tanh().view_as(x)


@pytest.mark.parametrize("gap, allowed", [(1e-2, 2e-2), (1e-4, 2e-4)])
def test_its_gradient_tends_to_that_of_the_unit_tangent(drawn, gap, allowed):
    x0, noise, z = drawn
    D, pairs = Curve(), ShrinkingPairs(q=1 / gap, k=0)              # n = 1: r = t (1 - gap)
    loss = made(pairs)(Networks(D, D), Batch(x0), 0, Scripted(noise, z)).loss
    found = th.autograd.grad(loss.sum(), D.weight)[0]
    t = (2.0 * z - 1.1).exp()
    x_t = x0 + noise * column(t, x0)
    tangent = th.func.jvp(D, (x_t, t), (noise, th.ones_like(t)))[1].detach()
    unit = tangent / tangent.flatten(1).norm(dim=1)[:, None, None, None]
    along = ((D(x_t, t) * unit).flatten(1).sum(1) / (t * gap)).sum()
    expected = th.autograd.grad(along, D.weight)[0]
    assert (found - expected).norm() / expected.norm() < allowed


def test_equal_images_have_a_finite_gradient(drawn):
    x0, noise, z = drawn
    x = nn.Parameter(x0.float())
    objective = made(ShrinkingPairs(q=256))
    nets = Networks(lambda _, sigma: x, nn.Module())
    loss = objective(nets, Batch(x0.float()), 0, Scripted(noise.float(), z)).loss
    assert th.equal(loss, th.zeros(3))
    assert th.equal(th.autograd.grad(loss.sum(), x)[0], th.zeros_like(x))


def test_the_published_settings_are_the_defaults():
    objective, values = objective_of(ECT, "--training_mode", "ect", "--total_training_steps", "80")
    assert objective.pairs == ShrinkingPairs(-1.1, 2.0, 2.0, 8.0, 1.0, 8, 10)
    assert (values["huber_c"], values["loss_norm"], values["weight_schedule"]) == (1e-8, "pseudo-huber", "uniform")
    assert [objective.logs(step) for step in (0, 10, 79)] == [{"stage": 0}, {"stage": 1}, {"stage": 7}]


def test_a_teacher_may_lead_it():
    objective, values = objective_of(ECT, "--training_mode", "ect", "--pair_path", "teacher", "--shrink_q", "4")
    assert [each.name for each in objective.companions] == ["teacher_model"] and objective.pairs.q == 4
    bed = Gaussian(0.3, 0.5)
    x0 = th.zeros(2, 1, 2, 2, dtype=F64)
    terms = objective(nets_of(lambda x, sigma: bed.flow(x, sigma, 0.0), teacher=bed.D), Batch(x0), 600_000, th)
    assert terms.loss.max() < 0.05                                  # one Heun step from its ODE, not the noise away


def test_pairs_that_do_not_end_at_zero_are_refused():
    with pytest.raises(UserError, match="--pairs grid: .*identity at noise level 0.*choose shrinking"):
        objective_of(ECT, "--training_mode", "ect", "--pairs", "grid")
    with pytest.raises(UserError, match="--start_scales: start_scales=4 is for"):
        objective_of(ECT, "--training_mode", "ect", "--start_scales", "4")
