"""Training in half precision: float32 masters of every network that moves, skipped steps, and resuming bit for bit."""

import csv

import pytest
import torch as th

from cm.training.loop import as_batch
from cm.training.master_weights import HALF
from support.training import MODES, digest, loop, network, run

KINDS = ("edm", "consistency_distillation", "consistency_training", "progdist")


def step(training):
    training.run_step(as_batch(next(training.data), training.step, 0, 1))


def saved(directory, name):
    return th.load(directory / name, weights_only=True)


def is_half(model):
    return any(param.dtype in HALF for param in model.parameters())


def overflow(training):
    """Make the gradients of the next step too large for half precision, once."""
    backward = training.trainer.backward

    def too_large(loss):
        training.trainer.backward = backward
        backward(loss * 1e30)

    training.trainer.backward = too_large


@pytest.mark.parametrize("mode", KINDS)
def test_a_run_that_learns_nothing_saves_what_it_started_from(images, tmp_path, mode):
    """At learning rate 0 every file holds the float32 start, to the bit: nothing has been rounded to half."""
    training = run(images, tmp_path, 2, mode=mode, lr=0.0, use_fp16=True)
    start, teacher = network().state_dict(), network(seed=1).state_dict()
    files = {"model000002.pt": start, "ema_0.5_000002.pt": start}
    if mode.startswith("consistency"):
        files["target_model000002.pt"] = start
    if mode == "progdist":
        files["teacher_model000002.pt"] = teacher
    for name, expected in files.items():
        found = saved(tmp_path, name)
        assert found.keys() == expected.keys()
        assert all(th.equal(found[key], value) for key, value in expected.items()), name
    assert is_half(training.model)
    for other in (training.target_model, training.teacher_model) if mode != "edm" else ():
        assert other is None or is_half(other)


def test_the_target_is_averaged_in_float32(images, tmp_path):
    """A step of 1e-6 of a weight, which half precision cannot hold, still moves the target."""
    training = loop(images, tmp_path, 9, mode="consistency_training", use_fp16=True, lr=1e-6,
                    curriculum=lambda step: (0.75, 6))
    slow = [param.detach().double() for param in training.trainer.master_params]
    for _ in range(3):
        step(training)
        slow = [0.75 * a + 0.25 * p.detach().double() for a, p in zip(slow, training.trainer.master_params)]
    ours = training.moving["target_model"].master_params
    for a, b, half in zip(slow, ours, training.target_model.parameters()):
        # Three float32 roundings of numbers below 2.
        th.testing.assert_close(b.double(), a, rtol=0, atol=4e-7)
        assert th.equal(half, b.to(half.dtype))
    assert training.trainer.skipped_steps == 0
    moved = [(b - p).abs().max().item() for b, p in zip(ours, network().parameters())]
    assert 0 < max(moved) < 1e-5


@pytest.mark.parametrize("mode", KINDS)
def test_an_overflow_skips_the_step_and_lowers_the_scale(images, tmp_path, mode):
    training = loop(images, tmp_path, 3, mode=mode, use_fp16=True, fp16_scale_growth=0.25, save_interval=2)
    overflow(training)
    before = [param.detach().clone() for param in training.trainer.master_params]
    step(training)
    assert all(th.equal(a, b) for a, b in zip(before, training.trainer.master_params))
    assert all(th.equal(a, b) for a, b in zip(before, training.ema_params[0]))
    training.run_loop()
    assert not all(th.equal(a, b) for a, b in zip(before, training.trainer.master_params))
    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    # The first row belongs to the second step: the first was taken by hand.
    assert [float(row["lg_loss_scale"]) for row in rows] == [19.0, 19.25]
    assert [int(row["skipped_steps"]) for row in rows] == [1, 1]
    assert saved(tmp_path, "trainer000003.pt") == {"lg_loss_scale": 19.5, "skipped_steps": 1}


def test_a_stage_ends_even_if_its_last_step_overflows(images, tmp_path):
    training = loop(images, tmp_path, 8, use_fp16=True, **MODES["progdist"], mode="progdist")
    step(training)
    optimizer = training.opt
    overflow(training)
    step(training)
    assert training.trainer.skipped_steps == 1 and training.opt is not optimizer
    teacher = training.moving["teacher_model"].master_params
    assert all(th.equal(a, b) for a, b in zip(teacher, training.trainer.master_params))


@pytest.mark.parametrize("mode", KINDS)
def test_a_resumed_run_is_the_same_run_to_the_last_bit(images, tmp_path, mode):
    options = {**MODES[mode], "mode": mode, "use_fp16": True}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(images, straight, 4, **options)
    for steps in (1, 4):                                        # progdist: inside the first stage, then into the second
        run(images, stopped, steps, **options)
    assert digest(straight, 4) == digest(stopped, 4)


@pytest.mark.parametrize("mode", KINDS)
def test_every_precision_learns_alike(images, tmp_path, mode):
    """Two steps bring every precision to about the same weights: half precision changes a step by percents."""
    start = list(network().parameters())
    trained = {}
    for precision in ("fp32", "bf16", "fp16"):
        training = loop(images, tmp_path / precision, 2, mode=mode, precision=precision)
        step(training)
        step(training)
        assert training.trainer.precision == precision and training.trainer.skipped_steps == 0
        trained[precision] = training.trainer.master_params
    moved = length(p - s for p, s in zip(trained["fp32"], start))
    for precision in ("bf16", "fp16"):
        off = length(p - q for p, q in zip(trained["fp32"], trained[precision])) / moved
        assert 0 < off < 0.1, precision


def length(tensors):
    return sum(float(tensor.detach().square().sum()) for tensor in tensors) ** 0.5
