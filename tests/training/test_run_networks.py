"""The networks of a run: their roles, the names under which they are saved, and the modules that a step trains."""

from dataclasses import replace

import pytest
import torch as th
from torch import nn

from cm.karras_diffusion import KarrasDenoiser
from cm.objectives.base import ONLINE, Companion, Objective
from cm.training.config import CompanionNetwork, LoopConfig, RunParts
from cm.training.engine import make_engine
from cm.training.run_networks import RunNetworks

CONFIG = LoopConfig(batch_size=2, lr=1e-3, ema_rate="0.5", log_interval=1, save_interval=1, optimizer="adam")
CHANGES = {"critic_model": "trained", "target_model": "by_objective", "teacher_model": "never"}


class Roles(Objective):
    """An objective with a companion of every kind; its loss is not needed here."""

    companions = tuple(Companion(name, "new", changes) for name, changes in CHANGES.items())

    @classmethod
    def from_flags(cls, diffusion, values):
        return cls()

    def __call__(self, nets, batch, step, rng):
        raise NotImplementedError


class Linear(nn.Module):
    """A network of one layer, whose passes can be told apart by its weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, labels):
        return self.layer(x)


def networks(config=CONFIG, missing=()):
    diffusion, objective = KarrasDenoiser(loss_norm="l2"), Roles()
    companions = {name: CompanionNetwork(Linear().requires_grad_(changes == "trained"), diffusion)
                  for name, changes in CHANGES.items() if name not in missing}
    parts = RunParts(Linear(), diffusion, objective, iter(()), companions)
    return RunNetworks(config, parts, make_engine(config, th.device("cpu"), False)), parts


def test_each_network_has_its_role():
    nets, parts = networks()
    assert list(nets.trained) == [ONLINE, "critic_model"] and list(nets.moving) == ["target_model"]
    assert list(nets.other_trainers) == ["critic_model"] and nets.trainer.model is parts.model
    assert list(nets.saved) == ["model", "target_model", "critic_model"], "a frozen teacher is in no checkpoint"
    assert nets.saved["model"] is nets.trainer and nets.saved["critic_model"] is nets.other_trainers["critic_model"]


def test_every_trained_network_has_an_optimizer_of_its_own():
    nets, parts = networks(replace(CONFIG, weight_decay=0.25))
    for network, model in zip(nets.trained.values(), (parts.model, parts.companions["critic_model"].model)):
        assert [p.shape for group in network.opt.param_groups for p in group["params"]] == [p.shape for p in
                                                                                             model.parameters()]
        assert network.opt.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize("role", [ONLINE, "critic_model"])
def test_a_step_runs_the_distributed_module_of_the_network_that_it_trains(role, monkeypatch):
    nets, parts = networks()
    before = nets.of_step(role)
    assert nets.of_step(role) is before
    passes = []

    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *args, **kwargs):
            passes.append(self.model)
            return self.model(*args, **kwargs)

    monkeypatch.setattr(nets.engine, "wrap", Wrapped)
    nets.distribute()
    step = nets.of_step(role)
    assert step is not before, "bound again to the distributed modules"
    x, sigma = th.ones(2, 4), th.ones(2)
    step.online(x, sigma)
    for companion in step.companions.values():
        companion.denoise(x, sigma)
    assert passes == [parts.model if role == ONLINE else parts.companions["critic_model"].model]
    masters = {name: nets.saved[name].master_params for name in ("critic_model", "target_model")}
    assert all(step.companions[name].params is params for name, params in masters.items())


def test_a_missing_companion_is_named():
    with pytest.raises(ValueError, match="Roles needs a network named 'target_model'; given are critic_model, teacher"):
        networks(missing=("target_model",))
