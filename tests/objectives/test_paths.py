"""The two paths on Gaussian data, where the teacher's ODE is known."""

import pytest
import torch as th
from torch import nn

from cm.errors import UserError
from cm.objectives.paths import NoisePath, TeacherPath, image_at, teacher_of
from cm.types import Batch, Networks
from support.gaussian import Gaussian, column
from support.objectives import nets_of

F64 = th.float64
BED = Gaussian(0.3, 0.7)
T, R = th.tensor([2.0, 0.5, 0.1], dtype=F64), th.tensor([1.99, 0.498, 0.0999], dtype=F64)


@pytest.fixture
def points():
    generator = th.Generator().manual_seed(0)
    x0, noise = (th.randn(3, 2, 2, 2, dtype=F64, generator=generator) for _ in range(2))
    return Batch(x0), noise, x0 + noise * column(T, x0)


@pytest.mark.parametrize("path", [TeacherPath(), NoisePath()])
def test_the_ends_are_those_of_a_line_through_x(path, points):
    batch, noise, x = points
    data, direction = path.ends(nets_of(BED.D, teacher=BED.D), batch, noise, x, T)
    th.testing.assert_close(data + column(T, x) * direction, x)


def test_the_teachers_line_is_tangent_to_its_ode(points):
    batch, noise, x = points
    _, slope = TeacherPath().ends(nets_of(BED.D, teacher=BED.D), batch, noise, x, T)
    h = 1e-5
    central = (BED.flow(x, T, T + h) - BED.flow(x, T, T - h)) / (2 * h)
    th.testing.assert_close(slope, central, rtol=1e-8, atol=1e-8)


def test_the_teachers_step_is_heuns(points):
    batch, noise, x = points
    nets = nets_of(BED.D, teacher=BED.D)
    error = TeacherPath().follow(nets, batch, noise, x, T, R) - BED.flow(x, T, R)
    assert error.abs().max() < 1e-7                                 # third order in a step of half a percent


def test_the_same_noise_leads_to_the_samples_image(points):
    batch, noise, x = points
    nets = nets_of(BED.D)
    th.testing.assert_close(NoisePath().follow(nets, batch, noise, x, T, R), batch.images + noise * column(R, x))


@pytest.mark.parametrize("path", [TeacherPath(), NoisePath()])
def test_level_zero_is_the_data_of_the_line(path, points):
    batch, noise, x = points
    nets = nets_of(BED.D, teacher=BED.D)
    r = th.tensor([0.0, 0.498, 0.0], dtype=F64)
    landed = image_at(path, nets, batch, noise, x, T, r, reaches_zero=True)
    data, _ = path.ends(nets, batch, noise, x, T)
    assert th.equal(landed[0], data[0]) and th.equal(landed[2], data[2])
    assert th.equal(landed[1], path.follow(nets, batch, noise, x, T, R)[1])


def test_the_teacher_is_conditioned_and_there_must_be_one(points):
    batch, noise, x = points
    batch.cond = {"y": th.tensor([1, 2, 3])}
    seen = []

    def D(x, sigma, y):
        seen.append(y)
        return x

    TeacherPath().follow(nets_of(D, teacher=D), batch, noise, x, T, R)
    assert len(seen) == 2 and all(y is batch.cond["y"] for y in seen)
    with pytest.raises(UserError, match="needs a teacher: give a teacher_model"):
        teacher_of(Networks(D, nn.Module()), batch)
