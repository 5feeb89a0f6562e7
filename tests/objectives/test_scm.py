"""sCM against closed forms: the tangent of the exact function, and the gradient of the loss, in float64."""

import pytest
import torch as th
from torch import nn

from cm.diffusion import trigflow
from cm.diffusion.denoiser import Diffusion
from cm.objectives.noise_bins import NoiseBinWeights
from cm.objectives.scm import SCD, SCT
from cm.random_util import SharedDropout
from cm.types import Batch, Networks
from support.gaussian import Gaussian, Scripted, column
from support.objectives import F64, objective_of

SD = 0.5
BED = Gaussian(0.3, 0.7)
DIFFUSION = Diffusion(time_scale=1.0)
Z = th.tensor([-1.5, 0.1, 1.2], dtype=F64)
SIGMA = (1.4 * Z - 1.0).exp()


class Net(nn.Module):
    """Any differentiable network with parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(th.randn(4, 4, dtype=F64, generator=th.Generator().manual_seed(3)))

    def forward(self, x, time):
        return (x.flatten(1) @ self.weight + column(time, x.flatten(1))).tanh().view_as(x)


class ExactNet(nn.Module):
    """The network whose denoiser, under EDM's scalings, is a given function of x and sigma."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.nothing = nn.Parameter(th.zeros((), dtype=F64))

    def forward(self, x, time):
        sigma = (4 * time).exp()
        c_skip, c_out, c_in = (column(c, x) for c in DIFFUSION.scaling.scalings(sigma))
        image = x / c_in
        return (self.function(image, sigma) - c_skip * image) / c_out + self.nothing


@pytest.fixture
def drawn():
    generator = th.Generator().manual_seed(1)
    x0, noise = (th.randn(3, 1, 2, 2, dtype=F64, generator=generator) for _ in range(2))
    return Batch(x0), noise, x0 + noise * column(SIGMA, x0)


def nets_of(model):
    return Networks(DIFFUSION.bind(model), model, teacher=BED.D, teacher_model=nn.Module())


def tangent_of(objective, model, drawn, rho=1.0):
    batch, noise, x = drawn
    return objective.tangent(nets_of(model), batch, noise, x, SIGMA, rho, SharedDropout("cpu"))


def velocity(path, drawn):
    """dx_t/dt of a path, by the formulas of METHODS: (cos t x_t - D) / sin t, or cos t sd z - sin t x0."""
    batch, noise, x = drawn
    t = column(trigflow.angle(SIGMA, SD), x)
    if path == "teacher":
        return (t.cos() ** 2 * x - BED.D(x, SIGMA)) / t.sin()
    return t.cos() * SD * noise - t.sin() * batch.images


@pytest.mark.parametrize("path", ["teacher", "noise"])
def test_the_tangent_is_the_derivative_of_f_along_the_path(path, drawn):
    """cos t df/dt, where f is the denoiser as a function of x_t and t."""
    model, (_, _, x) = Net(), drawn
    t = trigflow.angle(SIGMA, SD)

    def f(x_t, t):
        return DIFFUSION.bind(model)(x_t / column(t.cos(), x_t), SD * t.tan())

    x_t = x * column(t.cos(), x)
    _, slope = th.func.jvp(f, (x_t, t), (velocity(path, drawn), th.ones_like(t)))
    g = tangent_of(SCM_OF[path](DIFFUSION, path), model, drawn)
    th.testing.assert_close(g, (column(t.cos(), x) * slope).detach(), rtol=1e-9, atol=1e-9)


SCM_OF = {"teacher": SCD, "noise": SCT}


def test_the_exact_function_of_an_exact_teacher_has_no_tangent(drawn):
    g = tangent_of(SCD(DIFFUSION, "teacher"), ExactNet(lambda x, sigma: BED.flow(x, sigma, 0.0)), drawn)
    assert g.abs().max() < 1e-9


def test_the_tangent_without_a_teacher_is_right_on_average():
    """The mean over the images that could have become x is the tangent with the marginal velocity."""
    model, n = Net(), 200_000
    generator = th.Generator().manual_seed(2)
    x, sigma = th.full((1, 1, 2, 2), 0.8, dtype=F64), th.tensor([0.6], dtype=F64)
    variance = 1 / (1 / BED.s**2 + 1 / sigma**2)
    x0 = BED.D(x, sigma) + variance.sqrt() * th.randn(n, 1, 2, 2, dtype=F64, generator=generator)
    noise, many = (x - x0) / sigma, x.expand(n, -1, -1, -1)
    objective = SCT(DIFFUSION, "noise")
    g = objective.tangent(nets_of(model), Batch(x0), noise, many, sigma.expand(n), 1.0, SharedDropout("cpu"))
    exact = SCD(DIFFUSION, "teacher").tangent(
        nets_of(model), Batch(x0[:1]), noise[:1], x, sigma, 1.0, SharedDropout("cpu")
    )
    error = 5 * g.std(0) / n**0.5
    assert ((g.mean(0) - exact[0]).abs() < error).all()


def test_the_warm_up_begins_with_the_difference_of_velocities(drawn):
    batch, noise, x = drawn
    model, t = Net(), column(trigflow.angle(SIGMA, SD), x)
    F = trigflow.network_of(DIFFUSION, model, {})(t.cos() * x / SD, SIGMA.log())
    expected = -(t.cos() ** 2) * (SD * F - velocity("teacher", drawn))
    th.testing.assert_close(tangent_of(SCD(DIFFUSION, "teacher"), model, drawn, 0.0), expected.detach())
    objective = SCD(DIFFUSION, "teacher", warmup=100)
    assert [objective.warmup_factor(step) for step in (0, 25, 100, 999)] == [0, 0.25, 1, 1]
    assert SCD(DIFFUSION, "teacher", warmup=0).warmup_factor(0) == 1


@pytest.mark.parametrize("norm", ["rms", "norm"])
def test_the_gradient_is_that_of_f_times_its_slope(norm, drawn):
    """Of the loss -> 2 cos t / (sd sin t) f . df/dt / (|g| + c) / (CHW), equation 8 without weights."""
    batch, noise, x = drawn
    model = Net()
    objective = SCD(DIFFUSION, "teacher", c=0.1, norm=norm, warmup=0)
    terms = objective(nets_of(model), batch, 0, Scripted(noise, Z))
    found = th.autograd.grad(terms.loss.sum(), model.weight)[0]
    g = tangent_of(objective, model, drawn)
    size = g.flatten(1).norm(dim=1) / (2 if norm == "rms" else 1)
    t = trigflow.angle(SIGMA, SD)
    slope = g / column(t.cos(), x)
    along = (DIFFUSION.bind(model)(x, SIGMA) * slope).flatten(1).sum(1)
    expected = (2 * t.cos() / (SD * t.sin()) * along / (size + 0.1) / 4).sum()
    th.testing.assert_close(found, th.autograd.grad(expected, model.weight)[0], rtol=1e-9, atol=1e-12)
    th.testing.assert_close(terms.logs["tangent"], size)
    th.testing.assert_close(terms.peaks["tangent_max"], size)
    th.testing.assert_close(terms.loss, (g / column(size + 0.1, g)).square().flatten(1).mean(1))
    th.testing.assert_close(terms.sigma, SIGMA)


def test_weights_by_noise_level_multiply_the_loss(drawn):
    batch, noise, _ = drawn
    weights, model = NoiseBinWeights(0.002, 80), Net()
    plain = SCD(DIFFUSION, "teacher")(nets_of(model), batch, 0, Scripted(noise, Z))
    objective = SCD(DIFFUSION, "teacher", weights=weights)
    assert objective.history is weights
    objective.history.means[weights.bins(SIGMA[:1])] = 4.0
    terms = objective(nets_of(model), batch, 0, Scripted(noise, Z))
    th.testing.assert_close(terms.loss, plain.loss * th.tensor([0.25, 1, 1], dtype=F64))
    th.testing.assert_close(terms.logs["mse"], plain.loss)


def test_what_they_bring_along_and_their_settings():
    distilled, values = objective_of(SCD, "--training_mode", "scd", "--bin_weights", "True", "--tangent_norm", "norm")
    assert [each.name for each in distilled.companions] == ["teacher_model"] == [
        each.name for each in SCD.companions_of(values)
    ]
    assert (distilled.p_mean, distilled.p_std, distilled.c, distilled.norm, distilled.warmup) == (
        -1.0, 1.4, 0.1, "norm", 10_000
    )
    assert distilled.weights is not None
    alone, _ = objective_of(SCT, "--training_mode", "sct", "--p_std", "1.8")
    assert alone.companions == () and (alone.p_std, alone.norm, alone.history) == (1.8, "rms", None)
