"""The test bed itself agrees with its stored values."""

import pytest
import torch as th

from cm.diffusion.preconditioning import ConsistencyPrecond, EDMPrecond
from support.gaussian import Gaussian, Mixture, stored


@pytest.mark.parametrize("index", range(10))
def test_denoisers_and_consistency_function(index):
    bed, mixture = Gaussian.stored(), Mixture.stored()
    t, x = stored("g_t")[index], stored("g_x")[index]
    th.testing.assert_close(bed.D(x, t), stored("g_D")[index], rtol=1e-11, atol=1e-12)
    th.testing.assert_close(bed.f(x, t), stored("g_f")[index], rtol=1e-11, atol=1e-12)
    t, x = stored("m_t")[index], stored("m_x")[index]
    th.testing.assert_close(mixture.D(x, t), stored("m_D")[index], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "precond, exact, network", [(EDMPrecond(), "g_D", "g_F_edm"), (ConsistencyPrecond(), "g_f", "g_F_cm")]
)
def test_the_network_that_scalings_ask_for(precond, exact, network):
    """c_skip x + c_out F gives back the exact function with the F that was stored."""
    t = stored("g_t")[:, None, None]
    c_skip, c_out, _ = precond.scalings(t)
    rebuilt = c_skip * stored("g_x") + c_out * stored(network)
    th.testing.assert_close(rebuilt, stored(exact), rtol=1e-10, atol=1e-11)
