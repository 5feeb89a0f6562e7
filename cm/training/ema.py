"""Weight averages of a run: float32, at several rates, on the device or in CPU memory, whole or sharded over the ranks.

An average of rate r follows the parameters p by a <- r a + (1 - r) p after a step. It is not needed between two
updates, so it may live in the memory of the CPU, and each rank may keep only some of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import torch as th
from torch import Tensor

from cm.distributed import setup as dist
from cm.distributed.devices import background_thread
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
    :param shares: which rank keeps which tensor; None: this rank keeps all. With shares, all ranks must call the
        methods that return whole averages together.
    :param layout: how `params` are divided into rows among the ranks. If they are, `shares` is None, and all ranks must
        call the methods that return whole averages together, too.
    :raises UserError: for "cuda" if the parameters are not on a GPU.
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
        """A copy in float32: at a rate of 0.9999, an average in half precision would never change."""
        return param.detach().to(self.device, th.float32, copy=True)

    @property
    def local(self) -> list[list[Tensor]]:
        """For each rate, the tensors that this rank keeps, up to date; they are not copies."""
        if self.background:
            self.background.wait()
        return self._local

    def update(self, decays: Sequence[float]) -> None:
        """Update the averages after a step.

        :param decays: the rate r of each average, in [0, 1].
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
        """Load a whole average, one tensor per parameter on any device; this rank keeps its share of it.

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
        """`gather` on rank 0 only. The other ranks get an empty list, and need no memory for it."""
        local = self.local[self.rates.index(rate)]
        if self.shares.ranks == 1:
            return self.layout.gather_to_main(local)
        gathered = dist.gather_tensors(local)
        if gathered is None:
            return []
        parts = [iter(part) for part in gathered]
        return [next(parts[owner]) for owner in self.shares.owners]


class Background:
    """Copies of a device's parameters in CPU memory, and a thread that works with them.

    The copy is queued behind the work that was already given to the device, so it has the parameters after this work.
    From a GPU, it goes to pinned memory and is asynchronous.
    """

    def __init__(self, sources: Sequence[Tensor]):
        self.sources = list(sources)
        self.is_cuda = any(source.is_cuda for source in sources)
        self.copies = [
            th.empty_like(source, device=CPU, requires_grad=False, pin_memory=self.is_cuda) for source in sources
        ]
        self.thread = background_thread("averages", next((source.device for source in self.sources), CPU))
        self.task: Future | None = None

    def wait(self) -> None:
        """Wait until the latest task is done; an exception of the task is raised here."""
        if self.task is not None:
            task, self.task = self.task, None
            task.result()

    @th.no_grad()
    def submit(self, use: Callable[[Sequence[Tensor]], None]) -> None:
        """Copy, and let the thread call `use(copies)`; wait first if it still works with the previous copies."""
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
