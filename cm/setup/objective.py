"""The denoising objective of a run, and the settings that it was published with."""

from __future__ import annotations

import dataclasses

from cm.config.flags import Settings, defaults_of
from cm.config.schema import (
    ObjectiveConfig,
)
from cm.diffusion.noise_sampling import create_named_schedule_sampler
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.objectives import DENOISING
from cm.registry import lookup
from cm.types import Objective


def options_of(kind: type) -> list[str]:
    """The flags of a denoising objective alone: the fields of its class that have the name of a flag."""
    fields = {field.name for field in dataclasses.fields(kind)}
    return [field.name for field in dataclasses.fields(ObjectiveConfig) if field.name in fields]


def apply_objective_defaults(settings: Settings) -> None:
    """The settings that the objective was published with, where nobody asks for others.

    :raises UserError: for a flag that only another objective uses.
    """
    objective, values = settings.values["objective"], settings.values
    kind = lookup(DENOISING, objective, "objective")
    settings.replace(**{name: value for name, value in kind.defaults.items() if name not in settings.given})
    own, defaults = options_of(kind), defaults_of(ObjectiveConfig)
    for name in (name for other in DENOISING.values() for name in options_of(other) if name not in own):
        # A file may hold every flag of another run; there only a value that somebody chose has been lost.
        by_flag = settings.given.get(name, "").startswith("--")
        if by_flag or name in settings.given and values[name] != defaults[name]:
            users = " or ".join(f"--objective {other}" for other in DENOISING if name in options_of(DENOISING[other]))
            raise UserError(f"{settings.given[name]}: {name}={values[name]!r} is for {users}, but this run has "
                            f"--objective {objective}, which does not use it; drop it")


def objective_from(settings: Settings, diffusion: KarrasDenoiser) -> Objective:
    """The denoising objective that the flags describe."""
    kind = lookup(DENOISING, settings.values["objective"], "objective")
    law = create_named_schedule_sampler(settings.values["schedule_sampler"], diffusion)
    return kind.of(diffusion, law, {name: settings.values[name] for name in options_of(kind)})


# What the authors of each precond trained their networks with.
PUBLISHED_LAW = {name: {"schedule_sampler": name, "weight_schedule": "snr"} for name in ("vp", "ve", "iddpm", "ddpm")}


def apply_precond_defaults(settings: Settings) -> None:
    """The noise levels and weights that the precond was published with, where no flag asks for others."""
    published = PUBLISHED_LAW.get(settings.values["precond"], {})
    settings.replace(**{name: value for name, value in published.items() if name not in settings.given})
