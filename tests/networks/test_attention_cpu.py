"""Attention in bfloat16 on a CPU: by blocks, against float64, forward and backward."""

import pytest
import torch as th
from torch.func import jvp, vmap

from cm.networks import attention_cpu
from cm.networks.attention import qkv_attention
from support.naive import slow_attention


@pytest.mark.parametrize("block", [attention_cpu.BLOCK, 2 * 36**2, 1], ids=["all heads", "two heads", "one head"])
def test_bf16_attention_and_its_gradient_are_those_of_float64_to_rounding(block, monkeypatch):
    """Under autocast, in blocks that do not divide the heads, and with logits as far apart as trained networks have."""
    monkeypatch.setattr(attention_cpu, "BLOCK", block)
    th.manual_seed(0)
    qkv = (2 * th.randn(3, 96, 6, 6)).bfloat16().requires_grad_()
    direction = th.randn(3, 32, 6, 6).bfloat16()
    exact = qkv.detach().double().requires_grad_()
    expected = slow_attention(exact, 2)
    expected.backward(direction.double())
    with th.autocast("cpu", th.bfloat16):
        out = qkv_attention(qkv, 2)
    out.backward(direction)
    assert out.dtype == qkv.grad.dtype == th.bfloat16
    for own, right in ((out, expected), (qkv.grad, exact.grad)):
        # Logits of size 10 and the weights are rounded to 8 bits: relative errors of 2^-9 each, times 10 in the logits.
        assert (own - right).square().mean().sqrt() < 10 * 2**-9 * right.square().mean().sqrt()


def test_which_attention_goes_by_blocks():
    def tokens(length, dtype=th.bfloat16, device="cpu"):
        return th.empty(1, length, 96, dtype=dtype, device=device)

    assert attention_cpu.suits(tokens(attention_cpu.LONGEST))
    assert not attention_cpu.suits(tokens(attention_cpu.LONGEST + 1))
    assert not attention_cpu.suits(tokens(4, th.float32)) and not attention_cpu.suits(tokens(4, th.float16))
    assert not attention_cpu.suits(tokens(4, device="meta"))
    seen = []
    vmap(lambda each: seen.append(attention_cpu.suits(each)) or each)(tokens(4)[None])
    assert seen == [False]


def test_bf16_attention_can_be_differentiated_forward():
    th.manual_seed(0)
    x, direction = (th.randn(1, 96, 4, 4).bfloat16() for _ in range(2))
    value, derivative = jvp(lambda z: qkv_attention(z, 2), (x,), (direction,))
    exact = jvp(lambda z: slow_attention(z, 2), (x.double(),), (direction.double(),))
    for own, right in zip((value, derivative), exact, strict=True):
        assert (own - right).abs().max() < 0.03 * right.abs().max()


def test_bf16_attention_keeps_no_weights_for_the_backward_pass():
    """Of 1024 positions they would be 2 MiB a head."""
    qkv = th.randn(1, 96, 32, 32).bfloat16().requires_grad_()
    kept = []
    with th.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        qkv_attention(qkv, 2)
    assert sum(kept) <= qkv.numel()
