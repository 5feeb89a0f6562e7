"""How much memory a training run takes on each rank, from the shapes of its tensors; nothing is allocated.

What stays between steps is exact: it is counted on the same objects that a run makes, on the meta device. What the
forward pass keeps for the backward pass is an estimate: the tensors that autograd saves, with attention as a fused
kernel leaves them. On top come what single operations need for a moment, the caching allocator's loss and the GPU's
libraries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch as th
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cm.distributed.sharding import partition
from cm.networks.units import residual_blocks
from cm.training.master_weights import MasterWeights
from cm.training.optimizer import make_optimizer

GIB = 2**30
FLOAT = 4                                                   # bytes of a float32


@dataclass(frozen=True)
class PlannedRun:
    """What decides about memory, beside the network.

    :param companions: the networks besides the online one, by name, and how each changes; see `Companion`.
    :param shards: ranks among which every network is divided, see `cm.distributed.fsdp`; 1 for none.
    :param accumulates: whether a step takes several passes; divided networks then have whole gradients until the last.
    :param stores_casts: whether companions without gradients are stored as bf16's autocast would cast them.
    :param async_save: a rank keeps a copy of its share of a checkpoint while it is written.
    :param guide: bytes of the network that guides the teacher.
    :param decoder: bytes of the VAE that makes pictures of latents.
    :param on_gpu: whether device and host are different memories.
    """

    precision: str
    optimizer: str
    ema_rates: Sequence[str]
    ranks: int = 1
    ema_device: str = "same"
    shard_ema: bool = False
    shard_optimizer: bool = False
    shards: int = 1
    accumulates: bool = False
    async_save: bool = False
    companions: Mapping[str, str] = field(default_factory=dict)
    stores_casts: bool = False
    guide: int = 0
    decoder: int = 0
    on_gpu: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank, by what they are for; on a run without GPUs, device and host are the same memory."""

    device: dict[str, int]
    host: dict[str, int]
    checkpoint: int                                         # of all files of one checkpoint, on disk

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device, "host": self.host, "device_total": sum(self.device.values()),
            "checkpoint": self.checkpoint,
        }

    def table(self) -> str:
        """The estimate as text for the log."""
        rows = [
            *self.device.items(), ("together", sum(self.device.values())),
            *((f"{name} (host)", size) for name, size in self.host.items()),
            ("a checkpoint (disk)", self.checkpoint),
        ]
        return "\n".join(line(*row) for row in rows)


def plan(model: nn.Module, run: PlannedRun, rank: int | None = None) -> MemoryPlan:
    """What a rank holds when the backward pass has ended.

    :param model: the float32 network, on the meta device; it is not changed.
    :param rank: None for the one with the largest share.
    """
    still, moving = companion_bytes(model, run)
    trainer = MasterWeights(copy.deepcopy(model), run.precision)
    whole, buffers = trainer.master_params, list(model.buffers())
    params, masters = (own_rows(each, run.shards) for each in (trainer.model_params, whole))
    sizes = [param.numel() for param in masters]
    rank = fullest(sizes, run.ranks) if rank is None else rank
    shared, alone = partition(sizes, rank, run.ranks), partition(sizes, 0, 1)
    states = state_bytes(run.optimizer, masters)

    network, half = nbytes([*params, *buffers]), trainer.use_fp16
    device = {"parameters": network, "gradients": nbytes(params)}
    if half:
        device |= {"float32 masters": nbytes(masters), "gradients of the masters": nbytes(masters)}
    device["optimizer"] = sum((shared if run.shard_optimizer else alone).mine(states))
    average = FLOAT * sum((shared if run.shard_ema else alone).mine(sizes))
    averages = {f"average {rate}": average for rate in run.ema_rates}
    host = {}
    if run.on_gpu and run.ema_device == "cpu" and averages:
        host = averages | {"copy for the averages": average}
    else:
        device |= averages
    own = device["parameters"] + device["gradients"] + device["optimizer"] + (2 * nbytes(masters) if half else 0)
    for name, changes in run.companions.items():
        device[name.removesuffix("_model")] = {"never": still, "by_objective": moving, "trained": own}[changes]
    if run.guide:
        device["guide of the teacher"] = run.guide
    if run.decoder:
        device["VAE that decodes"] = run.decoder
    if run.shards > 1:
        device["gathered for a pass"] = gathered_bytes(trainer.model)
        if run.accumulates:
            device["gradients of microbatches"] = nbytes(whole)
    checkpoint = checkpoint_bytes(run, [*whole, *buffers], sum(state_bytes(run.optimizer, whole)))
    if run.async_save:
        writers = run.shards if run.shards > 1 else run.ranks
        (host if run.on_gpu else device)["copy for a save"] = checkpoint // writers
    return MemoryPlan(device, host, checkpoint)


def checkpoint_bytes(run: PlannedRun, network: Sequence[Tensor], optimizer: int) -> int:
    """Of all files of a checkpoint.

    :param network: the tensors of a file of weights.
    :param optimizer: bytes of the state of one optimizer.
    """
    kept = [changes for changes in run.companions.values() if changes != "never"]
    files, optimizers = 1 + len(kept) + len(run.ema_rates), 1 + kept.count("trained")
    return files * nbytes(network) + optimizers * optimizer


def gathered_bytes(model: nn.Module) -> int:
    """At most so much of a divided network is whole at a time: its largest block and the parameters of the next one,
    and what belongs to no block, with gradients.
    """
    blocks = [nbytes(block.parameters()) for block in residual_blocks(model)] or [0]
    return 2 * (nbytes(model.parameters()) - sum(blocks)) + 3 * max(blocks)


def own_rows(params: Sequence[Tensor], shards: int) -> list[Tensor]:
    """The part of parameters that a rank holds if they are divided among so many ranks; the first has the most rows."""
    return [param[:ceil(len(param) / shards)] if param.ndim and shards > 1 else param for param in params]


def companion_bytes(model: nn.Module, run: PlannedRun) -> tuple[int, int]:
    """What a companion without gradients holds, if it is frozen and if the objective moves it.

    :param model: the float32 network, on the meta device; it is not changed.
    """
    weights = MasterWeights(
        copy.deepcopy(model), run.precision, stores_casts=run.stores_casts and run.shards == 1
    )
    still = nbytes([*own_rows(weights.model_params, run.shards), *weights.model.buffers()])
    own = set(map(id, weights.model_params))
    return still, still + nbytes(master for master in weights.master_params if id(master) not in own)


def fullest(sizes: Sequence[int], ranks: int) -> int:
    """The rank with the largest share."""
    shares = partition(sizes, 0, ranks)
    return max(range(ranks), key=lambda rank: sum(shares.of(rank, sizes)))


def line(name: str, size: int) -> str:
    return f"{name:<32}{size / GIB:>10.3f} GiB"


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def state_bytes(optimizer: str, params: Sequence[Tensor]) -> list[int]:
    """The state of an optimizer for each parameter, from a real step on the meta device."""
    params = [nn.Parameter(th.empty_like(param, device="meta")) for param in params]
    for param in params:
        param.grad = th.empty_like(param)
    opt = make_optimizer(optimizer, params, lr=1.0, weight_decay=0.0)
    opt.step()
    return [nbytes(opt.state[param].values()) for param in params]


def activations(model: nn.Module, images: int, image_size: int, precision: str, class_cond: bool = False,
                channels: int = 3) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters apart: an estimate.

    :param model: the float32 network, on the meta device; it is not changed.
    :param images: how many, of `channels` channels and the side `image_size`.
    :param class_cond: whether it is given class labels.
    """
    model = MasterWeights(copy.deepcopy(model), precision).model
    own = {param.untyped_storage()._cdata for param in model.parameters()}
    kept: dict[int, th.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()                  # several tensors may be views of one
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with th.device("meta"):
        inputs = [th.empty(images, channels, image_size, image_size), th.empty(images)]
        if class_cond:
            inputs.append(th.empty(images, dtype=th.long))
    with AsOnGpu(precision), th.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


class FusedAttention(th.autograd.Function):
    """The shapes of attention by a fused kernel: it keeps its inputs, its output and one number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = th.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=th.float32))
        return out


class AsOnGpu(TorchFunctionMode):
    """On the meta device, what a GPU does with attention and, for bf16, what autocast does to types."""

    LOW = (F.conv2d, F.linear, F.scaled_dot_product_attention)
    HIGH = (F.group_norm,)

    def __init__(self, precision: str):
        super().__init__()
        self.is_autocast = precision == "bf16"

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.is_autocast and func in (*self.LOW, *self.HIGH):
            dtype = th.bfloat16 if func in self.LOW else th.float32
            args = [arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args]
        if func is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args)
        return func(*args, **(kwargs or {}))
