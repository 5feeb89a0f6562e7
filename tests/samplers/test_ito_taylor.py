"""The samplers of the reverse SDE, `sde` and `ito`: one step against golden outputs, and options that exclude others.

Orders: test_sampler_orders.py.
"""

import math

import pytest
import torch as th

from cm.diffusion.schedules import append_zero, karras_grid
from cm.errors import UserError
from cm.networks.jvp import JVP_COST
from cm.samplers import CountingDenoiser, integrate, make_sampler
from cm.samplers.euler_maruyama import EulerMaruyama
from cm.samplers.ito_taylor import Coefficients, ItoTaylor
from support.gaussian import Gaussian, Mixture, Scripted, stored

EXACT = {"rtol": 1e-11, "atol": 1e-12}
SILENT = Scripted()                                                 # any draw is an error


def one_step(sampler, i, *more):
    """From the stored points of case i, with the stored normal numbers and then others."""
    x = stored("st_x")[i]
    t, r = (th.full((len(x),), stored(name)[i].item(), dtype=x.dtype) for name in ("st_t", "st_r"))
    return sampler.step(Mixture.stored().D, x, t, r, Scripted(stored("st_z1"), stored("st_z2"), *more))


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("sampler, name", [
    (EulerMaruyama(), "st_em_t"),
    (ItoTaylor(), "st_exp15"),
    (ItoTaylor(eta=0.0), "st_dpmpp_taylor2"),
    (EulerMaruyama(eta=0.0), "st_euler"),
    (ItoTaylor(ito_form="taylor", ito_laplacian="none"), "st_it15_t_nolap"),
])
def test_one_step_on_the_mixture(sampler, name, i):
    th.testing.assert_close(one_step(sampler, i), stored(name)[i], **EXACT)


@pytest.mark.parametrize("i", range(4))
def test_the_probe_is_right_on_average(i):
    """In two dimensions the probes (1,1) and (1,-1) average to the Laplacian itself; only signs of a draw matter."""
    x = stored("st_x")[i]
    probes = th.tensor([[0.3, 2.0], [1.7, -0.1]], dtype=x.dtype)
    steps = [one_step(ItoTaylor(ito_form="taylor"), i, probe.expand_as(x)) for probe in probes]
    th.testing.assert_close(sum(steps) / 2, stored("st_it15_t")[i], **EXACT)
    assert (steps[0] - steps[1]).abs().max() > 1e-6


def test_noise_of_the_exponential_step_has_the_stored_covariances():
    for eta in (1.0, 0.5**0.5):
        c = Coefficients.of(stored("p_t"), stored("p_r"), th.full_like(stored("p_t"), eta))
        if eta == 1:
            th.testing.assert_close(c.A_z1**2, stored("n_varA"), **EXACT)
            th.testing.assert_close(c.A_z1 * c.K_z1, stored("n_covAK"), rtol=1e-9, atol=1e-12)
            th.testing.assert_close(c.K_z1**2 + c.K_z2**2, stored("n_varK"), rtol=1e-9, atol=1e-12)
        # Data that is one point: D is that point, J_D = 0, and the step is exact whatever eta; see GAUSSIAN, s = 0.
        r, t = stored("p_r"), stored("p_t")
        th.testing.assert_close(c.keep, (r / t) ** (1 + eta**2), **EXACT)
        th.testing.assert_close(c.A_z1**2, r**2 * (1 - (r / t) ** (2 * eta**2)), **EXACT)


def test_any_eta_keeps_the_marginals_of_gaussian_data():
    """One step from the exact law: mean and variance of the result follow from its coefficients, exactly.

    Halving the step divides their error by 2^3, what a step of weak order 2 leaves; at eta 1 the mean is exact.
    """
    bed = Gaussian(mu=0.3, s=0.5)

    def errors(eta, r):
        t, r = (th.tensor([level], dtype=th.float64) for level in (1.0, r))
        unit, zero = th.ones(1, 1, dtype=th.float64), th.zeros(1, 1, dtype=th.float64)

        def step(x, z1, z2):
            return ItoTaylor(eta=eta).step(bed.D, x, t, r, Scripted(z1, z2)).item()

        mean = step(zero + bed.mu, zero, zero)
        slope, by_z1, by_z2 = (step(bed.mu + x, z1, z2) - mean for x, z1, z2 in (
            (unit, zero, zero), (zero, unit, zero), (zero, zero, unit)))
        coef = ((bed.variance(r) / bed.variance(t)) ** ((1 + eta**2) / 2)).item()
        variance = slope**2 * bed.variance(t).item() + by_z1**2 + by_z2**2
        assert mean == pytest.approx(bed.mu, abs=1e-12)
        return abs(slope - coef), abs(variance - bed.variance(r).item())

    for eta in (0.3, 0.5**0.5, 1.0):
        for large, small in zip(errors(eta, 0.9), errors(eta, 0.95)):
            assert small < 2e-4 and (large < 1e-14 or math.log2(large / small) > 2.6)


def test_each_sample_has_its_own_noise_levels():
    D, x, t, r = Mixture.stored().D, stored("st_x")[:, 0], stored("st_t"), stored("st_r")
    z = stored("st_z1")[:4], stored("st_z2")[:4], stored("st_x")[:, 1]
    for sampler in (EulerMaruyama(), ItoTaylor(), ItoTaylor(eta=0.6), ItoTaylor(ito_form="taylor")):
        alone = [sampler.step(D, x[i : i + 1], t[i : i + 1], r[i : i + 1], Scripted(*(draw[i : i + 1] for draw in z)))
                 for i in range(4)]
        th.testing.assert_close(sampler.step(D, x, t, r, Scripted(*z)), th.cat(alone))


@pytest.mark.parametrize("kind, ode", [(EulerMaruyama, "st_euler"), (ItoTaylor, "st_dpmpp_taylor2")])
def test_outside_of_its_levels_there_is_no_fresh_noise(kind, ode):
    """The levels of the four cases are 5, 2, 1 and 0.5."""
    limited = kind(s_tmin=1.0, s_tmax=2.0)
    for i, noisy in enumerate((False, True, True, False)):
        expected = one_step(kind(), i) if noisy else stored(ode)[i]
        th.testing.assert_close(one_step(limited, i), expected, **EXACT)
    x = stored("st_x")[0]
    limited.step(Mixture.stored().D, x, x.new_full((32,), 5.0), x.new_full((32,), 4.0), SILENT)


@pytest.mark.parametrize("kind", [EulerMaruyama, ItoTaylor])
@pytest.mark.parametrize("sigma", [5.0, 2.0, 1.0, 0.5])
def test_the_loop_decides_on_the_host_what_a_step_would_have_waited_for(kind, sigma):
    limited = kind(eta=0.5, s_tmin=1.0, s_tmax=2.0)
    x, D = stored("st_x")[0], Mixture.stored().D
    t, r = x.new_full((len(x),), sigma), x.new_full((len(x),), sigma / 2)
    decided = limited.at(th.tensor(sigma, dtype=x.dtype))
    waited, free = (each.step(D, x, t, r, Scripted(stored("st_z1"), stored("st_z2"))) for each in (limited, decided))
    assert decided.has_no_window() and th.equal(free, waited)


@pytest.mark.parametrize("options, per_step", [
    ({}, JVP_COST), ({"eta": 0.5}, 1 + JVP_COST), ({"ito_form": "taylor", "ito_laplacian": "none"}, 1 + JVP_COST),
    ({"ito_form": "taylor"}, 1 + JVP_COST + JVP_COST**2), ({"eta": 0.0}, 1 + JVP_COST),
])
def test_passes_are_counted_as_evaluations(options, per_step):
    D = CountingDenoiser(Gaussian(0.0, 0.5).D)
    integrate(make_sampler("ito", options), D, th.ones(1, 2), append_zero(karras_grid(6)), th)
    assert D.calls == 5 * per_step + 1


def test_the_callback_sees_plain_images_and_all_is_clipped():
    seen = []
    x = th.full((2, 3), 4.0)
    end = integrate(ItoTaylor(), lambda x, sigma: 3 * x, x, [4.0, 1.0, 0.0], th, clip_denoised=True,
                    callback=seen.append)
    assert [info["sigma"] for info in seen] == [4.0, 1.0]
    assert th.equal(seen[0]["denoised"], th.ones(2, 3)) and end.abs().max() <= 1
    assert seen[0]["denoised"].numpy().sum() == 6                   # no wrapper of a pass that is over


@pytest.mark.parametrize("options, message", [
    ({"eta": 1.5}, "eta=1.5 must lie between 0"),
    ({"ito_form": "tailor"}, "unknown ito_form 'tailor'.*Did you mean 'taylor'"),
    ({"ito_laplacian": "exact"}, "unknown ito_laplacian 'exact'"),
    ({"ito_form": "taylor", "eta": 0.5}, "ito_form taylor is the reverse SDE .* eta=0.5.*use ito_form exp"),
    ({"ito_form": "taylor", "s_tmax": 5.0}, "s_tmax=5; use ito_form exp"),
    ({"ito_laplacian": "none"}, "ito_laplacian none belongs to ito_form taylor"),
])
def test_options_without_sense(options, message):
    with pytest.raises(UserError, match=message):
        make_sampler("ito", options)
