"""The sampler that the flags and the checkpoint choose, with its options and its grid of noise levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from cm.config.flags import Provenance, Settings, defaults_of
from cm.config.needs import refuse_options_of_others
from cm.config.plugin_flags import registered_sections
from cm.config.sampling_schema import AblationConfig, SampleConfig, SolverConfig
from cm.diffusion.preconditioning import PRECONDS
from cm.errors import UserError
from cm.logging import logger
from cm.objectives.base import Objective
from cm.samplers import SAMPLERS, Churn, make_sampler
from cm.samplers.ablation import DISCRETIZATIONS
from cm.samplers.sample import SampleOptions
from cm.setup.channels import are_pictures
from cm.setup.model import parse_ts
from cm.setup.objective import kind_of_result
from cm.types import Sampler

OWN_ETA = SolverConfig.eta                                  # means the default of the sampler


def choose_ablation(settings: Settings) -> None:
    """Choose the sampler ablation if any of its flags is given, as in EDM's generate.py, and no --sampler."""
    asked = any(field.name in settings.given for field in fields(AblationConfig))
    if asked and "sampler" not in settings.given:
        settings.replace(sampler="ablation")


def choose_sampler(settings: Settings) -> None:
    """Choose the sampler that fits the training of the network; if a flag names one that does not fit, warn.

    Without --ts, an edit with a consistency model visits all levels of its grid, since the kept parts are restored at
    each of them (Song et al. 2023, algorithm 4). Interpolation and denoising take one evaluation.
    """
    values, kind = settings.values, kind_of_result(settings.values["training_mode"])
    edits = "task" in values
    usual = "multistep" if kind.sampler == "onestep" and (edits or values["ts"]) else kind.sampler
    if not values["sampler"]:
        settings.replace(sampler=usual)
    elif not fits(kind, values["sampler"]):
        logger.warn(f"--sampler {values['sampler']} does not fit this model, which was trained by "
                    f"{values['training_mode']}: use --sampler {usual}")
    if edits and values["sampler"] == "multistep" and not values["ts"]:
        levels = settings.sources["model_path"].levels
        if levels and not settings.is_given("steps"):
            settings.replace(steps=levels)
        last = values["steps"] - 1
        ts = (0, last) if values["task"] in ("interpolate", "denoise") else range(last + 1)
        settings.replace(ts=",".join(map(str, ts)))


def fits(kind: type[Objective], sampler: str) -> bool:
    """Whether a sampler is meant for networks that an objective has trained."""
    return sampler == kind.sampler or kind.result in SAMPLERS[sampler].networks


def reach_all_levels(settings: Settings) -> None:
    """Set the ends of the grid where they are not those of the checkpoint, unless flags set them.

    A diffusion network on DDPM's timesteps is sampled over all levels of these timesteps, and the ablation sampler has
    ends of its own.
    """
    values, levels = settings.values, None
    if values["precond"] == "ddpm" and values["training_mode"] == "edm":
        levels = PRECONDS["ddpm"].levels
    if values["sampler"] == "ablation":
        levels = DISCRETIZATIONS[values.get("disc", AblationConfig.disc)][1:]
    if levels is not None:
        for name, level in zip(("sigma_min", "sigma_max"), levels):
            if settings.provenance(name) <= Provenance.CHECKPOINT:
                settings.replace(**{name: level})


def sampler_of(settings: Settings) -> tuple[Sampler, Tensor]:
    """The sampler that the flags describe, and its grid of noise levels.

    :raises UserError: if it cannot have such a grid, or a flag belongs to other samplers.
    """
    config, solver, values = settings.section(SampleConfig), settings.section(SolverConfig), settings.values
    if config.s_tmin > config.s_tmax:
        raise UserError(f"--s_tmin {config.s_tmin:g} is above --s_tmax {config.s_tmax:g}, so there would be no noise "
                        "at any level: exchange them, or leave out --s_churn")
    added = [settings.section(section) for section in registered_sections("sampler")]
    for section in (solver, *added):
        refuse_options_of_others(section, _users_of_options(section), "sampler", config.sampler)
    refuse_unused_flags(settings, SAMPLERS[config.sampler])
    options = {
        **{name: value for section in (solver, *added) for name, value in asdict(section).items()},
        "ts": parse_ts(config.ts), "sigma_min": values["sigma_min"], "sigma_max": values["sigma_max"],
        "s_tmin": config.s_tmin, "s_tmax": config.s_tmax,
    }
    _check_second_time(config.sampler, values["second_time"])
    if "consistency_function" in SAMPLERS[config.sampler].networks:
        options["sigma_min"] = level_of_images(settings)
    if solver.eta == OWN_ETA:
        del options["eta"]
    sampler = make_sampler(config.sampler, options)
    if values["compile"] and sampler.uses_jvp:
        raise UserError(f"--compile True: --sampler {config.sampler} differentiates the network in forward mode, which "
                        "compiled networks do not allow; drop --compile, or choose another sampler")
    return sampler, sampler.grid(config.steps, values["sigma_min"], values["sigma_max"], solver.rho)


def _check_second_time(sampler: str, second_time: bool) -> None:
    """Check that flow maps are sampled as such: samplers for consistency functions do not give the end of a step.

    :raises UserError: for a sampler that does not fit the network.
    """
    networks = SAMPLERS[sampler].networks
    if networks == ("flow_map",) and not second_time:
        raise UserError(f"--sampler {sampler} is for flow maps (cm_train.py --training_mode meanflow or alphaflow), "
                        "and this model is not one; choose onestep for a consistency model, heun for a diffusion model")
    if "consistency_function" in networks and second_time:
        raise UserError(f"--sampler {sampler} is for consistency models, and this is a flow map: choose --sampler "
                        "flowmap with --steps 1 or more")


def level_of_images(settings: Settings) -> float:
    """The lowest noise level of the network of --model_path: 0 for a consistency function with D(x, 0) = x, else
    sigma_min.
    """
    kind = kind_of_result(settings.values["training_mode"])
    return 0.0 if kind.few_step and not kind.distillation else settings.values["sigma_min"]


def _users_of_options(section: Any) -> dict[str, list[str]]:
    """Option of a section -> the samplers that use it."""
    return {
        field.name: [
            name for name, kind in SAMPLERS.items()
            if (kind.uses_rho if field.name == "rho" else field.name in kind.__dataclass_fields__)
        ] for field in fields(section)
    }


def _adds_noise(kind: type[Any]) -> bool:
    """Whether a sampler adds noise between two levels, --s_tmin and --s_tmax."""
    return kind.accepts_churn or "s_tmin" in kind.__dataclass_fields__


USERS: dict[str, tuple[str, Callable[[type[Any]], bool]]] = {
    "ts": ("--sampler {}", lambda kind: "ts" in kind.__dataclass_fields__),
    "s_churn": ("samplers with churn ({})", lambda kind: kind.accepts_churn),
    "s_noise": ("samplers with churn ({})", lambda kind: kind.accepts_churn),
    "s_tmin": ("samplers that add noise ({})", _adds_noise),
    "s_tmax": ("samplers that add noise ({})", _adds_noise),
    "steps": ("samplers of several steps", lambda kind: kind.uses_steps),
}
"""Flag of `SampleConfig` -> the samplers that use it, in words with a place for their names, and as a test."""


def refuse_unused_flags(settings: Settings, kind: type[Any]) -> None:
    """:raises UserError: for a flag on the command line that the sampler would ignore; it names the right samplers."""
    defaults = defaults_of(SampleConfig)
    unused = {
        name: what.format(", ".join(other for other, each in SAMPLERS.items() if uses(each)))
        for name, (what, uses) in USERS.items() if not uses(kind)
    }
    if kind.accepts_churn and not settings.values["s_churn"]:
        own = kind.__dataclass_fields__
        unused |= {name: "--s_churn above 0" for name in ("s_noise", "s_tmin", "s_tmax") if name not in own}
    for name, users in unused.items():
        if settings.is_typed(name) and (name == "steps" or settings.values[name] != defaults[name]):
            raise UserError(f"{settings.given[name]} {settings.values[name]} is for {users}; --sampler "
                            f"{settings.values['sampler']} does not use it; drop it")


def sampler_options(settings: Settings) -> SampleOptions:
    """The options of sampling that the flags of `SampleConfig` and `SolverConfig` describe."""
    values = settings.values
    churn = Churn(**{name: values[name] for name in ("s_churn", "s_tmin", "s_tmax", "s_noise")})
    own = {name: values[name] for name in ("steps", "clip_denoised", "sigma_min", "sigma_max", "rho")}
    return SampleOptions(
        sampler=sampler_of(settings)[0], churn=churn, clip_result=are_pictures(values["channels"]), **own
    )
