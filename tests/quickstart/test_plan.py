"""The planner: never more time or memory than there is, more time never gives a smaller network, and clear refusals."""

from dataclasses import replace

import pytest

from cm.config.flags import resolve
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.quickstart.look import Findings
from cm.quickstart.networks import SIZES
from cm.quickstart.plan import (
    LEAST_STEPS,
    MEMORY_SHARE,
    TEACHER_SHARE,
    Machine,
    Speed,
    Wish,
    learning_rate,
    make_plan,
    microbatch,
)

PHOTOS = Findings("photos", 100_000, 1000, (300, 480, 900), 0, False, {"a": 50_000, "b": 50_000})
NAMES = [size.name for size in SIZES]


def speed(name, side, size, slowness):
    """Steps of 32, 128 and 512 images: a constant part, and one in proportion."""
    steps = tuple((batch, slowness * (0.01 + 0.001 * batch)) for batch in (32, 128, 512))
    return Speed(name, side, int(1e6 * size), int(1e9 * size), int(1e6 * size), steps, slowness * 3e-4)


SPEEDS = (speed("tiny", 32, 0.05, 0.05), speed("small", 32, 0.2, 1.0), speed("medium", 64, 1.0, 2.0),
          speed("large", 128, 6.0, 6.0))
GPU = Machine("a GPU", "bf16", 1, 80 * 2**30, 4.0, SPEEDS)
HOURS = [0.02 * 1.2**step for step in range(58)]


def plan_of(hours, found=PHOTOS, machine=GPU, spent=5.0, **wish):
    return make_plan(found, machine, Wish(hours=hours, **wish), spent)


@pytest.mark.parametrize("wish", [{}, {"method": "cd"}, {"evaluates": True}])
def test_more_time_never_makes_the_network_smaller_and_never_more_is_planned(wish):
    plans = [plan_of(hours, **wish) for hours in HOURS]
    sizes = [NAMES.index(plan.network) for plan in plans]
    assert sizes == sorted(sizes) and set(sizes) == {0, 1, 2, 3}
    for hours, plan in zip(HOURS, plans):
        assert sum(plan.times.values()) <= 3600 * hours
        steps = [flags["total_training_steps"] for flags in (plan.teacher, plan.student)]
        assert min(steps) >= LEAST_STEPS
        assert plan.num_samples <= 1000
    for before, after in zip(plans, plans[1:]):
        if before.network == after.network:
            assert after.batch >= before.batch
            images = [plan.teacher["total_training_steps"] * plan.batch for plan in (before, after)]
            assert images[1] >= images[0] - after.batch     # steps are whole


def test_an_unsteady_measurement_does_not_change_that():
    """A larger batch that was measured as slower for each image is not taken."""
    odd = replace(SPEEDS[0], steps=((32, 0.01), (128, 0.3)))
    plans = [plan_of(hours, machine=replace(GPU, speeds=(odd,))) for hours in HOURS]
    assert {plan.batch for plan in plans} == {32}


def test_most_of_the_time_is_used_and_divided_as_stated():
    plan = plan_of(10.0)
    assert sum(plan.times.values()) > 0.85 * 36_000
    teacher, student = plan.times["training the teacher"], plan.times["training the student"]
    assert teacher / (teacher + student) == pytest.approx(TEACHER_SHARE, abs=0.01)
    assert teacher == pytest.approx(plan.teacher["total_training_steps"] * SPEEDS[2].step(plan.batch))


def test_the_time_of_a_step():
    each = Speed("x", 8, 1, 1, 1, ((32, 1.0), (128, 2.0)), 0.0)
    assert [each.step(batch) for batch in (16, 32, 80, 128, 256)] == [1, 1, 1.5, 2, 4]


@pytest.mark.parametrize("free, part", [(80 * 2**30, 256), (int((1e9 + 100e6) / MEMORY_SHARE), 64), (10**9, 0)])
def test_a_pass_has_as_many_images_as_fit(free, part):
    machine = replace(GPU, free=free)
    assert microbatch(machine, SPEEDS[2], 256) == part
    assert part == 0 or SPEEDS[2].held + part * SPEEDS[2].per_image <= MEMORY_SHARE * free
    assert microbatch(replace(machine, ranks=4), SPEEDS[2], 256) == min(part, 64)


def test_what_does_not_fit_the_memory_is_not_planned():
    small = replace(GPU, free=int((SPEEDS[1].held + 40e6) / MEMORY_SHARE))
    plan = plan_of(100.0, machine=small)
    assert plan.network == "small" and plan.memory <= MEMORY_SHARE * small.free
    assert plan.teacher["microbatch"] == 128 and plan.teacher["global_batch_size"] == 512
    with pytest.raises(UserError, match="the network tiny for 32x32 needs .* of the 1.0 KiB that are free"):
        plan_of(1.0, machine=replace(GPU, free=1024))


def test_too_little_time_names_the_least():
    with pytest.raises(UserError, match=r"--hours 0.001 \(4 s\) is too short .* the least here is about") as error:
        plan_of(0.001)
    least = float(str(error.value).split("--hours ")[-1])
    assert plan_of(1.01 * least).network == "tiny"
    with pytest.raises(UserError):
        plan_of(0.8 * least)


def test_a_network_that_was_asked_for_is_taken():
    plan = plan_of(20.0, size="tiny", max_steps=7, num_samples=5)
    assert (plan.network, plan.num_samples) == ("tiny", 5)
    assert plan.teacher["total_training_steps"] == plan.student["total_training_steps"] == 7


@pytest.mark.parametrize("method, mode", [("ect", "ect"), ("cd", "consistency_distillation")])
def test_the_flags_are_flags_of_training(method, mode):
    plan = plan_of(1.0, method=method)
    for flags in (plan.teacher, plan.student):
        values = resolve(flags, *TRAINING_SECTIONS).values
        assert values["precision"] == "auto" and values["data_dir"] == "photos" and values["random_flip"]
    assert plan.student["training_mode"] == mode
    assert plan.teacher["class_cond"] and plan.teacher["time_scale"] == 1, "a slow clock, which ECT needs"
    assert plan.student["lr"] < plan.teacher["lr"]


def test_grey_images_are_not_mirrored_unless_asked():
    grey = replace(PHOTOS, grey=True, classes={})
    plan = plan_of(1.0, found=grey)
    assert plan.teacher["random_flip"] is False and plan.teacher["channels"] == 1 and not plan.teacher["class_cond"]
    assert plan_of(1.0, found=grey, random_flip=True).student["random_flip"] is True


def test_smaller_batches_have_a_smaller_learning_rate():
    flags = {"lr": 1e-3, "global_batch_size": 128}
    assert [learning_rate(flags, batch) for batch in (32, 128, 512)] == [5e-4, 1e-3, 1e-3]
