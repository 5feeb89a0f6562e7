"""Dhariwal and Nichol's U-Net among the EDM networks is guided-diffusion's."""

import torch as th

from cm.networks.unet import UNet, UNetConfig
from support.edm_networks import inputs, tiny

# --- against guided-diffusion's U-Net --------------------------------------------------------------------------------


BLOCK_NAMES = {"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0",
               "conv1": "out_layers.3", "skip": "skip_connection"}
ATTENTION_NAMES = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def guided_names(adm, guided):
    """The weights of a DhariwalUNet under the names of a UNet, found by walking both in order."""
    blocks = [(f"enc.{key}", f"input_blocks.{i}.0") for i, key in enumerate(adm.enc)]
    attentions = {f"enc.{key}": f"input_blocks.{i}.1" for i, key in enumerate(adm.enc)}
    at = -1
    for key in adm.dec:
        if key.endswith("_in0"):
            blocks.append((f"dec.{key}", "middle_block.0"))
            attentions[f"dec.{key}"] = "middle_block.1"
        elif key.endswith("_in1"):
            blocks.append((f"dec.{key}", "middle_block.2"))
        elif key.endswith("_up"):
            blocks.append((f"dec.{key}", f"output_blocks.{at}.{len(guided.output_blocks[at]) - 1}"))
        else:
            at += 1
            blocks.append((f"dec.{key}", f"output_blocks.{at}.0"))
            attentions[f"dec.{key}"] = f"output_blocks.{at}.1"
    stems = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "out_norm": "out.0", "out_conv": "out.2"}
    for source, dest in blocks:
        if source.endswith("_conv"):
            stems[source] = dest
        stems |= {f"{source}.{a}": f"{dest}.{b}" for a, b in BLOCK_NAMES.items()}
        stems |= {f"{source}.{a}": f"{attentions.get(source)}.{b}" for a, b in ATTENTION_NAMES.items()}
    found = {"label_emb.weight": adm.map_label.weight.T}
    for name, value in adm.state_dict().items():
        stem, _, part = name.rpartition(".")
        if stem.endswith("qkv"):
            value = value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        if part != "resample_filter" and stem != "map_label":
            found[f"{stems[stem]}.{part}"] = value
    return found


@th.no_grad()
def test_adm_is_guided_diffusions_unet():
    """The same function, time by time and class by class, though written from another description of it."""
    adm = tiny("adm", model_channels=128, channel_mult=(1, 2), channels_per_head=64, augment_dim=0)
    guided = UNet(UNetConfig(
        image_size=8, in_channels=3, model_channels=128, out_channels=3, num_res_blocks=2, attention_resolutions=(2,),
        channel_mult=(1, 2), num_classes=5, num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True,
    ))
    guided.load_state_dict(guided_names(adm, guided))
    x, t, y, _ = inputs("adm", n=4)
    th.testing.assert_close(adm(x, t, y), guided(x, t, y), rtol=2e-5, atol=2e-5)
