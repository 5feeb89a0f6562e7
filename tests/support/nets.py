"""Helpers for tests that put networks on disk."""

from pathlib import Path

import numpy as np
import torch as th
from torch import Tensor, nn

from evaluations.features import save_torchscript


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A network's weights as float32 tensors on the CPU, without gradients."""
    return {
        name: value.detach().to("cpu", th.float32 if value.is_floating_point() else value.dtype)
        for name, value in model.state_dict().items()
    }


class TinyExtractor(nn.Module):
    """Six features of images [N,3,H,W], from 8 by 8 pixels on; always the same weights."""

    def __init__(self) -> None:
        super().__init__()
        th.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.float() / 255).flatten(1)


def save_measure(folder: Path) -> None:
    """tiny.ts, an extractor, and ref.npz, 50 images of noise: what a Fréchet distance needs."""
    save_torchscript(TinyExtractor(), str(folder / "tiny.ts"), "tiny", "none")
    rng = np.random.default_rng(0)
    np.savez(folder / "ref.npz", arr_0=rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
