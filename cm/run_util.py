"""What every training script does between its flags and its loop."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

import torch as th

from cm import dist_util, logger
from cm.checkpoints import storage
from cm.config import DataConfig, TrainConfig
from cm.flags import Settings
from cm.image_datasets import load_data
from cm.image_sources import open_source
from cm.registry import UserError
from cm.script_util import choose_precision, model_from


def rank_batch(global_batch_size: int, batch_size: int, world_size: int) -> int:
    """Images per step on one rank.

    :raises UserError: if the ranks cannot share the batch equally.
    """
    if batch_size > 0:
        return batch_size
    if global_batch_size % world_size:
        near = max(world_size, global_batch_size // world_size * world_size)
        raise UserError(
            f"--global_batch_size {global_batch_size} cannot be shared equally by {world_size} ranks; "
            f"choose a multiple of {world_size}, such as {near}, or another number of ranks"
        )
    return global_batch_size // world_size


def open_log(settings: Settings) -> None:
    """Start the log in --log_dir and leave the resolved flags there."""
    logger.configure(settings.values["log_dir"] or None, rank=dist_util.get_rank())
    dist_util.on_main(save_config, settings)
    logger.log(f"logging to {logger.get_dir()} on {dist_util.get_world_size()} rank(s), device {dist_util.dev()}")


def save_config(settings: Settings) -> None:
    text = settings.as_text().encode()
    storage.write_whole(os.path.join(logger.get_dir(), "config.json"), lambda file: file.write(text))


def open_data(settings: Settings) -> Any:
    """A function from the samples already consumed to the endless iterator of this rank's batches.

    Sets num_classes from the data, where no flag or checkpoint has set it.

    :raises UserError: if there is no such data, or class_cond is asked of data without labels.
    """
    data, train, values = settings.section(DataConfig), settings.section(TrainConfig), settings.values
    if not data.data_dir:
        raise UserError("--data_dir is missing: give a folder, an EDM zip or an npz of images, or `digits`")
    source = open_source(data.data_dir, values["image_size"])
    if values["class_cond"]:
        if source.num_classes is None:
            raise UserError(
                f"--class_cond True, but {data.data_dir} has no class labels (its first image is {source.name(0)})"
            )
        if not values["num_classes"]:
            settings.replace(num_classes=source.num_classes)
        if source.num_classes > values["num_classes"]:
            raise UserError(
                f"{data.data_dir} has {source.num_classes} classes, the network only {values['num_classes']}"
            )
    world_size = dist_util.get_world_size()
    return partial(
        open_stream,
        data_dir=data.data_dir,
        batch_size=rank_batch(train.global_batch_size, train.batch_size, world_size),
        image_size=values["image_size"],
        class_cond=values["class_cond"],
        random_crop=data.random_crop,
        random_flip=data.random_flip,
        seed=values["seed"],
        rank=dist_util.get_rank(),
        world_size=world_size,
        num_workers=None if data.num_workers < 0 else data.num_workers,
    )


def open_stream(start: int, **options: Any) -> Any:
    return load_data(start=start, **options)


def loop_arguments(settings: Settings) -> dict[str, Any]:
    """What both training loops take from the flags."""
    train, values = settings.section(TrainConfig), settings.values
    same_names = (
        "microbatch", "lr", "ema_rate", "log_interval", "save_interval", "resume_checkpoint", "fp16_scale_growth",
        "weight_decay", "lr_anneal_steps", "optimizer", "resume", "total_training_steps",
    )
    return {name: getattr(train, name) for name in same_names} | {
        "batch_size": rank_batch(train.global_batch_size, train.batch_size, dist_util.get_world_size()),
        "precision": choose_precision(values["precision"], values["use_fp16"], dist_util.dev()),
        "seed": values["seed"],
        "config": dict(values),
    }


def describe(settings: Settings) -> None:
    """--dry_run: print the resolved run as JSON, with the network's size, and do nothing."""
    with th.device("meta"):
        parameters = sum(param.numel() for param in model_from(settings).parameters())
    if dist_util.is_main():
        facts = {"parameters": parameters, "ranks": dist_util.get_world_size()}
        print(json.dumps(settings.values | facts, indent=2))
