"""From a model in memory to files: a checkpoint, a safetensors file, a folder for model hubs, or one of diffusers."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from cm.checkpoints import manifest
from cm.checkpoints.formats import described, diffusers, hub_folder
from cm.checkpoints.formats.described import Description
from cm.config.flags import Settings, defaults_of
from cm.config.schema import DiffusionConfig, LatentConfig, ModelConfig
from cm.data.class_names import ClassNames
from cm.data.decode import decode, why_unreadable
from cm.errors import UserError
from cm.io import budget, storage
from cm.report.model_card import Card, render
from cm.report.run_facts import Measurement
from cm.setup.objective import kind_of_result
from cm.setup.run_facts import facts_of, measured_in

DISTILLED_LEVELS = 40                                               # of the published distilled models
GRID = ("scale_mode", "start_scales", "end_scales")                 # flags that say how many levels training ended with


def network_flags(settings: Settings, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are needed to use the weights, and those of the training grid if they are known."""
    sections = (ModelConfig, DiffusionConfig, LatentConfig)
    names = [name for section in sections for name in defaults_of(section) if name in settings.values]
    own = {name: settings.values[name] for name in (*names, "training_mode")}
    return own | {name: trained[name] for name in GRID if name in trained}


def trained_flags(path: str) -> Mapping[str, Any]:
    """The flags of training that are stored with the weights at a path; empty without any. Call it on one rank."""
    if hub_folder.is_folder(path):
        return hub_folder.description(path).config
    if described.claims(path):
        about = described.description(path)
        return about.config if about else {}
    checkpoint = manifest.beside(path)
    return {} if checkpoint is None else checkpoint.config


def describe(settings: Settings, path: str, class_names: ClassNames = ()) -> Description:
    """A description of the weights at the path from which settings were resolved. Call it on one rank."""
    names = class_names if settings.values["class_cond"] else ()
    return Description(network_flags(settings, trained_flags(path)), names, facts_of(path))


# --- our own ---------------------------------------------------------------------------------------------------------


def save_native(folder: str, weights: Mapping[str, Tensor], about: Description) -> None:
    """Write a checkpoint of step 0 with a manifest, so that no flag needs to be given with it; on one rank."""
    storage.make_folder(folder)
    manifest.save(folder, 0, {"model": weights}, about.config, 0, classes=about.class_names)


def save_safetensors(path: str, weights: Mapping[str, Tensor], about: Description) -> None:
    """Write one safetensors file that describes its network; on one rank.

    :raises UserError: if its name does not end in .safetensors, or it cannot be written.
    """
    if not path.endswith(described.SUFFIX):
        raise UserError(f"{path}: a safetensors file is recognised by its name; give one that ends in "
                        f"{described.SUFFIX}")
    storage.make_folder(os.path.dirname(path) or ".")
    described.write(path, weights, about)


@dataclass(frozen=True)
class CardOptions:
    """The parts of a model card that a user adds.

    :param licence: an identifier such as mit; empty for none.
    :param picture: of samples, a PNG; empty for none.
    """

    licence: str = ""
    measured: tuple[Measurement, ...] = ()
    picture: bytes = b""


def card_options(licence: str, results: Iterable[str], picture: str) -> CardOptions:
    """Read the parts of a model card that a user adds; on one rank.

    :param results: files that evaluator.py or fid.py wrote with --json.
    :param picture: path of a picture; empty for none.
    :raises UserError: if one of them cannot be read.
    """
    return CardOptions(licence, tuple(measured_in(results)), read_picture(picture) if picture else b"")


def save_hub_folder(folder: str, weights: Mapping[str, Tensor], about: Description, options: CardOptions) -> None:
    """Write weights, config and a model card as model hubs have them; on one rank.

    :raises UserError: if the folder is not free for it or cannot be written.
    """
    measured = tuple(dict.fromkeys((*about.facts.measured, *options.measured)))
    about = replace(about, facts=replace(about.facts, measured=measured))
    card = Card(
        title=os.path.basename(os.path.abspath(folder)), config=about.config, class_names=about.class_names,
        facts=about.facts, few_steps=kind_of_result(about.config["training_mode"]).few_step,
        parameters=sum(value.numel() for value in weights.values()),
        picture=hub_folder.PICTURE_FILE if options.picture else "", licence=options.licence,
    )
    hub_folder.write(folder, weights, about, render(card), options.picture)


def read_picture(path: str) -> bytes:
    """A picture of any format as a PNG, without the metadata of its file.

    :raises UserError: if it cannot be read.
    """
    try:
        return png_of(decode(budget.read_bytes(path, budget.PICTURE), keep_gray=True))
    except UserError:
        raise
    except Exception as error:                                      # each format of pictures has errors of its own
        raise UserError(f"{path} cannot be read as a picture: {why_unreadable(error)}") from None


def png_of(image: Image.Image) -> bytes:
    """The bytes of a PNG."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


# --- diffusers -------------------------------------------------------------------------------------------------------


def save_diffusers(
    folder: str, weights: Mapping[str, Tensor], settings: Settings, num_train_timesteps: int, about: Description
) -> None:
    """Write a consistency model as a folder of diffusers; on one rank.

    :param num_train_timesteps: noise levels of the training grid; 0: as `training_levels` finds.
    :raises UserError: for a model that diffusers cannot hold.
    """
    mode = settings.values["training_mode"]
    if not kind_of_result(mode).distillation:
        raise UserError(f"a {diffusers.PIPELINE} contains only consistency models; this model was trained as {mode}")
    known = about.config.get("scale_mode") == "fixed" and about.config.get("start_scales")
    if num_train_timesteps and type(known) is int and 0 < known != num_train_timesteps:
        raise UserError(f"--num_train_timesteps {num_train_timesteps}: this model was trained with --start_scales "
                        f"{known}; drop the flag")
    levels = num_train_timesteps or training_levels(about.config, mode)
    diffusers.write(folder, weights, settings.values, levels, about.class_names)


def training_levels(trained: Mapping[str, Any], training_mode: str) -> int:
    """The number of noise levels of the grid at the end of training.

    :param trained: the flags of the training run; empty if they are not known.
    :raises UserError: if neither these nor the training mode determine it.
    """
    mode, first, last = (trained.get(name) for name in GRID)
    if mode == "fixed" and type(first) is int and first > 0:
        return first
    if mode in ("progressive", "doubling") and type(last) is int and last > 0:
        return last + 1
    if training_mode != "consistency_training":
        return DISTILLED_LEVELS
    raise UserError("how many noise levels the training grid had is not known: give --num_train_timesteps, such as 201 "
                    "for ct_imagenet64.pt or 151 for ct_bedroom256.pt")
