"""One set-up for every training command: from flags to a loop that runs."""

from __future__ import annotations

import torch as th
from torch import nn

from cm.checkpoints import loading
from cm.config.flags import Settings
from cm.config.objective_schema import ConsistencyConfig
from cm.config.schema import TrainConfig
from cm.data.image_source import ImageSource
from cm.data.streams import ImageStream
from cm.distributed import setup as dist
from cm.logging import logger
from cm.objectives.base import Companion, Objective
from cm.setup import announce, rules
from cm.setup.callbacks import open_callbacks
from cm.setup.clock import warn_of_fast_clock
from cm.setup.data import augment, drop_labels, open_data, share_of_batch
from cm.setup.dry_run import dry_run
from cm.setup.guide import guided_by
from cm.setup.model import diffusion_from, model_from
from cm.setup.objective import objective_kind
from cm.setup.rounding import warn_of_rounding
from cm.setup.run import on_device, run_precision, save_config, start_run
from cm.setup.weights_path import fetch_inputs
from cm.training.config import CompanionNetwork, LoopConfig, RunParts
from cm.training.loop import TrainLoop
from evaluations.in_training import open_metric

MILESTONE_SAVES = 10                                        # --milestone_interval -1, in checkpoints


def train(settings: Settings) -> None:
    """Train what the flags describe, or resume it; on every rank.

    :raises UserError: on every rank, for flags that do not go together and files that cannot be used.
    """
    dist.setup_dist(settings.values["timeout_seconds"], settings.values["device"])
    rules.resolve(settings, rules.TRAINING)
    if settings.dry_run:
        return dry_run(settings)
    fetch_inputs(settings, "eval_ref", "inception")
    kind = objective_kind(settings.values)
    kind.prepare(settings.values)
    start_run(settings)
    try:
        stopped = run(settings, kind)
    except BaseException:
        logger.close("failed")
        raise
    logger.close("stopped" if stopped else "finished")


def run(settings: Settings, kind: type[Objective]) -> bool:
    """Make the parts of a run whose log is open, and train; returns whether a signal has stopped it."""
    loop, source = make_loop(settings, kind)
    loop.resume()
    settings.replace(keep_checkpoints=loop.checkpoints.keep)        # as many as before, where no flag says
    dist.on_main(save_config, settings)                     # not for a run that was refused
    dist.on_main(announce.keep_classes, source, settings.values["class_cond"])
    if dist.is_main():
        logger.log(announce.start_line(settings, loop, source))
    loop.run_loop()
    if dist.is_main() and not loop.stop_signal:
        logger.log(announce.end_line(settings, loop))
    return bool(loop.stop_signal)


def make_loop(settings: Settings, kind: type[Objective]) -> tuple[TrainLoop, ImageSource | ImageStream]:
    """The loop of a run before its start, and the images it is trained on; on every rank.

    :param settings: resolved by `rules.TRAINING`.
    """
    diffusion = diffusion_from(settings, kind.distillation, kind.distance_of(settings.values))
    objective = kind.from_flags(diffusion, settings.values)
    warn_of_fast_clock(settings, diffusion)
    warn_of_rounding(settings, objective)
    data = open_data(settings, references=objective.references)
    callbacks = open_callbacks(settings, open_metric)
    model, companions = make_networks(settings, objective)
    parts = RunParts(
        model=model, diffusion=diffusion, objective=objective,
        data=drop_labels(settings, augment(settings, data.stream, model)), companions=companions, callbacks=callbacks,
        start=settings.sources.get("resume_checkpoint"), flags=dict(settings.values), class_names=data.class_names,
    )
    return TrainLoop(loop_config(settings), parts), data.source


def make_networks(settings: Settings, objective: Objective) -> tuple[nn.Module, dict[str, CompanionNetwork]]:
    """The online network and the companions that the objective declares, on this rank's device.

    The online network starts from the teacher's weights, if a teacher is given.
    """
    th.manual_seed(settings.values["seed"])
    model = model_from(settings)
    teacher = None
    if source := settings.sources.get("teacher_model_path"):
        dropout = settings.section(ConsistencyConfig).teacher_dropout
        teacher = model_from(settings, dropout=dropout, second_time=False)
        loading.fit(teacher, source.take(), source.path)
        model.load_state_dict(model.state_dict() | teacher.state_dict())    # a second time begins as it is
    companions = {}
    for each in objective.companions:
        network = model_from(settings) if each.origin != "teacher" or teacher is None else teacher
        if each.origin == "online":
            network.load_state_dict(model.state_dict())
        companions[each.name] = placed(settings, each, network)
    return on_device(settings, model), companions


def placed(settings: Settings, companion: Companion, network: nn.Module) -> CompanionNetwork:
    """A companion on this rank's device, as its role has it."""
    on_device(settings, network)
    if companion.origin == "teacher":
        network.eval()
    network.requires_grad_(companion.changes == "trained")
    kind = objective_kind(settings.values)
    diffusion = diffusion_from(settings, companion.distillation, kind.distance_of(settings.values))
    if companion.origin == "teacher":
        guide = settings.sources.get("teacher_guide")
        diffusion = guided_by(diffusion, guide, settings, stores_casts=not kind.full_precision_passes)
    return CompanionNetwork(network, diffusion)


def loop_config(settings: Settings) -> LoopConfig:
    """The settings of the training loop, from the flags."""
    train = settings.section(TrainConfig)
    batch_size, global_batch = share_of_batch(
        train.global_batch_size, train.batch_size, dist.get_rank(), dist.get_world_size()
    )
    same_names = (
        "microbatch", "lr", "ema_rate", "log_interval", "save_interval", "resume_checkpoint", "fp16_scale_growth",
        "weight_decay", "lr_anneal_steps", "optimizer", "adam_beta1", "adam_beta2", "adam_eps", "resume",
        "total_training_steps", "lr_rampup_kimg", "lr_decay_steps", "ema_rampup_ratio", "checkpoint_dir",
        "on_save_error", "ema_device", "shard_ema", "shard_optimizer", "grad_clip", "allow_other_classes", "parallel",
        "shard_size", "checkpoint_format", "async_save",
    )
    milestones = train.milestone_interval if train.milestone_interval >= 0 else MILESTONE_SAVES * train.save_interval
    return LoopConfig(
        batch_size=batch_size, global_batch_size=global_batch, precision=run_precision(settings),
        seed=settings.values["seed"], verify_weights=settings.values["verify_weights"], with_ticks=train.tick_kimg > 0,
        keep_checkpoints=train.keep_checkpoints if settings.is_given("keep_checkpoints") else None,
        milestone_interval=milestones,
        **{name: getattr(train, name) for name in same_names},
    )
