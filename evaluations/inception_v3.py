"""openai/consistency_models' `evaluations.inception_v3`, in front of `evaluations.features.inception_v3`.

The same network and the same names of weights, with that repository's forward pass.

Shapes: N images, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
from torch import Tensor, nn

from cm.errors import UserError
from evaluations.features import inception_v3

__all__ = ["Conv2dLayer", "InceptionV3", "SoftmaxModel"]


class Conv2dLayer(inception_v3.Conv):
    """Convolution, normalisation by stored statistics, ReLU: [N,in_channels,H,W] -> [N,out_channels,H',W'].

    :param kh, kw: height and width of the kernel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kh: int, kw: int, stride: int = 1,
        padding: int | Sequence[int] = 0,
    ):
        pad = padding if isinstance(padding, int) else (padding[0], padding[1])
        super().__init__(in_channels, out_channels, (kh, kw), stride, pad)


class InceptionV3(inception_v3.InceptionV3):
    """Images [N,3,H,W], values 0 to 255 -> features or class probabilities. Fresh weights are zeros: load some."""

    def forward(                                            # pyright: ignore[reportIncompatibleMethodOverride]
        self, img: Tensor, return_features: bool = True, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(pooled [N,2048], spatial [N,2023]), or the probabilities [N,1008] without `return_features`.

        :param no_output_bias: leave out the bias of the last layer, as published Inception Scores do.
        :raises UserError: for use_fp16: published numbers are float32's.
        """
        if use_fp16:
            raise UserError("use_fp16=True would change the features; published numbers are those of float32: drop it")
        output = super().forward(img)
        if return_features:
            return output.pool, output.spatial.flatten(1)
        return self.acts_to_probs(output.pool, no_output_bias)

    def acts_to_probs(self, features: Tensor, no_output_bias: bool = False) -> Tensor:
        """Pooled features [N,2048] -> probabilities of the classes [N,1008]."""
        logits = features @ self.output.weight.T
        return (logits if no_output_bias else logits + self.output.bias).softmax(1)

    def create_softmax_model(self) -> SoftmaxModel:
        """The last layer by itself, without its bias."""
        return SoftmaxModel(self.output.weight)


class SoftmaxModel(nn.Module):
    """Pooled features [N,D] -> probabilities [N,K], without a bias.

    :param weight: [K,D], copied.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return th.nn.functional.linear(x, self.weight).softmax(1)
