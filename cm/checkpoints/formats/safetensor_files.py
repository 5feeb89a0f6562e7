"""safetensors files: tensors by name, and nothing that could be run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch as th
from torch import Tensor

from cm.distributed.collectives import read_everywhere
from cm.errors import UserError
from cm.io import storage, untrusted
from cm.io.budget import HEADER, parse_json

METADATA = {"format": "pt"}                                         # these are tensors of torch
LENGTH_BYTES = 8                                                    # of the header, at the start of the file
DAMAGE = (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, AssertionError)


def write(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device.

    :raises UserError: if the file cannot be written.
    """
    owned = {name: value.detach().cpu().clone(memory_format=th.contiguous_format) for name, value in tensors.items()}
    storage.write_bytes(path, safetensors.torch.save(owned, METADATA))


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a file, on every rank; only rank 0 reads it. Call it on all ranks.

    :raises FileNotFoundError: on every rank, if rank 0 does not find it.
    :raises UserError: on every rank, if it is no such file, is damaged, or has a tensor twice.
    """
    with read_everywhere(path) as content:
        data = content.read()
    return parse(data, path)


def parse(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a file. The library checks sizes first: every byte belongs to exactly one tensor.

    :raises UserError: as `read`.
    """
    try:
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        header = data[LENGTH_BYTES : LENGTH_BYTES + length]
        parse_json(header, HEADER)                                  # within bounds, before anything is made of it
        json.loads(header, object_pairs_hook=refuse_duplicates)
        tensors = safetensors.torch.load(data)
    except DAMAGE as error:
        raise UserError(
            f"{source} is no complete safetensors file ({len(data):,} bytes): {error}. Fetch or write it again"
        ) from None
    return tensors


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict.

    :raises ValueError: if a name is in it twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {untrusted.shown(name)} stands in its header twice")
        found[name] = value
    return found
