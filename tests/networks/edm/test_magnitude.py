"""The layers of EDM2 keep the magnitude of independent inputs."""

import math

import pytest
import torch as th

from cm.networks.edm.magnitude import EPS, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize


def magnitude(x):
    return x.detach().square().mean().sqrt().item()


def normal(*shape, seed=0):
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


LAYERS = {
    "silu": lambda x: mp_silu(x),
    "sum": lambda x: mp_sum(x, normal(*x.shape, seed=1), 0.3),
    "even sum": lambda x: mp_sum(x, normal(*x.shape, seed=1), 0.5),
    "concatenation": lambda x: mp_cat(x, normal(16, 24, 16, 16, seed=1), 0.5),
    "uneven concatenation": lambda x: mp_cat(x, normal(16, 24, 16, 16, seed=1), 0.2),
    "1x1 convolution": MPConv(64, 96, 1),
    "linear layer": lambda x: MPConv(64, 96)(x.permute(0, 2, 3, 1).reshape(-1, 64)),
    "waves": lambda x: MPFourier(512)(x.flatten()[:2000]),
    "pixel norm": lambda x: normalize(3 * x, (1,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_magnitudes_are_preserved(name):
    th.manual_seed(3)
    assert magnitude(LAYERS[name](normal(16, 64, 16, 16))) == pytest.approx(1, abs=0.02)


def test_a_convolution_preserves_them_away_from_the_border():
    th.manual_seed(0)
    out = MPConv(64, 96, 3)(normal(8, 64, 16, 16))
    assert magnitude(out[:, :, 1:-1, 1:-1]) == pytest.approx(1, abs=0.02) and out.shape == (8, 96, 16, 16)


def test_sums_and_concatenations_are_those_of_the_paper():
    """Equations 88 and 103, written out."""
    a, b = normal(2, 6, 1, 1), normal(2, 2, 1, 1, seed=1)
    t, c = 0.3, math.sqrt(8 / (0.7**2 + 0.3**2))
    th.testing.assert_close(mp_cat(a, b, t), th.cat([a * c / math.sqrt(6) * 0.7, b * c / math.sqrt(2) * 0.3], 1))
    th.testing.assert_close(mp_sum(a, a.flip(1), t), (0.7 * a + 0.3 * a.flip(1)) / math.sqrt(0.58))
    shares = mp_cat(a, b, t).square().sum((0, 2, 3))
    assert magnitude(mp_sum(a.half(), a, t)) > 0 and mp_sum(a.half(), a, t).dtype == th.float16
    assert shares.shape == (8,)


def test_the_magnitude_of_half_precision_is_computed_in_float32():
    x = th.full((2, 4096), 200.0, dtype=th.float16)                 # whose squares no float16 holds
    out = normalize(x, (1,))
    assert out.dtype == th.float16 and th.equal(out, th.ones_like(x))
    assert not normalize(th.zeros(2, 3), (1,)).any()


def test_the_magnitude_of_weights_does_not_matter_but_their_gain():
    layer, x = MPConv(5, 7, 3), normal(2, 5, 4, 4)
    before = layer(x)
    with th.no_grad():
        layer.weight.mul_(th.linspace(1, 9, 7).reshape(7, 1, 1, 1))
    th.testing.assert_close(layer(x), before, rtol=3 * EPS, atol=1e-5)
    th.testing.assert_close(layer(x, th.tensor(0.5)), layer(x) / 2)
    rows = layer.effective(2.0).detach().flatten(1).norm(dim=1)
    th.testing.assert_close(rows, th.full((7,), 2.0), rtol=3 * EPS, atol=0)
