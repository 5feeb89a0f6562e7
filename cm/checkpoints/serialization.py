"""What a checkpoint file holds, tensors and plain values, and how it is written."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import IO, Any, cast

import torch as th

from cm.io.storage import write_atomically

PLAIN = (type(None), bool, int, float, str, bytes, tuple, collections.OrderedDict)
"""What lies in a checkpoint beside tensors, dicts and lists."""


def save_tensors(path: str, content: Any) -> dict[str, int]:
    """`torch.save` of what is the same file wherever its tensors are."""
    return write_atomically(path, lambda file: th.save(on_cpu(content), cast(IO[bytes], file)))


def on_cpu(content: Any) -> Any:
    """Nested dicts and lists with their tensors on the CPU; those that are there already are not copied.

    :raises TypeError: for an object that no reader would take back, since readers take only data.
    """
    if isinstance(content, th.Tensor):
        return content.cpu()
    if type(content) is dict:
        return {key: on_cpu(value) for key, value in content.items()}
    if type(content) is list:
        return [on_cpu(value) for value in content]
    if type(content) not in PLAIN:
        raise TypeError(f"a checkpoint holds tensors and plain values, not {type(content).__name__}: {content!r}")
    return content


def size_of(content: Any) -> int:
    """Bytes of the tensors in nested dicts and lists; a file of them is hardly larger."""
    if isinstance(content, th.Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(size_of(value) for value in content.values())
    return sum(map(size_of, content)) if isinstance(content, (list, tuple)) else 0
