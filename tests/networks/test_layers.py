"""cm.networks.layers against closed forms, golden numbers and slow references."""

import math

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from cm.networks.layers import (
    GroupNorm32,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    full_float32,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from support import golden, tf32


@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_embedding_golden(dim):
    golden.assert_close(timestep_embedding(golden.tensor("temb/timesteps"), dim), f"temb/dim{dim}")


def test_timestep_embedding_by_hand_in_float64():
    times = [-1553.652, 0.0, 0.5, 1095.5]
    expected = [
        [wave(t * math.exp(-math.log(10000) * i / 3)) for wave in (math.cos, math.sin) for i in range(3)] for t in times
    ]
    embedding = timestep_embedding(th.tensor(times, dtype=th.float64), 6)
    assert embedding.dtype == th.float64
    np.testing.assert_allclose(embedding.numpy(), expected, atol=1e-12)


def test_timestep_embedding_of_whole_and_half_precision_times_is_float32():
    times = th.tensor([3, 1000])
    expected = timestep_embedding(times.float(), 8)
    assert th.equal(timestep_embedding(times, 8), expected)
    assert th.equal(timestep_embedding(times.half(), 8), expected)
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        timestep_embedding(times[:, None], 8)


@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
def test_group_norm_has_32_groups_and_eps_1e_5(memory_format):
    # Channels of variance near 1e-5, where eps decides: 1e-6 instead would change the result by 40 %.
    x = (3e-3 * th.randn(2, 64, 5, 5, dtype=th.float64) + 0.1).contiguous(memory_format=memory_format)
    groups = x.reshape(2, 32, -1)
    variance, mean = th.var_mean(groups, dim=2, correction=0, keepdim=True)
    expected = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    out = normalization(64).double()(x)
    th.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
def test_group_norm_of_half_inputs_computes_in_float32(dtype, memory_format):
    th.manual_seed(0)
    norm = normalization(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    # A mean of 30 deviations: statistics accumulated in half precision would be wrong in the first digit.
    x = (30 + th.randn(2, 64, 16, 16)).to(dtype).contiguous(memory_format=memory_format)
    out = norm(x)
    expected = F.group_norm(x.float(), 32, norm.weight, norm.bias, 1e-5)
    assert out.dtype == dtype
    th.testing.assert_close(out.float(), expected, rtol=th.finfo(dtype).eps, atol=1e-4)     # the rounding of the output


def test_group_norm_of_half_inputs_has_float32_parameter_gradients():
    norm = normalization(32)
    x = th.randn(2, 32, 4, 4).bfloat16()
    norm(x).float().square().sum().backward()
    got = norm.weight.grad.clone()
    assert got.dtype == th.float32
    norm.weight.grad = None
    F.group_norm(x.float(), 32, norm.weight, norm.bias).square().sum().backward()
    th.testing.assert_close(got, norm.weight.grad, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("channels", [0, 16, 48, 100])
def test_normalization_names_the_remedy(channels):
    with pytest.raises(ValueError, match=f"layer of {channels} channels.*multiple of 32"):
        normalization(channels)
    assert isinstance(normalization(96), GroupNorm32)


def test_layers_by_dimension():
    for dims, conv, pool in ((1, nn.Conv1d, nn.AvgPool1d), (2, nn.Conv2d, nn.AvgPool2d), (3, nn.Conv3d, nn.AvgPool3d)):
        assert type(conv_nd(dims, 2, 3, 1)) is conv
        assert type(avg_pool_nd(dims, kernel_size=2)) is pool
    assert linear(2, 3).weight.shape == (3, 2)
    with pytest.raises(ValueError, match="unsupported dims 4; choose 1, 2 or 3"):
        conv_nd(4, 2, 3, 1)


def test_zero_module():
    layer = zero_module(nn.Linear(3, 2))
    assert not layer.weight.any() and not layer.bias.any() and layer.weight.requires_grad


def test_checkpoint_replays_the_dropout_mask():
    layer, dropout = nn.Linear(50, 50), nn.Dropout(0.5)
    x = th.randn(8, 50)

    def gradient(flag):
        th.manual_seed(3)
        layer.zero_grad()
        checkpoint(lambda z: dropout(layer(z)).square(), (x,), layer.parameters(), flag).sum().backward()
        return layer.weight.grad.clone(), th.rand(1)

    (plain, after), (recomputed, after_too) = gradient(False), gradient(True)
    assert th.equal(plain, recomputed)
    assert th.equal(after, after_too)       # and the recomputation leaves the stream where it was


def test_checkpoint_keeps_no_activations_of_its_own():
    kept = []
    layer = nn.Sequential(nn.Linear(20, 20), nn.SiLU(), nn.Linear(20, 20), nn.SiLU())
    x = th.randn(4, 20, requires_grad=True)
    with th.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        checkpoint(layer, (x,), layer.parameters(), True)
        assert [id(t) for t in kept] == [id(x)]         # only the input
        layer(x)
    assert len(kept) > 3


@pytest.mark.parametrize("allowed", [False, True])
def test_full_float32_is_that_on_gpus_with_cudnn_and_leaves_what_it_found(allowed):
    """cuDNN's own context manager would switch cuDNN off, unless it is told otherwise."""
    enabled, x = th.backends.cudnn.enabled, th.ones(1, 1, 1, 1)
    with tf32.at_first(allowed):
        with th.autocast("cpu", th.bfloat16), full_float32("cpu"):
            assert tf32.now() == (False, False) and th.backends.cudnn.enabled == enabled
            assert F.conv2d(x, x).dtype == th.float32
        assert tf32.now() == (allowed, allowed)


@pytest.mark.cuda
def test_a_gpu_computes_in_float32(gpu):
    """A product of 512 numbers is off by 1e-7 in float32, and by 3e-4 in TensorFloat-32."""
    x, w, a = th.randn(2, 512, 8, 8, device=gpu), th.randn(64, 512, 1, 1, device=gpu), th.randn(512, 512, device=gpu)
    with tf32.at_first(True), full_float32(gpu):
        for found, exact in ((F.conv2d(x, w), F.conv2d(x.double(), w.double())), (a @ a, a.double() @ a.double())):
            assert (found - exact).norm() < 1e-5 * exact.norm()
