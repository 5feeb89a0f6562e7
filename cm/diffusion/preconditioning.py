"""Preconditioning: how a network becomes a denoiser, D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

Sources: Karras et al. 2022 (EDM, arXiv 2206.00364), table 1, for EDM and, in its terms, VP and VE (Song et al. 2021,
arXiv 2011.13456) and iDDPM (Nichol and Dhariwal 2021, arXiv 2102.09672); Ho et al. 2020 (DDPM, arXiv 2006.11239);
Song et al. 2023 (Consistency Models, arXiv 2303.01469), appendix C. sigma is [N], and so is every result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch as th
from torch import Tensor

from cm.diffusion import ddpm_schedule
from cm.diffusion.schedules import VE_LEVELS, VP, iddpm_levels
from cm.types import Scalings

SIGMA_DATA = 0.5
STEPS = 1000                                                        # M, of the VP process


class Precond(ABC):
    """The scalings around a network, and what its noise conditioning is.

    :param sigma_data: standard deviation of the data, where the scalings use it.
    :param sigma_min: lowest noise level of the run, where a consistency function is the identity.
    """

    levels: tuple[float, float] = (0.0, math.inf)                   # lowest and highest noise level of its training
    # True if c_noise is the number of a step, 0 to 999, which no time_scale multiplies. Otherwise it is a logarithm.
    counts_steps: bool = False

    def __init__(self, sigma_data: float = SIGMA_DATA, sigma_min: float = 0.002):
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min

    @abstractmethod
    def scalings(self, sigma: Tensor) -> Scalings:
        """c_skip, c_out, c_in in the dtype of sigma."""

    @abstractmethod
    def c_noise(self, sigma: Tensor) -> Tensor:
        """The noise conditioning: what the network is given as its time, in float64."""

    def grid(self, sigmas: Tensor) -> Tensor:
        """The falling noise levels of a sampler, [S+1], moved to those that the network was trained on; 0 stays 0."""
        return sigmas


class EDMPrecond(Precond):
    """Network input and training target have unit variance at every noise level, for data of variance sigma_data^2."""

    def scalings(self, sigma: Tensor) -> Scalings:
        """Table 1, last column."""
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
    """EDM's scalings, shifted so that D(x, sigma_min) = x: the boundary condition of a consistency function, exactly.

    The published checkpoints keep EDM's square root in c_out; some texts print (sigma - sigma_min)^2 there.
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        """Song et al. 2023, appendix C, with the square root of EDM."""
        above = sigma - self.sigma_min
        root = (sigma**2 + self.sigma_data**2).rsqrt()
        return Scalings(
            c_skip=self.sigma_data**2 / (above**2 + self.sigma_data**2),
            c_out=above * self.sigma_data * root,
            c_in=root,
        )


class VEPrecond(Precond):
    """The network predicts the negative noise from the unscaled image: NCSN++ as its authors trained it."""

    levels = VE_LEVELS

    def scalings(self, sigma: Tensor) -> Scalings:
        """Table 1, column VE."""
        one = th.ones_like(sigma)
        return Scalings(c_skip=one, c_out=sigma, c_in=one)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """ln(sigma / 2)"""
        return (sigma.double() / 2).log()


class NoisePrecond(Precond):
    """The network predicts the noise from the image of a variance-preserving process."""

    counts_steps = True

    def scalings(self, sigma: Tensor) -> Scalings:
        """Table 1, columns VP and iDDPM."""
        return Scalings(c_skip=th.ones_like(sigma), c_out=-sigma, c_in=(sigma**2 + 1).rsqrt())


class VPPrecond(NoisePrecond):
    """Continuous time, t = 1e-5 to 1; the network is conditioned on 999 t: DDPM++ as its authors trained it."""

    levels = (VP.sigma(VP.ends[0]), VP.sigma(VP.ends[1]))

    def c_noise(self, sigma: Tensor) -> Tensor:
        """999 t, where sigma(t) = sigma."""
        return (STEPS - 1) * VP.time(sigma.double())


class IDDPMPrecond(NoisePrecond):
    """A table with one noise level per step; between two of them the network is conditioned on the nearest step."""

    def __init__(self, sigma_data: float = SIGMA_DATA, sigma_min: float = 0.002):
        super().__init__(sigma_data, sigma_min)
        self.table = self._make_table()                              # rising, [M] float64: level of step 0, 1, ...
        self.levels = (self.table[0].item(), self.table[-1].item())

    def _make_table(self) -> Tensor:
        return iddpm_levels().flip(0)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The number of the nearest step."""
        return self.nearest(sigma).double()

    def grid(self, sigmas: Tensor) -> Tensor:
        """Each level replaced by the nearest one of the table; equal neighbours become one."""
        known = self.table.to(sigmas.device)[self.nearest(sigmas)].to(sigmas.dtype)
        return th.where(sigmas > 0, known, sigmas).unique_consecutive()

    def nearest(self, sigma: Tensor) -> Tensor:
        """The steps nearest in sigma, and the noisier one of two equally near: [N] int64."""
        table, sigma = self.table.to(sigma.device), sigma.double()
        above = th.searchsorted(table, sigma).clamp(1, len(table) - 1)
        return above - (sigma - table[above - 1] < table[above] - sigma).long()


class DDPMPrecond(NoisePrecond):
    """The 1000 timesteps of DDPM's linear schedule, zero-based; between two of them the time is a fraction."""

    levels = (ddpm_schedule.sigmas()[0].item(), ddpm_schedule.sigmas()[-1].item())

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The timestep, see `ddpm_schedule.timestep_of`."""
        return ddpm_schedule.timestep_of(sigma)


class BoundaryPrecond(Precond):
    """Other scalings, changed so that D(x, sigma_min) = x: a share sigma_min / sigma of x replaces the denoised image.

    Far above sigma_min nothing changes, so a student with the weights of a teacher starts with the teacher's function.

    :param plain: the scalings to change.
    """

    def __init__(self, plain: Precond, sigma_min: float):
        super().__init__(plain.sigma_data, sigma_min)
        self.plain, self.levels, self.counts_steps = plain, plain.levels, plain.counts_steps

    def scalings(self, sigma: Tensor) -> Scalings:
        """k + (1 - k) c_skip, (1 - k) c_out and c_in, where k = sigma_min / sigma."""
        c_skip, c_out, c_in = self.plain.scalings(sigma)
        kept = self.sigma_min / sigma
        return Scalings(c_skip=kept + (1 - kept) * c_skip, c_out=(1 - kept) * c_out, c_in=c_in)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The noise conditioning of `plain`."""
        return self.plain.c_noise(sigma)

    def grid(self, sigmas: Tensor) -> Tensor:
        """The noise levels that `plain` makes of them."""
        return self.plain.grid(sigmas)


PRECONDS = {
    "edm": EDMPrecond,
    "vp": VPPrecond,
    "ve": VEPrecond,
    "iddpm": IDDPMPrecond,
    "ddpm": DDPMPrecond,
    "consistency": ConsistencyPrecond,
}
