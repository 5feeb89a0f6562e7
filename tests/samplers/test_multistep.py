"""`multistep`: its grid, its noise, and draws from the data with the exact consistency function."""

import math

import pytest
import torch as th

from cm.errors import UserError
from cm.samplers import integrate
from cm.samplers.multistep import Multistep
from support.gaussian import Gaussian, Scripted, level

# --- whole paths -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("ts", [(), (0,), (0, 3, 5), (1, 9), (0, 20, 9), (0, 5, 5, 9), (0, -4, 9), (0, 9, 10)])
def test_multistep_rejects_indices_without_sense(ts):
    with pytest.raises(UserError, match=r"--steps 10: ts must rise from 0 to steps-1 = 9, such as --ts 0,22,39"):
        Multistep(ts=ts).grid(10, 0.002, 80.0, 7.0)


def test_multistep_without_indices_shows_an_example():
    with pytest.raises(UserError, match=r"needs ts, .* such as --ts 0,22,39 with --steps 40"):
        Multistep().grid(10, 0.002, 80.0, 7.0)


def test_multistep_noise_starts_from_the_lowest_level():
    """An image at level 3 needs noise of deviation 4 to reach level 5."""
    z = th.tensor([[1.0], [-0.5]])
    up = Multistep(ts=(0, 1), sigma_min=3.0).step(lambda x, sigma: 0 * x, z, level(9, z), level(5, z), Scripted(z))
    th.testing.assert_close(up, 4 * z)


def test_multistep_ends_without_noise():
    x = integrate(Multistep(ts=(0, 5, 9)), lambda x, sigma: 0 * x, th.ones(4, 1), [80.0, 2.0, 0.0], th)
    assert (x == 0).all()
