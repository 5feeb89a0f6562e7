"""How fast a weight average follows the weights: a decay rate, or a half-life counted in images, and its warm-up.

B images per step, n images seen before the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cm.errors import UserError

HALF_LIFE = "kimg"                              # the end of the name of a half-life: "500kimg"


@dataclass(frozen=True)
class EmaRate:
    """The decay rate of one average.

    :param name: as the flag spells it, "0.9999" or "500kimg"; it also names the average's files.
    :param rampup_ratio: the half-life, also that of a decay rate, is never longer than this fraction of the images
        seen, so that the average forgets the first weights; 0 for no such limit.
    """

    name: str
    rampup_ratio: float = 0.0

    def __str__(self) -> str:
        return self.name

    def decay(self, images_seen: int, batch: int) -> float:
        """The rate of the step that follows `images_seen` images.

        A half-life of h images is min(h, ratio n): 0.5^(B / h) per step, and the first step copies the weights (Karras
        et al. 2022, arXiv 2206.00364, appendix F; EDM's own runs have h = 500 kimg and a ratio of 0.05). A decay rate
        has the same limit, min(rate, 0.5^(B / (ratio n))).

        :param batch: B, images per step over all ranks.
        """
        is_halflife = self.name.endswith(HALF_LIFE)
        halflife = float(self.name.removesuffix(HALF_LIFE)) * 1000 if is_halflife else math.inf
        if self.rampup_ratio:
            halflife = min(halflife, self.rampup_ratio * images_seen)
        limit = 0.5 ** (batch / halflife) if halflife else 0.0      # 1 without a limit
        return limit if is_halflife else min(float(self.name), limit)


def parse_rates(ema_rate: str | float, rampup_ratio: float = 0.0) -> list[EmaRate]:
    """'0.999,500kimg' -> one rate for each average.

    :raises UserError: if a part is neither a rate in [0, 1] nor a half-life.
    """
    names = [name.strip() for name in str(ema_rate).split(",") if name.strip()]
    for name in names:
        try:
            number = float(name.removesuffix(HALF_LIFE))
        except ValueError:
            number = math.nan
        if not (0 < number < math.inf if name.endswith(HALF_LIFE) else 0 <= number <= 1):
            raise UserError(f"--ema_rate {ema_rate!r}: {name!r} is not a decay rate in [0, 1] or a half-life such as "
                            "500kimg")
    return [EmaRate(name, rampup_ratio) for name in names]
