"""A second time in every network: it changes nothing at the start, and is learnt."""

import pytest
import torch as th

from cm.networks.jvp import jvp
from cm.networks.second_time import SCALE
from cm.script_util import create_model
from cm.setup.clock import FASTEST


def build(arch, **flags):
    th.manual_seed(0)
    return create_model(8, 32, 1, "1", class_cond=True, num_classes=3, attention_resolutions="8", num_head_channels=32,
                        arch=arch, **flags)


ARCHS = ["unet", "ddpmpp", "ncsnpp", "adm", "edm2"]
X, TIME, Y = th.randn(4, 3, 8, 8, generator=th.Generator().manual_seed(1)), th.linspace(-1, 1, 4), th.arange(4) % 3
GAP = th.tensor([0.0, 0.1, 0.5, 1.0])


@pytest.fixture(params=ARCHS)
def pair(request):
    """A network without and one with a second time, of the same weights, none of them 0."""
    one, two = build(request.param), build(request.param, second_time=True)
    for param in one.parameters():
        if param.detach().abs().max() < 1e-3:               # the layers that start near 0
            th.nn.init.normal_(param, std=0.05)
    missing = two.load_state_dict(one.state_dict(), strict=False)
    assert missing.missing_keys and all(name.startswith("second_time.") for name in missing.missing_keys)
    return one.eval(), two.eval()


@th.no_grad()
def test_it_begins_as_the_network_without(pair):
    one, two = pair
    expected = one(X, TIME, y=Y)
    assert th.equal(two(X, TIME, y=Y, gap=GAP), expected) and th.equal(two(X, TIME, y=Y), expected)
    with pytest.raises(ValueError, match="one time: call it without gap"):
        one(X, TIME, y=Y, gap=GAP)


def test_it_learns_the_gap_and_has_a_derivative_in_it(pair):
    _, two = pair
    two(X, TIME, y=Y).square().sum().backward()                     # without a gap all parameters have gradients, too
    assert all(param.grad is not None for param in two.second_time.parameters())
    th.nn.init.normal_(two.second_time.layers[2].weight, std=0.5)
    with th.no_grad():
        assert not th.allclose(two(X, TIME, y=Y, gap=GAP), two(X, TIME, y=Y, gap=GAP + 0.1))
        _, slope = jvp(lambda gap: two(X, TIME, y=Y, gap=gap), (GAP,), (th.ones(4),))
        two, h = two.double(), 1e-5
        args = (X.double(), TIME.double())
        above, below = (two(*args, y=Y, gap=GAP.double() + d) for d in (h, -h))
    th.testing.assert_close(slope.double(), (above - below) / (2 * h), rtol=1e-3, atol=1e-4)


def test_its_waves_are_slow():
    sigma = th.logspace(-3, 2, 1000, dtype=th.float64)
    s = sigma / (1 + sigma)
    speed = SCALE * (s.diff() / sigma.log().diff()).max()           # ds / d ln sigma = s (1 - s)
    assert speed <= FASTEST
