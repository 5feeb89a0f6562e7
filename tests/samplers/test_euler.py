"""The solvers of the ODE, Euler's, Heun's and the midpoint rule, against closed forms, and their measured orders."""

import math

import pytest
import torch as th

from cm.diffusion.schedules import karras_grid
from cm.samplers import integrate
from cm.samplers.ancestral import Ancestral
from cm.samplers.dpm import DPM
from cm.samplers.euler import Euler
from cm.samplers.heun import Heun
from support.gaussian import Gaussian, Mixture, Scripted, level, stored

ODE_SOLVERS = [Euler(), Heun(), DPM()]
SILENT = Scripted()                                                 # any draw is an error


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, name", [(Euler(), "st_euler"), (Heun(), "st_heun")])
@pytest.mark.parametrize("i", range(4))
def test_one_ode_step_on_the_mixture(solver, name, i):
    x = stored("st_x")[i]
    moved = solver.step(Mixture.stored().D, x, level(stored("st_t")[i], x), level(stored("st_r")[i], x), SILENT)
    th.testing.assert_close(moved, stored(name)[i], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "solver, name", [(Euler(), "p_euler_coef"), (Heun(), "p_heun_coef"), (Ancestral(), "p_trans_coef")]
)
def test_one_step_on_gaussian_data_shrinks_by_the_predicted_factor(solver, name):
    bed, t, r = Gaussian.stored(), stored("p_t"), stored("p_r")
    x = bed.mu + th.tensor([1.0, -2.0], dtype=th.float64).expand(len(t), 2)
    quiet = Scripted(th.zeros_like(x))
    factor = (solver.step(bed.D, x, t, r, quiet) - bed.mu) / (x - bed.mu)
    th.testing.assert_close(factor, stored(name)[:, None].expand(-1, 2), rtol=1e-11, atol=1e-12)


def test_each_sample_has_its_own_noise_levels():
    """[N] levels, as the losses use them: a batch of different levels equals one sample at a time."""
    D, x, t, r = Mixture.stored().D, stored("st_x")[:, 0], stored("st_t"), stored("st_r")
    for solver in ODE_SOLVERS:
        alone = [solver.step(D, x[i : i + 1], t[i : i + 1], r[i : i + 1], SILENT) for i in range(4)]
        th.testing.assert_close(solver.step(D, x, t, r, SILENT), th.cat(alone))


# --- whole paths -----------------------------------------------------------------------------------------------------


def reference(x: th.Tensor, high: float, low: float) -> th.Tensor:
    """The ODE's solution by classical Runge-Kutta in ln(sigma), where dx = (x - D) dln(sigma)."""
    D, steps = Mixture.stored().D, 300
    h = math.log(low / high) / steps

    def slope(x, log_sigma):
        return x - D(x, math.exp(log_sigma))

    for i in range(steps):
        s = math.log(high) + i * h
        k1 = slope(x, s)
        k2 = slope(x + h / 2 * k1, s + h / 2)
        k3 = slope(x + h / 2 * k2, s + h / 2)
        k4 = slope(x + h * k3, s + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def test_claimed_orders_are_measured_on_the_mixture():
    """Halving the step divides the error by 2^order. From 80 steps on it is seen to 0.015."""
    x = 10 * th.randn(32, 2, generator=th.Generator().manual_seed(0), dtype=th.float64)
    exact = reference(x, 10.0, 0.1)
    for solver in ODE_SOLVERS:
        errors = []
        for steps in (80, 160):
            end = integrate(solver, Mixture.stored().D, x, karras_grid(steps + 1, 0.1, 10.0), SILENT)
            errors.append((end - exact).square().mean().sqrt().item())
        assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.order, abs=0.03), type(solver).__name__


@pytest.mark.parametrize("solver", [Heun(), DPM()])
def test_gaussian_paths_lie_on_the_flow(solver):
    """At the 18 stored times of a 16 times finer grid."""
    bed, path = Gaussian.stored(), stored("g_traj")
    seen = []
    end = integrate(
        solver, bed.D, path[0], karras_grid(16 * 17 + 1), SILENT, callback=lambda info: seen.append(info["x"])
    )
    th.testing.assert_close(th.stack([*seen[::16], end]), path, rtol=2e-4, atol=2e-4)


def test_mixture_paths():
    path, seen = stored("m_traj"), []
    grid = karras_grid(64 * 17 + 1)
    end = integrate(
        Heun(), Mixture.stored().D, path[0], grid, SILENT, callback=lambda info: seen.append(info["x"])
    )
    th.testing.assert_close(th.stack([*seen[::64], end]), path, rtol=1e-4, atol=1e-4)
