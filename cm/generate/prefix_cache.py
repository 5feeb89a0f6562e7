"""Multistep sampling of many schedules that begin alike: the stages they share are evaluated once.

The noise of a sample's k-th stage does not depend on the schedule, so schedules with the same beginning see the same
images up to its end. `CachedDiffusion` stands in for the diffusion in `cm.generate.engine.draw` and answers from memory
there; noise and arithmetic are those of any other sampling, so the images are too.

Shapes: N samples of a batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn

from cm.diffusion.preconditioning import Precond
from cm.objectives.karras_denoiser import KarrasDenoiser
from cm.types import Denoiser

Prefix = tuple[int, ...]


class PrefixCache:
    """The last denoised images of shared beginnings, [N,C,H,W] a batch, on the CPU and in the type they came in.

    :param limit_bytes: memory for them on this rank; what does not fit is evaluated again.
    """

    def __init__(self, diffusion: KarrasDenoiser, limit_bytes: float):
        self.diffusion = diffusion
        self.free_bytes = limit_bytes
        self.evaluations = 0                                        # images that went through the network
        self.turned_away = 0                                        # images that found no room
        self._shared: set[Prefix] = set()
        self._held: dict[tuple[Prefix, int], Tensor] = {}

    def share(self, beginnings: Iterable[Prefix]) -> None:
        """Remember these beginnings of schedules from now on, and forget others."""
        self._shared = set(beginnings)
        for key in [key for key in self._held if key[0] not in self._shared]:
            self.free_bytes += self._held.pop(key).nbytes

    def denoiser(self, ts: Prefix, batch: int) -> CachedDiffusion:
        """For one sampling along `ts` of the batch with that number, always of the same samples."""
        return CachedDiffusion(self, ts, batch)

    def recall(self, beginning: Prefix, batch: int) -> Tensor | None:
        return self._held.get((beginning, batch))

    def offer(self, beginning: Prefix, batch: int, denoised: Tensor) -> None:
        if beginning not in self._shared:
            return
        if denoised.nbytes > self.free_bytes:
            self.turned_away += len(denoised)
            return
        self.free_bytes -= denoised.nbytes
        self._held[beginning, batch] = denoised.cpu()


@dataclass(frozen=True)
class CachedDiffusion:
    """A `KarrasDenoiser` as far as sampling needs one, whose network is asked only for what is not held."""

    stages: PrefixCache
    ts: Prefix
    batch: int

    @property
    def scaling(self) -> Precond:
        return self.stages.diffusion.scaling

    def bind(self, model: nn.Module) -> Denoiser:
        network = self.stages.diffusion.bind(model)
        lengths = count(1)                                          # multistep asks once for each index, in order

        def D(x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
            beginning = self.ts[: next(lengths)]
            held = self.stages.recall(beginning, self.batch)
            if held is not None:
                return held.to(x.device, non_blocking=True)
            denoised = network(x, sigma, **cond)
            self.stages.evaluations += len(x)
            self.stages.offer(beginning, self.batch, denoised)
            return denoised

        return D
