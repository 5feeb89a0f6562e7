"""Helpers for tests that put networks on disk."""

import torch as th
from torch import Tensor, nn


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A network's weights as float32 tensors on the CPU, without gradients."""
    return {
        name: value.detach().to("cpu", th.float32 if value.is_floating_point() else value.dtype)
        for name, value in model.state_dict().items()
    }
