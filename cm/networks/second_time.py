"""The second time of a flow map: an embedding of the length of its step, added to that of its start.

Shapes: N batch, E embedding width.
"""

from __future__ import annotations

from torch import Tensor, nn

from cm.networks.layers import SiLU, linear, timestep_embedding, zero_module

SCALE = 4.0
"""Of the gap, which is at most 1: its fastest wave turns by no more than 1 radian per unit of ln sigma."""


class SecondTime(nn.Module):
    """From the gap s - r between two times of the linear clock to an embedding; 0 in a new network, for every gap.

    :param channels: width of the waves.
    :param emb_channels: E.
    """

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(
            linear(channels, emb_channels), SiLU(), zero_module(linear(emb_channels, emb_channels))
        )

    def forward(self, gap: Tensor | None, like: Tensor) -> Tensor:
        """[N] -> [N,E]; without a gap it is 0, and the flow map is the denoiser at its start.

        :param like: the embedding that it is added to, [N,E].
        """
        gap = like.new_zeros(len(like)) if gap is None else gap
        return self.layers(timestep_embedding(SCALE * gap, self.channels).to(like.dtype))


def check_gap(gap: Tensor | None, second_time: nn.Module | None) -> None:
    """A gap is given to networks only that take one.

    :raises ValueError: if it is not.
    """
    if gap is not None and second_time is None:
        raise ValueError("the network has one time: call it without gap, or build it with second_time")
