"""Distances between images against their formulas; LPIPS has test_lpips.py to itself."""

import math

import pytest
import torch as th
import torch.nn.functional as F

from cm.config.objective_schema import ConsistencyConfig
from cm.objectives.distances import DISTANCES, get_distance
from support.gaussian import stored

HERE = [name for name in DISTANCES if name != "lpips"]              # which has test_lpips.py to itself


def images(side: int, n: int = 3) -> tuple[th.Tensor, th.Tensor]:
    rng = th.Generator().manual_seed(side)
    return tuple(th.rand(n, 3, side, side, generator=rng, dtype=th.float64) * 2 - 1 for _ in "ab")


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("side", [16, 32, 64])
def test_a_distance_is_zero_at_home_positive_abroad_and_symmetric(name, side):
    d = get_distance(name)
    a, b = images(side)
    assert d(a, b).shape == (3,)
    assert (d(a, a) == 0).all() and (d(a, b) > 0).all()
    th.testing.assert_close(d(a, b), d(b, a))


@pytest.mark.parametrize("name", HERE)
def test_samples_do_not_mix(name):
    a, b = images(32)
    alone = th.cat([get_distance(name)(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    th.testing.assert_close(get_distance(name)(a, b), alone)


def test_l1_and_l2_are_means():
    a, b = th.zeros(1, 1, 1, 4), th.tensor([[[[1.0, -3.0, 0.0, 0.0]]]])
    assert get_distance("l1")(a, b).item() == 1.0
    assert get_distance("l2")(a, b).item() == 2.5


def test_l2_32_resizes_both_images():
    a, b = images(64)
    small = [F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False) for x in (a, b)]
    th.testing.assert_close(get_distance("l2-32")(a, b), get_distance("l2")(*small))


def test_l2_32_does_not_see_what_32_pixels_cannot_show():
    checkers = th.ones(1, 1, 64, 64)
    checkers[..., ::2] = -1
    assert get_distance("l2-32")(checkers, th.zeros_like(checkers)).item() == 0


def test_pseudo_huber_values_and_gradients():
    """Stored: the norms of whole 32x32 images, the values, and d value / d norm over norm."""
    norm, expected, scale = stored("ph_norm"), stored("ph_value"), stored("ph_grad_scale")
    a = (norm / math.sqrt(3072))[:, None].expand(-1, 3072).reshape(-1, 3, 32, 32).clone().requires_grad_(True)
    value = get_distance("pseudo-huber")(a, th.zeros_like(a))
    th.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=1e-14)
    value.sum().backward()
    th.testing.assert_close(a.grad, a.detach() * scale.reshape(-1, 1, 1, 1), rtol=1e-10, atol=0)


def test_pseudo_huber_keeps_its_digits_near_zero():
    """In float32 the textbook form sqrt(s + c^2) - c is zero here; s / 2c is the truth to first order."""
    a = th.full((1, 3, 32, 32), 1e-7)
    c = 0.00054 * math.sqrt(3072)
    assert get_distance("pseudo-huber")(a, th.zeros_like(a)).item() == pytest.approx(3072e-14 / (2 * c), rel=1e-4)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="unknown loss_norm 'l3'; choose one of: l1, l2, l2-32, lpips, pseudo-huber"):
        get_distance("l3")


def test_the_flag_offers_the_table():
    assert ConsistencyConfig.__dataclass_fields__["loss_norm"].metadata["choices"] == tuple(DISTANCES)
