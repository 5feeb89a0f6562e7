"""Normalisation, gain, shift and SiLU in one operation: against torch's own, in float64 and in lower precisions."""

import copy

import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from cm.networks.fused_norm import _is_fused, norm_act
from cm.script_util import create_model


def by_torch(norm, x, gain, shift, silu):
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if gain is not None:
        y = y * gain[:, :, None, None] + shift[:, :, None, None]
    return F.silu(y) if silu else y


def problem(dtype, with_embedding, offset=1.0):
    """A normalisation of 64 channels in 32 groups, and its inputs, channels last."""
    th.manual_seed(0)
    norm = nn.GroupNorm(32, 64).to(th.promote_types(dtype, th.float32))
    nn.init.normal_(norm.weight, 1, 0.5)
    nn.init.normal_(norm.bias)
    x = (th.randn(3, 64, 5, 7, dtype=dtype) * 2 + offset).to(memory_format=th.channels_last).requires_grad_()
    gain, shift = (th.randn(3, 64, dtype=dtype, requires_grad=True) if with_embedding else None for _ in range(2))
    return norm, x, gain, shift


# The input is rounded to its dtype once and the result once more; between them nothing is below float32.
@pytest.mark.parametrize(("dtype", "tolerance"), [(th.float64, 1e-13), (th.float32, 5e-6), (th.bfloat16, 1e-2)])
@pytest.mark.parametrize("with_embedding", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_values_and_gradients_are_those_of_the_three_operations(dtype, tolerance, with_embedding, silu):
    norm, x, gain, shift = problem(dtype, with_embedding)
    assert _is_fused(x)
    inputs = [t for t in (x, *norm.parameters(), gain, shift) if t is not None]
    y = norm_act(norm, x, gain, shift, silu=silu)
    grad = th.randn_like(y)
    found = [y, *th.autograd.grad(y, inputs, grad)]
    assert y.dtype == dtype and y.is_contiguous(memory_format=th.channels_last)

    exact = copy.deepcopy(norm).double()
    wide = [None if t is None else t.detach().double().contiguous().requires_grad_() for t in (x, gain, shift)]
    expected = by_torch(exact, *wide, silu)
    inputs = [t for t in (wide[0], *exact.parameters(), *wide[1:]) if t is not None]
    for own, right in zip(found, [expected, *th.autograd.grad(expected, inputs, grad.double())], strict=True):
        assert (own.double() - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_images_in_blocks_are_what_all_together_are(dtype, monkeypatch):
    norm, x, gain, shift = problem(dtype, True)
    found = []
    for block in (x.numel(), 2 * x[0].numel(), 1):
        monkeypatch.setattr("cm.networks.fused_norm.BLOCK", block)
        y = norm_act(norm, x, gain, shift)
        found.append([y, *th.autograd.grad(y.float().square().sum(), [x, *norm.parameters(), gain, shift])])
    for other in found[1:]:
        th.testing.assert_close(other, found[0], rtol=2 * th.finfo(dtype).eps, atol=1e-6)


def test_gradients_agree_with_finite_differences():
    norm, x, gain, shift = problem(th.float64, True)
    x, gain, shift = (t[:1].detach().requires_grad_() for t in (x, gain, shift))
    x = x[..., :2, :2].contiguous(memory_format=th.channels_last).detach().requires_grad_()
    assert th.autograd.gradcheck(lambda *args: norm_act(norm, *args), (x, gain, shift), fast_mode=True)


def test_a_mean_far_above_the_spread_costs_few_digits():
    """Sums of squares cancel: with a mean of 50 spreads, float32 has about 4 digits left, bfloat16 data lack them."""
    norm, x, *_ = problem(th.float32, False, offset=100.0)
    expected = by_torch(copy.deepcopy(norm).double(), x.detach().double(), None, None, True)
    assert (norm_act(norm, x) - expected).abs().max() < 3e-3 * expected.abs().max()


def test_a_group_without_spread_becomes_its_bias():
    """Where all numbers are equal, E x^2 - (E x)^2 is rounding noise of x^2, half of it negative: that counts as 0.

    The noise is up to 1e-7 x^2, and 1 / sqrt(eps) multiplies what float32 leaves of x - E x: 316 * 1e-7 x.
    """
    norm = nn.GroupNorm(32, 64)
    nn.init.normal_(norm.bias)
    levels = th.linspace(100, 1000, 32)
    x = levels.repeat_interleave(2)[None, :, None, None].expand(2, -1, 5, 7)
    x = x.contiguous(memory_format=th.channels_last).requires_grad_()
    square, mean = x[0].detach().square().mean((1, 2)), x[0].detach().mean((1, 2))
    assert (square - mean.square() < -norm.eps).any(), "some of these levels have less than no spread"
    y = norm_act(norm, x, silu=False)
    th.testing.assert_close(y, norm.bias[None, :, None, None].expand_as(y), rtol=0, atol=0.1)
    assert th.autograd.grad(y.square().sum(), x)[0].isfinite().all()


def test_other_memory_formats_take_torchs_operations():
    norm, x, gain, shift = problem(th.float32, True)
    plain = x.detach().contiguous()
    assert not _is_fused(plain)
    assert th.equal(norm_act(norm, plain, gain, shift), F.silu(
        th.addcmul(shift[:, :, None, None], norm(plain), gain[:, :, None, None])
    ))


def test_forward_mode_derivatives_go_through():
    norm, x, gain, shift = problem(th.float64, True)
    x, gain, shift = x.detach(), gain.detach(), shift.detach()
    direction, step = th.randn_like(x), 1e-6
    _, along = th.func.jvp(lambda t: norm_act(norm, t, gain, shift), (x,), (direction,))
    ends = [norm_act(norm, x + sign * step * direction, gain, shift) for sign in (1, -1)]
    assert (along - (ends[0] - ends[1]) / (2 * step)).abs().max() < 1e-7


def test_a_whole_network_is_the_same_in_both_memory_formats():
    th.manual_seed(0)
    plain = create_model(16, 32, 1, "1,2", attention_resolutions="8", num_head_channels=16, resblock_updown=True,
                         use_scale_shift_norm=True).double()
    for param in plain.parameters():
        nn.init.normal_(param, std=0.1)
    last = copy.deepcopy(plain).to(memory_format=th.channels_last)
    x, time = th.randn(2, 3, 16, 16, dtype=th.float64), th.tensor([3.0, -700.0], dtype=th.float64)
    outputs, grads = [], []
    for model, images in ((plain, x), (last, x.to(memory_format=th.channels_last))):
        out = model(images, time)
        outputs.append(out)
        grads.append(th.autograd.grad(out.square().mean(), list(model.parameters())))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-12 * outputs[0].abs().max()
    for a, b in zip(*grads):
        assert (a - b).abs().max() <= 1e-10 * max(a.abs().max(), 1e-3)
