"""Improved consistency training: the curriculum, the distance and the loss, by the paper's numbers."""

import math

import pytest
import torch as th

from cm.errors import UserError
from cm.objectives.consistency import LossParts
from cm.objectives.distances import get_distance, pseudo_huber
from cm.objectives.ict import ICT
from cm.objectives.pairs import LognormalGridPairs
from cm.types import Batch
from support.gaussian import Gaussian, Scripted
from support.objectives import F64, nets_of, objective_of


def test_the_intervals_double_as_published():
    objective, _ = objective_of(ICT, "--training_mode", "ict", "--total_training_steps", "400000")
    scales = [objective.logs(step)["num_scales"] for step in (0, 49_999, *range(50_000, 400_000, 50_000), 399_999)]
    assert scales == [11, 11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert objective.logs(0) == {"num_scales": 11}                  # no decay rate: the target has the online weights


def test_a_stage_may_have_a_length_of_its_own():
    objective, _ = objective_of(
        ICT, "--training_mode", "ict", "--stage_steps", "10", "--start_scales", "2", "--end_scales", "10",
    )
    assert [objective.logs(step)["num_scales"] for step in (0, 9, 10, 20, 30, 600_000 - 1)] == [3, 3, 5, 9, 11, 11]


@pytest.mark.parametrize("shape, c", [((1, 3, 32, 32), 0.02993), ((1, 3, 64, 64), 0.05986)])
def test_the_distance_is_of_whole_images(shape, c):
    a, b = th.zeros(shape, dtype=F64), th.full(shape, 0.01, dtype=F64)
    total = a[0].numel() * 1e-4
    assert pseudo_huber(a, b).item() == pytest.approx(math.sqrt(total + c**2) - c, rel=1e-3)
    assert get_distance("pseudo-huber", 0.5)(a, b).item() == pytest.approx(math.sqrt(total + 0.25) - 0.5, rel=1e-12)


def test_the_loss_is_a_slope():
    """Of the exact consistency function, on the interval that a given number draws."""
    bed = Gaussian(0.3, 0.5)
    objective, values = objective_of(ICT, "--training_mode", "ict")
    assert values["weight_schedule"] == "uniform"
    generator = th.Generator().manual_seed(0)
    x0, noise = (th.randn(1, 1, 2, 2, dtype=F64, generator=generator) for _ in range(2))
    u = th.tensor([0.4], dtype=F64)
    terms = objective(nets_of(bed.f), Batch(x0), 0, Uniform(noise, u))
    grid = objective.levels(11, dtype=F64)
    i = objective.pairs.index(11, Uniform(u), x0)
    t, r = grid[i], grid[i + 1]
    distance = (bed.f(x0 + t * noise, t) - bed.f(x0 + r * noise, r)).square().sum()
    c = 0.00054 * 2
    expected = ((distance + c**2).sqrt() - c) / (t - r)
    th.testing.assert_close(terms.loss, expected, rtol=1e-9, atol=0)
    assert th.equal(terms.sigma, t)


class Uniform(Scripted):
    """Scripted draws, uniform numbers among them."""

    def rand(self, *shape, dtype=None, device=None):
        return self.randn(*shape)


def test_the_target_network_is_the_online_one():
    objective, _ = objective_of(ICT, "--training_mode", "ict")
    assert objective.companions == () and ICT.companions_of({}) == ()
    assert objective.after_step(nets_of(lambda x, sigma: x), 0) is False
    assert isinstance(objective.pairs, LognormalGridPairs)


def test_a_new_combination_needs_no_code():
    """iCT's pairs and weights along a teacher's ODE, against a moving average."""
    flags = ["--training_mode", "ict", "--pair_path", "teacher", "--pair_target", "ema", "--start_ema", "0.9",
             "--loss_norm", "l2"]
    objective, values = objective_of(ICT, *flags)
    assert [each.name for each in objective.companions] == ["target_model", "teacher_model"]
    assert ICT.companions_of(values) == objective.companions
    assert objective.logs(0) == {"target_ema": 0.9, "num_scales": 11}
    assert ICT.parts == LossParts("lognormal-grid", "noise", "gap", "online")


@pytest.mark.parametrize("argv, message", [
    (["--training_mode", "ict", "--start_ema", "0.9"], "--start_ema 0.9 has no effect without --pair_target ema"),
    (["--training_mode", "ict", "--shrink_q", "4"], "--shrink_q: shrink_q=4.0 is for --training_mode ect"),
    (["--training_mode", "ict", "--loss_norm", "l2", "--huber_c", "1"], "--huber_c 1.0 .* --loss_norm pseudo-huber"),
    (["--training_mode", "ict", "--pairs", "shrinking"], "identity at sigma_min, .*choose grid or lognormal-grid"),
])
def test_flags_that_would_have_no_effect_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        objective_of(ICT, *argv)
