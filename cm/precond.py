"""Preconditioning: how a denoiser is made of a network, D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

Sources: Karras et al. 2022 (EDM, arXiv 2206.00364), table 1; Song et al. 2023 (Consistency Models, arXiv 2303.01469),
appendix C. sigma is [N], and so is everything returned.
"""

from __future__ import annotations

from torch import Tensor

from cm.interfaces import Scalings

SIGMA_DATA = 0.5


class EDMPrecond:
    """Network input and training target have unit variance at every noise level, for data of variance sigma_data^2."""

    def __init__(self, sigma_data: float = SIGMA_DATA, sigma_min: float = 0.002):
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min

    def scalings(self, sigma: Tensor) -> Scalings:
        variance = sigma**2 + self.sigma_data**2
        return Scalings(
            c_skip=self.sigma_data**2 / variance,
            c_out=sigma * self.sigma_data * variance.rsqrt(),
            c_in=variance.rsqrt(),
        )

    def c_noise(self, sigma: Tensor) -> Tensor:
        """ln(sigma) / 4, in float64: at 1000 times this value float32 would lose its fourth decimal."""
        # 1e-44, the smallest float32, is what the published models were trained with: sigma = 0 stays finite.
        return (sigma.double() + 1e-44).log() / 4


class ConsistencyPrecond(EDMPrecond):
    """EDM's, moved so that D(x, sigma_min) = x: the boundary condition of a consistency function holds exactly.

    The published checkpoints keep EDM's square root under c_out; some texts print (sigma - sigma_min)^2 there.
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        above = sigma - self.sigma_min
        root = (sigma**2 + self.sigma_data**2).rsqrt()
        return Scalings(
            c_skip=self.sigma_data**2 / (above**2 + self.sigma_data**2),
            c_out=above * self.sigma_data * root,
            c_in=root,
        )


PRECONDS = {"edm": EDMPrecond, "consistency": ConsistencyPrecond}
