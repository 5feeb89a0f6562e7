"""Whether the precision of a run resolves what its objective compares: a warning if rounding would hide it.

Two passes of a network round differently. In bf16 this is a small part of the difference between outputs whose noise
levels are 0.3 of themselves apart, and more than half of it at 0.0071, iCT's last grid (tests/setup/test_rounding.py).
fp16 and TensorFloat-32 have three more bits.
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
