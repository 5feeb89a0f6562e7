"""Networks sharded over the ranks (ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054).

torch's `fully_shard` gathers the parameters of one unit at a time for its pass and averages its gradients into shards.
Each parameter is divided along its first axis, in equal numbers of rows; the last ranks have fewer, or none. With
replicas (hybrid sharding), a network is sharded over the ranks of one machine, and each machine has a replica.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch as th
from torch import Tensor, nn
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage] (documented, not in __all__)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from cm.distributed import setup as dist
from cm.distributed.layout import Layout, choose_shard_size
from cm.tensors import norm_of_tensors

CPU = th.device("cpu")
METHODS = ("log_variance",)
"""Methods of networks that use parameters outside of `forward`."""


# --- which ranks hold shards of the same ----------------------------------------------------------------------------


def open_mesh(device: th.device, shard_size: int | None) -> DeviceMesh:
    """The ranks as [replicas, shards], or [shards] with one replica. All ranks must call it.

    :param shard_size: None for all ranks; otherwise as in `choose_shard_size`. Ranks of one machine are neighbours.
    :raises UserError: as `choose_shard_size`.
    """
    ranks = dist.get_world_size()
    if shard_size is None:
        return DeviceMesh(device.type, th.arange(ranks), mesh_dim_names=("shard",))
    nodes = dist.all_gather_object(platform.node())
    names = list(dict.fromkeys(nodes))
    size = choose_shard_size(shard_size, ranks, [nodes.count(name) for name in names])
    order = th.tensor(sorted(range(ranks), key=lambda rank: (names.index(nodes[rank]), rank)))
    if size == ranks:
        return DeviceMesh(device.type, order, mesh_dim_names=("shard",))
    mesh = DeviceMesh(device.type, order.view(-1, size), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():
        wait_as_long(group)
    return mesh


def wait_as_long(group: ProcessGroup) -> None:
    """Give a group the time limit of the group of all ranks (--timeout_seconds); torch gives new ones its default."""
    everyone = th.distributed.group.WORLD
    assert everyone is not None, "a group was opened"
    for device in group._device_types:
        limit = everyone._get_backend(device).options._timeout
        group._get_backend(device)._set_default_timeout(limit)


# --- dividing a network ----------------------------------------------------------------------------------------------


def shard(model: nn.Module, units: Iterable[nn.Module], mesh: DeviceMesh, half: bool) -> ShardedLayout:
    """Shard a network in place: afterwards its parameters are DTensors, except those without axes.

    Parameters outside the units are gathered for the whole pass, in float32.

    :param units: modules inside of it whose parameters are gathered together.
    :param half: gather the parameters of units in bfloat16; gradients are still averaged in float32.
    """
    is_channels_last = any(_is_channels_last(param) for param in model.parameters())
    for param in model.parameters():
        param.data = param.data.contiguous()                # nothing else can be divided
    undivided = {param for param in model.parameters() if param.ndim == 0}
    policy = MixedPrecisionPolicy(
        param_dtype=th.bfloat16 if half else None, reduce_dtype=th.float32, cast_forward_inputs=False
    )
    # Never left gathered: a network that has no backward pass would compute with what it was before an update.
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": undivided}
    for unit in units:
        fully_shard(unit, mp_policy=policy, **options)
    fully_shard(model, **options)
    if is_channels_last:                                    # convolutions take the format from their input instead
        model.register_forward_pre_hook(_to_channels_last)
    for name in METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return ShardedLayout(tuple(model.parameters()), mesh)


def local_parts(model: nn.Module) -> list[Tensor]:
    """This rank's shards of the parameters of a network."""
    return [_local(param.detach()) for param in model.parameters()]


def _is_channels_last(param: Tensor) -> bool:
    return param.ndim == 4 and not param.is_contiguous() and param.is_contiguous(memory_format=th.channels_last)


def _to_channels_last(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    image, *rest = args
    return (image.contiguous(memory_format=th.channels_last), *rest)


@dataclass
class ShardedLayout(Layout):
    """Every rank holds some rows of each parameter; parameters without axes are not divided.

    :param params: of the network, after `shard`.
    """

    params: tuple[nn.Parameter, ...]
    mesh: DeviceMesh
    is_sharded = True

    @property
    def shards(self) -> int:
        """The ranks among which a parameter is divided."""
        return self.mesh.size(self.mesh.ndim - 1)

    @property
    def replicas(self) -> int:
        """The number of copies of each row."""
        return self.mesh.size() // self.shards

    @property
    def place(self) -> int:
        """The index of this rank among them."""
        return self.mesh.get_local_rank("shard")

    def masters(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        return [_local(param.detach()).requires_grad_(param.requires_grad) for param in params]

    def whole_sizes(self, masters: Sequence[Tensor]) -> list[int]:
        return [param.numel() for param in self.params]

    @th.no_grad()
    def hand_over_grads(self, params: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> None:
        """See `Layout`. Gradients of parameters without axes are averaged over the ranks here, once."""
        whole = [param.grad for param in params if param.ndim == 0 and param.grad is not None]
        if whole:
            means = dist.all_reduce_sum(th.stack(whole)) / dist.get_world_size()
            for grad, mean in zip(whole, means):
                grad.copy_(mean)
        for param, master in zip(params, masters):
            master.grad = None if param.grad is None else _local(param.grad)

    @th.no_grad()
    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """See `Layout`. It is one sum over all ranks, so that replicas agree bit for bit."""
        divided = [tensor for tensor in tensors if tensor.ndim]
        whole = [tensor for tensor in tensors if not tensor.ndim]
        square = dist.all_reduce_sum(norm_of_tensors(divided).square()) / self.replicas
        return (square + norm_of_tensors(whole).square() if whole else square).sqrt()

    def part(self, index: int, whole: Tensor) -> Tensor:
        if not whole.ndim:
            return whole[...]
        rows = ceil(len(whole) / self.shards)
        return whole[self.place * rows:(self.place + 1) * rows]

    def place_of(self, index: int, part: Tensor) -> tuple[th.Size, int] | None:
        if not part.ndim:
            return (part.shape, 0) if dist.is_main() else None
        if self.replicas > 1 and self.mesh.get_local_rank("replicate") or not len(part):
            return None
        shape = self.params[index].shape
        return shape, self.place * ceil(shape[0] / self.shards)

    @th.no_grad()
    def whole(self, index: int, part: Tensor) -> Tensor:
        if not part.ndim:
            return part
        like = self.params[index]
        part = part.detach().to(_local(like).device)
        rows = part.new_zeros(ceil(len(like) / self.shards), *part.shape[1:])      # as many on every rank
        rows[:len(part)] = part
        gathered = part.new_empty(self.shards * len(rows), *part.shape[1:])
        th.distributed.all_gather(list(gathered.split(len(rows))), rows, group=self.mesh.get_group("shard"))
        return gathered[:len(like)]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [self.whole(index, part).to(CPU) for index, part in enumerate(parts)]

    def gather_to_main(self, parts: Sequence[Tensor]) -> list[Tensor]:
        gathered = []
        for index, part in enumerate(parts):                # one at a time
            whole = self.whole(index, part)
            if dist.is_main():
                gathered.append(whole.to(CPU))
        return gathered


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
