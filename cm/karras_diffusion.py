"""KarrasDenoiser, a network made into a denoiser, and `karras_sample`, a denoiser made into images.

Sources: Karras et al. 2022 (EDM, arXiv 2206.00364); Song et al. 2023 (Consistency Models, arXiv 2303.01469). The
losses live in cm.objectives, the solvers in cm.samplers; here are the doors to them that openai/consistency_models
has, under its names.

Shapes: N batch, C channels, H and W height and width. Images are in [-1, 1]; noise levels are [N].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch as th
from torch import Tensor, nn

from cm.curricula import Curriculum
from cm.distances import get_distance
from cm.interfaces import Batch, Denoiser, Nets, NoiseSource, Objective, Sampler, Scalings, Terms
from cm.nn import append_dims
from cm.objectives import OBJECTIVES
from cm.objectives.edm import edm_terms
from cm.precond import PRECONDS, BoundaryPrecond, ConsistencyPrecond
from cm.random_util import DummyGenerator
from cm.registry import lookup
from cm.resample import ScheduleSampler
from cm.samplers import Churn, Counted, integrate, make_sampler
from cm.schedules import get_sigmas_karras, karras_grid
from cm.weightings import WEIGHTINGS, get_weightings

__all__ = ["KarrasDenoiser", "SampleResult", "get_sigmas_karras", "get_weightings", "karras_sample", "sample"]

Cond = Mapping[str, Any] | None


class KarrasDenoiser:
    """The noise levels of a run, the scalings around its network, and its loss weights.

    :param sigma_data: standard deviation of the data.
    :param rho: of the Karras grids that the losses draw their noise levels from.
    :param weight_schedule: name of a loss weight, see WEIGHTINGS.
    :param distillation: scale as a consistency function, D(x, sigma_min) = x; otherwise as `precond` says.
    :param loss_norm: name of the distance of consistency and progressive distillation, see DISTANCES.
    :param time_scale: the network is told time_scale ln(sigma) / 4: 1000 for UNetModel, 1 for the EDM networks. A
        precond that counts steps tells their number instead.
    :param precond: name of the scalings around the network, see PRECONDS. Noise levels that its networks do not know
        are cut off: sigma_min and sigma_max move to the nearest that they know.
    :raises ValueError: for an unknown weight_schedule, loss_norm or precond, and unless 0 < sigma_min < sigma_max.
    """

    num_timesteps = 40                                              # levels of the schedule samplers that use a grid

    def __init__(
        self,
        sigma_data: float = 0.5,
        sigma_max: float = 80.0,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        weight_schedule: str = "karras",
        distillation: bool = False,
        loss_norm: str = "lpips",
        time_scale: float = 1000.0,
        precond: str = "edm",
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"noise levels need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        lookup(WEIGHTINGS, weight_schedule, "weight_schedule")
        self.distance = get_distance(loss_norm)
        self.plain = lookup(PRECONDS, precond, "precond")(sigma_data, sigma_min)
        lowest, highest = self.plain.levels
        self.sigma_min, self.sigma_max = max(sigma_min, lowest), min(sigma_max, highest)
        is_edm = precond == "edm"                                   # whose published boundary has a form of its own
        self.boundary = (
            ConsistencyPrecond(sigma_data, sigma_min) if is_edm else BoundaryPrecond(self.plain, self.sigma_min)
        )
        self.precond = self.boundary if distillation else self.plain
        self.precond_name = precond
        self.sigma_data, self.rho = sigma_data, rho
        self.weight_schedule, self.distillation, self.loss_norm = weight_schedule, distillation, loss_norm
        self.time_scale = 1.0 if self.precond.counts_steps else time_scale

    # --- noise levels, weights, scalings: [N] -> [N] ----------------------------------------------------------------

    def get_snr(self, sigmas: Tensor) -> Tensor:
        """Signal-to-noise ratio."""
        return sigmas**-2

    def get_sigmas(self, sigmas: Tensor) -> Tensor:
        """Noise levels are their own times here."""
        return sigmas

    def weight(self, sigmas: Tensor) -> Tensor:
        """The weight of the loss."""
        return get_weightings(self.weight_schedule, self.get_snr(sigmas), self.sigma_data)

    def get_scalings(self, sigma: Tensor) -> Scalings:
        """c_skip, c_out, c_in of a diffusion model, EDM's unless `precond` says otherwise."""
        return self.plain.scalings(sigma)

    def get_scalings_for_boundary_condition(self, sigma: Tensor) -> Scalings:
        """A consistency function's c_skip, c_out, c_in."""
        return self.boundary.scalings(sigma)

    def noise_levels(self, n: int, device: Any = "cpu", dtype: th.dtype = th.float32) -> Tensor:
        """The Karras grid of n levels from sigma_max to sigma_min: [n]."""
        return karras_grid(n, self.sigma_min, self.sigma_max, self.rho, device, dtype)

    # --- the denoiser ----------------------------------------------------------------------------------------------

    def denoise(self, model: nn.Module, x_t: Tensor, sigmas: Tensor, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        """(F, D): the network's output and the denoised image, both in the dtype of x_t, whatever the network's is.

        :param x_t: [N,C,H,W] at noise levels sigmas [N].
        :param model_kwargs: what else the network takes, such as class labels y [N].
        """
        c_skip, c_out, c_in = (append_dims(c, x_t.ndim) for c in self.precond.scalings(sigmas))
        time = (self.time_scale * self.precond.c_noise(sigmas)).to(th.promote_types(x_t.dtype, th.float32))
        model_output = model(c_in * x_t, time, **model_kwargs).to(x_t.dtype)
        return model_output, th.addcmul(c_skip * x_t, c_out, model_output)

    def bind(self, model: nn.Module) -> Denoiser:
        """The denoiser D of a network."""

        def D(x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
            return self.denoise(model, x, sigma, **cond)[1]

        return D

    def as_teacher(self) -> KarrasDenoiser:
        """The same noise levels with the scalings of a diffusion model, as teachers have them."""
        return KarrasDenoiser(
            self.sigma_data, self.sigma_max, self.sigma_min, self.rho, self.weight_schedule, False, self.loss_norm,
            self.time_scale, self.precond_name,
        )

    # --- objectives ------------------------------------------------------------------------------------------------

    def training_objective(self, schedule_sampler: ScheduleSampler | None = None) -> Objective:
        """Denoising, with noise levels from that law (by default EDM's lognormal)."""
        laws = {} if schedule_sampler is None else {"schedule_sampler": schedule_sampler}
        return OBJECTIVES["edm"](self.weight, **laws)

    def consistency_objective(self, training_mode: str, ema_scale_fn: Curriculum) -> Objective:
        """Consistency distillation, consistency training or progressive distillation.

        :param ema_scale_fn: step -> (target decay rate, num_scales), from `cm.curricula`.
        :raises ValueError: for any other training_mode.
        """
        modes = {name: kind for name, kind in OBJECTIVES.items() if name != "edm"}
        kind = lookup(modes, training_mode, "training_mode")
        return kind(ema_scale_fn, self.noise_levels, self.weight, self.distance)

    # --- losses of given batches ------------------------------------------------------------------------------------

    def training_losses(
        self, model: nn.Module, x_start: Tensor, sigmas: Tensor, model_kwargs: Cond = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The denoising loss: `loss`, which is the weighted `mse`, and the unweighted `xs_mse`, [N] each."""
        noise = th.randn_like(x_start) if noise is None else noise
        return as_dict(edm_terms(self.bind(model), x_start, noise, sigmas, self.weight, dict(model_kwargs or {})))

    def consistency_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: Cond = None,
        target_model: nn.Module | None = None,
        teacher_model: nn.Module | None = None,
        teacher_diffusion: KarrasDenoiser | None = None,
        noise: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The consistency loss `loss` [N]: distillation if there is a teacher, otherwise training.

        :param num_scales: how many noise levels the grid has, at least 2.
        :param teacher_diffusion: the teacher's denoiser; by default this one with EDM's scalings.
        :param indices: [N] int64, which pair of neighbouring levels, 0..num_scales-2; by default random.
        :raises ValueError: without a target_model, and for num_scales below 2.
        """
        mode = "consistency_training" if teacher_model is None else "consistency_distillation"
        nets = self.nets(model, target_model, teacher_model, teacher_diffusion)
        return self.losses_of(mode, nets, x_start, num_scales, model_kwargs, noise, indices)

    def progdist_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: Cond = None,
        teacher_model: nn.Module | None = None,
        teacher_diffusion: KarrasDenoiser | None = None,
        noise: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of progressive distillation, `loss` [N].

        :param num_scales: the student's number of sampling steps; the teacher does twice as many.
        :param teacher_diffusion: the teacher's denoiser; by default this one with EDM's scalings.
        :param indices: [N] int64, which of the student's steps, 0..num_scales-1; by default random.
        :raises ValueError: without a teacher_model.
        """
        nets = self.nets(model, None, teacher_model, teacher_diffusion)
        return self.losses_of("progdist", nets, x_start, num_scales, model_kwargs, noise, indices)

    def nets(
        self,
        model: nn.Module,
        target_model: nn.Module | None,
        teacher_model: nn.Module | None,
        teacher_diffusion: KarrasDenoiser | None,
    ) -> Nets:
        teacher_diffusion = teacher_diffusion or self.as_teacher()
        return Nets(
            online=self.bind(model),
            online_model=model,
            target=None if target_model is None else self.bind(target_model),
            target_model=target_model,
            teacher=None if teacher_model is None else teacher_diffusion.bind(teacher_model),
            teacher_model=teacher_model,
        )

    def losses_of(
        self, mode: str, nets: Nets, x_start: Tensor, num_scales: int, model_kwargs: Cond, noise: Tensor | None,
        indices: Tensor | None,
    ) -> dict[str, Tensor]:
        """The loss of one batch at a fixed num_scales; noise and indices that are not given are drawn."""
        objective = self.consistency_objective(mode, lambda step: (0.0, num_scales))
        intervals = objective.intervals(num_scales)
        if noise is None:
            noise = th.randn_like(x_start)
        if indices is None:
            indices = th.randint(0, intervals, (len(x_start),), device=x_start.device)
        return as_dict(objective.terms(nets, Batch(x_start, dict(model_kwargs or {})), noise, indices, num_scales))


def as_dict(terms: Terms) -> dict[str, Tensor]:
    return {**terms.logs, "loss": terms.loss}


class SampleResult(NamedTuple):
    images: Tensor                                                  # [N,C,H,W] in [-1, 1]
    evaluations: int                                                # of the network, per image (NFE)


@th.no_grad()
def sample(
    diffusion: KarrasDenoiser,
    model: nn.Module,
    shape: Sequence[int],
    steps: int,
    clip_denoised: bool = True,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
    model_kwargs: Cond = None,
    device: Any = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sampler: str | Sampler = "heun",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    generator: NoiseSource | None = None,
    ts: Sequence[int] | None = None,
) -> SampleResult:
    """Images from noise, and what they cost.

    :param shape: (N, C, H, W).
    :param steps: of the solver; for multistep the number of noise levels that `ts` points into.
    :param clip_denoised: clamp every denoised image on the way to [-1, 1]; the result is clamped always.
    :param callback: see `cm.samplers.integrate`.
    :param model_kwargs: what else the network takes, such as class labels {"y": [N]}.
    :param device: where to sample; by default where the model is.
    :param sampler: a name in SAMPLERS, or a sampler made with options of its own.
    :param s_churn, s_tmin, s_tmax, s_noise: see `cm.samplers.Churn`.
    :param generator: the source of all noise; by default torch's global generator.
    :param ts: multistep only, see `cm.samplers.multistep`.
    :raises ValueError: for an unknown sampler, an impossible grid, missing or meaningless ts, churn where it is unused.
    """
    if isinstance(sampler, str):
        sampler = make_sampler(sampler, {"ts": ts, "sigma_min": sigma_min})
    lowest, highest = diffusion.precond.levels
    sigmas = diffusion.precond.grid(sampler.grid(steps, max(sigma_min, lowest), min(sigma_max, highest), rho))
    generator = DummyGenerator() if generator is None else generator
    D = Counted(diffusion.bind(model))
    x = integrate(
        sampler,
        partial(D, **(model_kwargs or {})),
        generator.randn(*shape, device=device_of(model) if device is None else device) * sigmas[0].item(),
        sigmas,
        generator,
        churn=Churn(s_churn, s_tmin, s_tmax, s_noise),
        clip_denoised=clip_denoised,
        progress=progress,
        callback=callback,
    )
    return SampleResult(x.clamp(-1, 1), D.calls)


def karras_sample(
    diffusion: KarrasDenoiser, model: nn.Module, shape: Sequence[int], steps: int, *args: Any, **kwargs: Any
) -> Tensor:
    """The images of `sample`, which takes the same arguments: [N,C,H,W] in [-1, 1]."""
    return sample(diffusion, model, shape, steps, *args, **kwargs).images


def device_of(model: nn.Module) -> th.device:
    return next((param.device for param in model.parameters()), th.device("cpu"))
