"""Guidance by a worse network, from flags: of sampling (--guide_scale), and of a teacher (--teacher_guide_scale).

Also label dropout, which trains the network that classifier-free guidance needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as th
from torch import Tensor

from cm.checkpoints.formats import openai
from cm.checkpoints.loading import look_at
from cm.config.flags import Origin, Settings, defaults_of
from cm.config.sampling_schema import GuidanceConfig
from cm.config.schema import DiffusionConfig, LatentConfig, ModelConfig
from cm.data import latents
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.logging import logger
from cm.networks.build import PUBLISHED_CLASSES
from cm.samplers.network_guidance import Guidance, NetworkGuidedDiffusion, without_class
from cm.setup.inherit import inherit_checkpoint
from cm.setup.model import diffusion_from
from cm.setup.network import load_network
from cm.setup.objective import choice_of, objective_kind
from cm.setup.run import run_precision
from cm.setup.weights_path import find_weights
from cm.training.master_weights import store_as_computed
from cm.types import Denoiser


@dataclass(frozen=True)
class GuideFlags:
    """The names of the flags of guidance, for sampling or for a teacher.

    :param prefix: first part of the names.
    :param guided: name of the guided network in messages.
    """

    prefix: str
    guided: str

    @property
    def scale(self) -> str:
        """The flag of the strength w."""
        return f"{self.prefix}guide_scale"

    @property
    def path(self) -> str:
        """The flag of the file of the guiding network."""
        return f"{self.prefix}guide_path"

    @property
    def interval(self) -> str:
        """The flag of the noise levels at which the guide acts."""
        return f"{self.prefix}guide_interval"


SAMPLING = GuideFlags("", "this model")
DISTILLING = GuideFlags("teacher_", "the teacher")


@dataclass(frozen=True)
class Guide:
    """The guidance that the flags ask for.

    :param scale: the strength w.
    :param interval: the guide acts at noise levels above the first number and up to the second.
    :param settings: settings of the guiding network, with its file in `sources`; None if the network guides itself,
        without its class.
    """

    flags: GuideFlags
    scale: float
    interval: tuple[float, float]
    settings: Settings | None

    def record(self) -> dict[str, Any]:
        """The values of the flags, for the summary of a result."""
        path = self.settings.values[self.flags.path] if self.settings else ""
        interval = "{:g},{:g}".format(*self.interval)       # text, since JSON knows no infinity
        return {self.flags.scale: self.scale, self.flags.path: path, self.flags.interval: interval}


# --- flags -----------------------------------------------------------------------------------------------------------


def prepare_label_dropout(settings: Settings) -> None:
    """For --label_dropout, give the network a label for images without a class.

    :raises UserError: if the network has no classes, or is asked not to have that label.
    """
    values = settings.values
    if not values["label_dropout"]:
        return
    origin = settings.given["label_dropout"]
    if not values["class_cond"]:
        raise UserError(f"{origin}: label_dropout={values['label_dropout']:g} drops class labels, and this network has "
                        "none: add --class_cond True, or drop it")
    if settings.is_given("null_class") and not values["null_class"]:
        raise UserError(f"{origin}: label_dropout={values['label_dropout']:g} needs --null_class True; drop one of "
                        "the two")
    settings.replace(null_class=True)
    settings.given.setdefault("null_class", Origin(origin.kind, f"{origin} (label_dropout)"))


def choose_teacher_guide(settings: Settings) -> None:
    """Store the guide of the teacher in `settings.sources["teacher_guide"]`, if the flags ask for one.

    :raises UserError: for the reasons of `choose_guide`, and if there is no teacher.
    """
    given = _given(settings, DISTILLING)
    companions = objective_kind(settings.values).companions_of(settings.values)
    if given and all(each.origin != "teacher" for each in companions):
        raise UserError(f"{given[0]} guides a teacher, and {choice_of(settings.values)} has none; drop it")
    if guide := choose_guide(settings, DISTILLING):
        settings.sources["teacher_guide"] = guide


def choose_guide(settings: Settings, flags: GuideFlags) -> Guide | None:
    """The guide that the flags ask for; None if they ask for none.

    :raises UserError: if flags are missing, or the guide cannot be read or does not fit the network.
    """
    given, values = _given(settings, flags), settings.values
    if not given:
        return None
    if not settings.is_given(flags.scale):
        raise UserError(f"{given[0]} has no effect without --{flags.scale}: give it too, such as --{flags.scale} 2, or "
                        "drop both")
    if flags is SAMPLING and values["training_mode"] != "edm":
        raise UserError(
            f"--{flags.scale} {values[flags.scale]:g}: this model was trained with --training_mode "
            f"{values['training_mode']}, and only a diffusion model can be guided when it is sampled. Guide its "
            f"teacher instead: cm_train.py --{DISTILLING.scale} {values[flags.scale]:g}"
        )
    if flags is SAMPLING and values["classifier_path"]:
        raise UserError(f"--classifier_path {values['classifier_path']} and {given[0]} are two ways of guidance; drop "
                        "one of them")
    own = None
    if values[flags.path]:
        own = _settings_of_guide(settings, flags)
        _check_fit(settings, own, flags)
    elif not values["null_class"]:
        raise UserError(
            f"--{flags.scale} {values[flags.scale]:g} guides by {flags.guided} without its class, which it has not "
            f"learnt: give --{flags.path}, a worse network such as an earlier checkpoint, or train with --class_cond "
            "True --label_dropout 0.1"
        )
    interval = parse_interval(values[flags.interval], flags.interval)
    _check_reach(interval, values, flags)
    return Guide(flags, values[flags.scale], interval, own)


def _check_reach(interval: tuple[float, float], values: Mapping[str, Any], flags: GuideFlags) -> None:
    """:raises UserError: if the guide acts at no noise level of the network."""
    if interval[0] >= values["sigma_max"] or interval[1] < values["sigma_min"]:
        raise UserError(f"--{flags.interval} {values[flags.interval]} is outside the noise levels "
                        f"{values['sigma_min']:g} to {values['sigma_max']:g}, so the guide would have no effect: give "
                        "levels among these")


def _given(settings: Settings, flags: GuideFlags) -> list[str]:
    """The flags of guidance that differ from their defaults, with their values, for messages."""
    defaults = defaults_of(GuidanceConfig)
    return [
        f"--{name} {settings.values[name]}" for name in (flags.scale, flags.path, flags.interval)
        if settings.values[name] != defaults[name.removeprefix(flags.prefix)]
    ]


def parse_interval(text: str, flag: str) -> tuple[float, float]:
    """'0.1,3' -> (0.1, 3.0); all noise levels for an empty text.

    :raises UserError: if it is no pair of rising levels.
    """
    if not text:
        return 0.0, math.inf
    try:
        lowest, highest = (float(word) for word in text.split(","))
    except ValueError:
        lowest = highest = math.nan
    if not 0 <= lowest < highest:
        raise UserError(f"--{flag} {text!r} is not a pair lo,hi of noise levels with 0 <= lo < hi, such as 0.1,3")
    return lowest, highest


def _settings_of_guide(settings: Settings, flags: GuideFlags) -> Settings:
    """The settings of the guiding network, from its file.

    :raises UserError: if there is no such file, it does not describe the network, or it is not a diffusion model.
    """
    path = find_weights(settings, flags.path)
    kind, checkpoint = dist.on_main(look_at, path)
    if kind == "file of weights" and checkpoint is None and not openai.published_mode(path):
        raise UserError(f"--{flags.path} {path} has no manifest next to it that describes its network: "
                        "convert_checkpoint.py writes one")
    of_run = ("verify_weights", "compile", "precision", "tf32", "use_fp16")
    known = defaults_of(ModelConfig) | defaults_of(DiffusionConfig) | defaults_of(LatentConfig)
    values = known | {"training_mode": "edm", flags.path: path}
    own = Settings(values | {name: settings.values[name] for name in of_run}, {})
    source = inherit_checkpoint(own, flags.path, also=("training_mode",))
    if source.training_mode not in (None, "edm"):
        raise UserError(f"--{flags.path} {path} was trained with --training_mode {source.training_mode}; a guide is a "
                        "diffusion model")
    return own


def _check_fit(settings: Settings, guide: Settings, flags: GuideFlags) -> None:
    """:raises UserError: if images or classes of the guide differ from those of the guided network."""
    path, model, own = guide.values[flags.path], settings.values, guide.values
    for name in ("image_size", "channels"):
        if own.get(name) != model.get(name):
            raise UserError(f"--{flags.path} {path} has {name}={own[name]}, {flags.guided} has {model[name]}; choose "
                            "another guide")
    latents.require_same(own.get("latents", ""), model.get("latents", ""), (f"--{flags.path} {path}", flags.guided))
    if not own["class_cond"]:
        return
    if not model["class_cond"]:
        raise UserError(f"--{flags.path} {path} is class-conditional, {flags.guided} is not; choose another guide")
    classes, known = (values["num_classes"] or PUBLISHED_CLASSES for values in (model, own))
    if known != classes:
        raise UserError(f"--{flags.path} {path} has {known} classes, {flags.guided} {classes}; choose another guide")
    if model.get("label_dropout") and not own["null_class"]:
        raise UserError(f"--{flags.path} {path} has no label for images without a class, as --label_dropout makes; "
                        "choose another guide, or drop --label_dropout")


# --- objects ---------------------------------------------------------------------------------------------------------


def guided_by(
    diffusion: Any, guide: Guide | None, settings: Settings, stores_casts: bool = True, device: th.device | None = None
) -> Any:
    """The diffusion with the guide, after loading its network; the diffusion itself if there is no guide.

    :param settings: settings of the guided network.
    :param stores_casts: whether, in bf16, the guide is only evaluated under autocast, and may store its weights in the
        dtype to which autocast casts them.
    :param device: device of the guide's network; by default this rank's.
    """
    if guide is None:
        return diffusion
    if guide.scale == 1:
        logger.log(f"--{guide.flags.scale} 1 means no guidance: the guide is not loaded")
        return diffusion
    if guide.settings is None:
        null_class = settings.values["num_classes"] or PUBLISHED_CLASSES
        return NetworkGuidedDiffusion(
            diffusion, Guidance(partial(without_class, null_class=null_class), guide.scale, *guide.interval)
        )
    model = load_network(guide.settings, guide.flags.path, device).requires_grad_(False)
    store_as_computed(model, run_precision(settings, device), stores_casts)
    own = diffusion_from(guide.settings, distillation=False)
    known = own.scaling.levels
    interval = _within(guide.interval, known)
    if interval != guide.interval:
        logger.log(f"the guide supports noise levels from {known[0]:g} to {known[1]:g} and is used only at these")
    denoise = with_known_conditioning(own.bind(model), guide.settings.values)
    return NetworkGuidedDiffusion(diffusion, Guidance(lambda D: denoise, guide.scale, *interval))


def _within(interval: tuple[float, float], levels: tuple[float, float]) -> tuple[float, float]:
    """The part of an interval inside the noise levels of a network, including their ends."""
    rounding = 1e-6                                         # of a noise level in float32
    return max(interval[0], levels[0] * (1 - rounding)), min(interval[1], levels[1] * (1 + rounding))


def with_known_conditioning(D: Denoiser, values: dict[str, Any]) -> Denoiser:
    """The denoiser, called with any conditioning: it passes on only the conditioning that its network has."""
    takes = {
        "y": values["class_cond"], "augment_labels": values["augment_dim"] > 0, "gap": values.get("second_time", False),
    }

    def denoise(x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        return D(x, sigma, **{name: value for name, value in cond.items() if takes.get(name, True)})

    return denoise
