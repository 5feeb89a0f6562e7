"""The denoiser made of a network and a preconditioning, against the original's numbers."""

import pytest
import torch as th
from torch import nn

from cm.karras_diffusion import KarrasDenoiser
from support import golden
from support.denoisers import diffusion, net


@pytest.mark.parametrize("name, distillation", [("edm", False), ("boundary", True)])
@th.no_grad()
def test_golden_denoiser(name, distillation):
    x_t, sigmas, y = (golden.tensor(f"denoise/{part}") for part in ("x_t", "sigmas", "y"))
    output, denoised = diffusion(distillation).denoise(net("model"), x_t, sigmas, y=y)
    golden.assert_close(output, f"denoise/{name}/model_output")
    golden.assert_close(denoised, f"denoise/{name}/denoised")
    assert th.equal(diffusion(distillation).bind(net("model"))(x_t, sigmas, y=y), denoised)


class Noisy(nn.Module):
    """Large outputs without reason, in a precision of its own; remembers what it was told."""

    def __init__(self, dtype: th.dtype = th.float32):
        super().__init__()
        self.dtype = dtype

    def forward(self, x, timesteps, y=None):
        self.told = timesteps
        return 1e3 * th.randn(x.shape, generator=th.Generator().manual_seed(0)).to(self.dtype)


@pytest.mark.parametrize("sigma_min", [0.002, 0.01])
def test_the_boundary_holds_bit_for_bit(sigma_min):
    """At the last level of every grid too."""
    denoiser = KarrasDenoiser(sigma_min=sigma_min, distillation=True)
    x = th.randn(3, 3, 8, 8)
    for n in (2, 18, 40):
        lowest = denoiser.noise_levels(n)[-1].expand(3)
        assert th.equal(denoiser.bind(Noisy())(x, lowest), x)


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16, th.float64])
def test_images_keep_their_precision_whatever_the_networks(dtype):
    output, denoised = diffusion().denoise(Noisy(dtype), th.ones(2, 3, 8, 8), th.ones(2))
    assert output.dtype == denoised.dtype == th.float32


@pytest.mark.parametrize("time_scale", [1000.0, 1.0])
def test_the_network_is_told_the_time(time_scale):
    model, sigma = Noisy(), th.tensor([0.002, 0.3, 80.0])
    KarrasDenoiser(time_scale=time_scale).denoise(model, th.zeros(3, 3, 8, 8), sigma)
    th.testing.assert_close(model.told, (time_scale / 4 * sigma.double().log()).float(), rtol=0, atol=0)
