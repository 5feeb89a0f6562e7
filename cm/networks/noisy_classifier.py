"""A classifier of noisy images, conditioned on their noise level: for classifier guidance.

Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), section 4: the encoder half of the U-Net. Input and noise level
are scaled as in EDM's networks.

Shapes: N batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import Tensor, nn

from cm.diffusion.preconditioning import EDMPrecond
from cm.errors import UserError
from cm.networks.layers import SiLU, linear, normalization, timestep_embedding, without_autocast, zero_module
from cm.networks.unet import LayerFactory, UNetConfig
from cm.tensors import append_dims

FORMAT = "noisy classifier 1"
TIME_SCALE = 1000.0                                         # the frequencies of the embedding suit times of this size


@dataclass(frozen=True)
class NoisyClassifierConfig:
    """The architecture of a classifier; it is saved with the weights."""

    image_size: int
    num_classes: int
    width: int = 32                                         # of the first level
    depth: int = 1                                          # residual blocks per level
    channel_mult: tuple[float, ...] = (1, 2)
    attention_factors: tuple[int, ...] = ()                 # downsampling factors at which the network attends
    sigma_min: float = 0.002                                # the noise levels that it was trained at
    sigma_max: float = 80.0
    channels: int = 3                                       # of the images
    class_names: tuple[str, ...] = ()                       # of the classes, where they are known


class NoisyClassifier(nn.Module):
    """x [N,C,H,W] at noise levels sigma [N] -> logits [N,K], whose softmax is p(y | x, sigma)."""

    def __init__(self, config: NoisyClassifierConfig):
        super().__init__()
        self.config = config
        self.precond = EDMPrecond()
        narrowest = int(min(config.channel_mult) * config.width)
        encoder = UNetConfig(
            image_size=config.image_size, in_channels=config.channels, model_channels=config.width,
            out_channels=config.num_classes,
            num_res_blocks=config.depth, attention_resolutions=config.attention_factors,
            channel_mult=config.channel_mult, num_head_channels=min(32, narrowest), use_scale_shift_norm=True,
            resblock_updown=True,
        )
        emb_channels = encoder.emb_channels
        make = LayerFactory(encoder)
        self.time_embed = nn.Sequential(linear(config.width, emb_channels), SiLU(), linear(emb_channels, emb_channels))
        self.blocks, outputs = make.encoder()
        self.middle = make.middle()
        side = config.image_size >> len(encoder.widths) - 1
        self.out = nn.Sequential(
            normalization(outputs[-1]), SiLU(),
            nn.Conv2d(outputs[-1], outputs[-1], side, groups=outputs[-1]),      # a mean with learnt weights
            nn.Flatten(), zero_module(linear(outputs[-1], config.num_classes)),
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[N,C,H,W], [N] -> logits [N,K]."""
        with without_autocast(x.device):                    # gradients of a small network: precision costs little here
            times = TIME_SCALE * self.precond.c_noise(sigma)
            emb = self.time_embed(timestep_embedding(times, self.config.width).to(x.dtype))
            h = append_dims(self.precond.scalings(sigma).c_in, x.ndim) * x
            for block in self.blocks:
                h = block(h, emb)
            return self.out(self.middle(h, emb))


# --- on disk ---------------------------------------------------------------------------------------------------------


def to_content(model: NoisyClassifier) -> dict[str, Any]:
    """The content of a classifier's file: plain data, so that reading it runs no code."""
    return {"format": FORMAT, "config": dataclasses.asdict(model.config), "weights": model.state_dict()}


def from_content(content: Any, path: str) -> NoisyClassifier:
    """The classifier in a file's content, in evaluation mode and without gradients.

    :param path: of the file, for the message.

    :raises UserError: if the file holds something else.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a classifier of noisy images; train one with classifier_train.py --noised True")
    try:
        config, weights = NoisyClassifierConfig(**content["config"]), content["weights"]
        if config.depth * len(config.channel_mult) > len(weights):          # each block has several tensors
            raise ValueError(f"{config.depth} blocks on {len(config.channel_mult)} levels in {len(weights)} tensors")
        with th.device("meta"):                             # what it describes must not need more than the file holds
            model = NoisyClassifier(config)
        model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    except (UserError, TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError, ZeroDivisionError,
            AssertionError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise UserError(f"{path} is a damaged classifier of noisy images ({reason}); download or train it "
                        "again") from None
    return model.eval().requires_grad_(False)
