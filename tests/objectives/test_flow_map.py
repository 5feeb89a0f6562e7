"""Flow maps on Gaussian data, whose exact map is known, in float64."""

import pytest
import torch as th
from torch import nn

from cm.diffusion import linear_clock
from cm.diffusion.denoiser import Diffusion
from cm.errors import UserError
from cm.objectives.flow_map import AlphaFlow, MeanFlow, Point
from cm.random_util import SampleStreams, SharedDropout
from cm.types import Batch, Networks
from support.gaussian import Gaussian, column
from support.objectives import F64, objective_of

BED = Gaussian(0.3, 0.7)
DIFFUSION = Diffusion(time_scale=1.0)
S, R = th.tensor([0.9, 0.6, 0.4], dtype=F64), th.tensor([0.1, 0.3, 0.4], dtype=F64)


class ExactNet(nn.Module):
    """The network whose denoiser is the exact flow map."""

    def forward(self, x, time, gap):
        sigma = (4 * time).exp()
        c_skip, c_out, c_in = (column(c, x) for c in DIFFUSION.scaling.scalings(sigma))
        image = x / c_in
        return (BED.flow_map(image, sigma, gap) - c_skip * image) / c_out


class Net(nn.Module):
    """Any differentiable network of two times."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(th.randn(4, 4, dtype=F64, generator=th.Generator().manual_seed(3)))

    def forward(self, x, time, gap):
        return (x.flatten(1) @ self.weight + column(time + 2 * gap, x.flatten(1))).tanh().view_as(x)


@pytest.fixture
def drawn():
    generator = th.Generator().manual_seed(1)
    x0, noise = (th.randn(3, 1, 2, 2, dtype=F64, generator=generator) for _ in range(2))
    return Batch(x0), noise


def nets_of(model):
    return Networks(DIFFUSION.bind(model), model, teacher=BED.D, teacher_model=nn.Module())


def residual_of(objective, model, drawn, step=0):
    at = objective.point(nets_of(model), *drawn, S, R)
    return objective.residual(nets_of(model), drawn[0], at, step, SharedDropout("cpu"))


def test_the_exact_map_satisfies_the_identity(drawn):
    """u = v - (s - r) du/ds, with the velocity of an exact teacher."""
    residual = residual_of(MeanFlow(DIFFUSION, "teacher"), ExactNet(), drawn)
    assert residual[:2].abs().max() < 1e-9                          # r < s; at r = s there is no derivative to take
    velocity = MeanFlow.velocity(nets_of(ExactNet()), drawn[0], drawn[1], S, S)
    x = drawn[1] / column(1 - S, drawn[1])
    th.testing.assert_close(velocity, (drawn[1] - BED.D(x, linear_clock.level(S))) / column(S, x))


def test_to_zero_it_is_the_consistency_function(drawn):
    sigma, x = linear_clock.level(S), drawn[1]
    th.testing.assert_close(DIFFUSION.bind(ExactNet())(x, sigma, gap=S), BED.flow(x, sigma, 0.0))


@pytest.mark.parametrize("path", ["noise", "teacher"])
def test_the_residual_is_meanflows(path, drawn):
    """With du/ds by a central difference, along (v, 1, 0)."""
    model, (batch, noise) = Net(), drawn
    objective = MeanFlow(DIFFUSION, path)
    at = objective.point(nets_of(model), batch, noise, S, R)
    y = (1 - column(S, noise)) * batch.images + column(S, noise) * noise
    x = y / column(1 - S, y)
    v = noise - batch.images if path == "noise" else (y - BED.D(x, linear_clock.level(S))) / column(S, y)
    th.testing.assert_close(at, Point(y, S, R, v))
    h, nets = 1e-5, nets_of(model)
    with th.no_grad():
        above, below = (MeanFlow.velocity(nets, batch, y + d * v, S + d, R) for d in (h, -h))
        expected = MeanFlow.velocity(nets, batch, y, S, R) - v + column(S - R, y) * (above - below) / (2 * h)
    th.testing.assert_close(residual_of(objective, model, drawn), expected, rtol=1e-6, atol=1e-7)


def test_alpha_flow_tends_to_meanflow(drawn):
    model = Net()
    exact = residual_of(MeanFlow(DIFFUSION), model, drawn)
    errors = []
    for alpha in (0.1, 0.01, 0.001):
        objective = AlphaFlow(DIFFUSION, alpha_end=alpha, alpha_steps=1)
        errors.append((residual_of(objective, model, drawn, step=10) - exact).abs().max().item())
    assert errors[0] < 1
    assert [a / b for a, b in zip(errors, errors[1:])] == pytest.approx([10, 10], rel=0.15)


def test_alpha_flow_begins_as_flow_matching(drawn):
    model, objective = Net(), AlphaFlow(DIFFUSION, alpha_steps=100)
    at = objective.point(nets_of(model), *drawn, S, R)
    expected = MeanFlow.velocity(nets_of(model), drawn[0], at.y, S, R) - at.v
    th.testing.assert_close(residual_of(objective, model, drawn), expected, rtol=1e-4, atol=1e-4)
    alphas = [objective.alpha(step) for step in (0, 50, 100)]
    assert alphas == pytest.approx([1, 0.5, 0.005], abs=1e-5) and objective.logs(50) == {"alpha": 0.5}


@pytest.mark.parametrize("kind, step", [(MeanFlow, 0), (AlphaFlow, 0), (AlphaFlow, 550_000)])
def test_the_gradient_is_that_of_the_velocity_times_the_residual(kind, step, drawn):
    """Whatever alpha is: the square of AlphaFlow's u - target, about alpha times the residual, counts 1 / alpha."""
    model, objective = Net(), kind(DIFFUSION, adapt_p=0.75, adapt_e=1e-3)
    streams = SampleStreams(0, [1, 2, 3], stream="train")
    terms = objective(nets_of(model), drawn[0], step, streams)
    found = th.autograd.grad(terms.loss.sum(), model.weight)[0]
    again = SampleStreams(0, [1, 2, 3], stream="train")
    noise = again.randn_like(drawn[0].images)
    s, r = objective.times(again, noise)
    at = objective.point(nets_of(model), drawn[0], noise, s, r)
    residual = objective.residual(nets_of(model), drawn[0], at, step, SharedDropout("cpu")).detach()
    squared = residual.square().flatten(1).sum(1)
    u = MeanFlow.velocity(nets_of(model), drawn[0], at.y, s, r)
    along = (2 * residual * u).flatten(1).sum(1) / (squared + 1e-3) ** 0.75
    th.testing.assert_close(found, th.autograd.grad(along.sum(), model.weight)[0])
    th.testing.assert_close(terms.loss, squared / (squared + 1e-3) ** 0.75)
    th.testing.assert_close(terms.sigma, s / (1 - s))


def test_the_times_are_lognormal_in_order_and_often_equal():
    objective = MeanFlow(DIFFUSION, equal_share=0.25)
    s, r = objective.times(SampleStreams(0, range(4000), stream="train"), th.zeros(4000, 1, dtype=F64))
    assert (r <= s).all() and (s < 1).all() and r.min() >= 0.001
    # r is s by choice, or because it was drawn later than s: P(N(-4, 1.6^2) > N(-0.6, 1.6^2)) = 0.0665
    assert (r == s).double().mean().item() == pytest.approx(0.25 + 0.75 * 0.0665, abs=0.03)
    assert (s / (1 - s)).log().mean().item() == pytest.approx(-0.6, abs=0.1)


def test_settings_and_companions():
    objective, values = objective_of(MeanFlow, "--training_mode", "meanflow", "--pair_path", "teacher")
    assert values["second_time"] is True and [each.name for each in objective.companions] == ["teacher_model"]
    assert (objective.p_mean, objective.r_mean, objective.equal_share, objective.adapt_p) == (-0.6, -4.0, 0.25, 0.75)
    alpha, _ = objective_of(AlphaFlow, "--training_mode", "alphaflow", "--total_training_steps", "50", "--compile", "1")
    assert (alpha.alpha_steps, alpha.alpha_end, alpha.companions) == (50, 0.005, ())
    with pytest.raises(UserError, match="--compile True: --training_mode meanflow differentiates"):
        objective_of(MeanFlow, "--training_mode", "meanflow", "--compile", "True")
    with pytest.raises(UserError, match="--precond ve: flow maps need"):
        objective_of(AlphaFlow, "--training_mode", "alphaflow", "--precond", "ve")
