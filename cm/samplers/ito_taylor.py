"""A sampler of the reverse SDE by Ito-Taylor expansions, with forward-mode differentiation.

The form `taylor` is the strong scheme of order 1.5 for additive noise in Kloeden and Platen 1992 (Numerical Solution
of Stochastic Differential Equations), section 10.4. For the exponential form let u = sigma^2, h = u - u', and
W = int dW over the step. The reverse SDE is dX = score dv + dW while u falls, score and D are martingales along it, and
D moves by J_D dW to first order. Hence with
A = u' int dW / u and K = W - A:  x' = (u'/u) x + (1 - u'/u) D + A + J_D K.

Shapes: N batch; every coefficient is [N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.networks.jvp import second_derivative
from cm.registry import lookup
from cm.samplers.base import lerp_to
from cm.samplers.euler_maruyama import NoiseInWindow, check_eta, eta_at
from cm.samplers.integrate import denoise_jvp
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource

FORMS = ("exp", "taylor")
LAPLACIANS = ("hutchinson", "none")


@dataclass(frozen=True)
class ItoTaylor(NoiseInWindow):
    """Strong order 1.5 and weak order 2, from one forward-mode pass per step.

    :param eta: amount of fresh noise, see `EulerMaruyama`; if it is below 1, a step costs one more evaluation.
    :param ito_form: `exp` is the exponential form above, `taylor` is the textbook scheme in sigma.
    :param ito_laplacian: taylor only: `hutchinson` estimates the Laplacian of D by one random probe, with nested
        passes; `none` drops it, and the order falls to 1.
    :param s_tmin, s_tmax: exp only: the noise levels, inclusive, at which there is fresh noise; elsewhere eta is 0.
    :raises UserError: for options that cannot be combined.
    """

    eta: float = 1.0
    ito_form: str = "exp"
    ito_laplacian: str = "hutchinson"
    s_tmin: float = 0.0
    s_tmax: float = math.inf

    order: ClassVar[float] = 1.5
    accepts_churn: ClassVar[bool] = False
    uses_jvp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_eta(self.eta)
        lookup(dict.fromkeys(FORMS), self.ito_form, "ito_form")
        lookup(dict.fromkeys(LAPLACIANS), self.ito_laplacian, "ito_laplacian")
        if self.ito_form == "exp" and self.ito_laplacian == "none":
            raise UserError("ito_laplacian none belongs to ito_form taylor: the exponential form needs no Laplacian")
        if self.ito_form == "taylor" and (self.eta, self.s_tmin, self.s_tmax) != (1, 0, math.inf):
            raise UserError(f"ito_form taylor is the reverse SDE at all noise levels, but eta={self.eta:g}, "
                            f"s_tmin={self.s_tmin:g}, s_tmax={self.s_tmax:g}; use ito_form exp")

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """A step of the form that `ito_form` names."""
        if self.ito_form == "taylor":
            return _taylor_step(D, x, sigma, sigma_next, rng, self.ito_laplacian == "hutchinson")
        return self._exponential_step(D, x, sigma, sigma_next, rng)

    def _exponential_step(
        self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource
    ) -> Tensor:
        """The exponential step of the module for any eta, with p = (1 + eta^2) / 2.

        The ratio u'/u gets the power p and the noise gets the factor eta. D drifts along the probability-flow ODE,
        linearly in ln(sigma), with the weight 1 - eta^2.
        """
        def broad(coefficient: Tensor) -> Tensor:
            return append_dims(coefficient.to(x.dtype), x.ndim)

        eta = eta_at(sigma, self.eta, self.s_tmin, self.s_tmax)     # [N]
        c = Coefficients.of(sigma.double(), sigma_next.double(), eta.double())
        A = K = th.zeros_like(x)
        if self.adds_noise(eta):
            z1, z2 = rng.randn_like(x), rng.randn_like(x)
            A, K = broad(c.A_z1) * z1, broad(c.K_z1) * z1 + broad(c.K_z2) * z2
        if self.eta == 1 and (self.has_no_window() or bool(eta.all())):     # D and its change by the noise at once
            denoised, change = denoise_jvp(D, x, sigma, K)
        else:
            along_ode = D(x, sigma) - x                             # dx per unit of -ln(sigma)
            tangent = K + broad(c.drift) * along_ode
            denoised, change = denoise_jvp(D, x, sigma, tangent, -c.drift.to(sigma.dtype) * sigma)
        return lerp_to(denoised, x, c.keep.to(x.dtype)) + A + change


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of an exponential step x' = D + keep (x - D) + A + J K + drift D', float64 [N] each.

    A and K are made of two independent normal numbers z1 and z2.
    """

    keep: Tensor
    drift: Tensor
    A_z1: Tensor
    K_z1: Tensor
    K_z2: Tensor

    @classmethod
    def of(cls, sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
        """The coefficients from the two noise levels and eta, float64 [N] each."""
        u, u_next, p = sigma**2, sigma_next**2, (1 + eta**2) / 2
        length = (u / u_next).log()

        def phi(a: Tensor) -> Tensor:
            """int_0^length exp(a s) ds"""
            return th.where(a == 0, length, th.expm1(a * length) / a.masked_fill(a == 0, 1))

        var_A = u_next * phi(-(eta**2))
        cov_WA = u_next * phi(1 - p)
        cov_AK = cov_WA - var_A
        var_K = (u - u_next) - 2 * cov_WA + var_A
        rest = (var_K - cov_AK**2 / var_A).clamp(min=0).sqrt()      # rounding may make it negative
        return cls(
            keep=(-p * length).exp(),
            drift=(1 - eta**2) * (length - phi(-p)) / 2,
            A_z1=eta * var_A.sqrt(),
            K_z1=eta * cov_AK / var_A.sqrt(),
            K_z2=eta * rest,
        )


def _taylor_step(
    D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource, with_laplacian: bool
) -> Tensor:
    """With t = sigma, k = t - t', a = 2 (D - x) / t, b = sqrt(2 t):
    x' = x + a k + b dW + k^2/2 L0a + (da/dx) b dZ + (dW k - dZ) db/dt', where L0a = -da/dt + (da/dx) a + t lap(a).

    All of da comes from one pass along (k^2/2 a + b dZ, -k^2/2).
    """
    def broad(coefficient: Tensor) -> Tensor:
        return append_dims(coefficient, x.ndim)

    k = sigma - sigma_next
    z1, z2 = rng.randn_like(x), rng.randn_like(x)
    dW = broad(k.sqrt()) * z1
    dZ = broad(k**1.5) * (z1 / 2 + z2 / math.sqrt(12))
    t, k, b = broad(sigma), broad(k), broad((2 * sigma).sqrt())

    a = 2 * (D(x, sigma) - x) / t
    dx, dt = k**2 / 2 * a + b * dZ, -k**2 / 2
    _, dD = denoise_jvp(D, x, sigma, dx, dt.flatten())
    change = 2 * (dD - dx) / t - a / t * dt                         # of a = 2 (D - x) / t
    if with_laplacian:
        probe = rng.randn_like(x).sign()
        change = change + k**2 * second_derivative(lambda z: D(z, sigma), x, probe)     # k^2/2 t lap(a) = k^2 lap(D)
    return x + a * k + b * dW + change - (k * dW - dZ) / b
