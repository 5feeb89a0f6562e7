"""Attention against a slow reference, in both memory formats, and its derivatives in forward mode."""

import pytest
import torch as th
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm.networks.attention import AttentionBlock, count_heads, qkv_attention
from support.naive import slow_attention


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
