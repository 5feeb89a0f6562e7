"""How the parameters of one network lie on the ranks: whole on each, or in parts that are gathered where one is needed.

`cm.distributed.fsdp` has the parts. What works element by element - optimizers, averages, copies - works on the parts,
with the same result; this says what the parts are of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch as th
from torch import Tensor, nn

from cm.errors import UserError
from cm.tensors import norm_of_tensors


class Layout:
    """Every rank holds every parameter whole. Methods that gather are one step of all ranks together."""

    is_sharded = False

    def masters(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """What this rank keeps of the parameters: tensors in the same memory."""
        return list(params)

    def whole_sizes(self, masters: Sequence[Tensor]) -> list[int]:
        """Elements of each parameter."""
        return [master.numel() for master in masters]

    def hand_over_grads(self, params: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> None:
        """Give the masters the gradients that a backward pass has left on the parameters."""

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The L2 norm over all ranks of tensors that are like the masters: a scalar, the same on every rank."""
        return norm_of_tensors(tensors)

    def part(self, index: int, whole: Tensor) -> Tensor:
        """What this rank keeps of something that has the shape of a parameter, given by its place.

        :param whole: a tensor, or what reads one when it is asked for rows.
        """
        return whole[...]

    def place_of(self, index: int, part: Tensor) -> tuple[th.Size, int] | None:
        """Of what this rank keeps the shape of the whole and the first row; None where other ranks keep the same, and
        one of them is to write it, and where it is nothing.
        """
        return part.shape, 0

    def whole(self, index: int, part: Tensor) -> Tensor:
        """The inverse of `part`, on every rank."""
        return part

    def parts(self, wholes: Iterable[Tensor]) -> list[Tensor]:
        """`part` of something for each parameter."""
        return [self.part(index, whole) for index, whole in enumerate(wholes)]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`whole` of something for each parameter, on every rank; on the CPU where it was in parts."""
        return list(parts)

    def gather_to_main(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """As `gather`, on rank 0; where it was in parts, the other ranks get an empty list."""
        return list(parts)


WHOLE = Layout()


def choose_shard_size(shard_size: int, ranks: int, per_node: Sequence[int]) -> int:
    """The number of ranks that a replica of the networks is divided among.

    :param shard_size: what the user says; 0 for the ranks of a machine.
    :param per_node: ranks on each machine.
    :raises UserError: if the ranks cannot be divided so.
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
