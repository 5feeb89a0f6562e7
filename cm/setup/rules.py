"""The order in which the flags of a training run are resolved: one table, read from top to bottom.

A rule may set values that the command line, a file and a checkpoint do not set, and refuse contradictions; `Provenance`
says which source wins. After the last rule, the settings do not change, and components take frozen sections of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cm.config.flags import Settings
from cm.config.needs import refuse_idle
from cm.config.schema import TrainConfig
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.setup import durations
from cm.setup.callbacks import check_flags
from cm.setup.channels import apply_latent_defaults
from cm.setup.clock import check_clock
from cm.setup.data import share_of_batch
from cm.setup.guide import choose_teacher_guide, prepare_label_dropout
from cm.setup.inherit import inherit_checkpoint, inherit_resumed
from cm.setup.latents import take_latents
from cm.setup.model import drop_unreachable_attention
from cm.setup.objective import (
    apply_objective_defaults,
    apply_precond_defaults,
    check_noise_levels,
    check_teacher,
    kind_of_result,
    objective_kind,
)
from cm.setup.parallel import check_parallel

Rule = Callable[[Settings], None]


def resolve(settings: Settings, rules: Sequence[Rule]) -> None:
    """Apply the rules in their order, on every rank."""
    for rule in rules:
        rule(settings)


def resolve_durations(settings: Settings) -> None:
    """Turn the durations that are given in images into steps; see `cm.setup.durations`.

    :raises UserError: if the images of a step are given in two ways that disagree.
    """
    train, rank, world_size = settings.section(TrainConfig), dist.get_rank(), dist.get_world_size()
    _, global_batch = share_of_batch(train.global_batch_size, train.batch_size, rank, world_size)
    typed = all(settings.is_typed(name) for name in ("batch_size", "global_batch_size"))
    if typed and global_batch != train.global_batch_size:
        raise UserError(f"--batch_size {train.batch_size} on {world_size} rank(s) is {global_batch} images per step, "
                        f"but --global_batch_size asks for {train.global_batch_size}: give one of them")
    durations.resolve_durations(settings, global_batch)


def inherit_teacher(settings: Settings) -> None:
    """Take the architecture from the teacher, which must be a diffusion model.

    :raises UserError: if it is a consistency model.
    """
    if not settings.values["teacher_model_path"]:
        return
    teacher = inherit_checkpoint(settings, "teacher_model_path")
    if teacher.training_mode and kind_of_result(teacher.training_mode).few_step:
        raise UserError(f"--teacher_model_path {teacher.path} is a consistency model; a teacher is a diffusion model")


def refuse_idle_flags(settings: Settings) -> None:
    """:raises UserError: for a flag on the command line that this run would ignore; see `cm.config.needs`."""
    kind, values = objective_kind(settings.values), settings.values
    refuse_idle(settings, {
        "dry_run": settings.dry_run, "flow_map": kind.second_time, "shrinking": "shrink_q" in kind.options_of(values),
        "teacher": any(each.origin == "teacher" for each in kind.companions_of(values)),
    })


TRAINING: tuple[Rule, ...] = (
    resolve_durations,                                      # kimg and ticks become steps
    check_teacher,
    prepare_label_dropout,                                  # the network that it needs
    inherit_teacher,                                        # the architecture, from the file that is distilled
    inherit_resumed,                                        # or from the one that --resume, --resume_checkpoint name
    take_latents,                                           # size, channels and scale, from the data
    apply_latent_defaults,                                  # of flags that are not given
    drop_unreachable_attention,                             # of the default attention resolutions
    choose_teacher_guide,                                   # which must fit the teacher
    apply_objective_defaults,                               # of flags that are not given
    apply_precond_defaults,
    check_noise_levels,
    check_clock,
    check_parallel,
    refuse_idle_flags,
    check_flags,                                            # of samples and measurements during training
)
