"""Training in float32, bfloat16 or float16, always with float32 master parameters.

- fp32: the model as it is.
- bf16: the model stays float32 and its forward pass runs under autocast; no loss scale is needed.
- fp16: the trunk of the model is half precision. The masters are float32 copies made before the conversion, the loss
  is scaled by a power of two to keep small gradients representable, and steps that overflow are skipped
  (Micikevicius et al. 2018, arXiv 1710.03740).

A step with gradients shared between ranks:

    trainer.zero_grad()
    with trainer.autocast():
        loss = ...
    trainer.backward(loss)                      # once per microbatch; gradients add up
    average(trainer.collect_grads())            # across ranks, in place
    finite = everywhere(trainer.grads_finite())
    report = trainer.step(optimizer, finite)

`trainer.optimize(optimizer)` stands for the last three lines on one rank, and wherever the backward pass has averaged
the gradients already: then all ranks hold the same ones and decide alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch as th
from torch import Tensor, nn

from cm.distributed.layout import WHOLE, Layout
from cm.errors import UserError
from cm.networks.precision import HalfPrecisionTrunk
from cm.tensors import copy_tensors, scale_tensors

INITIAL_LOG_LOSS_SCALE = 20.0
LOWEST_LOG_LOSS_SCALE = -16.0       # gradients that overflow even here exceed 2^32
PRECISIONS = ("fp32", "bf16", "fp16")
HALF = (th.float16, th.bfloat16)


@dataclass(frozen=True)
class StepReport:
    """What an optimiser step did; true if it was taken. The norms are scalar tensors on the model's device."""

    stepped: bool                   # False: the gradients were not finite, and the parameters are as before
    fatal: bool                     # not finite, and a smaller loss scale would not help: the run has diverged
    grad_norm: Tensor               # L2 over all parameters, of the unscaled gradients, before they are clipped
    param_norm: Tensor              # L2 over all master parameters, before the step
    lg_loss_scale: float | None     # log2 of the loss scale these gradients were made with; None unless fp16
    grad_clip: float = 0.0          # the norm to which they were clipped; 0 for none

    def __bool__(self) -> bool:
        return self.stepped

    def logs(self) -> dict[str, float]:
        """The numbers by guided-diffusion's names; waits for the device."""
        scale = {} if self.lg_loss_scale is None else {"lg_loss_scale": self.lg_loss_scale}
        norm = self.grad_norm.item()
        clipped = {"clipped_grad_norm": min(norm, self.grad_clip)} if self.grad_clip else {}
        return {"grad_norm": norm, "param_norm": self.param_norm.item(), **clipped, **scale}


class Steps(Protocol):
    """An optimizer, as far as it is needed here."""

    def step(self) -> Any: ...


@runtime_checkable
class Constrained(Protocol):
    """A network whose parameters do not go wherever an optimizer leads them."""

    def constrain(self, params: Mapping[str, Tensor]) -> None:
        """Change the float32 parameters, by their names in the network, in place after every optimizer step."""
        ...


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
    """Let a network that stands still hold the weights that bf16's autocast would make of its own at every pass."""
    if isinstance(model, HalfPrecisionTrunk):               # others are cast at every pass
        model.store_as_autocast(th.bfloat16)


class MasterWeights:
    """The float32 parameters of a network, which itself may compute in half precision.

    Averages are made of `master_params` and files are written from them; `master_params_to_model_params`
    copies them into the network. For fp32, and for bf16 unless they are stored as it computes, they are the network's
    own parameters.

    :param model: a float32 network; for fp16 it must have `convert_to_fp16()`, which is called here. A network that
        was converted to float16 before, as consistency_models' script does, gets float32 masters of its rounded values.
    :param precision: "fp32", "bf16" or "fp16".
    :param layout: how the parameters lie on the ranks; where a rank holds rows of them, its masters are these.
    :param stores_casts: in bf16, a network without gradients, whole on every rank, shall hold its weights as autocast
        would cast them.
    :raises ValueError: for an unknown precision, or a half-precision model in another precision than fp16, whose
        master parameters would be rounded.
    """

    def __init__(
        self, model: nn.Module, precision: str, layout: Layout = WHOLE, stores_casts: bool = False
    ) -> None:
        self.precision = _choose_precision(precision, False)
        self.model, self.layout = model, layout
        self.model_params: list[nn.Parameter] = list(model.parameters())
        self.master_params: list[Tensor] = layout.masters(self.model_params)
        self._copied: list[tuple[Tensor, Tensor]] = []          # parameters that are not their own masters, with these
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
        """Set masters and model, say to `params_in(state_dict)`: whole parameters, of which a rank takes its rows.

        Loading a file into the model itself would round it to half precision on its way to the masters.
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
        """The whole masters on rank 0; one step of all ranks together."""
        return self.layout.gather_to_main(self.master_params)

    def master_params_to_state_dict(self, master_params: Iterable[Tensor]) -> dict[str, Tensor]:
        """A state dict of the model with these whole parameters (the masters, or an average of them).

        Plain contiguous float32 tensors that ask for no gradient, on the CPU, where a file of them is written or a
        network is made for them. They may share memory with `master_params`.
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
        """As `params_in`, but new tensors of the masters' dtype, on their device."""
        values = self.layout.parts(self.params_in(state_dict))
        return [
            th.empty_like(master, requires_grad=False).copy_(value)
            for master, value in zip(self.master_params, values)
        ]


class MixedPrecisionTrainer(MasterWeights):
    """Trains a network: make the optimiser and the EMAs from `master_params`.

    :param model: a float32 network; for fp16 it must have `convert_to_fp16()`, which is called here.
    :param use_fp16: guided-diffusion's switch, the same as precision="fp16".
    :param fp16_scale_growth: added to log2 of the loss scale at each good step; an overflow takes off 1.
    :param precision: "fp32", "bf16" or "fp16"; by default what `use_fp16` says.
    :param layout: see `MasterWeights`.
    :param grad_clip: the largest L2 norm of all gradients together, unscaled and averaged over microbatches and ranks,
        with which a step is taken; larger ones are scaled down to it (Pascanu et al. 2013, arXiv 1211.5063); 0: none.
    :raises ValueError: for an unknown precision, one that contradicts `use_fp16`, or a model that already is half
        precision, whose master parameters would be rounded.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        precision: str | None = None,
        grad_clip: float = 0.0,
        layout: Layout = WHOLE,
    ) -> None:
        super().__init__(model, _choose_precision(precision, use_fp16), layout)
        self.fp16_scale_growth, self.grad_clip = fp16_scale_growth, grad_clip
        self.lg_loss_scale = initial_lg_loss_scale
        self.skipped_steps = 0                          # because their gradients overflowed
        self.report: StepReport | None = None           # of the latest step
        self._grads: list[Tensor] | None = None
        self._grad_norm: Tensor | None = None

    def autocast(self) -> AbstractContextManager:
        """The context for the forward pass and the loss."""
        if self.precision != "bf16":
            return nullcontext()
        # A pass uses each weight once, so the cache of cast weights would save nothing. In torch releases before 2026
        # it hands weights cast under no_grad (the network as its own target) to the trained pass, which then loses
        # their gradients.
        return th.autocast(self.model_params[0].device.type, dtype=th.bfloat16, cache_enabled=False)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in [*self.model_params, *self.master_params]:
            p.grad = None
        self._grads = self._grad_norm = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the scalar `loss` to what earlier microbatches left."""
        self._grads = self._grad_norm = None
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def collect_grads(self) -> list[Tensor]:
        """The gradients of the master parameters, unscaled, in float32; change them in place to share or clip them.

        Where a rank holds rows, they are those of its rows, averaged over the ranks already, and every rank calls this.

        :raises RuntimeError: if there are none.
        """
        if self._grads is None:
            self.layout.hand_over_grads(self.model_params, self.master_params)
            if self.use_fp16:
                self._unscale()
            self._grads = [p.grad for p in self.master_params if p.grad is not None]
            if not self._grads:
                raise RuntimeError("no parameter has a gradient: call backward(loss) before the step")
        return self._grads

    def _unscale(self) -> None:
        """Half-precision gradients of the scaled loss -> float32 gradients of the loss, on the masters."""
        for p, master in zip(self.model_params, self.master_params):
            master.grad = None if p.grad is None else p.grad.to(th.float32, copy=True)
        grads = [master.grad for master in self.master_params if master.grad is not None]
        if grads:
            scale_tensors(grads, 2.0**-self.lg_loss_scale)

    def grad_norm(self) -> Tensor:
        """L2 norm of all gradients, a scalar tensor that is not waited for."""
        if self._grad_norm is None:
            self._grad_norm = self.layout.norm([grad.detach() for grad in self.collect_grads()])
        return self._grad_norm

    def grads_finite(self) -> Tensor:
        """Whether every gradient is finite: a boolean scalar tensor, for the ranks to agree on before `step`."""
        return self.grad_norm().isfinite()

    def step(self, opt: Steps, finite: bool | Tensor) -> StepReport:
        """Take an optimiser step; unless `finite`, leave the parameters alone and, in fp16, halve the loss scale.

        :param finite: what `grads_finite` says on every rank; a tensor is waited for.
        """
        finite = bool(finite)
        fatal = not finite and not (self.use_fp16 and self.lg_loss_scale > LOWEST_LOG_LOSS_SCALE)
        lg_loss_scale = self.lg_loss_scale if self.use_fp16 else None
        param_norm = self.layout.norm([param.detach() for param in self.master_params])
        self.report = StepReport(finite, fatal, self.grad_norm(), param_norm, lg_loss_scale, self.grad_clip)
        if finite:
            self._clip_grads()
            opt.step()
            self._constrain()
            self.master_params_to_model_params()
        if self.use_fp16:
            self.lg_loss_scale += self.fp16_scale_growth if finite else -1
            self.skipped_steps += not finite
        return self.report

    @th.no_grad()
    def _constrain(self) -> None:
        """Let the network bring its new parameters back to where they must lie, such as weights of a fixed norm.

        All ranks hold the same parameters here, also after a step in shares, and change them alike.
        """
        if isinstance(self.model, Constrained):
            names = (name for name, _ in self.model.named_parameters())
            self.model.constrain(dict(zip(names, self.master_params, strict=True)))

    def _clip_grads(self) -> None:
        """Scale the gradients down to a norm of `grad_clip`; `grad_norm` stays what it was before."""
        if self.grad_clip:
            factor = (self.grad_clip / self.grad_norm()).clamp(max=1.0)        # a zero gradient: infinity, so 1
            scale_tensors(self.collect_grads(), factor)

    def optimize(self, opt: Steps) -> StepReport:
        """Take a step if all gradients are finite. The report is true if it was taken."""
        return self.step(opt, self.grads_finite())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides parameters and optimiser."""
        return {"lg_loss_scale": self.lg_loss_scale, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.lg_loss_scale = float(state_dict["lg_loss_scale"])
        self.skipped_steps = int(state_dict.get("skipped_steps", 0))


def _choose_precision(precision: str | None, use_fp16: bool) -> str:
    if precision is None:
        return "fp16" if use_fp16 else "fp32"
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; choose one of: {', '.join(PRECISIONS)}")
    if use_fp16 and precision != "fp16":
        raise UserError(f"use_fp16=True contradicts precision={precision!r}: give one of them")
    return precision
