"""The words the rooms of this house speak to each other in.

Shapes: N batch, C channels, H and W height and width. Images are float in [-1, 1], NCHW.
A noise level `sigma` is always one value per sample, [N], so that an ODE step inside a loss and a step
of a sampler are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch as th
from torch import Tensor, nn


class Scalings(NamedTuple):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise); each is [N]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


class Denoiser(Protocol):
    """D(x, sigma): a noisy image and its noise level to a clean image."""

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """[N,C,H,W], [N] -> [N,C,H,W]; `cond` holds the conditioning, such as class labels y [N]."""


@runtime_checkable
class NoiseSource(Protocol):
    """Random numbers whose first axis is the batch. Row i belongs to sample i and to nobody else."""

    def randn(self, *shape: int, dtype: th.dtype | None = None, device: Any = None) -> Tensor: ...

    def randn_like(self, x: Tensor) -> Tensor: ...

    def rand(self, *shape: int, dtype: th.dtype | None = None, device: Any = None) -> Tensor: ...

    def randint(self, low: int, high: int, size: tuple[int, ...], device: Any = None) -> Tensor: ...


@dataclass
class Batch:
    """One rank's share of a step.

    Unpacks as `images, cond = batch`, which is what guided-diffusion's data iterators yield.
    """

    images: Tensor                                                  # [N,C,H,W] in [-1, 1]
    cond: dict[str, Tensor] = field(default_factory=dict)           # {"y": [N] int64} when class-conditional
    positions: Tensor | None = None                                 # [N] int64: which draw of the whole run
    indices: Tensor | None = None                                   # [N] int64: which image of the data set
    references: Batch | None = None                                 # images of the whole run, uint8 or float, if asked

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.cond))

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, start: int, stop: int) -> Batch:
        """Samples start..stop-1, for microbatches."""
        cut = slice(start, stop)
        return Batch(
            self.images[cut],
            {key: value[cut] for key, value in self.cond.items()},
            None if self.positions is None else self.positions[cut],
            None if self.indices is None else self.indices[cut],
            self.references,
        )

    def to(self, device: Any) -> Batch:
        return Batch(
            self.images.to(device, non_blocking=True),
            {key: value.to(device, non_blocking=True) for key, value in self.cond.items()},
            self.positions,
            self.indices,
            None if self.references is None else self.references.to(device),
        )


@dataclass
class BoundNetwork:
    """A network in its role: the denoiser made of it, the bare module, and its parameters in float32.

    The parameters are the module's own unless the module computes in half precision: then they are the values that
    `after_step` changes, and the loop copies them into the module.
    """

    denoise: Denoiser
    model: nn.Module
    params: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        self.params = self.params or own_params(self.model)


@dataclass
class Networks:
    """The networks of a step as denoisers; an objective takes those it needs.

    The `*_model` fields are the bare modules behind them, and the `*_params` their parameters in float32, see
    `BoundNetwork`. `companions` holds every network besides the online one by its role, and target and teacher are
    two of them: "target_model" and "teacher_model".
    """

    online: Denoiser
    online_model: nn.Module
    target: Denoiser | None = None
    target_model: nn.Module | None = None
    teacher: Denoiser | None = None
    teacher_model: nn.Module | None = None
    online_params: Sequence[Tensor] = ()
    target_params: Sequence[Tensor] = ()
    teacher_params: Sequence[Tensor] = ()
    companions: Mapping[str, BoundNetwork] = field(default_factory=dict)

    @classmethod
    def of(cls, online: BoundNetwork, companions: Mapping[str, BoundNetwork]) -> Networks:
        """From the online network and its companions by role."""
        nets = cls(online.denoise, online.model, online_params=online.params, companions=dict(companions))
        if target := companions.get("target_model"):
            nets.target, nets.target_model, nets.target_params = target.denoise, target.model, target.params
        if teacher := companions.get("teacher_model"):
            nets.teacher, nets.teacher_model, nets.teacher_params = teacher.denoise, teacher.model, teacher.params
        return nets

    def __post_init__(self) -> None:
        self.online_params = self.online_params or own_params(self.online_model)
        self.target_params = self.target_params or own_params(self.target_model)
        self.teacher_params = self.teacher_params or own_params(self.teacher_model)


def own_params(model: nn.Module | None) -> list[Tensor]:
    return [] if model is None else list(model.parameters())


@dataclass
class LossTerms:
    """What an objective returns."""

    loss: Tensor                                                    # [N], differentiable
    sigma: Tensor                                                   # [N], the noise level truly used
    logs: Mapping[str, Tensor] = field(default_factory=dict)        # named [N] or scalar values


class LossHistory(Protocol):
    """What an objective learns from the losses of all ranks, and a resumed run must know."""

    def update_loss_history(self, sigma: Tensor, loss: Tensor) -> None:
        """Noise levels and losses of a step's samples, [B] each, in the order of their positions in the run."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Callback(Protocol):
    """Looks at a run after its steps and changes nothing of it, neither weights nor random streams."""

    name: str                                                       # of its state in a checkpoint

    def after_step(self, loop: Any) -> Mapping[str, float]:
        """Called on all ranks after every step; what it has found goes into a row of the log, none is {}."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Sampler(Protocol):
    """One step of a solver from sigma to sigma_next; `integrate` owns the loop."""

    order: float                                                    # claimed; the tests measure it

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """[N,C,H,W] at sigma [N] -> [N,C,H,W] at sigma_next [N], where sigma_next > 0."""

    def last_step(self, D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        """The step from sigma [N] to 0."""
