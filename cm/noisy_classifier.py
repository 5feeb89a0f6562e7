"""A classifier of noisy images, told their noise level: for classifier guidance.

Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), section 4: the encoder half of the U-Net. Input and noise level
are scaled as for EDM's networks.

Shapes: N batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cm.classifier_fit import fit
from cm.nn import SiLU, append_dims, linear, normalization, timestep_embedding, without_autocast, zero_module
from cm.precond import EDMPrecond
from cm.registry import UserError
from cm.unet import LayerFactory

FORMAT = "noisy classifier 1"
TIME_SCALE = 1000.0                                         # the embedding's frequencies are made for times this large


@dataclass(frozen=True)
class NoisyClassifierConfig:
    """What a classifier is built from; saved with its weights."""

    image_size: int
    num_classes: int
    width: int = 32                                         # of the first level
    depth: int = 1                                          # residual blocks per level
    channel_mult: tuple[float, ...] = (1, 2)
    attention_factors: tuple[int, ...] = ()                 # downsampling factors at which the network attends
    sigma_min: float = 0.002                                # the noise levels that it was trained at
    sigma_max: float = 80.0


class NoisyClassifier(nn.Module):
    """x [N,3,H,W] at noise levels sigma [N] -> logits [N,K], of which a softmax makes p(y | x, sigma)."""

    def __init__(self, config: NoisyClassifierConfig):
        super().__init__()
        self.config = config
        self.precond = EDMPrecond()
        widths = [int(mult * config.width) for mult in config.channel_mult]
        emb_channels = 4 * config.width
        make = LayerFactory(
            emb_channels=emb_channels, dropout=0.0, dims=2, use_checkpoint=False, use_scale_shift_norm=True,
            num_head_channels=min(32, *widths), resblock_updown=True, conv_resample=True,
        )
        self.time_embed = nn.Sequential(linear(config.width, emb_channels), SiLU(), linear(emb_channels, emb_channels))
        self.blocks, outputs = make.encoder(3, widths, config.depth, config.attention_factors, num_heads=1)
        self.middle = make.middle(outputs[-1], num_heads=1)
        side = config.image_size >> len(widths) - 1
        self.out = nn.Sequential(
            normalization(outputs[-1]), SiLU(),
            nn.Conv2d(outputs[-1], outputs[-1], side, groups=outputs[-1]),      # a mean whose weights are learnt
            nn.Flatten(), zero_module(linear(outputs[-1], config.num_classes)),
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        with without_autocast(x.device):                    # gradients of a small network: precision costs little here
            times = TIME_SCALE * self.precond.c_noise(sigma)
            emb = self.time_embed(timestep_embedding(times, self.config.width).to(x.dtype))
            h = append_dims(self.precond.scalings(sigma).c_in, x.ndim) * x
            for block in self.blocks:
                h = block(h, emb)
            return self.out(self.middle(h, emb))


def train_noisy_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    config: NoisyClassifierConfig,
    *,
    epochs: int = 15,
    batch_size: int = 64,
    lr: float = 4e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    device: th.device | str = "cpu",
    progress: bool = True,
) -> NoisyClassifier:
    """Train on images [N,H,W,3] and labels [N]; the noise level of each is drawn log-uniformly over the config's.

    Torch's global generator is left as it was.
    """
    x, y = to_images(images).to(device), th.as_tensor(labels, dtype=th.int64).to(device)
    with th.random.fork_rng():
        th.manual_seed(seed)
        model = NoisyClassifier(config).to(device)

        def loss_of(rows: Tensor) -> Tensor:
            noisy, sigma = add_noise(x[rows], config)
            return F.cross_entropy(model(noisy, sigma), y[rows])

        fit(model, loss_of, len(x), epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
            progress=progress)
    return model.eval().requires_grad_(False)


def add_noise(x: Tensor, config: NoisyClassifierConfig) -> tuple[Tensor, Tensor]:
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    sigma = (low + (high - low) * th.rand(len(x), device=x.device)).exp()
    return x + append_dims(sigma, x.ndim) * th.randn_like(x), sigma


@th.inference_mode()
def accuracy_at(
    model: NoisyClassifier, images: NDArray[np.uint8], labels: NDArray[np.integer], sigma: float, seed: int = 0,
    batch_size: int = 512,
) -> float:
    """Share of images [N,H,W,3] whose class is recognised at one noise level."""
    device, right = next(model.parameters()).device, 0
    rng = th.Generator().manual_seed(seed)
    for x, y in zip(to_images(images).split(batch_size), th.as_tensor(labels).split(batch_size)):
        noisy = (x + sigma * th.randn(x.shape, generator=rng)).to(device)
        right += int((model(noisy, noisy.new_full((len(x),), sigma)).argmax(1).cpu() == y).sum())
    return right / len(images)


def to_images(images: NDArray[np.uint8]) -> Tensor:
    """[N,H,W,3] uint8 -> [N,3,H,W] in [-1, 1]."""
    return th.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


# --- on disk ---------------------------------------------------------------------------------------------------------


def to_content(model: NoisyClassifier) -> dict[str, Any]:
    """What a file of a classifier holds: plain data, read back without running any code."""
    return {"format": FORMAT, "config": dataclasses.asdict(model.config), "weights": model.state_dict()}


def from_content(content: Any, path: str) -> NoisyClassifier:
    """The classifier in a file's content, ready to use.

    :raises UserError: if the file holds something else.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no classifier of noisy images; make one with classifier_train.py --noised True")
    model = NoisyClassifier(NoisyClassifierConfig(**content["config"]))
    model.load_state_dict(content["weights"])
    return model.eval().requires_grad_(False)
