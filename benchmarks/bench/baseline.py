"""The same network and the same step done the plain way, as most forks of guided-diffusion do it.

Attention as two einsums with a softmax in float32 between them, GroupNorm in float32 with a cast on either side,
channels first in memory, the optimizer and each weight average parameter by parameter, and the losses of every step
taken to Python sample by sample.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from torch import Tensor, nn

from cm.networks.attention import AttentionBlock
from cm.networks.layers import GroupNorm32
from cm.networks.unet_blocks import ResBlock
from cm.tensors import append_dims
from cm.types import Batch


@contextmanager
def torchs_default() -> Iterator[None]:
    """TensorFloat-32 in the convolutions of a GPU, as torch has it unless it is told otherwise."""
    before = th.backends.cudnn.allow_tf32
    th.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        th.backends.cudnn.allow_tf32 = before


class PlainAttention(AttentionBlock):
    """softmax(q k / sqrt(d)) v, with the whole matrix of weights in memory."""

    def _forward(self, x: Tensor) -> Tensor:
        n, c, *positions = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.num_heads, c // self.num_heads, -1)
        q, k, v = (part.flatten(0, 1) for part in qkv.unbind(1))                    # each [N h,d,T]
        scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
        weights = th.einsum("bct,bcs->bts", q * scale, k * scale)
        weights = th.softmax(weights.float(), dim=-1).type(weights.dtype)
        out = th.einsum("bts,bcs->bct", weights, v)
        return x + self.proj_out(out.reshape(n, c, *positions))


class PlainNorm(GroupNorm32):
    def forward(self, x: Tensor) -> Tensor:
        return nn.GroupNorm.forward(self, x.float()).type(x.dtype)


class PlainBlock(ResBlock):
    """Layer after layer."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        scale, shift = append_dims(self.emb_layers(emb), h.ndim).chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = th.addcmul(shift, norm(h), 1 + scale)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


def plain_copy(model: nn.Module) -> nn.Module:
    """The same weights, computed the plain way."""
    model = copy.deepcopy(model).to(memory_format=th.contiguous_format)
    for module in model.modules():
        if isinstance(module, AttentionBlock):
            module.__class__ = PlainAttention
        elif isinstance(module, GroupNorm32):
            module.__class__ = PlainNorm
        elif isinstance(module, ResBlock):
            module.__class__ = PlainBlock
    return model


class PlainStep:
    """Forward, backward, optimizer, averages and logs of one training step of plain loops.

    :param diffusion: a KarrasDenoiser; the loss is the toolkit's own, so that only the way of computing differs.
    :param loss_of: (model, images) -> loss [N].
    """

    def __init__(self, model: nn.Module, diffusion, loss_of, ema_rates: tuple[float, ...]):
        self.model, self.diffusion, self.loss_of = model, diffusion, loss_of
        self.opt = th.optim.RAdam(model.parameters(), lr=1e-4, foreach=False)
        self.averages = {rate: [p.detach().clone() for p in model.parameters()] for rate in ema_rates}
        self.log: list[float] = []

    @torchs_default()
    def __call__(self, images: Tensor) -> None:
        for param in self.model.parameters():
            if param.grad is not None:
                param.grad.detach_()
                param.grad.zero_()
        loss = self.loss_of(self.model, images)
        loss.mean().backward()
        norm = 0.0
        for param in self.model.parameters():
            norm += param.grad.float().norm().item() ** 2
        self.opt.step()
        for rate, average in self.averages.items():
            for kept, param in zip(average, self.model.parameters()):
                kept.mul_(rate).add_(param.detach(), alpha=1 - rate)
        for each in loss.detach():
            self.log.append(each.item())
        del self.log[:-1000]


@torchs_default()
def plain_heun(diffusion, model: nn.Module, noise: Tensor, sigmas: list[float]) -> Tensor:
    """Heun's method with autograd switched off and nothing else done for speed."""
    with th.no_grad():
        x = noise * sigmas[0]
        for sigma, sigma_next in zip(sigmas, sigmas[1:]):
            level = x.new_full((len(x),), sigma)
            slope = (x - diffusion.denoise(model, x, level)[1]) / append_dims(level, x.ndim)
            ahead = x + slope * (sigma_next - sigma)
            if sigma_next > 0:
                level = x.new_full((len(x),), sigma_next)
                again = (ahead - diffusion.denoise(model, ahead, level)[1]) / append_dims(level, x.ndim)
                ahead = x + (slope + again) / 2 * (sigma_next - sigma)
            x = ahead
        return x


@torchs_default()
@th.no_grad()
def plain_one_step(diffusion, model: nn.Module, noise: Tensor) -> Tensor:
    """One evaluation of a consistency model at the highest noise level."""
    return diffusion.denoise(model, noise * 80, noise.new_full((len(noise),), 80.0))[1]


def batch_of(images: Tensor, step: int) -> Batch:
    """A training batch of these images as the loop takes it."""
    positions = step * len(images) + th.arange(len(images))
    return Batch(images, {}, positions, positions)
