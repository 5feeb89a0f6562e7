"""A diffusers AutoencoderKL with two tiny blocks, and images for it."""

import numpy as np
import torch as th
from PIL import Image

from cm.io.torchvision_shim import import_torchvision

SETTINGS = dict(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
                sample_size=16)


def tiny_vae(folder=None, seed=0, **changes):
    """The network, also saved to a folder if one is given; latents have half the side of their images."""
    import_torchvision()
    from diffusers import AutoencoderKL

    th.manual_seed(seed)
    model = AutoencoderKL(**{**SETTINGS, **changes}).eval()
    if folder is not None:
        model.save_pretrained(folder)
    return model


def pictures(folder, count=12, side=16, classes=("cat", "dog")):
    """Images of noise, in a sub-folder for each class: uint8 [count,side,side,3] in the order of their paths."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / classes[i * len(classes) // count] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return pixels


def moments_of(model, pixels, low=0):
    """diffusers' own mean and standard deviation [N,2C,H,W] of uint8 [N,S,S,3] as pixels in [low, 1]."""
    images = th.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with th.no_grad():
        found = model.encode(images * (1 - low) + low).latent_dist
    return th.cat([found.mean, found.std], dim=1).numpy()
