"""Small EDM networks and what goes into them."""

import torch as th

from cm.networks.edm import EDM_NETWORKS

TINY = {
    "ddpmpp": dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=5, augment_dim=9, model_channels=16,
                   channel_mult=(1, 2), num_blocks=2, attn_resolutions=(4,), dropout=0.0),
    "adm": dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=5, augment_dim=4, model_channels=16,
                channel_mult=(2, 3), num_blocks=2, attn_resolutions=(4,), dropout=0.0, channels_per_head=8),
}
TINY["ncsnpp"] = TINY["ddpmpp"] | {"channel_mult": (1, 2, 1)}
TAPS = {"ddpmpp": (1, 1), "ncsnpp": (1, 3, 3, 1), "adm": (1, 1)}
AUGMENT = {"ddpmpp": 9, "ncsnpp": 9, "adm": 4}


def tiny(arch, dtype=th.float32, **changes):
    """A small network all of whose layers matter: those that start near zero are drawn anew."""
    th.manual_seed(0)
    model = EDM_NETWORKS[arch](**{**TINY[arch], **changes})
    with th.no_grad():
        for param in model.parameters():
            if param.std() < 1e-3 or param.ndim == 1:
                param.normal_(std=0.2)
    return model.to(dtype)


def inputs(arch, dtype=th.float32, n=2, side=8):
    generator = th.Generator().manual_seed(1)
    x = th.randn(n, 3, side, side, dtype=dtype, generator=generator)
    augment = th.randn(n, AUGMENT[arch], dtype=dtype, generator=generator)
    return x, th.linspace(-1.5, 1.1, n, dtype=dtype), th.tensor([4, 0, 2, 1])[:n], augment
