"""Orders of convergence of the SDE samplers, beside those that theory gives; benchmarks/sampler_orders.py has more.

Gaussian data alone would not do: its score is linear, which hides the Laplacian and lifts the strong order to 2.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch as th

from cm.networks.jvp import JVP_COST
from cm.report.plots import COLOURS
from cm.samplers import integrate
from cm.samplers.ancestral import Ancestral
from cm.samplers.ddim import DDIM
from cm.samplers.euler_maruyama import EulerMaruyama
from cm.samplers.heun import Heun
from cm.samplers.ito_taylor import ItoTaylor
from support.gaussian import Gaussian, Mixture, Scripted
from support.solver_orders import EXPECTED, SAMPLERS, Paths, drawn_errors, exact_means, line_bed, order, weak_errors

STEPS, WEAK_STEPS = (8, 16, 32), (16, 32)
COS_2X = 2                                                          # one of the test functions


@pytest.fixture(scope="module")
def mixture_paths():
    return Paths(Mixture.stored(), fine=512, count=256)


@pytest.fixture(scope="module")
def measured(mixture_paths):
    """The orders, by sampler: strong on Gaussian data, strong on the mixture, weak."""
    gaussian_paths = Paths(Gaussian.stored(), fine=256, count=64)
    table = {}
    for name, sampler in SAMPLERS.items():
        weak = [weak_errors(sampler, n, line_bed(), high=2.0, low=0.2, to_data=False)[COS_2X] for n in WEAK_STEPS]
        table[name] = (
            order(STEPS, gaussian_paths.errors(sampler, STEPS)), order(STEPS, mixture_paths.errors(sampler, STEPS)),
            order(WEAK_STEPS, th.stack(weak).abs()),
        )
    return table


def test_orders_are_those_that_theory_gives(measured):
    """Within 0.2: 256 paths show a slope to 0.1, and the finest of these steps are not yet infinitely fine."""
    print("\nsampler                             strong, Gaussian   strong, mixture    weak         (expected)")
    for name, row in measured.items():
        print(f"{name:34}", *(f"{value:8.2f}     ({e:.1f})" for value, e in zip(row, EXPECTED[name])))
    for name, row in measured.items():
        assert row == pytest.approx(EXPECTED[name], abs=0.2), name
        assert SAMPLERS[name].order == EXPECTED["ito" if name.startswith("ito") else name][1]


def test_the_laplacian_matters(measured):
    """Dropped, the order on the mixture falls by half; on Gaussian data nobody would notice."""
    kept, dropped = measured["ito, taylor form"], measured["ito, taylor form without Laplacian"]
    assert kept[0] == pytest.approx(dropped[0], abs=1e-6) and kept[1] > dropped[1] + 0.35


@pytest.mark.parametrize("evaluations", [48, 96, 192])
def test_at_equal_cost_ito_is_nearer_to_the_paths_than_euler_maruyama(mixture_paths, evaluations):
    ito = mixture_paths.errors(ItoTaylor(), [evaluations // JVP_COST])[0]
    divisors = [n for n in (32, 64, 128, 256) if n >= evaluations]  # of the fine grid: in favour of Euler-Maruyama
    assert ito < 0.6 * mixture_paths.errors(EulerMaruyama(), divisors[:1])[0]


def test_at_equal_cost_ito_is_nearer_to_the_law_than_euler_maruyama():
    """From noise to data at 192 evaluations. Heun's method, on this exact denoiser, is better still."""
    def error(sampler, steps):
        return weak_errors(sampler, steps, line_bed()).square().mean().sqrt().item()

    ito, sde, heun = error(ItoTaylor(), 64), error(EulerMaruyama(), 192), error(Heun(), 96)
    assert heun < ito < 0.6 * sde


def test_the_integrals_are_those_of_the_law_itself():
    """The exact transition of Gaussian data leaves no weak error: the method itself adds none above 1e-8."""

    class Exact(Ancestral):
        def step(self, D, x, sigma, sigma_next, rng):
            v, v_next = bed.s[0] ** 2 + sigma[:, None] ** 2, bed.s[0] ** 2 + sigma_next[:, None] ** 2
            mean = bed.mu[0] + v_next / v * (x - bed.mu[0])
            return mean + (v_next * (v - v_next) / v).sqrt() * rng.randn_like(x)

    mixture = line_bed()
    bed = type(mixture)(th.ones(1, dtype=th.float64), mixture.mu[:1], mixture.s[:1])
    assert weak_errors(Exact(), 6, bed, high=2.0, low=0.2, to_data=False).abs().max() < 1e-8
    assert exact_means(bed, 0.0).abs().max() > 0.1


def test_the_errors_of_draws_are_those_of_the_integrals():
    """65536 draws err by 0.003 at most; the errors themselves are 0.1 and more."""
    bed, sampler = line_bed(), DDIM(eta=1.0)
    drawn, integrated = drawn_errors(sampler, 6, bed, bed.D), weak_errors(sampler, 6, bed)
    assert integrated.abs().max() > 0.1 and (drawn - integrated).abs().max() < 0.012


def test_ddim_with_eta_1_is_ancestral_sampling(mixture_paths):
    draws = mixture_paths.draws(Ancestral(), 32)
    ends = [integrate(sampler, mixture_paths.bed.D, mixture_paths.x, mixture_paths.grid[::16], Scripted(*draws))
            for sampler in (Ancestral(), DDIM(eta=1.0))]
    th.testing.assert_close(*ends)


@pytest.mark.parametrize("script, options, smaller, files", [
    ("sampler_orders.py", ("--paths", "4", "--fine", "256"), {"SAMPLERS": {"sde": EulerMaruyama()}}, ["orders"]),
    ("sampler_cost.py", (), {"BUDGETS": (8, 16)}, ["cost", "cost_imperfect"]),
])
def test_the_benchmarks_leave_tables_and_pictures(script, options, smaller, files, tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / script))["main"]
    assert len(main.__globals__.get("METHODS", ())) <= len(COLOURS), "two curves would look the same"
    main.__globals__.update(smaller)
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path / "new"), *options])
    main()
    assert "| sde |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{files[0]}.json", *(f"{f}.png" for f in files)}
    facts = json.loads((tmp_path / "new" / f"{files[0]}.json").read_text())
    assert (facts["samplers"]["sde"]["orders"] if "samplers" in facts else facts["exact denoiser"]["ito, rho 3"])
