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

`trainer.optimize(optimizer)` replaces the last three lines on one rank, and if the backward pass has already averaged
the gradients: then all ranks hold the same gradients and make the same decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch as th
from torch import Tensor, nn

from cm.distributed.layout import WHOLE, Layout
from cm.errors import UserError
from cm.tensors import scale_tensors
from cm.training.master_weights import MasterWeights, check_precision

INITIAL_LOG_LOSS_SCALE = 20.0
LOWEST_LOG_LOSS_SCALE = -16.0       # gradients that overflow even here exceed 2^32


@dataclass(frozen=True)
class StepReport:
    """The outcome of an optimiser step; true if it was taken. The norms are scalar tensors on the model's device."""

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
    """The part of an optimizer that is used here."""

    def step(self) -> Any: ...


@runtime_checkable
class Constrained(Protocol):
    """A network that corrects its parameters after every optimizer step, such as weights of a fixed norm."""

    def constrain(self, params: Mapping[str, Tensor]) -> None:
        """Change the float32 parameters, by their names in the network, in place after every optimizer step."""
        ...


class MixedPrecisionTrainer(MasterWeights):
    """Trains a network: make the optimiser and the EMAs from `master_params`.

    :param model: a float32 network; for fp16 it must have `convert_to_fp16()`, which is called here.
    :param use_fp16: guided-diffusion's switch, the same as precision="fp16".
    :param fp16_scale_growth: added to log2 of the loss scale at each good step; an overflow takes off 1.
    :param precision: "fp32", "bf16" or "fp16"; by default what `use_fp16` says.
    :param layout: see `MasterWeights`.
    :param grad_clip: the largest L2 norm of all gradients together, unscaled and averaged over microbatches and ranks,
        with which a step is taken; larger ones are scaled down to it (Pascanu et al. 2013, arXiv 1211.5063); 0: none.
    :raises UserError: for an unknown precision, or one that contradicts `use_fp16`.
    :raises ValueError: for a model that already is half precision, whose master parameters would be rounded.
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
        # A pass uses each weight once, so the cache of cast weights would save nothing. In torch releases before 2026,
        # it also gives weights that were cast under no_grad (if the network is its own target) to the pass with
        # gradients, which then loses the gradients of these weights.
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
        """Let the network correct its new parameters, such as weights of a fixed norm.

        All ranks hold the same parameters here, also after a step of `ZeroOptimizer`, and change them in the same way.
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
        """The state that a resumed run needs besides parameters and optimiser."""
        return {"lg_loss_scale": self.lg_loss_scale, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.lg_loss_scale = float(state_dict["lg_loss_scale"])
        self.skipped_steps = int(state_dict.get("skipped_steps", 0))


def _choose_precision(precision: str | None, use_fp16: bool) -> str:
    """:raises UserError: for an unknown precision, or one that contradicts `use_fp16`."""
    if precision is None:
        return "fp16" if use_fp16 else "fp32"
    if use_fp16 and check_precision(precision) != "fp16":
        raise UserError(f"use_fp16=True contradicts precision={precision!r}: give one of them")
    return precision
