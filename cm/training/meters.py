"""Averages of per-sample losses, overall and by quarter of the noise range, without a synchronisation per step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch as th
from torch import Tensor

from cm.types import LossTerms

QUARTERS = 4


class LossMeter:
    """Collects the terms of an objective between two rows of the log.

    A quarter is a quarter of [ln sigma_min, ln sigma_max], q0 the cleanest, so its column means the same in every
    row and every run. Sums stay on the device until `means` is called.
    """

    def __init__(
        self, sigma_min: float, sigma_max: float, all_reduce_sum: Callable[[Tensor], Tensor],
        all_reduce_max: Callable[[Tensor], Tensor] = lambda values: values,
    ):
        self.low, self.high = math.log(sigma_min), math.log(sigma_max)
        self.all_reduce_sum, self.all_reduce_max = all_reduce_sum, all_reduce_max
        self.peaks: dict[str, Tensor] = {}                  # name -> the largest value so far
        self.sums: dict[str, Tensor] = {}                   # name -> [2, QUARTERS]: sums and counts

    def quarter(self, sigma: Tensor) -> Tensor:
        """[N] -> [N] int64 in 0..3."""
        place = (sigma.log() - self.low) / (self.high - self.low)
        return (place * QUARTERS).long().clamp_(0, QUARTERS - 1)

    @th.no_grad()
    def add(self, terms: LossTerms) -> None:
        quarter = self.quarter(terms.sigma.detach())
        for name, value in {"loss": terms.loss, **terms.logs}.items():
            value = value.detach().double().expand(len(quarter))
            if name not in self.sums:
                self.sums[name] = th.zeros(2, QUARTERS, dtype=th.float64, device=value.device)
            self.sums[name][0].index_add_(0, quarter, value)
            self.sums[name][1].index_add_(0, quarter, th.ones_like(value))
        for name, value in terms.peaks.items():
            largest = value.detach().double().max()
            self.peaks[name] = th.maximum(self.peaks[name], largest) if name in self.peaks else largest

    def means(self) -> dict[str, float | None]:
        """Averages over all ranks since the last call: `loss`, `loss_q0` .. `loss_q3` (None without samples there).

        Also the maxima of the peaks, under their own names.
        """
        means: dict[str, float | None] = {}
        names = sorted(self.sums)
        if not names:
            return means
        sums = self.all_reduce_sum(th.stack([self.sums[name] for name in names])).cpu()
        for name, (total, count) in zip(names, sums):
            means[name] = float(total.sum() / count.sum())
            means.update({f"{name}_q{q}": float(total[q] / count[q]) if count[q] else None for q in range(QUARTERS)})
        if self.peaks:
            names = sorted(self.peaks)
            largest = self.all_reduce_max(th.stack([self.peaks[name] for name in names]))
            means |= dict(zip(names, largest.tolist()))
        self.sums.clear()
        self.peaks.clear()
        return means
