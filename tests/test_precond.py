import math

import golden
import pytest
import torch as th

from cm.precond import PRECONDS, ConsistencyPrecond, EDMPrecond


@pytest.mark.parametrize("name, table", [("edm", "edm"), ("boundary", "consistency")])
def test_golden_scalings(name, table):
    scalings = PRECONDS[table]().scalings(golden.tensor("denoise/sigmas"))
    for field, value in scalings._asdict().items():
        golden.assert_close(value, f"denoise/{name}/{field}")


def test_golden_time():
    golden.assert_close(1000 * EDMPrecond().c_noise(golden.tensor("denoise/sigmas")), "denoise/rescaled_t")


def test_noise_zero_is_finite():
    assert EDMPrecond().c_noise(th.zeros(1)).item() == pytest.approx(math.log(1e-44) / 4, rel=1e-12)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_the_boundary_is_exact(dtype):
    sigma = th.full((1,), 0.002, dtype=dtype)
    c_skip, c_out, _ = ConsistencyPrecond(sigma_min=0.002).scalings(sigma)
    assert c_skip.item() == 1 and c_out.item() == 0


def test_consistency_scalings_without_a_lowest_level_are_edms():
    sigma = th.logspace(-2, 2, 9, dtype=th.float64)
    for a, b in zip(ConsistencyPrecond(0.7, sigma_min=0.0).scalings(sigma), EDMPrecond(0.7).scalings(sigma)):
        th.testing.assert_close(a, b)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_keeps_unit_variance(sigma_data):
    """Input c_in x and target (x0 - c_skip x) / c_out have variance 1 for data of variance sigma_data^2."""
    sigma = th.logspace(-2, 2, 9, dtype=th.float64)
    c_skip, c_out, c_in = EDMPrecond(sigma_data).scalings(sigma)
    variance = sigma_data**2 + sigma**2
    th.testing.assert_close(c_in**2 * variance, th.ones_like(sigma))
    th.testing.assert_close(((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2, th.ones_like(sigma))
