"""The content of a checkpoint file, tensors and plain values, and how it is written."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import IO, Any, cast

import torch as th

from cm.io.storage import write_atomically

PLAIN = (type(None), bool, int, float, str, bytes, tuple, collections.OrderedDict)
"""Types that a checkpoint may contain besides tensors, dicts and lists."""


def save_tensors(path: str, content: Any) -> dict[str, int]:
    """`torch.save` with the same bytes for tensors on any device; returns size and CRC-32 of the file.

    :raises UserError: if it cannot be written.
    """
    return write_atomically(path, lambda file: th.save(_on_cpu(content), cast(IO[bytes], file)))


def _on_cpu(content: Any) -> Any:
    """Nested dicts and lists with their tensors on the CPU; those that are already there are not copied.

    :raises TypeError: for any other object, as readers accept only data.
    """
    if isinstance(content, th.Tensor):
        return content.cpu()
    if type(content) is dict:
        return {key: _on_cpu(value) for key, value in content.items()}
    if type(content) is list:
        return [_on_cpu(value) for value in content]
    if type(content) not in PLAIN:
        raise TypeError(f"a checkpoint holds tensors and plain values, not {type(content).__name__}: {content!r}")
    return content


def size_of(content: Any) -> int:
    """The size of the tensors in nested dicts and lists, in bytes; a file with them is hardly larger."""
    if isinstance(content, th.Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(size_of(value) for value in content.values())
    return sum(map(size_of, content)) if isinstance(content, (list, tuple)) else 0
