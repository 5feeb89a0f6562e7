"""Edits through a VAE against slow calculations with diffusers' own VAE."""

import numpy as np
import pytest
import torch as th

from cm.data.latents import LatentRecord
from cm.errors import UserError
from cm.generate.editing import EDITS, Between, Colorize, Denoise, Inpaint, Interpolate, Stroke, SuperRes
from cm.generate.latent_edits import check_latent_task, known_latents, on_latents, run_picture_edit
from cm.generate.vae import Decoder, load_vae
from cm.random_util import get_generator
from cm.samplers import make_sampler
from support.tiny_vae import moments_of, tiny_vae

RECORD = LatentRecord((1.0, -2.0, 0.5, 0.0), (0.5, 1.0, 2.0, 4.0))
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
SIGMAS = th.tensor([5.0, 1.0, 0.0])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae(folder)
    return Decoder(load_vae(str(folder), "vae", "unit", 2), RECORD)


def tensor(pixels):
    return th.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def noise():
    return get_generator("determ", 3, 0).for_samples(th.arange(3))


def D(x, sigma):
    """Of latents that are normal with mean 0.3 and standard deviation 0.5."""
    share = 0.25 / (0.25 + sigma[:, None, None, None] ** 2)
    return 0.3 + share * (x - 0.3)


def encoded(pixels):
    """x of uint8 pixels, channel by channel."""
    mean, x = moments_of(tiny_vae(), pixels)[:, :4], np.empty((len(pixels), 4, 8, 8), np.float32)
    for channel in range(4):
        x[:, channel] = (mean[:, channel] - RECORD.mean[channel]) / RECORD.std[channel] / 2
    return th.from_numpy(x)


def decoded(x):
    z = th.empty_like(x)
    for channel in range(4):
        z[:, channel] = 2 * RECORD.std[channel] * x[:, channel] + RECORD.mean[channel]
    with th.no_grad():
        return 2 * tiny_vae().decode(z).sample - 1


def euler(x, levels, known=None, kept=None):
    """The ODE by hand; the known latents are put back into every denoised image, and at the end."""
    fix = (lambda y: y) if known is None else (lambda y: th.where(known, kept, y))
    for sigma, following in zip(levels, levels[1:]):
        denoised = fix(D(x, th.full((len(x),), sigma)))
        x = denoised + (x - denoised) * following / sigma
    return fix(x)


def run(edit, decoder, rng=None):
    return run_picture_edit(D, edit, decoder, make_sampler("euler", {}), SIGMAS, rng or noise(), clip_denoised=False)


def test_inpainting_fills_latents_and_keeps_pixels(decoder):
    mask = th.ones(16, 16)
    mask[3:9, 4:11] = 0
    hidden = np.where(mask.bool().numpy()[..., None], PIXELS, 127.5)
    known = th.ones(8, 8, dtype=bool)
    for row in range(16):
        for column in range(16):
            known[row // 2, column // 2] &= bool(mask[row, column])
    assert known.sum() == 64 - 4 * 4
    mean = moments_of(tiny_vae(), hidden)[:, :4]
    x = (th.from_numpy(mean) - th.tensor(RECORD.mean).view(4, 1, 1)) / th.tensor(RECORD.std).view(4, 1, 1) / 2
    start = x * known + 5.0 * noise().randn(3, 4, 8, 8)
    expected = th.where(mask.bool(), tensor(PIXELS), decoded(euler(start, [5.0, 1.0, 0.0], known, x)))
    found = run(Inpaint(tensor(PIXELS), mask), decoder)
    th.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found[..., mask.bool()].equal(tensor(PIXELS)[..., mask.bool()])
    other = PIXELS.copy()
    other[:, 3:9, 4:11] = 255 - other[:, 3:9, 4:11]
    assert run(Inpaint(tensor(other), mask), decoder).equal(found), "what was behind the mask has no say"
    red = th.stack([mask, th.ones(16, 16), th.ones(16, 16)])
    assert (on_latents(Inpaint(tensor(PIXELS), red), decoder).mask == known).all(), "of all colours of its pixels"


def test_strokes_start_from_encoded_pictures(decoder):
    start = encoded(PIXELS) + 2.0 * noise().randn(3, 4, 8, 8)
    found = run(Stroke(tensor(PIXELS), 2.0), decoder)
    th.testing.assert_close(found, decoded(euler(start, [2.0, 1.0, 0.0])), atol=1e-4, rtol=1e-4)


def test_interpolation_is_between_noises_of_latents(decoder):
    rng = Between(noise(), noise(), th.zeros(3))
    found = run(Interpolate(th.zeros(3, 3, 16, 16)), decoder, rng)
    start = 5.0 * noise().randn(3, 4, 8, 8)
    th.testing.assert_close(found, decoded(euler(start, [5.0, 1.0, 0.0])), atol=1e-4, rtol=1e-4)


def test_without_a_vae_it_is_the_plain_edit():
    images = th.randn(3, 3, 8, 8)
    assert run(Denoise(images, 1.0), None).equal(D(images, th.ones(3)))


def test_what_latents_cannot_do_is_refused(decoder):
    for edit in (Colorize(tensor(PIXELS)), SuperRes(tensor(PIXELS), 2), Denoise(tensor(PIXELS), 0.5)):
        with pytest.raises(UserError, match=f"{type(edit).__name__} is defined on pixels; latents take one of: inp"):
            on_latents(edit, decoder)
    with pytest.raises(UserError, match="--task superres is defined on pixels.*choose one of: inpaint, stroke, interp"):
        check_latent_task("superres", EDITS, "--task")
    with pytest.raises(UserError, match="no square of 2x2 pixels known"):
        known_latents(th.arange(256).reshape(16, 16) % 2, 2)
