"""Weights of a loss by its noise level, as functions of the signal-to-noise ratio snr = 1 / sigma^2 [N].

Sources: `karras` is Karras et al. 2022 (EDM, arXiv 2206.00364), table 1, which makes the optimal loss of data with
variance sigma_data^2 the same at every level; `snr+1` and `truncated-snr` are Salimans and Ho 2022 (Progressive
Distillation, arXiv 2202.00512), section 4.
"""

from __future__ import annotations

import torch as th
from torch import Tensor

from cm.registry import lookup


def snr(snrs: Tensor, sigma_data: float) -> Tensor:
    """The unweighted error of the predicted noise."""
    return snrs


def snr_plus_one(snrs: Tensor, sigma_data: float) -> Tensor:
    """The sum of the errors of the predicted noise and of the data, which is the error of a predicted velocity."""
    return snrs + 1


def karras(snrs: Tensor, sigma_data: float) -> Tensor:
    """1 / c_out^2: the error of the network's own output has weight 1."""
    return snrs + 1 / sigma_data**2


def truncated_snr(snrs: Tensor, sigma_data: float) -> Tensor:
    """The larger of the errors of noise and of data."""
    return snrs.clamp(min=1)


def uniform(snrs: Tensor, sigma_data: float) -> Tensor:
    """The unweighted error of the data."""
    return th.ones_like(snrs)


WEIGHTINGS = {
    "karras": karras,
    "snr": snr,
    "snr+1": snr_plus_one,
    "truncated-snr": truncated_snr,
    "uniform": uniform,
}


def get_weightings(weight_schedule: str, snrs: Tensor, sigma_data: float) -> Tensor:
    """The weights of `weight_schedule` at the ratios `snrs`: [N] -> [N].

    :raises UserError: for a name that is not in WEIGHTINGS.
    """
    return lookup(WEIGHTINGS, weight_schedule, "weight_schedule")(snrs, sigma_data)
