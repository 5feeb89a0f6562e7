"""Which parts of a network turn to half precision."""

import torch as th
from torch import nn

from cm.networks.precision import convert_module_to_f16, convert_module_to_f32


def test_conversion_touches_convolutions_only():
    convolutions = nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1)
    model = nn.Sequential(*convolutions, nn.Linear(1, 1), nn.GroupNorm(1, 1))
    model.apply(convert_module_to_f16)
    assert [layer.weight.dtype for layer in model] == [th.float16] * 3 + [th.float32] * 2
    model.apply(convert_module_to_f32)
    assert all(p.dtype == th.float32 for p in model.parameters())
