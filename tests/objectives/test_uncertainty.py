"""The loss weighted by uncertainty against its formula, and where its estimate is best."""

import pytest
import torch as th
from networks.edm.test_edm2 import tiny

from cm.errors import UserError
from cm.objectives import DENOISING
from cm.objectives.edm import EDM
from cm.objectives.uncertainty import Uncertainty
from cm.setup.model import create_diffusion
from cm.types import Batch, BoundNetwork, Networks
from support.training import network

FLAGS = {"arch": "edm2", "schedule_sampler": "lognormal", "noise_mean": -0.4, "noise_std": 1.0}


def parts(model, time_scale=0.0):
    diffusion = create_diffusion(arch="edm2", time_scale=time_scale)
    images = th.rand(4, 3, 8, 8, generator=th.Generator().manual_seed(2)) * 2 - 1
    nets = Networks.of(BoundNetwork(diffusion.bind(model), model), {})
    return diffusion, nets, Batch(images, {"y": th.arange(4) % 3})


@pytest.mark.parametrize("time_scale", [0.0, 0.5])
def test_the_loss_is_that_of_the_paper(time_scale):
    model = tiny()
    diffusion, nets, batch = parts(model, time_scale)
    noise, sigma = th.randn(4, 3, 8, 8), th.tensor([0.1, 0.5, 1.0, 9.0])
    objective = Uncertainty.from_flags(diffusion, FLAGS)
    terms = objective.terms(nets, batch, noise, sigma, None)
    denoised = nets.online(batch.images + sigma[:, None, None, None] * noise, sigma, **batch.cond)
    error = (denoised - batch.images).square().mean((1, 2, 3))
    u = model.log_variance((time_scale or 1) * sigma.log() / 4)
    th.testing.assert_close(terms.loss, (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error * (-u).exp() + u)
    th.testing.assert_close(terms.logs["log_variance"], u)
    plain = EDM(diffusion.weight).terms(nets, batch, noise, sigma, None)
    th.testing.assert_close(terms.logs["mse"], plain.loss)
    terms.loss.sum().backward()
    assert all(param.grad is not None for param in model.parameters())
    assert model.logvar_linear.weight.grad.any()


def test_the_noise_levels_are_those_of_the_flags():
    law = Uncertainty.from_flags(create_diffusion(arch="edm2"), FLAGS | {"noise_mean": -0.8, "noise_std": 1.6})
    assert (law.schedule_sampler.p_mean, law.schedule_sampler.p_std) == (-0.8, 1.6)


def test_another_distribution_of_noise_levels_is_refused():
    with pytest.raises(UserError, match="--schedule_sampler uniform: --objective uncertainty draws ln sigma"):
        Uncertainty.from_flags(create_diffusion(arch="edm2"), FLAGS | {"schedule_sampler": "uniform"})


def test_networks_without_an_estimate_are_refused():
    diffusion, nets, batch = parts(network())
    with pytest.raises(UserError, match="--arch unet does not: choose --arch edm2"):
        DENOISING["uncertainty"].from_flags(diffusion, FLAGS | {"arch": "unet"})
    with pytest.raises(UserError, match="UNet.* does not have: choose --arch edm2"):
        Uncertainty.from_flags(diffusion, FLAGS).terms(nets, batch, th.zeros_like(batch.images), th.ones(4), None)
