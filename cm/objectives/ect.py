"""Easy consistency tuning of a diffusion model: Geng et al. 2024 (ECT, arXiv 2406.14548).

A denoiser is the consistency function for pairs with r = 0; it is tuned while r approaches t. The scalings are those of
the diffusion model, with D(x, 0) = x, so training starts from its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cm.objectives.consistency import Consistency, LossParts


class ECT(Consistency):
    """[sqrt(|D(x_t, t) - sg D(x_r, r)|^2 + c^2) - c] / (t - r), where D(x, 0) = x.

    With the published c, near 0, the gradient is that of a unit vector over t - r: it doubles from stage to stage at
    q = 2 and does not fall with the error. It is 1e-8 and not 0, where the gradient of two equal images is infinite.
    """

    needs_slow_clock = True
    parts = LossParts(pairs="shrinking", pair_path="noise", pair_weight="gap", pair_target="online")
    distillation = False
    defaults: ClassVar[Mapping[str, Any]] = {
        "loss_norm": "pseudo-huber", "weight_schedule": "uniform", "huber_c": 1e-8,
    }
