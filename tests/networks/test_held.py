"""What networks hold while they sample: same images, none of it left behind, nothing where it would be wrong."""

import pytest
import torch as th
from torch import nn

from cm.networks.held import Holds, weights_held
from cm.script_util import create_model


def network(arch: str) -> nn.Module:
    th.manual_seed(0)
    model = create_model(16, 32, 1, channel_mult="1,2", attention_resolutions="8", num_head_channels=16, arch=arch,
                         use_scale_shift_norm=True, resblock_updown=True)
    for param in model.parameters():
        if param.ndim and not param.any():
            nn.init.normal_(param, std=0.1)
    return model.eval()


def operations(model: nn.Module, x: th.Tensor) -> int:
    with th.profiler.profile(activities=[th.profiler.ProfilerActivity.CPU]) as profile:
        model(x, x.new_ones(len(x)))
    return sum(event.count for event in profile.key_averages())


@pytest.mark.parametrize("arch", ["unet", "ddpmpp", "ncsnpp", "adm", "edm2"])
def test_a_pass_has_the_same_result_in_fewer_operations(arch):
    model, x = network(arch), th.randn(2, 3, 16, 16)
    keys = list(model.state_dict())
    with th.no_grad():
        expected, before = model(x, x.new_ones(2)), operations(model, x)
        with weights_held(model):
            th.testing.assert_close(model(x, x.new_ones(2)), expected, rtol=1e-4, atol=1e-5)
            assert operations(model, x) < before
            assert list(model.state_dict()) == keys
        assert th.equal(model(x, x.new_ones(2)), expected)
    assert all(module.held is None for module in model.modules() if isinstance(module, Holds))


def test_new_weights_count_after_it():
    model, x = network("unet"), th.randn(1, 3, 16, 16)
    with th.no_grad():
        with weights_held(model):
            before = model(x, x.new_ones(1))
        for param in model.parameters():
            param.mul_(1.1)
        expected = model(x, x.new_ones(1))
        with weights_held(model), weights_held(model):
            th.testing.assert_close(model(x, x.new_ones(1)), expected, rtol=1e-4, atol=1e-5)
    assert not th.allclose(before, expected, rtol=1e-2)


class Wrapped(nn.Parameter):
    """Stands for a parameter with operations of its own, as one in shards is."""


def test_nothing_is_held_where_it_would_be_wrong():
    model = network("unet")
    with weights_held(model):
        assert model.held is None, "gradients are taken"
    with th.no_grad():
        model.compile(backend="eager")
        with weights_held(model):
            assert model.held is None, "compiled"
        model._compiled_call_impl = None
        model.out[2].bias = Wrapped(model.out[2].bias.data)
        with weights_held(model):
            assert model.held is None, "not plain"
    other = network("unet")
    other.middle_block[0].emb_layers[1].register_forward_hook(lambda *_: None)
    with th.no_grad(), weights_held(other):
        assert other.held is None, "somebody watches a projection"
