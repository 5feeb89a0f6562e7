"""The layers for GPUs, computed on the CPU: torch's own numbers, in the memory formats that the next layer wants."""

import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from cm.networks import gpu_layouts
from cm.networks.held import weights_held
from cm.script_util import create_model


@pytest.fixture
def here(monkeypatch):
    """Stands for a GPU: its layers are for whatever takes no gradient."""
    monkeypatch.setattr(gpu_layouts, "suits", lambda x: x.ndim == 4 and not th.is_grad_enabled())


def is_last(x):
    return x.is_contiguous(memory_format=th.channels_last) and not x.is_contiguous()


# Of bfloat16 data the result is rounded before SiLU and after it.
@pytest.mark.parametrize(("dtype", "tolerance"), [(th.float64, 1e-13), (th.float32, 2e-6), (th.bfloat16, 2**-7)])
@pytest.mark.parametrize("each_image", [False, True])
def test_norms_of_all_images_are_one_of_many_groups(dtype, tolerance, each_image):
    th.manual_seed(0)
    norm, x = nn.GroupNorm(4, 16), th.randn(3, 16, 4, 6, dtype=dtype).to(memory_format=th.channels_last)
    weight, bias = th.randn(2, *([3] if each_image else []), 16, dtype=th.promote_types(dtype, th.float32))
    x_hat = F.group_norm(x.double().contiguous(), 4, eps=norm.eps)
    expected = x_hat * weight.double()[..., None, None] + bias.double()[..., None, None]
    with th.no_grad():
        plain = gpu_layouts.norm_act(norm, x, weight, bias, silu=False)
        bent = gpu_layouts.norm_act(norm, x, weight, bias, silu=True)
    assert plain.dtype == bent.dtype == dtype and plain.is_contiguous() and is_last(bent)
    for found, right in ((plain, expected), (bent, F.silu(expected))):
        assert (found.double() - right).abs().max() <= tolerance * right.abs().max()


def network(**changes):
    th.manual_seed(0)
    model = create_model(16, 32, 1, channel_mult="1,2", attention_resolutions="8", num_head_channels=16,
                         **{"use_scale_shift_norm": True, "resblock_updown": True, **changes})
    for param in model.parameters():
        nn.init.normal_(param, std=0.1)
    return model.eval().to(memory_format=th.channels_last)


@pytest.mark.parametrize("changes", [
    {}, {"use_scale_shift_norm": False, "resblock_updown": False}, {"arch": "ddpmpp"}, {"arch": "adm"},
])
def test_a_network_has_the_same_result(changes, here, monkeypatch):
    model = network(**changes).double()
    x, time = th.randn(3, 3, 16, 16, dtype=th.float64), th.tensor([1.0, -3.0, 0.5], dtype=th.float64)
    expected = model(x, time)
    with th.no_grad():
        own = model(x, time)
        with weights_held(model):
            held = model(x, time)
        monkeypatch.undo()
        with weights_held(model):
            th.testing.assert_close(model(x, time), expected, rtol=1e-10, atol=1e-10)
    for found in (own, held):
        th.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_network_under_autocast_differs_by_its_rounding(here, monkeypatch):
    """The layers round once more, before SiLU, than the one operation for CPUs: the error grows by under a third."""
    model = network()
    x, time = th.randn(8, 3, 16, 16), th.linspace(-3, 3, 8)
    exact = model(x, time).detach()
    with th.no_grad(), th.autocast("cpu", th.bfloat16):
        own = model(x, time)
        monkeypatch.undo()
        others = model(x, time)
    errors = [(found - exact).square().mean().sqrt() for found in (own, others)]
    assert own.dtype == exact.dtype and errors[0] < 1.33 * errors[1]


def test_they_are_for_gpus_without_gradients_or_derivatives():
    x = th.empty(1, 4, 2, 2, device="meta")
    assert not gpu_layouts.suits(x), "gradients are taken"
    with th.no_grad():
        assert gpu_layouts.suits(x)
        assert not gpu_layouts.suits(x[0]) and not gpu_layouts.suits(th.empty(1, 4, 2, 2))
        seen = []
        th.func.jvp(lambda z: seen.append(gpu_layouts.suits(z)) or z, (x,), (x,))
    assert seen == [False]
