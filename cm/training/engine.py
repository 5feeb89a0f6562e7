"""How a run is divided among its ranks (--parallel): one object per mode, so the loop needs no case distinctions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch as th
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cm.distributed import setup as dist
from cm.distributed.layout import WHOLE, Layout
from cm.errors import UserError
from cm.networks.units import residual_blocks
from cm.registry import lookup
from cm.training.config import LoopConfig


class Engine:
    """ddp: every rank holds every network, and the gradients of all are averaged while the backward pass runs."""

    def lay_out(self, model: nn.Module) -> Layout:
        """Divide a network among the ranks, before its parameters are used, and return their layout."""
        return WHOLE

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose backward pass averages gradients; all ranks must hold the same weights."""
        if dist.get_world_size() == 1:
            return model
        device = next(model.parameters()).device
        shared = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
        )
        # Buffers are constants, the same on every rank from the start. (As an argument, newer torch deprecates it.)
        shared.broadcast_buffers = False
        return shared

    def needs_warm_up(self) -> bool:
        """Whether the order of sums changes after the first backward pass; see `TrainLoop._warm_up`."""
        return dist.get_world_size() > 2

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager:
        """A context in which the gradients of a microbatch are not averaged over the ranks."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def is_finite(self, model: nn.Module) -> bool:
        """Whether all weights of a network are finite. All ranks must call it together."""
        return all(bool(param.isfinite().all()) for param in model.parameters())

    def check_passes(self, passes: int) -> None:
        """Check that the ranks may need different numbers of passes through a network per step.

        All ranks must call it together.

        :param passes: number of passes of this rank.
        :raises UserError: if the numbers differ and the mode does not allow this.
        """


class ShardedEngine(Engine):
    """fsdp, hsdp: networks, gradients, optimizers and averages are sharded; a pass gathers one block at a time.

    Frozen networks are sharded like the trained ones: they have the same size, and would otherwise soon take most of a
    rank's memory.

    :param half: parameters of blocks are gathered in bfloat16.
    """

    def __init__(self, device: th.device, shard_size: int | None, half: bool):
        # this import takes half a second
        from cm.distributed import fsdp

        self.shard, self.local, self.half = fsdp.shard, fsdp.local_parts, half
        self.mesh = fsdp.open_mesh(device, shard_size)

    def lay_out(self, model: nn.Module) -> Layout:
        return self.shard(model, residual_blocks(model), self.mesh, self.half)

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def needs_warm_up(self) -> bool:
        return False

    @contextlib.contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        """As in `Engine`; until the last microbatch, a rank holds whole gradients."""
        wrapped.set_requires_gradient_sync(False)           # pyright: ignore[reportCallIssue] (`fully_shard` adds it)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)        # pyright: ignore[reportCallIssue]

    def is_finite(self, model: nn.Module) -> bool:
        own = all(bool(part.isfinite().all()) for part in self.local(model))
        return not dist.all_reduce_max(th.tensor([int(not own)])).item()

    def check_passes(self, passes: int) -> None:
        counts = dist.all_gather_object(passes)
        if len(set(counts)) > 1:
            raise UserError(f"the ranks need {', '.join(map(str, counts))} passes per step, but with --parallel fsdp "
                            "or hsdp all ranks run each pass together: choose --global_batch_size and --microbatch so "
                            "that every rank needs the same number")


PARALLEL = ("ddp", "hsdp", "fsdp")


def make_engine(config: LoopConfig, device: th.device, full_precision: bool) -> Engine:
    """The engine of a run. All ranks must call it together.

    :param full_precision: whether parts of a step compute in float32 whatever the precision of the run.
    :raises UserError: for an unknown mode, or settings that cannot be combined.
    """
    if lookup(dict.fromkeys(PARALLEL, config.parallel), config.parallel, "parallel") == "ddp":
        return Engine()
    check_sharded(config.parallel, dist.get_world_size(), {
        "--precision": config.precision or ("fp16" if config.use_fp16 else ""),
        "--shard_ema": config.shard_ema, "--shard_optimizer": config.shard_optimizer,
    })
    half = config.precision == "bf16" and not full_precision
    return ShardedEngine(device, config.shard_size if config.parallel == "hsdp" else None, half)


def check_sharded(parallel: str, ranks: int, flags: Mapping[str, Any]) -> None:
    """Check that networks can be sharded with these flags.

    :param flags: other flags of the run -> their values.
    :raises UserError: if they cannot be sharded.
    """
    mode = f"--parallel {parallel}"
    if ranks == 1:
        raise UserError(f"{mode} divides the networks among ranks, and there is only one: start several, such as "
                        "mpiexec -n 8 python ..., or give --parallel ddp")
    for name, why in CONFLICTS.items():
        if flags.get(name) in why:
            raise UserError(f"{name} {flags[name]} and {mode}: {why[flags[name]]}")


CONFLICTS: dict[str, dict[Any, str]] = {
    "--precision": {"fp16": "a network in shards is never converted to fp16; give --precision bf16 or fp32"},
    "--shard_ema": {True: "averages lie in shards already; drop --shard_ema"},
    "--shard_optimizer": {True: "the optimizer lies in shards already; drop --shard_optimizer"},
    "--compile": {True: "compiled networks cannot be divided; drop --compile"},
}
"""Flag -> value -> why it does not go with networks in shards, and what to do."""
