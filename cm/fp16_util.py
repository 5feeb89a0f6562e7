"""openai/consistency_models' `cm.fp16_util`: float32 master parameters of a half-precision network, as two vectors.

A compatibility module. The toolkit itself trains with `cm.training.mixed_precision`, whose masters are shaped as the
parameters; the functions here serve code that keeps master parameters by hand, as guided-diffusion does.

A *group* is a pair of named parameters [(name, parameter), ...] and the shape of its master: the first group holds
the scalars and vectors, flat, the second all others, as [1,n]. Masters are in the order of groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch as th
from torch import Tensor, nn

from cm.networks import precision
from cm.training.mixed_precision import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer

__all__ = [
    "INITIAL_LOG_LOSS_SCALE", "MixedPrecisionTrainer", "check_overflow", "convert_module_to_f16",
    "convert_module_to_f32", "get_param_groups_and_shapes", "make_master_params", "master_params_to_model_params",
    "master_params_to_state_dict", "model_grads_to_master_grads", "param_grad_or_zeros", "state_dict_to_master_params",
    "unflatten_master_params", "zero_grad", "zero_master_grads",
]

NamedParams = Sequence[tuple[str, Tensor]]
Group = tuple[NamedParams, Sequence[int]]


def convert_module_to_f16(l: nn.Module) -> None:            # noqa: E741 (the original's name)
    """Make a convolution half precision; for `nn.Module.apply`."""
    precision.convert_module_to_f16(l)


def convert_module_to_f32(l: nn.Module) -> None:            # noqa: E741
    """Make a convolution single precision; for `nn.Module.apply`."""
    precision.convert_module_to_f32(l)


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, Tensor]]) -> list[Group]:
    """The two groups of a network, from `model.named_parameters()`."""
    named = list(named_model_params)
    vectors = [(name, param) for name, param in named if param.ndim <= 1]
    matrices = [(name, param) for name, param in named if param.ndim > 1]
    return [(vectors, (-1,)), (matrices, (1, -1))]


def make_master_params(param_groups_and_shapes: Iterable[Group]) -> list[nn.Parameter]:
    """A float32 copy of each group, as one parameter."""
    return [
        nn.Parameter(_flat(param.detach().float() for _, param in group).view(shape))
        for group, shape in param_groups_and_shapes
    ]


def model_grads_to_master_grads(param_groups_and_shapes: Iterable[Group], master_params: Iterable[Tensor]) -> None:
    """Give each master the gradients of its group, in float32; a parameter without one counts as zero."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = _flat(param_grad_or_zeros(param).float() for _, param in group).view(shape)


@th.no_grad()
def master_params_to_model_params(param_groups_and_shapes: Iterable[Group], master_params: Iterable[Tensor]) -> None:
    """Copy the masters into the network, rounded to its precision."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        for (_, param), value in zip(group, unflatten_master_params(group, master), strict=True):
            param.copy_(value)


def unflatten_master_params(param_group: NamedParams, master_param: Tensor) -> list[Tensor]:
    """The parts of a master, shaped as the parameters of its group: views, no copies."""
    pieces = master_param.reshape(-1).split([param.numel() for _, param in param_group])
    return [piece.view(param.shape) for piece, (_, param) in zip(pieces, param_group, strict=True)]


def master_params_to_state_dict(
    model: nn.Module, param_groups_and_shapes: Iterable[Group] | None, master_params: Iterable[Tensor], use_fp16: bool
) -> dict[str, Tensor]:
    """The state dict of the network with the values of the masters.

    :param param_groups_and_shapes: with use_fp16, the groups of the masters; else it is not looked at.
    :param use_fp16: whether the masters are flat; else they are one per parameter of the network, in its order.
    :raises ValueError: with use_fp16, if there are no groups.
    """
    if use_fp16:
        named = _named_parts(param_groups_and_shapes, master_params)
    else:
        named = dict(zip((name for name, _ in model.named_parameters()), master_params, strict=True))
    return {**model.state_dict(), **named}


def state_dict_to_master_params(
    model: nn.Module, state_dict: Mapping[str, Tensor], use_fp16: bool
) -> list[nn.Parameter] | list[Tensor]:
    """Masters with the values of a state dict: flat and float32 with use_fp16, else one per parameter, no copies."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return make_master_params(get_param_groups_and_shapes(named))
    return [value for _, value in named]


def zero_master_grads(master_params: Iterable[Tensor]) -> None:
    """Forget the gradients of the masters."""
    for param in master_params:
        param.grad = None


def zero_grad(model_params: Iterable[Tensor]) -> None:
    """Set the gradients of a network's parameters to zero, detached; parameters without one stay without."""
    for param in model_params:
        if param.grad is not None:
            param.grad.detach_()
            param.grad.zero_()


def param_grad_or_zeros(param: Tensor) -> Tensor:
    """The gradient of a parameter, detached; zeros of its shape if it has none."""
    return th.zeros_like(param) if param.grad is None else param.grad.detach()


def check_overflow(value: float | Tensor) -> bool:
    """Whether a number is infinite or NaN."""
    return not bool(th.as_tensor(value).isfinite().all())


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    pieces = [tensor.detach().reshape(-1) for tensor in tensors]
    return th.cat(pieces) if pieces else th.zeros(0)


def _named_parts(groups: Iterable[Group] | None, masters: Iterable[Tensor]) -> dict[str, Tensor]:
    if groups is None:
        raise ValueError("use_fp16=True needs param_groups_and_shapes, which get_param_groups_and_shapes makes")
    return {
        name: value
        for master, (group, _) in zip(masters, groups, strict=True)
        for (name, _), value in zip(group, unflatten_master_params(group, master), strict=True)
    }
