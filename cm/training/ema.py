"""Weight averages of a run: float32, at several rates, on the device or in CPU memory, whole or sharded over the ranks.

An average of rate r follows the parameters p by a <- r a + (1 - r) p after a step. It is not needed between two
updates, so it may live in the memory of the CPU, and each rank may keep only some of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch as th
from torch import Tensor

from cm.distributed import setup as dist
from cm.distributed.layout import WHOLE, Layout
from cm.distributed.sharding import Sharding, partition
from cm.errors import UserError
from cm.tensors import update_emas

CPU = th.device("cpu")


class EMA:
    """Averages that start from the present values of some parameters.

    :param params: what is averaged: float32, all on one device.
    :param rates: their names, such as "0.9999".
    :param device: "same" for that of the parameters; "cpu", to which a GPU's parameters are copied while it goes on
        with the next step; or "cuda".
    :param shares: who keeps which tensor; None for all of them here. The methods that give whole averages are then
        one step of all ranks together.
    :param layout: of what parameters `params` are rows; then `shares` is None, and whole averages as there.
    :raises UserError: for "cuda" where the parameters are not on a GPU.
    """

    def __init__(
        self, params: Sequence[Tensor], rates: Sequence[str], device: str = "same", shares: Sharding | None = None,
        layout: Layout = WHOLE,
    ):
        self.rates, self.all, self.layout = list(rates), list(params), layout
        self.shares = shares or partition([param.numel() for param in self.all], 0, 1)
        self.sources = self.shares.mine(self.all)
        at = self.all[0].device
        if device == "cuda" and at.type != "cuda":
            raise UserError(f"--ema_device cuda, but this run is on the {at.type}: choose same, or cpu")
        self.device = CPU if device == "cpu" else at
        self.background = Background(self.sources) if self.device != at and self.rates else None
        self._local = [[self.copy_of(param) for param in self.sources] for _ in self.rates]
        self.initial_weight = [1.0] * len(self.rates)               # share of the weights that each started from

    def copy_of(self, param: Tensor) -> Tensor:
        """float32 whatever the parameter: at 0.9999 a half-precision average would never move."""
        return param.detach().to(self.device, th.float32, copy=True)

    @property
    def local(self) -> list[list[Tensor]]:
        """For each rate the tensors that this rank keeps, up to date: themselves, no copies."""
        if self.background:
            self.background.wait()
        return self._local

    def update(self, decays: Sequence[float]) -> None:
        """Follow the parameters, after a step.

        :param decays: for each average its r, in [0, 1].
        """
        self.initial_weight = [decay * share for decay, share in zip(decays, self.initial_weight, strict=True)]
        if self.background:
            self.background.submit(partial(self._update, decays))
        else:
            self._update(decays, self.sources)

    def _update(self, decays: Sequence[float], values: Sequence[Tensor]) -> None:
        update_emas(self._local, values, decays)

    def restart(self) -> None:
        """Restart from the current values."""
        for rate in self.rates:
            self._take(rate, self.shares.mine(self.all), 1.0)

    def load(self, rate: str, params: Sequence[Tensor], initial_weight: float = 1.0) -> None:
        """Go on from whole averages, one tensor per parameter on any device; this rank keeps its share of them.

        :param initial_weight: the share that they still hold of the weights that they started from.
        """
        self._take(rate, self.layout.parts(self.shares.mine(params)), initial_weight)

    @th.no_grad()
    def _take(self, rate: str, params: Sequence[Tensor], initial_weight: float) -> None:
        index = self.rates.index(rate)
        self.initial_weight[index] = initial_weight
        for average, param in zip(self.local[index], params, strict=True):
            average.copy_(param)

    def gather(self, rate: str) -> list[Tensor]:
        """The average of every parameter, on every rank; on the CPU where it is kept in shares."""
        local = self.local[self.rates.index(rate)]
        if self.shares.ranks == 1:
            return self.layout.gather(local)
        ours = iter(local)
        params = [
            next(ours).to(CPU) if owner == self.shares.rank else th.empty_like(param, dtype=th.float32, device=CPU)
            for param, owner in zip(self.all, self.shares.owners)
        ]
        for rank in range(self.shares.ranks):
            dist.sync_params(self.shares.of(rank, params), rank)
        return params

    def gather_to_main(self, rate: str) -> list[Tensor]:
        """As `gather`, on rank 0 only and without memory on the others, which get an empty list."""
        local = self.local[self.rates.index(rate)]
        if self.shares.ranks == 1:
            return self.layout.gather_to_main(local)
        gathered = dist.gather_tensors(local)
        if gathered is None:
            return []
        parts = [iter(part) for part in gathered]
        return [next(parts[owner]) for owner in self.shares.owners]


class Background:
    """Copies of a device's parameters in the memory of the CPU, and a thread that works with them.

    The copy is queued behind the work that the device has been given, so that it shows the parameters as they are after
    it; from a GPU it goes into pinned memory, and nobody waits.
    """

    def __init__(self, sources: Sequence[Tensor]):
        self.sources = list(sources)
        self.is_cuda = any(source.is_cuda for source in sources)
        self.copies = [
            th.empty_like(source, device=CPU, requires_grad=False, pin_memory=self.is_cuda) for source in sources
        ]
        self.thread = ThreadPoolExecutor(1, "averages")
        self.task: Future | None = None

    def wait(self) -> None:
        """Until the latest task is done; raises what it raised."""
        if self.task is not None:
            task, self.task = self.task, None
            task.result()

    @th.no_grad()
    def submit(self, use: Callable[[Sequence[Tensor]], None]) -> None:
        """Copy, and let the thread call `use(copies)`; waits only if it is still busy with the copies before."""
        self.wait()
        for copy, source in zip(self.copies, self.sources):
            copy.copy_(source.detach(), non_blocking=True)
        copied = th.cuda.Event() if self.is_cuda else None
        if copied:
            copied.record()
        self.task = self.thread.submit(self.work, use, copied)

    def work(self, use: Callable[[Sequence[Tensor]], None], copied: th.cuda.Event | None) -> None:
        if copied:
            copied.synchronize()
        use(self.copies)
