"""The optimizers of the table step as torch's plain loops over the parameters do, also in shares."""

import copy
import sys

import pytest
import torch as th

from cm.distributed.sharding import partition
from cm.training.optimizer import OPTIMIZERS, ZeroOptimizer, decay, make_optimizer
from support.mpi import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import numpy as np

from cm.training.loop import as_batch
from cm.training.mixed_precision import MixedPrecisionTrainer
from cm.training.optimizer import rampup
from support.training import loop

PLAIN = {"radam": th.optim.RAdam, "adam": th.optim.Adam, "adamw": th.optim.AdamW}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_are_fused(name):
    assert make_optimizer(name, [th.ones(2, requires_grad=True)], lr=1e-2, weight_decay=0.0).defaults["fused"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_fastest_way_takes_the_same_steps(name):
    """With channels-last weights, and a state that goes on in the other way."""
    th.manual_seed(0)
    params = [th.randn(8, 4, 3, 3).to(memory_format=th.channels_last), th.randn(5)]
    ours, theirs = ([p.clone().requires_grad_() for p in params] for _ in range(2))
    fast = make_optimizer(name, ours, lr=1e-2, weight_decay=0.1)
    plain = PLAIN[name](theirs, lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(12):
        for own, other in zip(ours, theirs):
            own.grad = th.randn_like(own)
            other.grad = own.grad.clone()
        fast.step()
        plain.step()
        if step == 8:
            again = make_optimizer(name, ours, lr=1e-2, weight_decay=0.1)
            again.load_state_dict(copy.deepcopy(plain.state_dict()))    # as of a file that an older version wrote
            fast = again
    for own, other, before in zip(ours, theirs, params):
        assert (own - before).abs().max() > 0.05 and th.allclose(own, other, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_adam_follows_its_settings():
    """Of algorithm 1 of 1412.6980: lr g / (|g| + eps), as both moments are corrected, and then by the two rates."""
    param, grads = th.zeros(1, requires_grad=True), (2.0, -1.0)
    opt = make_optimizer("adam", [param], lr=0.1, weight_decay=0.0, betas=(0.5, 0.25), eps=1.0)
    places = []
    for grad in grads:
        param.grad = th.full((1,), grad)
        opt.step()
        places.append(param.item())
    mean = (0.5 * 0.5 * grads[0] + 0.5 * grads[1]) / (1 - 0.5**2)
    square = (0.25 * 0.75 * grads[0] ** 2 + 0.75 * grads[1] ** 2) / (1 - 0.25**2)
    first = -0.1 * grads[0] / (abs(grads[0]) + 1.0)
    assert places == pytest.approx([first, first - 0.1 * mean / (square**0.5 + 1.0)], rel=1e-6)


def test_a_resumed_run_keeps_the_moments_and_takes_its_own_settings(images, tmp_path):
    first = loop(images, tmp_path, 1, optimizer="adam", adam_beta2=0.9, save_interval=1)
    first.run_loop()
    again = loop(images, tmp_path, 2, optimizer="adam", adam_beta1=0.7, adam_beta2=0.8, adam_eps=1e-6, weight_decay=0.1)
    again.resume()
    group, = again.opt.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.8), 1e-6, 0.1)
    moments = [[entry["exp_avg"] for entry in each.opt.state.values()] for each in (first, again)]
    assert len(moments[0]) == len(moments[1]) > 0 and all(map(th.equal, *moments))


# --- shares over ranks -----------------------------------------------------------------------------------------------


def test_a_rank_without_a_share_and_a_saved_optimizer_that_does_not_fit():
    owners = partition([3, 2], 2, 3)
    opt = make_optimizer("radam", [th.zeros(3), th.zeros(2)], 0.1, 0.0, owners)
    assert isinstance(opt, ZeroOptimizer) and opt.own == []
    opt.inner.step()
    with pytest.raises(ValueError, match="not one of 2 parameters"):
        opt.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        make_optimizer("sgd", [th.zeros(3)], 0.1, 0.0)


# ---- averages ----


def test_the_learning_rate_rises_over_images(images, tmp_path):
    training, rates = loop(images, tmp_path, 6, lr_rampup_kimg=0.032), []
    for _ in range(6):
        training.run_step(as_batch(next(training.data), training.step, 0, 1))
        rates.append(training.opt.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3], rtol=1e-12)
    assert rampup(0, 0) == 1


def test_the_learning_rate_falls_with_the_root_of_the_step(images, tmp_path):
    """Equation 67 of EDM2: constant up to lr_decay_steps, here 2."""
    training, rates = loop(images, tmp_path, 9, lr_decay_steps=2), []
    for training.step in (0, 1, 2, 8):
        training.set_learning_rate(training.trained["online"])
        rates.append(training.opt.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 1e-3, 5e-4], rtol=1e-12)
    assert decay(10**9, 0) == 1


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_mean_over_pixels_learns_as_their_sum_does_with_eps_and_clipping_over_their_number(grad_clip):
    """What the presets of EDM, EDM2 and SA-DPM, whose published losses are sums, rely on."""
    n, inputs = 12288, th.randn(2, 8, generator=th.Generator().manual_seed(0), dtype=th.float64)

    def weights_after(reduce, divisor):
        model = th.nn.Linear(8, n, bias=False, dtype=th.float64)
        th.nn.init.constant_(model.weight, 0.1)
        trainer = MixedPrecisionTrainer(model=model, grad_clip=grad_clip / divisor)
        opt = make_optimizer("adam", trainer.master_params, lr=1e-3, weight_decay=0.0, eps=1e-8 / divisor)
        for step in range(5):
            trainer.zero_grad()
            trainer.backward(1e-4 * reduce((model(inputs) - step).square()))
            trainer.optimize(opt)
        return model.weight.detach()

    published, ours, wrong = (weights_after(*way) for way in ((th.sum, 1), (th.mean, 2 * n), (th.mean, 1)))
    th.testing.assert_close(ours, published, rtol=1e-9, atol=0)
    assert (wrong - published).abs().max() > 1e-4
