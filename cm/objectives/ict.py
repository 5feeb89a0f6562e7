"""Improved consistency training, without a teacher: Song and Dhariwal 2023 (iCT, arXiv 2310.14189).

Against consistency training: the target has the online weights (section 3.2), the distance is the pseudo-Huber metric
(3.3), the number of intervals doubles (3.4), and levels are drawn lognormal and weighted by 1 / (t - r) (3.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cm.objectives.consistency import Consistency, LossParts


class ICT(Consistency):
    """[sqrt(|f(x_t, t) - sg f(x_r, r)|^2 + c^2) - c] / (t - r) for neighbours t > r of a grid of 11 to 1281 levels."""

    needs_slow_clock = True
    parts = LossParts(pairs="lognormal-grid", pair_path="noise", pair_weight="gap", pair_target="online")
    defaults: ClassVar[Mapping[str, Any]] = {
        "loss_norm": "pseudo-huber", "weight_schedule": "uniform", "scale_mode": "doubling", "start_scales": 10,
        "end_scales": 1280,
    }
