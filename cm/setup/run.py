"""What the scripts do between their flags and their loop: lock the folder, open the log, resolve, describe."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch as th
from torch import nn

from cm.checkpoints import lock, manifest
from cm.config.flags import Settings
from cm.config.schema import CONSISTENCY_MODES, TrainConfig
from cm.distributed import setup as dist
from cm.distributed import signals
from cm.io import storage
from cm.logging import logger
from cm.networks.build import to_device
from cm.networks.compile import compile_network
from cm.setup.data import share_of_batch
from cm.setup.inherit import inherit_checkpoint, inherit_flags
from cm.setup.model import choose_precision, model_from
from cm.training import durations
from cm.training.memory_estimate import PlannedRun, activations, line, plan


def start_run(settings: Settings) -> None:
    """Lock the folder of a training run against a second job, and start its log.

    :raises UserError: on every rank, if another job has it.
    """
    directory = settings.values["log_dir"] or os.environ.get("OPENAI_LOGDIR", "")
    if directory and not storage.is_remote(directory):      # a new temporary folder is nobody else's
        dist.on_main(lock.take, os.path.expanduser(directory))
    signals.allow(settings.values["grace_seconds"])
    open_log(settings)


def inherit_resumed(settings: Settings) -> None:
    """Take the architecture from the checkpoint that --resume or --resume_checkpoint names.

    :raises UserError: if there is no such checkpoint, or another flag contradicts it.
    """
    resume = settings.values["resume"]
    if resume not in ("auto", "never"):
        inherit_flags(settings, dist.on_main(manifest.find, resume).config, (), resume)
    elif settings.values["resume_checkpoint"]:
        inherit_checkpoint(settings, "resume_checkpoint")


def resolve_durations(settings: Settings) -> None:
    """Turn the durations that are given in images into steps; see `cm.training.durations`."""
    train, rank, world_size = settings.section(TrainConfig), dist.get_rank(), dist.get_world_size()
    _, global_batch = share_of_batch(train.global_batch_size, train.batch_size, rank, world_size)
    durations.resolve_durations(settings, global_batch)


def open_log(settings: Settings) -> None:
    """Start the log in --log_dir and leave the resolved flags there."""
    also = ("stats",) if settings.values.get("tick_kimg") else ()
    logger.configure(settings.values["log_dir"] or None, rank=dist.get_rank(), also=also)
    dist.on_main(save_config, settings)
    logger.log(f"logging to {logger.get_dir()} on {dist.get_world_size()} rank(s), device {dist.dev()}")


def save_config(settings: Settings) -> None:
    text = settings.as_text().encode()
    storage.write_atomically(os.path.join(logger.get_dir(), "config.json"), lambda file: file.write(text))


def loop_arguments(settings: Settings) -> dict[str, Any]:
    """What both training loops take from the flags."""
    train, values = settings.section(TrainConfig), settings.values
    same_names = (
        "microbatch", "lr", "ema_rate", "log_interval", "save_interval", "resume_checkpoint", "fp16_scale_growth",
        "weight_decay", "lr_anneal_steps", "optimizer", "resume", "total_training_steps", "lr_rampup_kimg",
        "ema_rampup_ratio", "checkpoint_dir", "keep_checkpoints", "milestone_interval", "on_save_error",
        "ema_device", "shard_ema", "shard_optimizer",
    )
    batch_size, global_batch = share_of_batch(
        train.global_batch_size, train.batch_size, dist.get_rank(), dist.get_world_size()
    )
    return {name: getattr(train, name) for name in same_names} | {
        "with_ticks": train.tick_kimg > 0,
        "batch_size": batch_size,
        "global_batch_size": global_batch,
        "precision": run_precision(settings),
        "seed": values["seed"],
        "config": dict(values),
        "start": settings.sources.get("resume_checkpoint"),
    }


def on_device(settings: Settings, model: nn.Module) -> nn.Module:
    """Put a network on this rank's device, compiled if the flags say so."""
    to_device(model, dist.dev())
    if settings.values["compile"]:
        compile_network(model, dist.dev())
    return model


def run_precision(settings: Settings) -> str:
    return choose_precision(settings.values["precision"], settings.values["use_fp16"], dist.dev())


def dry_run(settings: Settings) -> None:
    """--dry_run: print the resolved run as JSON, with the network's size, and do nothing.

    Of a training run also the memory that it takes on the fullest rank, in bytes, and on stderr as a table.
    """
    with th.device("meta"):
        model = model_from(settings)
    facts = {
        "parameters": sum(param.numel() for param in model.parameters()), "ranks": dist.get_world_size()
    }
    if not dist.is_main():
        return
    if "ema_rate" in settings.values:
        run, images = planned_run(settings)
        memory = plan(model, run)
        kept = activations(
            model, images, settings.values["image_size"], run.precision, settings.values["class_cond"]
        )
        facts["memory"] = {
            "ranks": run.ranks, **memory.as_dict(), "activations_estimate": kept, "images_per_pass": images
        }
        print(f"memory of one of {run.ranks} ranks\n{memory.table()}", file=sys.stderr)
        print(line(f"estimate: {images} images at a time", kept), file=sys.stderr)
    print(json.dumps(settings.values | facts, indent=2))


def planned_run(settings: Settings) -> tuple[PlannedRun, int]:
    """What the flags of a training run say about its memory, and the images of a forward pass."""
    train, values = settings.section(TrainConfig), settings.values
    ranks = train.dry_run_ranks or dist.get_world_size()
    images, _ = share_of_batch(train.global_batch_size, train.batch_size, 0, ranks)
    mode = values["training_mode"]
    run = PlannedRun(
        precision=run_precision(settings),
        optimizer=train.optimizer,
        ema_rates=durations.parse_rates(train.ema_rate),
        ranks=ranks,
        ema_device=train.ema_device,
        shard_ema=train.shard_ema,
        shard_optimizer=train.shard_optimizer,
        has_target=mode in CONSISTENCY_MODES,
        teacher={"consistency_distillation": "still", "progdist": "moving"}.get(mode, "none"),
        on_gpu=train.dry_run_ranks > 0 or dist.dev().type == "cuda",
    )
    return run, min(images, train.microbatch) if train.microbatch > 0 else images
