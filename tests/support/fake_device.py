"""A device that stands for an accelerator, watched: whoever mixes it with the CPU, or waits for it, is found.

The device "meta" plays the accelerator on machines without one. Tensors there have shapes and no values, while those of
the CPU are real; so the random streams, the grids and the data are those of a real run. Where there is a GPU the same
watch works on it, with values.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch as th
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
OURS = [str(ROOT / package) for package in ("cm", "evaluations")]
aten = th.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
BY_INDEX = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
MASKS = (th.bool, th.uint8)


class MixedDevicesError(AssertionError):
    """An operation took tensors of the accelerator and of the CPU."""


class WatchedDevice(TorchDispatchMode):
    """While it is entered, keeps the place of everything that waits for the device, and refuses mixed operations.

    A wait is whatever needs a value, or a number of values, on the host: `.item()`, `bool()`, `.cpu()`, `nonzero`, a
    mask as an index. On "meta" it gets ones. A copy to the device waits, too, unless it is `non_blocking`.

    :param device: the accelerator; a name of its type.
    """

    def __init__(self, device: str):
        super().__init__()
        self.type = device
        self.waits: list[str] = []                          # "path: function" of each

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = kwargs or {}
        if th._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:                                      # comes here whole under inference_mode
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if tensor.device.type == self.type]
        if func in COPIES:
            return self._copy(func, args, kwargs)
        if here and any(tensor.device.type == "cpu" and tensor.ndim for tensor in tensors):
            raise MixedDevicesError(f"{func} takes tensors of {self.type} and of the CPU in {place()}")
        if here and asks_for_values(func, args):
            self.waits.append(place())
            if func is aten._local_scalar_dense.default and self.type == "meta":
                return th.ones((), dtype=here[0].dtype).item()
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: tuple, kwargs: Mapping) -> Any:
        source = args[1] if func is aten.copy_.default else args[0]
        target = args[0].device if func is aten.copy_.default else th.device(kwargs.get("device") or source.device)
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        crosses = {source.device.type, target.type} == {self.type, "cpu"}
        if crosses and blocks and source.numel() > 1:       # torch passes a number with the operation that takes it
            self.waits.append(place())
        if crosses and target.type == "cpu" and self.type == "meta":
            source = th.ones(source.shape, dtype=source.dtype)
            args = (args[0], source, *args[2:]) if func is aten.copy_.default else (source, *args[1:])
        return func(*args, **kwargs)


def asks_for_values(func: Any, args: tuple) -> bool:
    """Whether the result's type or shape depends on values of tensors."""
    if func.overloadpacket in BY_INDEX:
        return any(isinstance(index, Tensor) and index.dtype in MASKS for index in args[1])
    return th.Tag.data_dependent_output in func.tags or th.Tag.dynamic_output_shape in func.tags


def place() -> str:
    """The innermost function of the toolkit that is running."""
    return next(_frames(), "outside of the toolkit")


def _frames() -> Iterator[str]:
    for frame, _ in traceback.walk_stack(None):
        path = frame.f_code.co_filename
        if any(path.startswith(folder) for folder in OURS) and not frame.f_code.co_name.startswith("<"):
            yield f"{Path(path).relative_to(ROOT)}: {frame.f_code.co_name}"
