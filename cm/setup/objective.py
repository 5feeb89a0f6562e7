"""The objective that the flags choose, and its published settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from cm.config.flags import Settings, choices_of, defaults_of, same
from cm.config.needs import warn_of_idle
from cm.config.objective_schema import ConsistencyConfig, FewStepConfig, ObjectiveConfig
from cm.config.schema import LARGEST_SIGMA, LEAST_SIGMA
from cm.errors import UserError
from cm.logging import logger
from cm.objectives import DENOISING, OBJECTIVES
from cm.objectives.base import Objective
from cm.registry import lookup

PUBLISHED_NOISE = {name: {"schedule_sampler": name, "weight_schedule": "snr"} for name in ("vp", "ve", "iddpm", "ddpm")}
"""Preconditioning -> the noise distribution and loss weight that its authors trained their networks with."""

NORMAL = (("noise_mean", "noise_std"), ("p_mean", "p_std"), ("r_mean", "r_std"))
"""Mean and standard deviation of ln sigma, as flags."""
SWITCHES = ("loss_norm", "pair_path", "pair_target")
"""Parts of a consistency loss which bring flags along, and of which an objective may take any."""
AROUND, REACH = 3.0, 5.0                                    # standard deviations


def objective_kind(values: Mapping[str, Any]) -> type[Objective]:
    """The class of the objective that --training_mode names; for "edm", the class that --objective names.

    :raises UserError: for a name that is in neither table.
    """
    if values["training_mode"] != "edm":
        return lookup(OBJECTIVES, values["training_mode"], "training_mode")
    return lookup(DENOISING, values["objective"], "objective")


def kind_of_result(training_mode: str) -> type[Objective]:
    """The objective that trained a checkpoint; for any diffusion model it is EDM, which is enough for sampling.

    :raises UserError: for a name that is not in the table.
    """
    return lookup(OBJECTIVES, training_mode, "training_mode")


def apply_objective_defaults(settings: Settings) -> None:
    """Apply the objective's published defaults to flags that are not given.

    :raises UserError: for a flag that only another objective uses.
    """
    values = settings.values
    kind = objective_kind(values)
    settings.replace(**{name: value for name, value in kind.defaults.items() if not settings.is_given(name)})
    if kind.second_time:
        settings.replace(second_time=True)
    _refuse_flags_of_others(settings, kind)
    _warn_of_fixed_levels(settings, kind.options_of(values))


def _refuse_flags_of_others(settings: Settings, kind: type[Objective]) -> None:
    """Refuse flags that only another objective or another part of the loss uses; of some in a file, only warn.

    A file may hold every flag of another run, so of its values only those that differ from the defaults count.
    """
    values, users, idle = settings.values, flags_of_objectives(), {}
    for name in sorted(users.keys() & settings.given.keys() - set(kind.options_of(values))):
        typed, switches = settings.is_typed(name), switches_of(name, kind, values)
        if typed and switches:
            raise UserError(f"{settings.given[name]} {values[name]} has no effect without {' or '.join(switches)}: "
                            "give that, too, or leave it out")
        differs = not same(values[name], settings.defaults.get(name))
        if typed or differs and name in defaults_of(ObjectiveConfig):
            raise UserError(
                f"{settings.given[name]}: {name}={values[name]!r} is for {' or '.join(users[name])}, but this run has "
                f"{choice_of(values)}, which does not use it; drop it"
            )
        if differs:
            idle[name] = " or ".join(switches or users[name])
    warn_of_idle(settings, idle)


def _warn_of_fixed_levels(settings: Settings, options: Sequence[str]) -> None:
    """Warn of a number of noise levels that the schedule never reaches."""
    values, name = settings.values, "end_scales"
    is_asked = settings.is_typed(name) and name in options and values[name] != values["start_scales"]
    if is_asked and values["scale_mode"] == "fixed":
        logger.warn(f"--end_scales {values[name]} has no effect: with --scale_mode fixed there are --start_scales "
                    f"{values['start_scales']} noise levels throughout; give progressive or doubling, or leave it out")


def switches_of(name: str, kind: type[Objective], values: Mapping[str, Any]) -> list[str]:
    """The other choices of `SWITCHES` with which the chosen objective would use a flag."""
    parts = [field for section in (ConsistencyConfig, FewStepConfig) for field in fields(section)
             if field.name in SWITCHES]
    return [f"--{field.name} {choice}" for field in parts for choice in choices_of(field)
            if choice and name in kind.options_of({**values, field.name: choice})]


def flags_of_objectives() -> dict[str, list[str]]:
    """Flag -> the choices of --objective or --training_mode that use it."""
    users: dict[str, list[str]] = {}
    for flag, table in (("objective", DENOISING), ("training_mode", OBJECTIVES)):
        for name, kind in table.items():
            for option in kind.options_of({}):
                users.setdefault(option, []).append(f"--{flag} {name}")
    return users


def choice_of(values: Mapping[str, Any]) -> str:
    """The flag that chooses the objective, with its value, for messages."""
    mode = values["training_mode"]
    return f"--objective {values['objective']}" if mode == "edm" else f"--training_mode {mode}"


def apply_precond_defaults(settings: Settings) -> None:
    """Apply the noise distribution and weights that the preconditioning was published with, for a diffusion model."""
    if settings.values["training_mode"] == "edm":
        published = PUBLISHED_NOISE.get(settings.values["precond"], {})
        settings.replace(**{name: value for name, value in published.items() if not settings.is_given(name)})


def check_noise_levels(settings: Settings) -> None:
    """Check that the objective draws noise levels in the range of the network and of float32.

    :raises UserError: if hardly any lies between sigma_min and sigma_max (the mean is more than 3 standard deviations
        from them), or some are so far away that their squares are no numbers (5 standard deviations from the mean).
    """
    values = settings.values
    used = objective_kind(values).options_of(values)
    for mean, std in NORMAL:
        if mean not in used:
            continue
        m, s = values[mean], values[std]
        lowest, highest = math.log(values["sigma_min"]) - AROUND * s, math.log(values["sigma_max"]) + AROUND * s
        if not lowest <= m <= highest:
            raise UserError(f"--{mean} {m:g} is the mean of ln sigma: with --{std} {s:g} hardly any noise level lies "
                            f"between --sigma_min {values['sigma_min']:g} and --sigma_max {values['sigma_max']:g}; "
                            f"choose --{mean} from {lowest:.1f} to {highest:.1f}")
        largest = min(math.log(LARGEST_SIGMA) - m, m - math.log(LEAST_SIGMA)) / REACH
        if s > largest:
            raise UserError(f"--{std} {s:g} is the standard deviation of ln sigma: around --{mean} {m:g} there would "
                            f"be noise levels beyond {LEAST_SIGMA:g} to {LARGEST_SIGMA:g}, whose squares are "
                            f"out of range in float32; choose --{std} up to {largest:.1f}")


def check_teacher(settings: Settings) -> None:
    """Check that a teacher is given if the objective needs one.

    :raises UserError: if it is not, or a diffusion model is to be trained from one.
    """
    values = settings.values
    needs = any(each.origin == "teacher" for each in objective_kind(values).companions_of(values))
    if needs and not values["teacher_model_path"]:
        raise UserError(f"--training_mode {values['training_mode']} needs a teacher: give --teacher_model_path")
    if values["training_mode"] == "edm" and values["teacher_model_path"]:
        raise UserError(f"--teacher_model_path {values['teacher_model_path']} is for distillation; to begin a "
                        "diffusion model from other weights, give --resume_checkpoint")
