"""How the parameters of a network are stored on the ranks: complete on each, or sharded and gathered when needed.

`cm.distributed.fsdp` has the sharded layout. Elementwise operations (optimizers, averages, copies) work on the shards
with the same result; a layout knows how shards and complete tensors correspond.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch as th
from torch import Tensor, nn

from cm.errors import UserError
from cm.tensors import norm_of_tensors


class Layout:
    """Every rank holds every parameter completely. All ranks must call the methods that gather."""

    is_sharded = False

    def masters(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """This rank's parts of the parameters: tensors in the same memory."""
        return list(params)

    def whole_sizes(self, masters: Sequence[Tensor]) -> list[int]:
        """Elements of each parameter."""
        return [master.numel() for master in masters]

    def hand_over_grads(self, params: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> None:
        """Give the masters the gradients that a backward pass has left on the parameters."""

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The L2 norm over all ranks of tensors shaped like the masters: a scalar, the same on every rank."""
        return norm_of_tensors(tensors)

    def part(self, index: int, whole: Tensor) -> Tensor:
        """This rank's part of a tensor with the shape of the parameter `index`.

        :param whole: a tensor, or an object that reads rows of one when it is indexed.
        """
        return whole[...]

    def place_of(self, index: int, part: Tensor) -> tuple[th.Size, int] | None:
        """The shape of the complete tensor and the first row of this rank's part; None if the part is empty, or if
        another rank with the same part writes it.
        """
        return part.shape, 0

    def whole(self, index: int, part: Tensor) -> Tensor:
        """The inverse of `part`, on every rank."""
        return part

    def parts(self, wholes: Iterable[Tensor]) -> list[Tensor]:
        """`part` of something for each parameter."""
        return [self.part(index, whole) for index, whole in enumerate(wholes)]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`whole` of something for each parameter, on every rank; on the CPU if it was sharded."""
        return list(parts)

    def gather_to_main(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`gather` on rank 0 only; if the network is sharded, the other ranks get an empty list."""
        return list(parts)


WHOLE = Layout()


def choose_shard_size(shard_size: int, ranks: int, per_node: Sequence[int]) -> int:
    """The number of ranks that a replica of the networks is divided among.

    :param shard_size: the number that the user gives; 0 for the ranks of a machine.
    :param per_node: number of ranks on each machine.
    :raises UserError: if the ranks cannot be divided in this way.
    """
    if not shard_size:
        if len(set(per_node)) > 1:
            raise UserError(f"--parallel hsdp: the machines have {', '.join(map(str, per_node))} ranks, but shards "
                            "stay within a machine: start equally many on each, or give --shard_size")
        shard_size = per_node[0]
    if shard_size == 1:
        raise UserError("--parallel hsdp with shards on 1 rank is what --parallel ddp does; give --parallel ddp, or "
                        "--shard_size 2 or more")
    if ranks % shard_size:
        fitting = [size for size in range(2, ranks + 1) if ranks % size == 0]
        raise UserError(f"--shard_size {shard_size} does not divide the {ranks} ranks; choose one of: "
                        f"{', '.join(map(str, fitting))}")
    return shard_size
