"""Durations counted in images, as NVlabs/edm counts them, beside those counted in steps.

A kimg is 1000 images over all ranks. Flags in kimg become steps before the loop begins; what must stay in images (a
half-life, a ramp) is asked of the objects here at each step. B images of a step, n images seen before it.
"""

from __future__ import annotations

import math

from cm.config.flags import Settings
from cm.errors import UserError

HALF_LIFE = "kimg"                              # the end of a rate that is a half-life: "500kimg"


def steps_of(kimg: float, batch: int) -> int:
    """The least number of steps that show so many images, at least 1."""
    return max(1, math.ceil(round(kimg * 1000 / batch, 9)))


def resolve_durations(settings: Settings, batch: int) -> None:
    """Turn the flags in images and in ticks (--total_kimg, --tick_kimg and the rest) into those of the loop, in steps.

    :param batch: images per step over all ranks.
    :raises UserError: if a duration is asked for in steps and in images, or in ticks without
        --tick_kimg.
    """
    values = settings.values
    ticks = [values[flag] for flag in ("snapshot_ticks", "state_dump_ticks") if values[flag]]
    if ticks and not values["tick_kimg"]:
        raise UserError("--snapshot_ticks and --state_dump_ticks count ticks: give --tick_kimg, the kimg of one, "
                        "such as --tick_kimg 50")
    if values["total_kimg"]:
        set_steps(settings, "total_training_steps", "total_kimg", steps_of(values["total_kimg"], batch), batch)
    if values["tick_kimg"]:
        tick = steps_of(values["tick_kimg"], batch)
        set_steps(settings, "log_interval", "tick_kimg", tick, batch)
        if ticks:                               # a checkpoint is a snapshot and a dump: the more frequent of both
            flag = min(("snapshot_ticks", "state_dump_ticks"), key=lambda name: values[name] or math.inf)
            set_steps(settings, "save_interval", flag, tick * values[flag], batch)
    if values["ema_halflife_kimg"]:
        word = f"{values['ema_halflife_kimg']:g}{HALF_LIFE}"
        rates = values["ema_rate"].split(",") if "ema_rate" in settings.given else []
        if word not in [rate.strip() for rate in rates]:
            settings.replace(ema_rate=",".join([*rates, word]))


def set_steps(settings: Settings, name: str, flag: str, steps: int, batch: int) -> None:
    """Give the flag `name`, in steps, the value that `flag`, in images, stands for.

    The command line wins over a file; what was resolved once and is read back from a file agrees with itself.
    """
    by, value = settings.given.get(name, ""), settings.values[name]
    by_flag = settings.given.get(flag, f"--{flag}")
    if by and value and value != steps and is_typed(by) == is_typed(by_flag):
        raise UserError(
            f"{by} asks for {name}={value}, and {by_flag} for {flag}={settings.values[flag]}, which at {batch} images "
            f"a step is {name}={steps}: give one of them on the command line"
        )
    if by and value and is_typed(by) and not is_typed(by_flag):
        return
    settings.replace(**{name: steps})


def is_typed(place: str) -> bool:
    """Whether a value stands on the command line, not in a file."""
    return place.startswith("--")


# ---- averages of weights ----


class EmaRate(str):
    """The decay rate of an average of weights: fixed, or by a half-life in images.

    It is a word, '0.9999' or '500kimg', because it names the average's files.
    """

    rampup_ratio: float

    def __new__(cls, word: str, rampup_ratio: float = 0.0) -> EmaRate:
        rate = super().__new__(cls, word)
        rate.rampup_ratio = rampup_ratio
        return rate

    def decay(self, images_seen: int, batch: int) -> float:
        """The rate of the step that follows `images_seen` images.

        A half-life of h images is min(h, ratio n): 0.5^(B / h) per step, and the first step copies the weights (Karras
        et al. 2022, arXiv 2206.00364, appendix F; EDM's own runs have h = 500 kimg and a ratio of 0.05).
        """
        if not self.endswith(HALF_LIFE):
            return float(self)
        halflife = float(self.removesuffix(HALF_LIFE)) * 1000
        if self.rampup_ratio:
            halflife = min(halflife, self.rampup_ratio * images_seen)
        return 0.5 ** (batch / halflife) if halflife else 0.0


def parse_rates(ema_rate: str | float, rampup_ratio: float = 0.0) -> list[EmaRate]:
    """'0.999,500kimg' -> an average by each.

    :raises UserError: if a word is neither a rate in [0, 1] nor a half-life.
    """
    words = [word.strip() for word in str(ema_rate).split(",") if word.strip()]
    for word in words:
        try:
            number = float(word.removesuffix(HALF_LIFE))
        except ValueError:
            number = math.nan
        if not (0 < number < math.inf if word.endswith(HALF_LIFE) else 0 <= number <= 1):
            raise UserError(f"--ema_rate {ema_rate!r}: {word!r} is not a decay rate in [0, 1] or a half-life such as "
                            "500kimg")
    return [EmaRate(word, rampup_ratio) for word in words]


# ---- the learning rate ----


def rampup(images_seen: int, rampup_kimg: float) -> float:
    """The factor of a learning rate that rises linearly from 0 over so many kimg; 1 where that is 0."""
    return min(1.0, images_seen / (1000 * rampup_kimg)) if rampup_kimg else 1.0
