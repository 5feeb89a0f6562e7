"""A VAE against diffusers' own calls, and the pictures of what a network has sampled."""

import numpy as np
import pytest
import torch as th

from cm.data.latents import LatentRecord
from cm.errors import UserError
from cm.generate.vae import Decoder, check_vae, load_vae
from support.tiny_vae import moments_of, tiny_vae

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny_vae(tmp_path_factory.mktemp("vae"))
    return str(tmp_path_factory.getbasetemp() / "vae0")


@pytest.mark.parametrize("pixels, low", [("unit", 0), ("symmetric", -1)])
def test_encode_and_decode_are_diffusers_own(folder, pixels, low):
    vae, theirs = load_vae(folder, "vae", pixels, 2), tiny_vae()
    images = th.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert np.allclose(vae.encode(images).numpy(), moments_of(theirs, IMAGES, low), atol=1e-5)
    record = LatentRecord((1.0, 2.0, 3.0, 4.0), (0.5, 1.0, 2.0, 4.0), pixels)
    x, z = th.randn(5, 4, 8, 8), th.empty(5, 4, 8, 8)
    for channel in range(4):
        z[:, channel] = 2 * record.std[channel] * x[:, channel] + record.mean[channel]
    with th.no_grad():
        expected = (theirs.decode(z).sample - low) / (1 - low) * 2 - 1     # of pixels in [low, 1]
    decoder = Decoder(vae, record)
    th.testing.assert_close(decoder(x), expected, atol=1e-5, rtol=1e-5)
    assert decoder.side(8) == 16
    with th.autocast("cpu", dtype=th.bfloat16):
        th.testing.assert_close(decoder(x), expected, atol=1e-5, rtol=1e-5)


def test_the_batch_bounds_what_is_decoded_at_once(folder, monkeypatch):
    vae, sizes = load_vae(folder, "vae", "unit", 2), []
    decode = vae.loaded.model.decode
    monkeypatch.setattr(vae.loaded.model, "decode", lambda z: sizes.append(len(z)) or decode(z))
    assert vae.decode(th.zeros(5, 4, 8, 8)).shape == (5, 3, 16, 16) and sizes == [2, 2, 1]


def test_another_vae_is_refused(folder):
    loaded = load_vae(folder, "vae", "unit", 2).loaded
    own = LatentRecord((0.0,) * 4, (1.0,) * 4, vae="vae", sha256=loaded.sha256)
    check_vae(loaded, own, folder)
    check_vae(loaded, LatentRecord((0.0,) * 4, (1.0,) * 4), folder)
    with pytest.raises(UserError, match="is not the VAE that the latents .* the record is of the VAE 'sd-vae'"):
        check_vae(loaded, LatentRecord((0.0,) * 4, (1.0,) * 4, vae="sd-vae", sha256="00" * 32), folder)
    with pytest.raises(UserError, match="makes latents of 4 channels, and those of the network have 16"):
        check_vae(loaded, LatentRecord((0.0,) * 16, (1.0,) * 16), folder)
