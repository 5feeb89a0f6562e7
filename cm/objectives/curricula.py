"""Curricula of consistency training: the number of noise levels N and the decay rate of the target, by step.

Sources: Song et al. 2023 (Consistency Models, arXiv 2303.01469), appendix C: N grows, so that the bias of the loss
falls while its variance rises, and the target follows more slowly. Song and Dhariwal 2023 (iCT, arXiv 2310.14189),
section 3.4: N doubles. Salimans and Ho 2022 (Progressive Distillation, arXiv 2202.00512): N halves. All arithmetic is
in float64, because `ceil` meets whole numbers exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cm.errors import UserError
from cm.registry import lookup

Curriculum = Callable[[int], tuple[float, int]]                     # step -> (target decay rate, N)
Scales = Callable[[int], int]                                       # step -> N


def ema_and_scales(
    target_ema_mode: str,
    start_ema: float,
    scale_mode: str,
    start_scales: int,
    end_scales: int,
    total_steps: int,
    distill_steps_per_iter: int,
) -> Curriculum:
    """The curriculum of a run, a function from the step k (0 for the first) to (target decay rate, N).

    scale_mode `fixed`: N = start_scales. `progressive`: N(k) = max(1, ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1)) + 1
    with s0 = start_scales, s1 = end_scales and K = total_steps, after which N stays. `doubling`: N(k) =
    min(s0 2^floor(k/K'), s1) + 1 with K' = floor(K / (floor(log2(s1/s0)) + 1)). `progdist`: N is halved every
    `distill_steps_per_iter` steps; the stage of 2 lasts twice as long, and 1 stays.

    target_ema_mode `fixed`: start_ema (but 1 with progdist, which has no target). `adaptive`, with progressive only:
    exp(s0 ln(start_ema) / (N - 1)).

    :raises UserError: for unknown modes, modes that cannot be combined, and values that the modes cannot use. All are
        checked here, not at a later step.
    """
    scales = lookup(SCALE_MODES, scale_mode, "scale_mode")(
        start_scales, end_scales, total_steps, distill_steps_per_iter
    )
    if not 0 <= start_ema <= 1:
        raise UserError(f"start_ema is a decay rate in [0, 1], got {start_ema}")
    decay = lookup(EMA_MODES, target_ema_mode, "target_ema_mode")(start_ema, scale_mode, start_scales)

    def curriculum(step: int) -> tuple[float, int]:
        n = scales(step)
        return decay(n), n

    return curriculum


# --- N(step) ----------------------------------------------------------------------------------------------------------


def fixed_scales(start: int, end: int, total_steps: int, steps_per_iter: int) -> Scales:
    """N = start at every step."""
    at_least("start_scales", start, 1)
    return lambda step: start


def progressive_scales(start: int, end: int, total_steps: int, steps_per_iter: int) -> Scales:
    """N grows like a square root, from `start` to `end + 1`.

    Step 0 is special: the root is an integer there, so ceil(start - 1) + 1 = start; from step 1 on, N is start + 1.
    """
    at_least("start_scales", start, 1)
    at_least("end_scales", end, start, "start_scales")
    at_least("total_steps", total_steps, 1)

    def scales(step: int) -> int:
        done = min(step, total_steps) / total_steps
        root = math.sqrt(done * ((end + 1) ** 2 - start**2) + start**2)
        return max(1, math.ceil(root - 1)) + 1

    return scales


def halving_scales(start: int, end: int, total_steps: int, steps_per_iter: int) -> Scales:
    """N is halved, rounding down, every `steps_per_iter` steps; the stages of 2 and 1 are twice as long."""
    at_least("start_scales", start, 1)
    at_least("distill_steps_per_iter", steps_per_iter, 1)

    def scales(step: int) -> int:
        n = start >> (step // steps_per_iter)
        if n > 2:
            return n
        past_halvings = max(step - steps_per_iter * (math.log2(start) - 1), 0)
        return 1 if past_halvings >= 2 * steps_per_iter else 2

    return scales


def doubling_scales(start: int, end: int, total_steps: int, steps_per_iter: int) -> Scales:
    """N = min(start 2^stage, end) + 1 in stages of equal length: iCT, section 3.4."""
    stage_steps = max(1, total_steps // doublings(start, end))
    at_least("total_steps", total_steps, 1)

    def scales(step: int) -> int:
        stage = min(step // stage_steps, end.bit_length())          # a larger power of two would be above end anyway
        return min(start << stage, end) + 1

    return scales


def doublings(start: int, end: int) -> int:
    """The number of stages in which N doubles from start to end intervals: floor(log2(end / start)) + 1.

    :raises UserError: unless 1 <= start <= end.
    """
    at_least("start_scales", start, 1)
    at_least("end_scales", end, start, "start_scales")
    return (end // start).bit_length()


SCALE_MODES = {
    "fixed": fixed_scales, "progressive": progressive_scales, "progdist": halving_scales, "doubling": doubling_scales,
}


# --- the decay rate of the target ------------------------------------------------------------------------------------


def fixed_ema(start_ema: float, scale_mode: str, start_scales: int) -> Callable[[int], float]:
    """`start_ema` at every step; 1 (a target that never changes) for progressive distillation, which has no target."""
    rate = 1.0 if scale_mode == "progdist" else start_ema
    return lambda n: rate


def adaptive_ema(start_ema: float, scale_mode: str, start_scales: int) -> Callable[[int], float]:
    """exp(s0 ln(start_ema) / (N-1)): the target averages over more steps as the levels move together."""
    if scale_mode != "progressive":
        raise UserError(
            f"target_ema_mode 'adaptive' does not go with scale_mode {scale_mode!r}: it follows a growing N. "
            "Choose scale_mode 'progressive', or target_ema_mode 'fixed'"
        )
    if not start_ema > 0:
        raise UserError(
            f"target_ema_mode 'adaptive' needs a start_ema above 0, got {start_ema}; the paper uses 0.9 and 0.95. "
            "For a target that equals the online network, choose target_ema_mode 'fixed'"
        )
    exponent = start_scales * math.log(start_ema)
    return lambda n: math.exp(exponent / (n - 1))


EMA_MODES = {"fixed": fixed_ema, "adaptive": adaptive_ema}


def at_least(name: str, value: int, bound: int, bound_name: str = "") -> None:
    if value < bound:
        raise UserError(f"{name} must be at least {f'{bound_name}={bound}' if bound_name else bound}, got {value}")
