"""Shared types: the data and protocols that the packages of cm exchange.

Shapes: N batch, C channels, H and W height and width. Images are float in [-1, 1], NCHW.
A noise level `sigma` is always one value per sample, [N], so an ODE step inside a loss and a step of a
sampler are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch as th
from torch import Tensor, nn
from torch.types import Device

Result = Literal["denoiser", "consistency_function", "progressive_student", "flow_map"]
"""The kind of a trained network. denoiser: D(x, sigma) at all noise levels. consistency_function: the image from any
level. progressive_student: a denoiser for the steps of progressive distillation. flow_map: D(x, sigma, gap), which is
also conditioned on the length of a step."""


class Scalings(NamedTuple):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise); each is [N]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


class Denoiser(Protocol):
    """D(x, sigma): from a noisy image and its noise level to a clean image."""

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """[N,C,H,W], [N] -> [N,C,H,W]; `cond` holds the conditioning, such as class labels y [N]."""
        ...


@runtime_checkable
class NoiseSource(Protocol):
    """A source of random numbers with the batch as first axis: row i is used for sample i only. Called as in torch."""

    def randn(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Standard normal numbers of a shape [N, ...]."""
        ...

    def randn_like(self, x: Tensor, /) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of x [N, ...]."""
        ...

    def rand(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Uniform numbers in [0, 1) of a shape [N, ...]."""
        ...

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: th.dtype = th.long, device: Device = None
    ) -> Tensor:
        """Integers in low..high-1 of a shape [N, ...]."""
        ...


@dataclass
class Batch:
    """One rank's share of a step.

    Unpacks as `images, cond = batch`, which is what guided-diffusion's data iterators yield.
    """

    images: Tensor                                                  # [N,C,H,W] in [-1, 1]
    cond: dict[str, Tensor] = field(default_factory=dict)           # {"y": [N] int64} when class-conditional
    positions: Tensor | None = None                                 # [N] int64: numbers of the samples in the run
    indices: Tensor | None = None                                   # [N] int64: numbers of the images in the data set
    references: Batch | None = None                                 # images of all ranks, uint8 or float, if asked for

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

    def to(self, device: Device) -> Batch:
        """The batch with images, conditioning and references on a device; positions and indices stay where they are."""
        return Batch(
            self.images.to(device, non_blocking=True),
            {key: value.to(device, non_blocking=True) for key, value in self.cond.items()},
            self.positions,
            self.indices,
            None if self.references is None else self.references.to(device),
        )


@dataclass
class BoundNetwork:
    """A network in its role: its denoiser, the bare module, and its parameters in float32.

    The parameters are the module's own unless the module computes in half precision. Then they are the values that
    `after_step` changes, and the loop copies them to the module.
    """

    denoise: Denoiser
    model: nn.Module
    params: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        self.params = self.params or _own_params(self.model)


@dataclass
class Networks:
    """The networks of a step as denoisers; an objective uses those it needs.

    The `*_model` fields are the bare modules behind them, and the `*_params` their parameters in float32, see
    `BoundNetwork`. `companions` holds every network other than the online one by its role; target and teacher are two
    of them: "target_model" and "teacher_model".
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
        self.online_params = self.online_params or _own_params(self.online_model)
        self.target_params = self.target_params or _own_params(self.target_model)
        self.teacher_params = self.teacher_params or _own_params(self.teacher_model)


def _own_params(model: nn.Module | None) -> list[Tensor]:
    return [] if model is None else list(model.parameters())


@dataclass
class LossTerms:
    """The result of an objective for one batch."""

    loss: Tensor                                                    # [N], differentiable
    sigma: Tensor                                                   # [N], the noise levels that were used
    logs: Mapping[str, Tensor] = field(default_factory=dict)        # named [N] or scalar values, logged as means
    peaks: Mapping[str, Tensor] = field(default_factory=dict)       # the same, logged as maxima


class LossHistory(Protocol):
    """A record of the losses of all ranks that an objective keeps; it is part of a checkpoint."""

    def update_loss_history(self, sigma: Tensor, loss: Tensor) -> None:
        """Record noise levels and losses of a step's samples, [B] each, in the order of their positions in the run."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The recorded losses, for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        ...


class Callback(Protocol):
    """Observes a run after its steps; it changes neither weights nor random streams."""

    name: str                                                       # under which a checkpoint holds its state

    def after_step(self, loop: Any) -> Mapping[str, float]:
        """Called on all ranks after every step; the result is logged, {} for nothing."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its state for a checkpoint, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        ...


class Sampler(Protocol):
    """A solver: its noise levels and its steps; `integrate` runs the loop. `cm.samplers.base` has the base class."""

    order: ClassVar[float]                                          # claimed; the tests measure it
    accepts_churn: ClassVar[bool]                                   # whether `integrate` may add noise before a step
    uses_rho: ClassVar[bool]                                        # whether the grid is a Karras grid
    uses_jvp: ClassVar[bool]                                        # whether it uses forward-mode derivatives of D

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """The falling noise levels of `steps` steps, float64."""
        ...

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """[N,C,H,W] at sigma [N] -> [N,C,H,W] at sigma_next [N], where sigma_next > 0."""
        ...

    def last_step(self, D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        """The step from sigma [N] to 0: [N,C,H,W] -> [N,C,H,W]."""
        ...
