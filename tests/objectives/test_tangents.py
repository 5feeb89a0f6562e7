"""Forward-mode derivatives inside losses: precision, dropout, sizes, and what is refused."""

import pytest
import torch as th

from cm.diffusion import trigflow
from cm.diffusion.denoiser import Diffusion
from cm.errors import UserError
from cm.objectives.scm import SCD, SCT
from cm.objectives.tangents import derivative, normalized, sample_norm
from cm.random_util import SharedDropout
from support import tf32
from support.objectives import objective_of
from support.training import network

N = 6


@pytest.fixture(scope="module")
def points():
    generator = th.Generator().manual_seed(0)
    x, v = (th.randn(N, 3, 8, 8, generator=generator) for _ in range(2))
    return x, v, th.linspace(-3, 3, N)


def tangent_of(model, x, v, log_sigma, masks=None):
    F = trigflow.network_of(Diffusion(time_scale=1.0), model, {"y": th.arange(N) % 3})
    primals, tangents = (x, log_sigma), (v, th.ones_like(log_sigma))
    return F, derivative(F, primals, tangents, masks or SharedDropout("cpu"))


def relative(a, b):
    return ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max().item()


def test_it_is_the_central_difference(points):
    """The published-style U-Net in float32 against differences in float64."""
    x, v, log_sigma = points
    _, (_, change) = tangent_of(network(), x, v, log_sigma)
    F, _ = tangent_of(network().double(), x.double(), v.double(), log_sigma.double())
    h = 1e-4
    with th.no_grad():
        above, below = (F(x.double() + d * v, log_sigma.double() + d) for d in (h, -h))
        central = (above - below) / (2 * h)
    assert relative(change.double(), central) < 3e-5


def test_a_bf16_run_differentiates_in_float32(points):
    model = network()
    _, plain = tangent_of(model, *points)
    with th.autocast("cpu", dtype=th.bfloat16):
        _, inside = tangent_of(model, *points)
    assert th.equal(plain[1], inside[1]) and th.equal(plain[0], inside[0])
    assert not plain[1].requires_grad


def test_a_run_in_tf32_differentiates_in_float32(points):
    """TensorFloat-32 has no more digits than half precision."""
    x, seen = points[0], []
    with tf32.at_first(True):
        derivative(lambda x: seen.append(tf32.now()) or x, (x,), (x,), SharedDropout("cpu"))
        assert seen == [(False, False)] and tf32.now() == (True, True)


def test_the_masks_are_those_of_the_pass_with_the_gradient(points):
    model, masks = network(dropout=0.5).train(), SharedDropout("cpu")
    th.manual_seed(0)
    F, (value, _) = tangent_of(model, *points, masks)
    with masks:
        again = F(points[0], points[2])
    other = F(points[0], points[2])
    th.testing.assert_close(again, value, rtol=1e-4, atol=1e-5)
    assert relative(other, value) > 0.1


def test_sizes():
    g = th.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]])
    assert sample_norm(g, "norm").tolist() == [5, 0]
    assert sample_norm(g, "rms").tolist() == pytest.approx([5 / 2**0.5, 0])
    th.testing.assert_close(normalized(g, 0.1, "norm"), g / 5.1)


@pytest.mark.parametrize("kind, mode", [(SCD, "scd"), (SCT, "sct")])
@pytest.mark.parametrize("argv, message", [
    (["--compile", "True"], "--compile True: .*forward mode"),
    (["--use_fp16", "True"], "float32, which a network in fp16 cannot: give --precision bf16"),
    (["--precision", "fp16"], "float32"), (["--precond", "ve"], "--precond ve: .*needs EDM's scalings"),
])
def test_networks_that_cannot_be_differentiated_are_refused(kind, mode, argv, message):
    with pytest.raises(UserError, match=message):
        objective_of(kind, "--training_mode", mode, *argv)


