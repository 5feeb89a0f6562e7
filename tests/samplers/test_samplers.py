"""Solvers against closed forms, `integrate` against its contract. Golden images: test_karras_diffusion.py."""

import math

import pytest
import torch as th

from cm.config.schema import SAMPLER_NAMES
from cm.diffusion.schedules import append_zero, karras_grid
from cm.errors import UserError
from cm.samplers import SAMPLERS, Churn, CountingDenoiser, integrate, make_sampler
from cm.samplers.ancestral import Ancestral
from cm.samplers.dpm import DPM
from cm.samplers.euler import Euler
from cm.samplers.heun import Heun
from cm.samplers.multistep import Multistep
from cm.samplers.onestep import OneStep
from cm.samplers.progdist import ProgDist
from cm.types import Sampler
from support.gaussian import Gaussian, Mixture, Scripted, stored

ODE_SOLVERS = [Euler(), Heun(), DPM()]
SILENT = Scripted()                                                 # any draw is an error


def level(t: th.Tensor | float, x: th.Tensor) -> th.Tensor:
    return th.full((len(x),), float(t), dtype=x.dtype)


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, name", [(Euler(), "st_euler"), (Heun(), "st_heun")])
@pytest.mark.parametrize("i", range(4))
def test_one_ode_step_on_the_mixture(solver, name, i):
    x = stored("st_x")[i]
    moved = solver.step(Mixture.stored().D, x, level(stored("st_t")[i], x), level(stored("st_r")[i], x), SILENT)
    th.testing.assert_close(moved, stored(name)[i], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("i", range(4))
def test_an_ancestral_step_is_the_exponential_integrator_of_the_reverse_sde(i):
    x, t, r = stored("st_x")[i], stored("st_t")[i], stored("st_r")[i]
    moved = Ancestral().step(Mixture.stored().D, x, level(t, x), level(r, x), Scripted(stored("st_z1")))
    th.testing.assert_close(moved, stored("st_exp1")[i], rtol=1e-11, atol=1e-12)


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


def test_ancestral_converges_strongly_with_order_one():
    """The same Brownian path, on coarse and fine grids: A = u' int dW/u, from the sum of dW/u over fine steps."""
    bed, fine_steps = Mixture.stored(), 1024
    grid = karras_grid(fine_steps + 1, 0.2, 2.0)
    u = grid**2
    rng = th.Generator().manual_seed(1)
    x = 2.0 * th.randn(400, 2, generator=rng, dtype=th.float64)
    # int dW/u over one fine step has variance 1/u' - 1/u; these are exactly independent from step to step.
    pieces = th.randn(fine_steps, 400, 2, generator=rng, dtype=th.float64)
    pieces *= (1 / u[1:] - 1 / u[:-1]).sqrt()[:, None, None]

    def run(steps: int) -> th.Tensor:
        stride = fine_steps // steps
        levels = grid[::stride]
        sums = pieces.reshape(steps, stride, 400, 2).sum(1)
        unit = (1 / levels[1:] ** 2 - 1 / levels[:-1] ** 2).sqrt()[:, None, None]
        return integrate(Ancestral(), bed.D, x, levels, Scripted(*(sums / unit)))

    exact = run(fine_steps)
    errors = [(run(steps) - exact).square().mean().sqrt().item() for steps in (32, 64)]
    # Measured against 1024 steps, not infinitely many, order 1 shows as log2((1/32-1/1024) / (1/64-1/1024)). Over
    # seeds the slope of 400 paths varies by 0.06.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(math.log2(31 / 15), abs=0.15)


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


def test_multistep_with_the_exact_consistency_function_draws_from_the_data():
    """Every round trip, up with noise and back, keeps the distribution; the mean of 40000 errs by 0.0025."""
    bed = Gaussian(mu=0.3, s=0.5)
    rng = th.Generator().manual_seed(0)
    draws = th.randn(4, 20_000, 2, generator=rng, dtype=th.float64)
    sampler = Multistep(ts=(0, 3, 6, 9))
    x_T = bed.mu + draws[0] * math.sqrt(bed.variance(80.0))
    x = integrate(sampler, bed.f, x_T, sampler.grid(10, 0.002, 80.0, 7.0), Scripted(*draws[1:3]))
    assert x.mean().item() == pytest.approx(bed.mu, abs=0.01)
    assert x.std().item() == pytest.approx(bed.s, abs=0.008)


# --- grids -----------------------------------------------------------------------------------------------------------


def test_grids():
    levels = (10, 0.002, 80.0, 7.0)
    grid = karras_grid(10)
    for solver in (*ODE_SOLVERS, Ancestral()):
        assert th.equal(solver.grid(*levels), append_zero(grid))
    assert OneStep().grid(*levels).tolist() == [80.0, 0.0]
    assert th.equal(ProgDist().grid(*levels), karras_grid(11))
    assert th.equal(Multistep(ts=(0, 5, 9)).grid(*levels), append_zero(grid[[0, 5]]))
    assert Euler().grid(1, 0.002, 80.0, 7.0).tolist() == [80.0, 0.0]


@pytest.mark.parametrize("ts", [(), (0,), (0, 3, 5), (1, 9), (0, 20, 9), (0, 5, 5, 9), (0, -4, 9), (0, 9, 10)])
def test_multistep_rejects_indices_without_sense(ts):
    with pytest.raises(UserError, match=r"ts must rise from 0 to steps-1 = 9, such as ts=\(0, 22, 39\).*steps=10"):
        Multistep(ts=ts).grid(10, 0.002, 80.0, 7.0)


def test_multistep_without_indices_shows_an_example():
    with pytest.raises(UserError, match=r"needs ts, .* such as ts=\(0, 22, 39\) with steps=40"):
        Multistep().grid(10, 0.002, 80.0, 7.0)


def test_multistep_noise_starts_from_the_lowest_level():
    """An image at level 3 needs noise of deviation 4 to reach level 5."""
    z = th.tensor([[1.0], [-0.5]])
    up = Multistep(ts=(0, 1), sigma_min=3.0).step(lambda x, sigma: 0 * x, z, level(9, z), level(5, z), Scripted(z))
    th.testing.assert_close(up, 4 * z)


def test_multistep_ends_without_noise():
    x = integrate(Multistep(ts=(0, 5, 9)), lambda x, sigma: 0 * x, th.ones(4, 1), [80.0, 2.0, 0.0], th)
    assert (x == 0).all()


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table():
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    options = {"ts": (0, 5, 9), "sigma_min": 0.01, "eta": 0.5}
    assert make_sampler("multistep", options) == Multistep(ts=(0, 5, 9), sigma_min=0.01)
    assert make_sampler("heun", options) == Heun()
    with pytest.raises(ValueError, match="unknown sampler 'huen'; choose one of: heun, .*Did you mean 'heun'"):
        make_sampler("huen", {})


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_from_noise_to_the_data(name):
    """What all of them promise: shapes, a finite result, their order and churn declared, no change of the input."""
    sampler = make_sampler(name, {"ts": (0, 20, 39)})
    assert isinstance(sampler.order, (int, float)) and isinstance(sampler.accepts_churn, bool)
    assert all(hasattr(sampler, method) for method in vars(Sampler) if not method.startswith("_"))
    x = 80 * th.randn(5, 3, 4, 6, generator=th.Generator().manual_seed(0))
    start = x.clone()
    end = integrate(sampler, Gaussian(0.0, 0.5).D, x, sampler.grid(40, 0.002, 80.0, 7.0), th)
    assert end.shape == x.shape and end.dtype == th.float32 and end.isfinite().all()
    assert end.std() < 1 and th.equal(x, start)


# --- integrate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver, per_step, last", [(Euler(), 1, 1), (Heun(), 2, 1), (DPM(), 2, 2), (Ancestral(), 1, 1)]
)
def test_evaluations_are_counted(solver, per_step, last):
    D = CountingDenoiser(Gaussian(0.0, 0.5).D)
    integrate(solver, D, th.ones(1, 2), append_zero(karras_grid(6)), th)
    assert D.calls == 5 * per_step + last


def test_churn_rises_as_algorithm_2_says():
    churn = Churn(s_churn=5.0, s_tmin=0.05, s_tmax=50.0)
    assert churn.gamma(1.0, steps=20) == 0.25
    assert churn.gamma(1.0, steps=4) == math.sqrt(2) - 1            # the cap
    assert churn.gamma(50.0, 20) > 0 and churn.gamma(0.05, 20) > 0  # both ends belong to the interval
    assert churn.gamma(50.1, 20) == 0 and churn.gamma(0.049, 20) == 0


def test_churn_adds_the_noise_that_the_higher_level_needs():
    """From x = 0 at level 2 with gamma 0.25: level 2.5, and noise of standard deviation s_noise sqrt(2.5^2 - 2^2)."""
    z, seen = th.tensor([[1.0], [-1.0]], dtype=th.float64), []
    churn = Churn(s_churn=0.25, s_noise=1.003)
    integrate(Euler(), lambda x, sigma: x, 0 * z, [2.0, 0.0], Scripted(z), churn=churn, callback=seen.append)
    assert seen[0]["sigma"] == 2.5
    th.testing.assert_close(seen[0]["x"], 1.003 * 1.5 * z)


def test_noise_is_drawn_only_where_it_is_used():
    grid = append_zero(karras_grid(4))
    x = th.ones(1, 2, dtype=th.float64)
    for solver in ODE_SOLVERS:
        integrate(solver, Gaussian(0.0, 0.5).D, x, grid, SILENT, churn=Churn(s_churn=0.0))
        one = Scripted(x)
        integrate(solver, Gaussian(0.0, 0.5).D, x, grid, one, churn=Churn(s_churn=1.0, s_tmin=79.0))
        assert not one.draws


@pytest.mark.parametrize("name", ["ancestral", "onestep", "multistep", "progdist"])
def test_churn_is_refused_where_it_would_be_ignored(name):
    sampler = make_sampler(name, {"ts": (0, 4)})
    grid = sampler.grid(5, 0.002, 80.0, 7.0)
    with pytest.raises(UserError, match="takes no churn: set s_churn to 0, or use heun or dpm"):
        integrate(sampler, Gaussian(0.0, 0.5).D, th.ones(1, 2), grid, th, churn=Churn(s_churn=1.0))
    integrate(sampler, Gaussian(0.0, 0.5).D, th.ones(1, 2), grid, th, churn=Churn(s_churn=0.0))


def test_every_value_of_the_denoiser_is_clipped():
    def D(x, sigma):
        return 0 * x + 3

    ends = [integrate(Heun(), D, th.ones(1, 1), [5.0, 1.0, 0.0], SILENT, clip_denoised=clip).item() for clip in (1, 0)]
    assert ends == [1.0, 3.0]


def test_the_callback_sees_each_step():
    bed, seen = Gaussian(0.0, 0.5), []
    x = th.ones(2, 3, dtype=th.float64)
    integrate(Heun(), bed.D, x, [4.0, 1.0, 0.0], SILENT, callback=seen.append)
    assert [info["i"] for info in seen] == [0, 1] and [info["sigma"] for info in seen] == [4.0, 1.0]
    assert seen[0]["x"] is x
    for info in seen:
        th.testing.assert_close(info["denoised"], bed.D(info["x"], info["sigma"]))


def test_progress_is_shown_when_asked_for(capsys):
    for progress in (False, True):
        integrate(Euler(), Gaussian(0.0, 0.5).D, th.ones(1, 1), [4.0, 1.0, 0.0], SILENT, progress=progress)
        assert ("sampling" in capsys.readouterr().err) == progress


@pytest.mark.parametrize("sigmas", [[], [80.0], [1.0, 1.0, 0.0], [1.0, 2.0], [1.0, -0.1], [1.0, math.nan]])
def test_grids_that_do_not_fall(sigmas):
    with pytest.raises(ValueError, match="at least two noise levels, falling, none negative; got"):
        integrate(Euler(), Gaussian(0.0, 0.5).D, th.ones(1, 1), sigmas, SILENT)


def test_negative_churn():
    with pytest.raises(ValueError, match="s_churn and s_noise must not be negative, got -1 and 1"):
        Churn(s_churn=-1)
