"""Small denoisers for tests of losses and samplers."""

from functools import cache

from torch import nn

from cm.karras_diffusion import KarrasDenoiser
from support import golden


@cache
def net(which: str) -> nn.Module:
    return golden.build(which)


def diffusion(distillation: bool = False, loss_norm: str = "l2", weighting: str = "uniform") -> KarrasDenoiser:
    return KarrasDenoiser(distillation=distillation, loss_norm=loss_norm, weight_schedule=weighting)


class Plain(nn.Module):
    """A network without labels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, timesteps):
        return self.conv(x)
