"""Attention against a slow reference, in both memory formats, and its derivatives in forward mode."""

import pytest
import torch as th
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm.networks import attention_cpu
from cm.networks.attention import AttentionBlock, count_heads, qkv_attention


def slow_attention(qkv: th.Tensor, heads: int) -> th.Tensor:
    """Head by head, position by position's softmax, straight from the formula."""
    n, width, *positions = qkv.shape
    q, k, v = qkv.flatten(2).chunk(3, dim=1)                            # [N,C,T]
    d = width // 3 // heads
    out = th.empty_like(v)
    for head in range(heads):
        rows = slice(head * d, (head + 1) * d)
        weights = th.softmax(q[:, rows].transpose(1, 2) @ k[:, rows] / d**0.5, dim=-1)   # [N,T,T]
        out[:, rows] = v[:, rows] @ weights.transpose(1, 2)
    return out.view(n, width // 3, *positions)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("positions", [(7,), (4, 6), (2, 3, 4)])
def test_attention_equals_the_slow_one(heads, positions):
    th.manual_seed(0)
    qkv = 2 * th.randn(2, 3 * 24, *positions, dtype=th.float64)
    th.testing.assert_close(qkv_attention(qkv, heads), slow_attention(qkv, heads), rtol=1e-12, atol=1e-12)


def test_attention_keeps_channels_last_and_copies_nothing_to_get_there():
    qkv = th.randn(2, 96, 4, 6).contiguous(memory_format=th.channels_last)
    out = qkv_attention(qkv, 2)
    assert out.is_contiguous(memory_format=th.channels_last)
    th.testing.assert_close(out, slow_attention(qkv, 2), rtol=1e-5, atol=1e-6)
    tokens = qkv.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous() and tokens.data_ptr() == qkv.data_ptr()


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 3, 2, 1), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_any_strides_will_do(order):
    """Images that come out of an einsum or a permutation lie in memory in orders of their own."""
    th.manual_seed(0)
    qkv = th.randn(2, 96, 4, 6)
    strided = qkv.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    assert th.equal(strided, qkv) and not strided.is_contiguous()
    th.testing.assert_close(qkv_attention(strided, 2), slow_attention(qkv, 2), rtol=1e-5, atol=1e-6)
    block = AttentionBlock(96, 2)
    th.nn.init.normal_(block.proj_out.weight, std=0.1)
    th.testing.assert_close(block(strided), block(qkv), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_half_attention(dtype):
    th.manual_seed(0)
    qkv = th.randn(2, 96, 4, 4).to(dtype)
    out = qkv_attention(qkv, 2)
    assert out.dtype == dtype
    # Outputs are averages of values of size 1; softmax weights and the result are each rounded a few times.
    difference = (out.double() - slow_attention(qkv.double(), 2)).abs().max()
    assert difference < 4 * th.finfo(dtype).eps


def test_forward_mode_derivative_equals_finite_differences():
    th.manual_seed(0)
    x, direction = (th.randn(2, 96, 3, 3, dtype=th.float64) for _ in range(2))
    _, derivative = jvp(lambda z: qkv_attention(z, 2), (x,), (direction,))
    h = 1e-5
    expected = (qkv_attention(x + h * direction, 2) - qkv_attention(x - h * direction, 2)) / (2 * h)
    th.testing.assert_close(derivative, expected, rtol=1e-7, atol=1e-8)


def test_forward_mode_nests_with_the_other_transforms():
    th.manual_seed(0)
    x, direction = (th.randn(1, 96, 2, 2, dtype=th.float64) for _ in range(2))

    def energy(z):
        return qkv_attention(z, 2).square().sum()

    curvature = jvp(grad(energy), (x,), (direction,))[1]                # Hessian-vector product
    h = 1e-5
    expected = (grad(energy)(x + h * direction) - grad(energy)(x - h * direction)) / (2 * h)
    th.testing.assert_close(curvature, expected, rtol=1e-6, atol=1e-7)
    many = jvp(vmap(energy), (x[None].repeat(2, 1, 1, 1, 1),), (th.stack([direction, 2 * direction]),))[1]
    once = jvp(energy, (x,), (direction,))[1]
    th.testing.assert_close(many, th.stack([once, 2 * once]))


def test_callers_can_choose_the_kernel():
    qkv = th.randn(1, 96, 4, 4, requires_grad=True)
    fused = qkv_attention(qkv, 2)
    with sdpa_kernel(SDPBackend.MATH):
        plain = qkv_attention(qkv, 2)
    th.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    (gradient,) = th.autograd.grad(plain.square().sum(), qkv, create_graph=True)
    gradient.square().sum().backward()                                  # twice backward, which fused kernels cannot
    assert qkv.grad.isfinite().all()


def test_block_is_the_identity_at_the_start_and_has_the_published_parameters():
    block = AttentionBlock(64, num_head_channels=16)
    x = th.randn(2, 64, 4, 4)
    assert th.equal(block(x), x)
    assert {key: tuple(value.shape) for key, value in block.state_dict().items()} == {
        "norm.weight": (64,), "norm.bias": (64,), "qkv.weight": (192, 64, 1, 1), "qkv.bias": (192,),
        "proj_out.weight": (64, 64, 1, 1), "proj_out.bias": (64,),
    }


def test_number_of_heads():
    assert count_heads(128, num_heads=4, num_head_channels=-1) == 4
    assert count_heads(128, num_heads=4, num_head_channels=64) == 2
    for heads, width in ((3, -1), (0, -1), (-1, -1)):
        with pytest.raises(ValueError, match=f"num_heads={heads} does not divide the 128 channels"):
            count_heads(128, heads, width)
    for width in (48, 0):
        with pytest.raises(ValueError, match=f"num_head_channels={width} does not divide the 128 channels"):
            AttentionBlock(128, 1, width)


# --- bfloat16 on CPUs ----------------------------------------------------------------------------------------------

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
