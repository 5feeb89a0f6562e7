"""What all objectives have in common: conditions, weights, evaluations, and what they refuse."""

import pytest
import torch as th
from torch import nn

from cm.config.objective_schema import TRAINING_MODES
from cm.objectives import OBJECTIVES
from cm.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from cm.objectives.distances import l2
from cm.objectives.progdist import ProgressiveDistillation
from cm.samplers import CountingDenoiser
from cm.types import Batch, Networks
from support.gaussian import Gaussian, Scripted
from support.objectives import F64, GRIDS, Linear, levels, nets_of, orthonormal, plain

# --- consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, expected", [(ConsistencyTraining, (1, 1, 0)), (ConsistencyDistillation, (1, 1, 2)),
                       (ProgressiveDistillation, (1, 0, 2))],
)
def test_no_network_is_asked_more_often_than_needed_and_only_one_learns(kind, expected):
    modules = [Linear(5, 0.0) for _ in range(3)]
    counted = [CountingDenoiser(module) for module in modules]
    nets = Networks(counted[0], modules[0], counted[1], modules[1], counted[2], modules[2])
    objective = kind(lambda step: (0.0, 5), levels, plain, l2)
    objective(nets, Batch(th.ones(4, 2, 2, dtype=F64)), 0, th).loss.sum().backward()
    assert tuple(network.calls for network in counted) == expected
    assert modules[0].alpha.grad is not None and all(module.alpha.grad is None for module in modules[1:])


def test_conditions_reach_every_network():
    labels = th.tensor([3, 5])
    seen = []

    def D(x, sigma, y):
        seen.append(y)
        return x

    batch = Batch(th.zeros(2, 2, 2, dtype=F64), {"y": labels})
    for kind, calls in [(ConsistencyTraining, 2), (ConsistencyDistillation, 4), (ProgressiveDistillation, 3)]:
        kind(lambda step: (0.0, 5), levels, plain, l2)(nets_of(D, teacher=D), batch, 0, th)
        assert len(seen) == calls and all(th.equal(y, labels) for y in seen)
        seen.clear()


@pytest.mark.parametrize("kind", GRIDS)
def test_weights_multiply_the_loss_of_each_sample(kind):
    bed = Gaussian(0.3, 0.5)
    batch, noise = orthonormal(bed, 3)
    index, curriculum = th.tensor([0, 1, 3]), (lambda step: (0.0, 6))
    nets = nets_of(bed.D, teacher=bed.D)
    losses = [
        kind(curriculum, levels, weight, l2)(nets, batch, 0, Scripted(noise, index)).loss
        for weight in (plain, lambda sigma: sigma**-2)
    ]
    grid = levels(6 if kind is not ProgressiveDistillation else 7)
    th.testing.assert_close(losses[1], losses[0] * grid[index] ** -2)


@pytest.mark.parametrize("kind", GRIDS)
def test_every_interval_is_drawn(kind):
    objective = kind(lambda step: (0.0, 4), levels, plain, l2)
    terms = objective(nets_of(lambda x, sigma: x, teacher=lambda x, sigma: x), Batch(th.zeros(200, 1, 1)), 0, th)
    grid = levels(4 if kind is not ProgressiveDistillation else 5, dtype=th.float32)
    assert sorted(set(terms.sigma.tolist())) == sorted(grid[:-1].tolist())


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, num_scales, message",
    [
        (ConsistencyTraining, 1, "neighbouring noise levels: num_scales must be at least 2, got 1"),
        (ConsistencyDistillation, 1, "neighbouring noise levels: num_scales must be at least 2, got 1"),
        (ProgressiveDistillation, 0, "student's number of sampling steps, at least 1, got 0"),
        (ConsistencyTraining, 3, "compare with a target network: give a target_model"),
        (ConsistencyDistillation, 3, "compare with a target network: give a target_model"),
        (ProgressiveDistillation, 3, "progressive distillation needs a teacher: give a teacher_model"),
    ],
)
def test_missing_networks_and_levels(kind, num_scales, message):
    nets = Networks(lambda x, sigma: x, nn.Module())
    with pytest.raises(ValueError, match=message):
        kind(lambda step: (0.0, num_scales), levels, plain, l2)(nets, Batch(th.zeros(2, 1, 1)), 0, th)


def test_the_table_holds_the_training_modes():
    assert tuple(OBJECTIVES) == TRAINING_MODES
