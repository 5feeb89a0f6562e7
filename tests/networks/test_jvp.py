"""Derivatives of the real network in forward mode, wherever sampling takes place, against differences."""

import contextlib

import pytest
import torch as th

from cm.karras_diffusion import KarrasDenoiser
from cm.networks.jvp import JVP_COST, depth, evaluations_of_a_call, inside_jvp, jvp, second_derivative
from cm.networks.layers import normalization
from cm.samplers.integrate import denoise_jvp
from support import golden


@pytest.fixture(scope="module")
def denoiser():
    """The class-conditional golden network with attention, as the scripts place it."""
    model = golden.build().to(memory_format=th.channels_last).requires_grad_(False)
    return model, KarrasDenoiser(loss_norm="l2").bind(model)


@pytest.fixture(scope="module")
def point():
    rng = th.Generator().manual_seed(0)
    x, v = th.randn(2, 2, 3, 32, 32, generator=rng)
    return x, v, th.tensor([0.4, 1.5]), th.tensor([3, 7])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("context", [contextlib.nullcontext, th.no_grad, th.inference_mode])
def test_through_the_real_network(denoiser, point, context):
    """float32 differences of step 1e-2 err by about 2e-4, half of it rounding and half curvature."""
    (_, D), (x, v, sigma, y), h = denoiser, point, 1e-2
    with context():
        value, change = jvp(lambda z: D(z, sigma, y=y), (x,), (v,))
        th.testing.assert_close(value, D(x, sigma, y=y), rtol=1e-5, atol=1e-5)
        difference = (D(x + h * v, sigma, y=y) - D(x - h * v, sigma, y=y)) / (2 * h)
    assert relative(change, difference) < 1e-3


def test_along_the_noise_level_too(denoiser, point):
    (_, D), (x, v, sigma, y), h = denoiser, point, 2e-4
    dsigma = th.tensor([0.3, -0.5])

    def at(step):
        return D(x + step * v, sigma + step * dsigma, y=y)

    with th.inference_mode():
        _, change = denoise_jvp(lambda z, level: D(z, level, y=y), x, sigma, v, dsigma)
        assert relative(change, (at(h) - at(-h)) / (2 * h)) < 5e-3


def test_the_second_derivative(denoiser, point):
    (_, D), (x, v, sigma, y), h = denoiser, point, 1e-2
    with th.inference_mode():
        second = second_derivative(lambda z: D(z, sigma, y=y), x, v)

        def slope(step):
            return jvp(lambda z: D(z, sigma, y=y), (x + step * v,), (v,))[1]

        assert relative(second, (slope(h) - slope(-h)) / (2 * h)) < 5e-3


def test_backwards_by_torch_func_too(denoiser, point):
    """As classifier guidance differentiates, in inference mode; against autograd, whose layers are fused."""
    (_, D), (x, v, sigma, y) = denoiser, point
    x = x.contiguous(memory_format=th.channels_last)
    with th.inference_mode():
        gradient = th.func.grad(lambda z: (D(z, sigma, y=y) * v).sum())(x)
    (expected,) = th.autograd.grad((D(x.requires_grad_(), sigma, y=y) * v).sum(), x)
    assert relative(gradient, expected) < 1e-5


def test_in_half_precision(denoiser, point):
    """bf16 has 8 bits; value and change differ from those of float32 by about 1 %."""
    (model, D), (x, v, sigma, y) = denoiser, point
    value, change = jvp(lambda z: D(z, sigma, y=y), (x,), (v,))
    with th.inference_mode(), th.autocast("cpu", dtype=th.bfloat16):
        rough_value, rough_change = jvp(lambda z: D(z, sigma, y=y), (x,), (v,))
    assert rough_change.dtype == th.float32
    assert relative(rough_value, value) < 0.02 and 1e-5 < relative(rough_change, change) < 0.03
    model.convert_to_fp16()
    try:
        with th.inference_mode():
            assert relative(jvp(lambda z: D(z, sigma, y=y), (x,), (v,))[1], change) < 0.01
    finally:
        model.convert_to_fp32()


@pytest.mark.parametrize("dtype, tolerance", [(th.float32, 1e-5), (th.bfloat16, 0.02)])
def test_group_normalisation_alone(dtype, tolerance):
    """Value and change have one dtype, which torch's rule breaks, and channels-last data is taken, which it refuses."""
    x, v = th.randn(2, 2, 64, 4, 4, generator=th.Generator().manual_seed(0))
    norm = normalization(64)
    with th.no_grad():
        expected = jvp(norm, (x,), (v,))
        last = [t.to(dtype).contiguous(memory_format=th.channels_last) for t in (x, v)]
        for found, right in zip(jvp(norm, last[:1], last[1:]), expected):
            assert found.dtype == dtype and relative(found.float(), right) < tolerance


def test_what_a_pass_counts_for():
    seen = []

    def f(z):
        seen.append((depth(), inside_jvp(), evaluations_of_a_call()))
        return z**3

    x, v = th.tensor([2.0]), th.tensor([1.0])
    f(x)
    assert [part.item() for part in jvp(f, (x,), (v,))] == [8, 12]
    assert second_derivative(f, x, v).item() == 12
    assert seen == [(0, False, 1), (1, True, JVP_COST), (2, True, JVP_COST**2)]
    with pytest.raises(ZeroDivisionError):
        jvp(lambda z: 1 / 0, (x,), (v,))
    assert depth() == 0
