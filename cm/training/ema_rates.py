"""The rates of weight averages: a decay rate per step, a half-life in images, or a power function; and their warm-up.

B is the number of images per step, n the number of images seen before the step.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cm.errors import UserError
from cm.training import power_ema

HALF_LIFE = "kimg"                              # the end of the name of a half-life: "500kimg"
POWER = "power"                                 # the beginning of the name of a power function: "power0.05"


@dataclass(frozen=True)
class EmaRate:
    """The decay rate of one average.

    :param name: as given to --ema_rate, such as "0.9999", "500kimg" or "power0.05"; also used in file names.
    :param rampup_ratio: the half-life, also that of a decay rate, is never longer than this fraction of the images
        seen, so that the average forgets the first weights; 0 for no such limit.
    """

    name: str
    rampup_ratio: float = 0.0

    def __str__(self) -> str:
        return self.name

    @property
    def power_std(self) -> float | None:
        """The relative width of a power-function average; None for the others."""
        return float(self.name.removeprefix(POWER)) if self.name.startswith(POWER) else None

    def decay(self, images_seen: int, batch: int, began: int = 0) -> float:
        """The rate of the step that follows `images_seen` images.

        A half-life of h images is min(h, ratio n): 0.5^(B / h) per step, and the first step copies the weights (Karras
        et al. 2022, arXiv 2206.00364, appendix F; EDM's own runs have h = 500 kimg and a ratio of 0.05). A decay rate
        has the same limit, min(rate, 0.5^(B / (ratio n))).

        The rate of a power function depends on its width and on the images seen only, see `power_ema.decay`.

        :param batch: B, images per step over all ranks.
        :param began: the images seen when the average began, from which a power function counts.
        """
        if self.power_std is not None:
            return power_ema.decay(images_seen - began + batch, batch, self.power_std)
        is_halflife = self.name.endswith(HALF_LIFE)
        halflife = float(self.name.removesuffix(HALF_LIFE)) * 1000 if is_halflife else math.inf
        if self.rampup_ratio:
            halflife = min(halflife, self.rampup_ratio * images_seen)
        limit = 0.5 ** (batch / halflife) if halflife else 0.0      # 1 without a limit
        return limit if is_halflife else min(float(self.name), limit)


def parse_rates(ema_rate: str | float, rampup_ratio: float = 0.0) -> list[EmaRate]:
    """'0.999,500kimg,power0.05' -> one rate for each average.

    :raises UserError: if a part is not a rate in [0, 1], a half-life or the width of a power function.
    """
    names = [name.strip() for name in str(ema_rate).split(",") if name.strip()]
    for name in names:
        if width := re.fullmatch(POWER + r"(\d*\.\d+)", name):
            power_ema.gamma_of(float(width[1]))
            continue
        try:
            number = float(name.removesuffix(HALF_LIFE))
        except ValueError:
            number = math.nan
        if not (0 < number < math.inf if name.endswith(HALF_LIFE) else 0 <= number <= 1):
            raise UserError(f"--ema_rate {ema_rate!r}: {name!r} is not a decay rate in [0, 1] or a half-life such as "
                            "500kimg, nor the width of a power function such as power0.05")
    return [EmaRate(name, rampup_ratio) for name in names]
