"""Consistency training and distillation on data whose consistency function is known."""

import math
from functools import partial

import pytest
import torch as th
from torch import nn

from cm.config.flags import defaults_of
from cm.config.objective_schema import ConsistencyConfig
from cm.karras_diffusion import KarrasDenoiser
from cm.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from cm.objectives.distances import l1, l2
from cm.objectives.ect import ECT
from cm.objectives.ict import ICT
from cm.objectives.pairs import ShrinkingPairs
from cm.objectives.paths import TEACHER_SOLVERS
from cm.samplers.network_guidance import Guidance, NetworkGuidedDenoiser
from cm.types import Batch, Networks
from support.gaussian import Gaussian, Scripted, stored
from support.objectives import F64, Linear, levels, nets_of, orthonormal, plain


@pytest.mark.parametrize(
    "kind, name", [(ConsistencyTraining, "p_ct_loss"), (ConsistencyDistillation, "p_cd_heun_loss")]
)
@pytest.mark.parametrize("i", range(10))
def test_the_loss_of_the_exact_consistency_function(kind, name, i):
    """It is not zero, but as predicted: from the noise of the Euler step, and from the error of the Heun step."""
    bed = Gaussian(0.3, stored("g_s").item())
    pair = th.stack([stored("p_t")[i], stored("p_r")[i]])
    objective = kind(lambda step: (0.0, 2), lambda n, device, dtype: pair, plain, l2)
    batch, noise = orthonormal(bed, 1)
    terms = objective(nets_of(bed.f, teacher=bed.D), batch, 0, Scripted(noise, th.tensor([0])))
    # The loss is a small difference of numbers near 1: absolute errors of 1e-16 relative to squares of 80.
    th.testing.assert_close(terms.loss[0], stored(name)[i], rtol=1e-6, atol=1e-18)
    assert terms.sigma.item() == pair[0]


@pytest.mark.parametrize("kind, order", [
    (ConsistencyTraining, 1), (ConsistencyDistillation, 3),
    (partial(ConsistencyDistillation, teacher_solver="euler"), 2),
])
def test_the_loss_of_the_exact_function_falls_with_the_step(kind, order):
    bed, roots = Gaussian(0.3, 0.5), []
    batch, noise = orthonormal(bed, 1)
    for step in (0.04, 0.02):
        pair = th.tensor([0.5, 0.5 - step], dtype=F64)
        objective = kind(lambda step: (0.0, 2), lambda n, device, dtype, pair=pair: pair, plain, l2)
        nets = nets_of(bed.f, teacher=bed.D)
        roots.append(objective(nets, batch, 0, Scripted(noise, th.tensor([0]))).loss.sqrt().item())
    assert math.log2(roots[0] / roots[1]) == pytest.approx(order, abs=0.1)


def test_the_teachers_solver_is_a_flag():
    values = {**defaults_of(ConsistencyConfig), "total_training_steps": 10}
    diffusion = KarrasDenoiser(loss_norm="l2", distillation=True)
    for name in TEACHER_SOLVERS:
        made = ConsistencyDistillation.from_flags(diffusion, values | {"teacher_solver": name})
        assert made.teacher_solver == name
    assert set(ConsistencyConfig.__dataclass_fields__["teacher_solver"].metadata["choices"]) == set(TEACHER_SOLVERS)


@pytest.mark.parametrize(
    "kind, name", [(ConsistencyTraining, "fp_slope_ct"), (ConsistencyDistillation, "fp_slope_cd_heun")]
)
@pytest.mark.parametrize("i, n", [(0, 2), (1, 11), (2, 18), (3, 41)])
def test_training_ends_where_the_formula_says(kind, name, i, n):
    """The loss is a parabola in each alpha: two gradients find its least point, from the cleanest level upwards."""
    assert stored("fp_N")[i] == n
    bed = Gaussian(0.3, stored("g_s").item())
    online = Linear(n, bed.mu)
    batch, noise = orthonormal(bed, 1)
    objective = kind(lambda step: (0.0, n), levels, plain, l2)
    for index in reversed(range(n - 1)):
        gradients = []
        for trial in (0.0, 1.0):
            online.alpha.data[index] = trial
            nets = Networks(online, online, online, online, bed.D)
            loss = objective(nets, batch, 0, Scripted(noise, th.tensor([index]))).loss
            gradients.append(th.autograd.grad(loss.sum(), online.alpha)[0][index].item())
        online.alpha.data[index] = -gradients[0] / (gradients[1] - gradients[0])
    th.testing.assert_close(online.alpha.data[0], stored(name)[i], rtol=1e-6, atol=0)


class Dropper(nn.Module):
    """Its output is its dropout mask."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(th.ones(()))

    def forward(self, x, sigma):
        return nn.functional.dropout(th.ones_like(x), 0.5, training=True) * self.scale


@pytest.mark.parametrize("kind", [ConsistencyTraining, ConsistencyDistillation, ICT, ECT])
def test_online_and_target_network_share_their_dropout_mask(kind):
    """Also when a teacher with a dropout of its own is asked in between; and the next mask is another one."""
    th.manual_seed(0)
    online, masks = Dropper(), []

    def watched(x, sigma):
        masks.append(online(x, sigma))
        return masks[-1]

    pairs = ShrinkingPairs(q=256) if kind is ECT else None          # whose r is above 0 from the first step
    objective = kind(lambda step: (0.0, 5), levels, plain, l1, drawn=pairs)
    nets = Networks(watched, online, Dropper(), online, Dropper())
    for _ in range(2):
        terms = objective(nets, Batch(th.zeros(4, 3, 8, 8)), 0, th)
        assert (terms.loss == 0).all()
    assert not th.equal(masks[0], masks[-1])


def test_after_a_step_the_target_follows():
    online, target = nn.Linear(2, 2), nn.Linear(2, 2)
    before, rates = target.weight.detach().clone(), {0: 0.75, 1: 0.0, 2: 1.0}
    objective = ConsistencyTraining(lambda step: (rates[step], 5), levels, plain, l2)
    nets = Networks(online, online, target, target)
    assert objective.after_step(nets, 0) is False
    th.testing.assert_close(target.weight, 0.75 * before + 0.25 * online.weight)
    objective.after_step(nets, 1)
    assert th.equal(target.weight, online.weight)
    online.weight.data.add_(1)
    objective.after_step(nets, 2)
    assert not th.equal(target.weight, online.weight)


def test_a_guided_teacher_is_followed_where_its_interval_says():
    """One sample in each interval of the grid; the guided slope is written down once more."""
    good, bad, n, w = Gaussian(0.3, 0.5), Gaussian(-0.2, 0.9), 7, 2.5
    guide = NetworkGuidedDenoiser(good.D, Guidance(lambda D: bad.D, w, 0.5, 20.0))

    def formula(x, sigma):
        inside = ((sigma > 0.5) & (sigma <= 20))[:, None, None]
        return th.where(inside, bad.D(x, sigma) + w * (good.D(x, sigma) - bad.D(x, sigma)), good.D(x, sigma))

    objective = ConsistencyDistillation(lambda step: (0.0, n), levels, plain, l2)
    batch, noise = orthonormal(good, n - 1)
    losses = [
        objective(nets_of(good.f, teacher=teacher), batch, 0, Scripted(noise, th.arange(n - 1))).loss
        for teacher in (guide, formula, good.D)
    ]
    th.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-15)
    guided = levels(n)[:-1] <= 20
    guided &= levels(n)[:-1] > 0.5
    changed = (losses[0] - losses[2]).abs() > 1e-9 * losses[2]
    assert guided.any() and changed[guided].all() and not changed[levels(n)[:-1] <= 0.5].any()


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_distillation_without_a_teacher():
    nets = Networks(lambda x, sigma: x, nn.Module(), target=lambda x, sigma: x)
    with pytest.raises(ValueError, match="consistency distillation needs a teacher: give a teacher_model"):
        ConsistencyDistillation(lambda step: (0.0, 5), levels, plain, l2)(nets, Batch(th.zeros(2, 1, 1)), 0, th)
