"""The objectives on data whose optimal denoiser is known. Golden losses: test_karras_diffusion.py."""

import math

import pytest
import torch as th
from torch import nn

from cm.config.schema import TRAINING_MODES
from cm.diffusion.noise_sampling import LossSecondMomentResampler
from cm.diffusion.preconditioning import EDMPrecond
from cm.diffusion.schedules import karras_grid
from cm.diffusion.weightings import get_weightings
from cm.objectives import OBJECTIVES
from cm.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from cm.objectives.curricula import ema_and_scales
from cm.objectives.distances import l1, l2
from cm.objectives.edm import EDM
from cm.objectives.progdist import ProgressiveDistillation
from cm.samplers import CountingDenoiser
from cm.samplers.euler import Euler
from cm.types import Batch, Networks
from support.gaussian import Gaussian, Scripted, stored

F64 = th.float64
GRIDS = [ConsistencyTraining, ConsistencyDistillation, ProgressiveDistillation]


def plain(sigma: th.Tensor) -> th.Tensor:
    return th.ones_like(sigma)


def levels(n: int, device: object = "cpu", dtype: th.dtype = F64) -> th.Tensor:
    return karras_grid(n, device=device, dtype=dtype)


def orthonormal(bed: Gaussian, n: int) -> tuple[Batch, th.Tensor]:
    """Data and noise of n samples whose second moments are the distribution's, exactly: expectations become sums."""
    pattern = th.tensor([[[1.0, 1.0], [-1.0, 1.0]]], dtype=F64).expand(n, 2, 2)
    return Batch(bed.mu + bed.s * pattern), th.tensor([[[1.0, -1.0], [1.0, 1.0]]], dtype=F64).expand(n, 2, 2).clone()


def nets_of(online, target=None, teacher=None) -> Networks:
    empty = nn.Module()
    return Networks(online, empty, target or online, empty, teacher, empty)


# --- denoising -------------------------------------------------------------------------------------------------------


def test_the_least_denoising_loss():
    bed, t = Gaussian(0.3, stored("g_s").item()), stored("p_t")
    batch, noise = orthonormal(bed, len(t))

    class Law:
        def draw(self, rng, n, device):
            return t, plain(t), None

    terms = EDM(plain, Law())(nets_of(bed.D), batch, 0, Scripted(noise))
    th.testing.assert_close(terms.loss, stored("p_edm_min_loss"), rtol=1e-10, atol=0)
    assert th.equal(terms.sigma, t)


def test_karras_weights_make_the_least_loss_one_at_every_level():
    bed, sigma = Gaussian(0.3, 0.5), th.logspace(-2.5, 2, 9, dtype=F64)
    batch, noise = orthonormal(bed, 9)

    class Law:
        def draw(self, rng, n, device):
            return sigma, plain(sigma), None

    objective = EDM(lambda sigma: get_weightings("karras", sigma**-2, 0.5), Law())
    terms = objective(nets_of(bed.D), batch, 0, Scripted(noise))
    th.testing.assert_close(terms.loss, th.ones(9, dtype=F64), rtol=1e-9, atol=0)
    th.testing.assert_close(terms.logs["mse"], terms.loss)
    th.testing.assert_close(terms.logs["xs_mse"] / EDMPrecond().scalings(sigma).c_out ** 2, terms.loss)


def test_importance_weights_reach_the_loss_but_not_the_logs():
    law = LossSecondMomentResampler(karras_grid(3, 0.1, 10.0), history_per_term=1)
    law.update_with_losses(th.arange(3), th.tensor([1.0, 2.0, 5.0]))
    bed, rng = Gaussian(0.0, 0.5), th.Generator().manual_seed(0)
    u, noise = th.tensor([0.01, 0.2, 0.99]), th.randn(3, 2, 2, generator=rng, dtype=F64)

    class Source(Scripted):
        rand = Scripted.randn

    terms = EDM(plain, law)(nets_of(bed.D), Batch(th.zeros_like(noise)), 0, Source(u, noise))
    weight = 1 / (3 * law.probabilities())
    th.testing.assert_close(terms.loss, weight.float().double() * terms.logs["mse"])
    th.testing.assert_close(terms.sigma, law.sigmas.double())


# --- consistency -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind, order", [(ConsistencyTraining, 1), (ConsistencyDistillation, 3)])
def test_the_loss_of_the_exact_function_falls_with_the_step(kind, order):
    bed, roots = Gaussian(0.3, 0.5), []
    batch, noise = orthonormal(bed, 1)
    for step in (0.04, 0.02):
        pair = th.tensor([0.5, 0.5 - step], dtype=F64)
        objective = kind(lambda step: (0.0, 2), lambda n, device, dtype, pair=pair: pair, plain, l2)
        nets = nets_of(bed.f, teacher=bed.D)
        roots.append(objective(nets, batch, 0, Scripted(noise, th.tensor([0]))).loss.sqrt().item())
    assert math.log2(roots[0] / roots[1]) == pytest.approx(order, abs=0.1)


class Linear(nn.Module):
    """f(x, t_i) = mu + alpha_i (x - mu): one number for each level of a grid."""

    def __init__(self, n: int, mu: float):
        super().__init__()
        self.mu, self.grid = mu, levels(n)
        self.alpha = nn.Parameter(th.ones(n, dtype=F64))

    def forward(self, x, sigma):
        index = (self.grid - sigma[:, None]).abs().argmin(1)
        return self.mu + self.alpha[index][:, None, None] * (x - self.mu)


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


@pytest.mark.parametrize("kind", [ConsistencyTraining, ConsistencyDistillation])
def test_online_and_target_network_share_their_dropout_mask(kind):
    """Also when a teacher with a dropout of its own is asked in between; and the next mask is another one."""
    th.manual_seed(0)
    online, masks = Dropper(), []

    def watched(x, sigma):
        masks.append(online(x, sigma))
        return masks[-1]

    objective = kind(lambda step: (0.0, 5), levels, plain, l1)
    nets = Networks(watched, online, Dropper(), online, Dropper())
    for _ in range(2):
        terms = objective(nets, Batch(th.zeros(4, 3, 8, 8)), 0, th)
        assert (terms.loss == 0).all()
    assert not th.equal(*masks)


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


# --- progressive distillation ----------------------------------------------------------------------------------------


class Table(nn.Module):
    """D(x, sigma) = mu + a(sigma) (x - mu), with a looked up among the noise levels it has been taught."""

    def __init__(self, grid: th.Tensor, slopes: th.Tensor, mu: float):
        super().__init__()
        self.mu = mu
        self.register_buffer("grid", grid)
        self.slopes = nn.Parameter(slopes)

    def forward(self, x, sigma):
        nearest = (self.grid.log() - sigma[:, None].log()).abs().argmin(1)
        return self.mu + self.slopes[nearest][:, None, None] * (x - self.mu)


def test_stages_end_in_one_step_that_does_all_the_steps_of_the_first_teacher():
    """8 Euler steps become 4, 2, 1. In each stage the loss has a zero, found here by two gradients per level."""
    bed = Gaussian(0.3, 0.5)
    curriculum = ema_and_scales("fixed", 0.0, "progdist", 4, 4, 100, 10)
    objective = ProgressiveDistillation(curriculum, levels, plain, l2)
    batch, noise = orthonormal(bed, 1)
    fine = levels(9)                                                # every level that any stage asks about
    exact = 0.25 / (0.25 + fine**2)
    student, teacher = (Table(fine, exact.clone(), bed.mu) for _ in range(2))
    nets = Networks(student, student, None, None, teacher, teacher)
    stages = []
    for step in range(60):
        n = curriculum(step)[1]
        if step % 10 == 9:                                          # the stage has been trained to the end
            for index in range(n):
                slot = index * (8 // n)
                gradients = []
                for trial in (0.0, 1.0):
                    student.slopes.data[slot] = trial
                    loss = objective(nets, batch, step, Scripted(noise, th.tensor([index]))).loss
                    gradients.append(th.autograd.grad(loss.sum(), student.slopes)[0][slot].item())
                student.slopes.data[slot] = -gradients[0] / (gradients[1] - gradients[0])
                assert objective(nets, batch, step, Scripted(noise, th.tensor([index]))).loss.item() < 1e-18
        holder = teacher.slopes
        if objective.after_step(nets, step):
            stages.append(step)
            assert teacher.slopes is holder                         # in place: nobody has to bind it anew
            assert th.equal(teacher.slopes, student.slopes)
    assert stages == [9, 29]                                        # the stage of 2 lasts twice as long

    x = th.tensor([[[80.0, -30.0]]], dtype=F64)
    once = Euler().step(student, x, levels(2)[:1], levels(2)[1:], None)
    for t, r in zip(fine, fine[1:]):
        x = Euler().step(bed.D, x, t[None], r[None], None)
    th.testing.assert_close(once, x, rtol=1e-8, atol=1e-8)


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


def test_distillation_without_a_teacher():
    nets = Networks(lambda x, sigma: x, nn.Module(), target=lambda x, sigma: x)
    with pytest.raises(ValueError, match="consistency distillation needs a teacher: give a teacher_model"):
        ConsistencyDistillation(lambda step: (0.0, 5), levels, plain, l2)(nets, Batch(th.zeros(2, 1, 1)), 0, th)


def test_the_table_holds_the_training_modes():
    assert tuple(OBJECTIVES) == TRAINING_MODES
