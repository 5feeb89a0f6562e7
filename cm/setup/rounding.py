"""Whether the precision of a run resolves what its objective compares: a warning if rounding would hide it.

Two passes of a network round differently. In bf16 the rounding of the difference between a trained denoiser's outputs
was 0.2 of it or less at a gap of 0.3 between their noise levels, as in consistency distillation on 40 levels, 0.2 to
1.5 of it at a gap of 0.036, and 0.9 to 5 at 0.009, iCT's last grid. In fp16 and in TensorFloat-32 it was an eighth of
that.
"""

from __future__ import annotations

from cm.config.flags import Settings
from cm.logging import logger
from cm.objectives.base import Objective, length_of
from cm.setup.objective import choice_of
from cm.setup.run import run_precision

CLOSEST = 0.05                                              # gap without a warning


def warn_of_rounding(settings: Settings, objective: Objective) -> None:
    """Warn if the levels that the objective compares come too close for bf16."""
    gap = objective.least_gap(length_of(settings.values))
    if gap < CLOSEST and run_precision(settings) == "bf16":
        logger.warn(
            f"{choice_of(settings.values)} ends by comparing outputs whose noise levels differ by {gap:.2g} of "
            f"themselves: below {CLOSEST:g}, the rounding of bf16 is as large as the difference of the outputs; give "
            "--precision fp32, on a GPU with --tf32 True (docs/few-step.md)"
        )
