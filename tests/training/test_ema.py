"""Averages of the weights: folded in beside the device, in float32, where they were asked for."""

import sys
import threading

import pytest
import torch as th

from cm.errors import UserError
from cm.training import ema
from cm.training.ema import EMA, Background
from support.mpi import ROOT
from support.training import loop

sys.path.insert(0, str(ROOT / "benchmarks"))
from cm.training.loop import as_batch, parse_rates


def params(dtype=th.float32):
    th.manual_seed(0)
    made = [th.nn.Parameter(th.randn(4, 3, 3, 3, dtype=dtype)), th.nn.Parameter(th.randn(7, dtype=dtype))]
    made[0].data = made[0].data.to(memory_format=th.channels_last)
    return made


def beside(averages):
    """As on a GPU, where copies are folded in by a thread."""
    averages.background = Background(averages.sources)
    return averages


def test_averages_folded_in_beside_the_device_are_the_same_to_the_last_bit():
    ours, plain = params(), params()
    far, near = beside(EMA(ours, ["0.9", "0.5"])), EMA(plain, ["0.9", "0.5"])
    for step in range(5):
        for own in (*ours, *plain):
            own.data.mul_(1.3).add_(step)
        far.update([0.9, 0.5])
        near.update([0.9, 0.5])
        if step == 2:
            far.restart()
            near.restart()
    for a, b in zip(far.local, near.local, strict=True):
        assert all(th.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))
    assert not any(average.requires_grad for average in far.local[0])


@pytest.mark.parametrize("sources, device", [([th.empty(2, device="meta")], "meta"), ([], "cpu")])
def test_the_thread_begins_at_the_device_of_the_parameters(sources, device, monkeypatch):
    """A rank may have none of them."""
    asked = []
    monkeypatch.setattr(ema, "background_thread", lambda name, device: asked.append(device))
    Background(sources)
    assert asked == [th.device(device)]


def test_training_goes_on_while_an_average_is_folded_in():
    """The average is that of the moment of the update, whatever has become of the parameters since."""
    ours = params()
    averages = beside(EMA(ours, ["0.5"]))
    expected = [0.5 * p.detach() + 0.5 * (p.detach() + 1) for p in ours]
    may_begin, follow = threading.Event(), averages._update

    def slow(decays, values):
        assert may_begin.wait(20)
        follow(decays, values)

    averages._update = slow
    for own in ours:
        own.data.add_(1)
    averages.update([0.5])
    for own in ours:
        own.data.fill_(100)
    assert not averages.background.task.done()
    may_begin.set()
    for average, right in zip(averages.local[0], expected):
        th.testing.assert_close(average, right)


def test_a_failure_beside_the_device_is_heard_of():
    averages = beside(EMA(params(), ["0.5"]))
    averages._update = lambda decays, values: 1 / 0
    averages.update([0.5])
    with pytest.raises(ZeroDivisionError):
        averages.update([0.5])


def test_averages_are_float32_whatever_the_parameters():
    averages = EMA(params(th.bfloat16), ["0.9999"], device="cpu")
    before = averages.local[0][1].clone()
    averages.sources[1].data.add_(1)
    averages.update([0.9999])
    assert averages.local[0][1].dtype == th.float32
    # Half of an ulp of bfloat16 is 2^-9 of a value; this step is smaller.
    assert ((averages.local[0][1] - before) - 1e-4).abs().max() < 2e-6


def test_a_gpu_for_averages_that_is_not_there():
    with pytest.raises(UserError, match="--ema_device cuda, but this run is on the cpu: choose same, or cpu"):
        EMA(params(), ["0.9"], device="cuda")


def test_averages_follow_the_weights_at_every_rate(images, tmp_path):
    training = loop(images, tmp_path, 3)
    slow = [[p.detach().double().clone() for p in training.trainer.master_params] for _ in training.ema_rate]
    for _ in range(3):
        training.run_step(as_batch(next(training.data), training.step, 0, 1))
        for rate, average in zip((0.5, 0.9), slow):
            for e, p in zip(average, training.trainer.master_params):
                e.mul_(rate).add_(p.detach().double(), alpha=1 - rate)
    for average, ours in zip(slow, training.ema_params):
        for e, p in zip(average, ours):
            assert th.allclose(e.float(), p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rates", ["fast", "1.5", "0.9,x"])
def test_wrong_ema_rates(rates):
    with pytest.raises(UserError, match="--ema_rate"):
        parse_rates(rates)
