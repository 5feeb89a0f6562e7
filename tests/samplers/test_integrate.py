"""`integrate` against its contract: evaluations, churn, clipping, the callback, and grids that it refuses."""

import math

import pytest
import torch as th

from cm.diffusion.schedules import append_zero, karras_grid
from cm.samplers import Churn, CountingDenoiser, integrate
from cm.samplers.ancestral import Ancestral
from cm.samplers.dpm import DPM
from cm.samplers.euler import Euler
from cm.samplers.heun import Heun
from support.gaussian import Gaussian, Scripted

ODE_SOLVERS = [Euler(), Heun(), DPM()]
SILENT = Scripted()                                                 # any draw is an error


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


def test_progress_is_shown_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr("cm.io.progress.on_terminal", lambda: True)
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
