"""A convolution and what is added to it: the sum, and on a GPU (whose layers run on the CPU here) its memory format."""

import pytest
import torch as th
from torch import nn

from cm.networks import gpu_layouts
from cm.networks.fused_conv import conv_plus


@pytest.fixture
def here(monkeypatch):
    """Stands for a GPU."""
    monkeypatch.setattr(gpu_layouts, "suits", lambda x: True)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
def test_a_convolution_and_what_is_added(kernel, bias, memory_format, here):
    th.manual_seed(0)
    conv = nn.Conv2d(8, 16, kernel, padding=kernel // 2, bias=bias).double().to(memory_format=th.channels_last)
    x, plus = th.randn(2, 8, 4, 6, dtype=th.float64), th.randn(2, 16, 4, 6, dtype=th.float64)
    with th.no_grad():
        for others in ((), (plus,), (plus, plus)):
            found = conv_plus(conv, x, *others, memory_format=memory_format)
            th.testing.assert_close(found, conv(x) + len(others) * plus, rtol=1e-12, atol=1e-12)
            assert found.is_contiguous(memory_format=memory_format)


def test_a_convolution_that_is_watched_is_called(here):
    conv, calls = nn.Conv2d(8, 8, 3), []
    conv.register_forward_hook(lambda *_: calls.append(1))
    with th.no_grad():
        conv_plus(conv, th.randn(1, 8, 4, 4))
    assert calls


def test_elsewhere_it_is_the_sum_of_the_layers():
    conv, x = nn.Conv2d(8, 8, 3, padding=1), th.randn(2, 8, 4, 4)
    assert th.equal(conv_plus(conv, x), conv(x)) and th.equal(conv_plus(conv, x, x), x + conv(x))
    assert th.equal(conv_plus(nn.Identity(), x), x)
