"""A network whose trunk can run in half precision, and the layers that do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial

import torch as th
from torch import nn


class HalfPrecisionTrunk(nn.Module):
    """A network between embeddings and an output layer that stay float32."""

    @abstractmethod
    def trunk(self) -> Iterable[nn.Module]:
        """The layers that change their precision, the first of them with parameters."""

    @property
    def dtype(self) -> th.dtype:
        """The precision of the trunk: float16 after `convert_to_fp16`."""
        return next(next(iter(self.trunk())).parameters()).dtype

    def convert_to_fp16(self) -> None:
        """Make the trunk half precision. Norms compute in float32."""
        self._convert(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Make the trunk float32 again."""
        self._convert(convert_module_to_f32)

    def store_as_autocast(self, dtype: th.dtype) -> None:
        """Store the weights of the trunk as autocast of this dtype would cast them at every pass.

        A pass under autocast then gives the same numbers, bit for bit, without the casts. For a network that is asked
        under that autocast only, and whose weights take no gradient.
        """
        self._convert(partial(_convert_layer, dtype=dtype))

    def _convert(self, convert: Callable[[nn.Module], None]) -> None:
        for layer in self.trunk():
            layer.apply(convert)


def convert_module_to_f16(module: nn.Module) -> None:
    """Make a convolution half precision; for `nn.Module.apply`. Norms and embeddings stay as they are."""
    _convert_convolution(module, th.float16)


def convert_module_to_f32(module: nn.Module) -> None:
    """Make a convolution single precision; for `nn.Module.apply`."""
    _convert_convolution(module, th.float32)


def _convert_convolution(module: nn.Module, dtype: th.dtype) -> None:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        for param in module.parameters(recurse=False):              # buffers keep their precision
            param.data = param.data.to(dtype)


def _convert_layer(module: nn.Module, dtype: th.dtype) -> None:
    """Convert a layer that autocast computes in its dtype, all of whose inputs it casts."""
    if isinstance(module, nn.Linear):
        for param in module.parameters(recurse=False):
            param.data = param.data.to(dtype)
    _convert_convolution(module, dtype)
