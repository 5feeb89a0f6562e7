"""How fast the noise label of a network changes: warn if it is too fast for few-step objectives.

Objectives that compare close noise levels, or differentiate by them, train the slope of the network in ln sigma.
guided-diffusion's U-Net is conditioned on 250 ln(sigma), whose fastest wave turns by 250 radians per unit; most of the
slope is then a ripple of the embedding.
"""

from __future__ import annotations

import math

from cm.config.flags import Settings
from cm.diffusion.denoiser import Diffusion
from cm.diffusion.schedules import geometric_grid
from cm.errors import UserError
from cm.logging import logger
from cm.setup.objective import objective_kind

FASTEST = 1.0                                               # radians per unit of ln sigma without a warning
FREQUENCY = {"ncsnpp": 2 * math.pi * 16, "edm2": 2 * math.pi}
"""--arch -> radians that a typical fast wave of its embedding turns per unit of time; 1 for the others."""


def clock_speed(diffusion: Diffusion, arch: str) -> float:
    """Radians that the fastest wave of the embedding turns per unit of ln sigma, at the level where it is fastest."""
    levels = geometric_grid(400, diffusion.sigma_min, diffusion.sigma_max)
    time = diffusion.noise_labels(levels, levels.dtype)
    return FREQUENCY.get(arch, 1.0) * (time.diff() / levels.log().diff()).abs().max().item()


def check_clock(settings: Settings) -> None:
    """Check that --time_scale has an effect.

    :raises UserError: if the preconditioning tells the network the number of a step.
    """
    scale, precond = settings.values["time_scale"], settings.values["precond"]
    if scale and Diffusion(precond=precond).scaling.counts_steps:
        raise UserError(f"--time_scale {scale:g}: with --precond {precond} the network is conditioned on the index of "
                        "a timestep, which has no scale; drop the flag")


def warn_of_fast_clock(settings: Settings, diffusion: Diffusion) -> None:
    """Warn if the objective needs a slow clock and the network has a fast one."""
    kind, values = objective_kind(settings.values), settings.values
    speed = clock_speed(diffusion, values["arch"])
    if not kind.needs_slow_clock or speed <= FASTEST:
        return
    slow = diffusion.time_scale / speed
    begin = (
        f"train the teacher with --time_scale {slow:.2g}, or fine-tune it so first" if values["teacher_model_path"]
        else f"give --time_scale {slow:.2g}"
    )
    logger.warn(
        f"the time embedding of this network turns by {speed:.0f} radians per unit of ln sigma, above {FASTEST:g}: "
        f"--training_mode {values['training_mode']} will learn slowly or get worse; {begin} (docs/few-step.md)"
    )
