"""The optimizers of the table step as torch's plain loops over the parameters do."""

import copy

import pytest
import torch as th

from cm.training.optimizer import OPTIMIZERS, make_optimizer

PLAIN = {"radam": th.optim.RAdam, "adam": th.optim.Adam, "adamw": th.optim.AdamW}


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
