"""Power-function averages of the weights, and how to make one of any width from a few snapshots.

Source: Karras et al. 2024 (Analyzing and improving the training dynamics of diffusion models, arXiv 2312.02696),
section 3 and appendix C. Time is counted in images. At time t the weights of time tau < t count with the profile
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1); its width is its standard deviation, as a fraction of t. Everything here
is float64, for the system of `coefficients` is badly conditioned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from cm.errors import UserError

WIDEST = 12**-0.5                                           # gamma 0, the mean of all weights


class Profile(NamedTuple):
    """The profile of an average."""

    images: float                                           # t, its time
    gamma: float

    @classmethod
    def of(cls, images: float, std: float) -> Profile:
        """The profile of an average with a relative width."""
        return cls(images, gamma_of(std))


@cache
def gamma_of(std: float) -> float:
    """The exponent of a relative width: the largest root of equation 126.

    :raises UserError: for a width that no exponent above 0 has.
    """
    if not 0 < std < WIDEST:
        raise UserError(f"{std:g} is not a width of a power-function average: it must be above 0 and below "
                        f"{WIDEST:.3f}, such as 0.05")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


def decay(images: float, batch: float, std: float) -> float:
    """What a step leaves of the average: equation 127. The first step copies the weights.

    :param images: seen after the step.
    :param batch: images of the step.
    """
    return max(0.0, 1 - batch / images) ** (gamma_of(std) + 1)


def overlap(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles: equation 151."""
    ratio = a.images / b.images
    power = ratio**b.gamma if ratio < 1 else ratio**-a.gamma
    norm = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return norm * power / max(a.images, b.images)


class Mix(NamedTuple):
    """The coefficients that make one average of others."""

    coefficients: np.ndarray                                # [S] float64, of the snapshots; their sum is 1
    error: float                                            # distance of its profile from the one asked for, relative


def mix(snapshots: Sequence[Profile], target: Profile) -> Mix:
    """The combination of snapshots with the profile nearest to that of the target: algorithm 3.

    :raises UserError: if there is no snapshot, or two are of the same time and width.
    """
    if not snapshots:
        raise UserError("there are no snapshots of power-function averages to compute others from")
    A = np.array([[overlap(a, b) for b in snapshots] for a in snapshots])
    b = np.array([overlap(a, target) for a in snapshots])
    try:
        x = np.linalg.solve(A, b)
    except np.linalg.LinAlgError:
        raise UserError(f"{len(snapshots)} snapshots of power-function averages do not determine others: two of them "
                        "have the same step and width") from None
    x /= x.sum()
    whole = overlap(target, target)
    return Mix(x, math.sqrt(max(0.0, 1 - (2 * x @ b - x @ A @ x) / whole)))
