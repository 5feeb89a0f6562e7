"""Multistep sampling of many schedules with a common prefix: the stages that they share are evaluated once.

The noise of a sample's k-th stage does not depend on the schedule, so schedules with the same prefix have the
same images up to its end. `CachedDiffusion` replaces the diffusion in `cm.generate.engine.draw` and takes these images
from memory; noise and arithmetic are those of any other sampling, so the images are too.

Shapes: N samples of a batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn

from cm.diffusion.preconditioning import Precond
from cm.samplers.sample import BindsNetworks
from cm.types import Denoiser

Prefix = tuple[int, ...]


class PrefixCache:
    """The last denoised images of shared prefixes, [N,C,H,W] for each batch, on the CPU and in their own dtype.

    :param limit_bytes: memory for them on this rank; what does not fit is evaluated again.
    """

    def __init__(self, diffusion: BindsNetworks, limit_bytes: float):
        self.diffusion = diffusion
        self.free_bytes = limit_bytes
        self.evaluations = 0                                        # images that went through the network
        self.not_held = 0                                           # images that did not fit in the memory
        self._shared: set[Prefix] = set()
        self._held: dict[tuple[Prefix, int], Tensor] = {}

    def share(self, prefixes: Iterable[Prefix]) -> None:
        """Store the images of these prefixes of schedules from now on, and drop those of others."""
        self._shared = set(prefixes)
        for key in [key for key in self._held if key[0] not in self._shared]:
            self.free_bytes += self._held.pop(key).nbytes

    def denoiser(self, ts: Prefix, batch: int) -> CachedDiffusion:
        """The diffusion for sampling one batch along `ts`; a batch number always means the same samples."""
        return CachedDiffusion(self, ts, batch)

    def recall(self, prefix: Prefix, batch: int) -> Tensor | None:
        """The last denoised images of a prefix, on the CPU; None if they are not stored."""
        return self._held.get((prefix, batch))

    def offer(self, prefix: Prefix, batch: int, denoised: Tensor) -> None:
        """Store these images if the prefix is shared and they fit."""
        if prefix not in self._shared:
            return
        if denoised.nbytes > self.free_bytes:
            self.not_held += len(denoised)
            return
        self.free_bytes -= denoised.nbytes
        self._held[prefix, batch] = denoised.cpu()


@dataclass(frozen=True)
class CachedDiffusion:
    """The part of a diffusion that sampling needs. The network is evaluated only for images that are not stored."""

    cache: PrefixCache
    ts: Prefix
    batch: int

    @property
    def scaling(self) -> Precond:
        """The preconditioning of the diffusion behind it."""
        return self.cache.diffusion.scaling

    def bind(self, model: nn.Module) -> Denoiser:
        """A denoiser for one sampling, which must ask for the stages of `ts` in their order."""
        network = self.cache.diffusion.bind(model)
        lengths = count(1)                                          # multistep evaluates each index once, in order

        def D(x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
            prefix = self.ts[: next(lengths)]
            held = self.cache.recall(prefix, self.batch)
            if held is not None:
                return held.to(x.device, non_blocking=True)
            denoised = network(x, sigma, **cond)
            self.cache.evaluations += len(x)
            self.cache.offer(prefix, self.batch, denoised)
            return denoised

        return D
