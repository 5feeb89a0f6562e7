"""The float32 parameters of a network that may itself compute, or be stored, in half precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch as th
from torch import Tensor, nn

from cm.distributed.layout import WHOLE, Layout
from cm.errors import UserError
from cm.networks.precision import HalfPrecisionTrunk
from cm.tensors import copy_tensors

PRECISIONS = ("fp32", "bf16", "fp16")
HALF = (th.float16, th.bfloat16)


def check_precision(precision: str) -> str:
    """The precision itself.

    :raises UserError: if there is none of that name.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; choose one of: {', '.join(PRECISIONS)}")
    return precision


def halve(model: nn.Module) -> None:
    """Convert the trunk of a network to float16, unless that has been done.

    :raises UserError: if it is no network that can be converted.
    """
    convert = getattr(model, "convert_to_fp16", None)
    if convert is None:
        raise UserError(f"{type(model).__name__} cannot be trained in fp16; choose bf16 or fp32")
    if all(param.dtype not in HALF for param in model.parameters()):
        convert()


def store_as_autocast(model: nn.Module) -> None:
    """Store the weights of a frozen network in the dtype to which bf16's autocast would cast them at every pass."""
    if isinstance(model, HalfPrecisionTrunk):               # others are cast at every pass
        model.store_as_autocast(th.bfloat16)


def store_as_computed(model: nn.Module, precision: str, stores_casts: bool = True) -> None:
    """Store the weights of a frozen network in the precision that its passes compute in.

    :param stores_casts: whether all of its passes in bf16 are under autocast; if not, it stays float32 in bf16.
    :raises UserError: as `halve`.
    """
    if precision == "fp16":
        halve(model)
    elif precision == "bf16" and stores_casts:
        store_as_autocast(model)


class MasterWeights:
    """The float32 parameters of a network that may compute in half precision.

    Averages are made of `master_params` and files are written from them; `master_params_to_model_params`
    copies them into the network. For fp32, and for bf16 unless they are stored as it computes, they are the network's
    own parameters.

    :param model: a float32 network; for fp16 it must have `convert_to_fp16()`, which is called here. A network that
        was converted to float16 before, as consistency_models' script does, gets float32 masters of its rounded values.
    :param precision: "fp32", "bf16" or "fp16".
    :param layout: how the parameters are divided among the ranks; a rank that holds only some rows has masters of
        these.
    :param stores_casts: in bf16, store the weights of the network in the dtype to which autocast would cast them; only
        for a network that needs no gradients and is whole on every rank.
    :raises UserError: for an unknown precision.
    :raises ValueError: for a half-precision model in another precision than fp16, whose master parameters would be
        rounded.
    """

    def __init__(
        self, model: nn.Module, precision: str, layout: Layout = WHOLE, stores_casts: bool = False
    ) -> None:
        self.precision = check_precision(precision)
        self.model, self.layout = model, layout
        self.model_params: list[nn.Parameter] = list(model.parameters())
        self.master_params: list[Tensor] = layout.masters(self.model_params)
        self._copied: list[tuple[Tensor, Tensor]] = []          # (parameter, master) where the two are not the same
        rounded = [name for name, p in model.named_parameters() if p.dtype in HALF]
        if rounded and not (self.use_fp16 and all(p.dtype != th.bfloat16 for p in model.parameters())):
            raise ValueError(f"{rounded[0]} and {len(rounded) - 1} more parameters are already half precision, so the "
                             "master parameters would be rounded: pass the float32 model, it is converted here")
        if self.use_fp16:
            self.master_params = [
                p.detach().to(th.float32, copy=True).requires_grad_(p.requires_grad) for p in self.model_params
            ]
            halve(model)
        elif stores_casts and precision == "bf16" and not layout.is_sharded:
            wide = [p.data for p in self.model_params]
            store_as_autocast(model)
            self.master_params = [
                p if p.dtype == kept.dtype else kept.requires_grad_(p.requires_grad)
                for p, kept in zip(self.model_params, wide)
            ]
        if not layout.is_sharded:
            pairs = zip(self.model_params, self.master_params, strict=True)
            self._copied = [pair for pair in pairs if pair[0] is not pair[1]]

    @property
    def use_fp16(self) -> bool:
        """Whether the model itself is half precision."""
        return self.precision == "fp16"

    @th.no_grad()
    def master_params_to_model_params(self) -> None:
        """Give the model the values of the master parameters, after something changed them."""
        if self._copied:
            copy_tensors(*zip(*self._copied))

    @th.no_grad()
    def load_master_params(self, params: Iterable[Tensor]) -> None:
        """Set masters and model to whole parameters, such as `params_in(state_dict)`; a rank takes its rows of them.

        If a file were loaded into the model itself, the masters would get values rounded to half precision.
        """
        for master, param in zip(self.master_params, self.layout.parts(params), strict=True):   # from any device
            master.copy_(param)
        self.master_params_to_model_params()

    @th.no_grad()
    def copy_masters(self, other: MasterWeights) -> None:
        """Set masters and model to those of a network of the same architecture and layout."""
        for master, param in zip(self.master_params, other.master_params, strict=True):
            master.copy_(param)
        self.master_params_to_model_params()

    def gather_to_main(self) -> list[Tensor]:
        """The whole masters on rank 0; if they are sharded, the other ranks get []. All ranks must call it together."""
        return self.layout.gather_to_main(self.master_params)

    def master_params_to_state_dict(self, master_params: Iterable[Tensor]) -> dict[str, Tensor]:
        """A state dict of the model with these whole parameters (the masters, or an average of them).

        The tensors are contiguous, float32, without gradients, and on the CPU. They may share memory with
        `master_params`.
        """
        by_param = dict(zip(map(id, self.model_params), master_params, strict=True))
        state: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        return {key: by_param.get(id(value), value).detach().cpu().contiguous() for key, value in state.items()}

    def params_in(self, state_dict: Mapping[str, Tensor]) -> list[Tensor]:
        """The parameters in a state dict, in the order of `master_params`: its own tensors, no copies.

        :raises ValueError: if a parameter is missing or has another shape.
        """
        params = []
        for (name, _), param in zip(self.model.named_parameters(), self.model_params):
            if name not in state_dict:
                raise ValueError(f"the state dict has no {name!r}: it belongs to another architecture")
            value = state_dict[name]
            if value.shape != param.shape:
                raise ValueError(f"{name!r} has shape {tuple(value.shape)} in the state dict and "
                                 f"{tuple(param.shape)} in the model: it belongs to another architecture")
            params.append(value.detach())
        return params

    def state_dict_to_master_params(self, state_dict: Mapping[str, Tensor]) -> list[Tensor]:
        """`params_in` as new tensors in the dtype of the masters, on their device."""
        values = self.layout.parts(self.params_in(state_dict))
        return [
            th.empty_like(master, requires_grad=False).copy_(value)
            for master, value in zip(self.master_params, values)
        ]
