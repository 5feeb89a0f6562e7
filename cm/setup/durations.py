"""Durations that NVlabs/edm counts in images or ticks, turned into the steps that the training loop counts.

A kimg is 1000 images over all ranks, a tick is --tick_kimg of them.
"""

from __future__ import annotations

import math

from cm.config.flags import Origin, Provenance, Settings
from cm.errors import UserError
from cm.logging import logger
from cm.training.ema_rates import HALF_LIFE


def steps_of(kimg: float, batch: int) -> int:
    """The least number of steps that show so many images, at least 1.

    :param batch: images per step over all ranks.
    """
    return max(1, math.ceil(round(kimg * 1000 / batch, 9)))


def resolve_durations(settings: Settings, batch: int) -> None:
    """Turn the flags in images and in ticks (--total_kimg, --tick_kimg and the rest) into those of the loop, in steps.

    :param batch: images per step over all ranks.
    :raises UserError: if a duration is given in steps and in images, or in ticks without --tick_kimg.
    """
    values = settings.values
    ticks = [values[flag] for flag in ("snapshot_ticks", "state_dump_ticks") if values[flag]]
    if ticks and not values["tick_kimg"]:
        raise UserError("--snapshot_ticks and --state_dump_ticks count ticks: give --tick_kimg, the length of one, "
                        "such as --tick_kimg 50")
    if values["total_kimg"]:
        set_steps(settings, "total_training_steps", "total_kimg", steps_of(values["total_kimg"], batch), batch)
    if values.get("stage_kimg"):
        set_steps(settings, "stage_steps", "stage_kimg", steps_of(values["stage_kimg"], batch), batch)
    if values["tick_kimg"]:
        tick = steps_of(values["tick_kimg"], batch)
        set_steps(settings, "log_interval", "tick_kimg", tick, batch)
        if ticks:                               # a checkpoint is a snapshot and a dump: the more frequent of both
            flag = min(("snapshot_ticks", "state_dump_ticks"), key=lambda name: values[name] or math.inf)
            set_steps(settings, "save_interval", flag, tick * values[flag], batch)
    total, annealed = values["total_training_steps"], values["lr_anneal_steps"]
    if 0 < annealed < total:
        logger.warn(f"training ends at step {annealed}, where the learning rate is 0, not at step {total}: "
                    f"--lr_anneal_steps {annealed} is less than --total_training_steps {total}")
    if values["ema_halflife_kimg"]:
        name = f"{values['ema_halflife_kimg']:g}{HALF_LIFE}"
        rates = values["ema_rate"].split(",") if settings.is_given("ema_rate") else []
        if name not in [rate.strip() for rate in rates]:
            settings.replace(ema_rate=",".join([*rates, name]))


def set_steps(settings: Settings, name: str, flag: str, steps: int, batch: int) -> None:
    """Set the flag `name`, in steps, from the value of `flag`, in images.

    The command line wins over a file. Settings that were resolved and are read back from a file agree.

    :raises UserError: if both are given in the same place and disagree.
    """
    value = settings.values[name]
    by_steps = settings.given.get(name)
    by_flag = settings.given.get(flag, Origin(Provenance.COMMAND_LINE, f"--{flag}"))
    if by_steps and value:
        typed = [origin.kind == Provenance.COMMAND_LINE for origin in (by_steps, by_flag)]
        if value != steps and typed[0] == typed[1]:
            raise UserError(
                f"{by_steps} asks for {name}={value}, and {by_flag} for {flag}={settings.values[flag]}, which at "
                f"{batch} images per step is {name}={steps}: give one of them on the command line"
            )
        if typed[0] and not typed[1]:
            return
    settings.replace(**{name: steps})
