"""From a model in memory to files: a checkpoint of this toolkit, or a folder of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cm.checkpoints import manifest
from cm.checkpoints.formats import diffusers
from cm.config.flags import Settings, defaults_of
from cm.config.schema import DiffusionConfig, ModelConfig
from cm.data.class_names import ClassNames
from cm.errors import UserError
from cm.io import storage
from cm.setup.objective import kind_of_result

DISTILLED_LEVELS = 40                                               # of the published distilled models


def save_native(folder: str, weights: Mapping[str, Tensor], settings: Settings, class_names: ClassNames = ()) -> None:
    """Write a checkpoint of step 0 with a manifest, so that no flag needs to be given with it; on one rank.

    :param class_names: of its classes, where they are known.
    """
    storage.make_folder(folder)
    names = (*defaults_of(ModelConfig), *defaults_of(DiffusionConfig), "training_mode")
    config = {name: settings.values[name] for name in names}
    manifest.save(folder, 0, {"model": weights}, config, 0, classes=class_names)


def save_diffusers(
    folder: str, weights: Mapping[str, Tensor], settings: Settings, num_train_timesteps: int,
    trained: Mapping[str, Any] | None = None, class_names: ClassNames = (),
) -> None:
    """Write a consistency model as a folder of diffusers; on one rank.

    :param num_train_timesteps: noise levels of the training grid; 0: as `training_levels` finds.
    :param trained: the flags of the run that made the checkpoint, if they are known.
    :raises UserError: for a model that diffusers cannot hold.
    """
    mode = settings.values["training_mode"]
    if not kind_of_result(mode).distillation:
        raise UserError(f"a {diffusers.PIPELINE} holds consistency models alone; this one was trained as {mode}")
    levels = num_train_timesteps or training_levels(trained or {}, mode)
    diffusers.write(folder, weights, settings.values, levels, class_names)


def training_levels(trained: Mapping[str, Any], training_mode: str) -> int:
    """How many noise levels the grid had at the end of training.

    :param trained: the flags of the run that made the checkpoint, empty if they are not known.
    :raises UserError: if neither these nor the mode say it.
    """
    if trained.get("scale_mode") == "fixed":
        return trained["start_scales"]
    if trained.get("scale_mode") in ("progressive", "doubling"):
        return trained["end_scales"] + 1
    if training_mode != "consistency_training":
        return DISTILLED_LEVELS
    raise UserError("how many noise levels the training grid had is not known: give --num_train_timesteps, such as 201 "
                    "for ct_imagenet64.pt or 151 for ct_bedroom256.pt")
