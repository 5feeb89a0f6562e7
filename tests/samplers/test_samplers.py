"""The table of samplers: what is in it, the grid of each, and that each goes from noise to the data."""

import pytest
import torch as th

from cm.config.schema import SAMPLER_NAMES
from cm.diffusion.schedules import append_zero, karras_grid
from cm.errors import UserError
from cm.samplers import SAMPLERS, Churn, integrate, make_sampler
from cm.samplers.ancestral import Ancestral
from cm.samplers.dpm import DPM
from cm.samplers.euler import Euler
from cm.samplers.heun import Heun
from cm.samplers.multistep import Multistep
from cm.samplers.onestep import OneStep
from cm.samplers.progdist import ProgDist
from cm.types import Sampler
from support.gaussian import Gaussian

ODE_SOLVERS = [Euler(), Heun(), DPM()]


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
    end = integrate(sampler, Gaussian(0.0, 0.5).denoiser_for(name), x, sampler.grid(40, 0.002, 80.0, 7.0), th)
    assert end.shape == x.shape and end.dtype == th.float32 and end.isfinite().all()
    assert end.std() < 1 and th.equal(x, start)


# --- integrate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ancestral", "onestep", "multistep", "progdist"])
def test_churn_is_refused_where_it_would_be_ignored(name):
    sampler = make_sampler(name, {"ts": (0, 4)})
    grid = sampler.grid(5, 0.002, 80.0, 7.0)
    with pytest.raises(UserError, match="takes no churn: set s_churn to 0, or use heun or dpm"):
        integrate(sampler, Gaussian(0.0, 0.5).D, th.ones(1, 2), grid, th, churn=Churn(s_churn=1.0))
    integrate(sampler, Gaussian(0.0, 0.5).D, th.ones(1, 2), grid, th, churn=Churn(s_churn=0.0))
