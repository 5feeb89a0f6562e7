"""The EDM networks against slow sums, published sizes, guided-diffusion's U-Net, and themselves in half precision."""

import math

import pytest
import torch as th
from torch.func import jvp

from cm.errors import UserError
from cm.networks.build import create_model
from cm.networks.edm import EDM_NETWORKS, SongUNet
from cm.networks.edm.layers import Conv, ConvDown, Init, Resample
from cm.networks.unet import UNetModel
from support import slow_edm

F64 = th.float64
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


# --- against slow sums -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", TINY)
@th.no_grad()
def test_the_whole_network(arch):
    """Every layer acts: changing any parameter would change the result far beyond rounding (see below)."""
    model, (x, t, y, augment) = tiny(arch, F64), inputs(arch, F64)
    labels = th.eye(5, dtype=F64)[y]
    slow = slow_edm.network(model.state_dict(), x, t, labels, augment, TAPS[arch], head_width=8)
    # The random frequencies of NCSN++ are far from 1: ln(sigma) / 4 times 2 pi 40 is known to 1e-14.
    th.testing.assert_close(model(x, t, y, augment), slow, rtol=1e-9, atol=1e-9)
    th.testing.assert_close(model(x, t, labels), slow_edm.network(
        model.state_dict(), x, t, labels, None, TAPS[arch], head_width=8
    ), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", TINY)
def test_every_parameter_acts(arch):
    """So the comparison above can find a fault in any of them; biases before a mean is taken away do not."""
    model, (x, t, y, augment) = tiny(arch, F64), inputs(arch, F64)
    model(x, t, y, augment).square().sum().backward()
    idle = [name for name, param in model.named_parameters() if not param.grad.abs().max() > 1e-6]
    assert all(name.endswith("qkv.bias") for name in idle), idle


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_resampling(direction, taps):
    x = th.randn(2, 3, 6, 4, dtype=F64, generator=th.Generator().manual_seed(0))
    fast = Resample(direction, taps).to(F64)
    th.testing.assert_close(fast(x), slow_edm.resample(x, direction, taps))
    flat = fast(th.ones_like(x))[:, :, 1:-1, 1:-1]
    th.testing.assert_close(flat, th.ones_like(flat))               # brightness stays, away from the border


@pytest.mark.parametrize("kind", ["down", "up", "", "image"])
@th.no_grad()
def test_resampling_convolutions(kind):
    x, taps = th.randn(2, 3, 8, 8, dtype=F64), (1, 3, 3, 1)
    conv = (ConvDown(3, 5, 3, taps) if kind == "image" else Conv(3, 5, 3, kind, taps)).to(F64)
    state = {f"c.{name}": value for name, value in conv.state_dict().items()}
    if kind == "image":                                             # at full resolution first
        slow = slow_edm.both_ways(slow_edm.down_rows, slow_edm.convolve(state, "c", x, border=2), taps, 0)
    else:
        slow = slow_edm.convolve(state, "c", slow_edm.resample(x, kind, taps))
    th.testing.assert_close(conv(x), slow)


@th.no_grad()
def test_skip_paths_are_scaled():
    """A block whose own path is silent halves the variance twice where it attends."""
    block = tiny("ddpmpp").enc["4x4_block1"]
    for layer in (block.conv1, block.proj):
        layer.weight.zero_(), layer.bias.zero_()
    x = th.randn(2, 32, 4, 4)
    th.testing.assert_close(block(x, th.randn(2, 64)), x / 2)


# --- against guided-diffusion's U-Net --------------------------------------------------------------------------------

BLOCK_NAMES = {"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0",
               "conv1": "out_layers.3", "skip": "skip_connection"}
ATTENTION_NAMES = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def guided_names(adm, guided):
    """The weights of a DhariwalUNet under the names of a UNetModel, found by walking both in order."""
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
    guided = UNetModel(
        image_size=8, in_channels=3, model_channels=128, out_channels=3, num_res_blocks=2, attention_resolutions=(2,),
        channel_mult=(1, 2), num_classes=5, num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True,
    )
    guided.load_state_dict(guided_names(adm, guided))
    x, t, y, _ = inputs("adm", n=4)
    th.testing.assert_close(adm(x, t, y), guided(x, t, y), rtol=2e-5, atol=2e-5)


# --- sizes and initialisation ----------------------------------------------------------------------------------------

PUBLISHED = {                                                       # arXiv 2206.00364; parameters counted there
    "cifar10_ddpmpp": ("ddpmpp", 32, "2,2,2", 55.73), "cifar10_ncsnpp": ("ncsnpp", 32, "2,2,2", 56.40),
    "ffhq_ddpmpp": ("ddpmpp", 64, "1,2,2,2", 61.81), "ffhq_ncsnpp": ("ncsnpp", 64, "1,2,2,2", 62.76),
    "imagenet64_adm": ("adm", 64, "1,2,3,4", 295.90),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    arch, side, channel_mult, millions = PUBLISHED[name]
    adm = {"num_channels": 192, "num_res_blocks": 3, "attention_resolutions": "32,16,8", "class_cond": True}
    song = {"num_channels": 128, "num_res_blocks": 4, "attention_resolutions": "16", "augment_dim": 9}
    with th.device("meta"):
        model = create_model(side, arch=arch, channel_mult=channel_mult, **(adm if arch == "adm" else song))
    count = sum(param.numel() for param in model.parameters())
    assert round(count / 1e6, 2) == millions
    if arch == "adm":
        assert count == 295_899_267                                 # to a number that of the published U-Net


def expected_spread(arch, name, shape):
    """(law, bound or deviation) of a fresh weight, from the table of initialisations of EDM's appendix F.3."""
    area = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * area, shape[0] * area
    last = any(f"{layer}.weight" in name for layer in ("conv1", "proj", "aux_conv", "out_conv"))
    if arch == "adm":
        if name == "map_label.weight":
            return "normal", 1.0
        return "uniform", 0.0 if last or "map_augment" in name else 1 / math.sqrt(fan_in)
    return "uniform", math.sqrt(6 / (fan_in + fan_out)) * (1e-5 if last else math.sqrt(0.2) if "qkv" in name else 1)


@pytest.mark.parametrize("arch", TINY)
def test_initialisation(arch):
    th.manual_seed(0)
    model = EDM_NETWORKS[arch](**{**TINY[arch], "model_channels": 64, "num_blocks": 1, "channels_per_head": 32}
                               if arch == "adm" else {**TINY[arch], "model_channels": 64, "num_blocks": 1})
    for name, param in model.named_parameters():
        if "norm" in name:
            assert (param == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            weight = model.get_parameter(name.removesuffix("bias") + "weight")
            _, bound = expected_spread(arch, name.removesuffix("bias") + "weight", weight.shape)
            if arch != "adm" or bound == 0:
                assert not param.any(), name
            else:                                                   # drawn like the weights
                assert 0.8 * bound < param.abs().max() <= bound * (1 + 1e-6) or len(param) < 20, name
        else:
            law, spread = expected_spread(arch, name, param.shape)
            n = param.numel()
            if law == "normal":
                assert param.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * n)), name
            elif spread == 0:
                assert not param.any(), name
            else:
                # The mean square of n draws has a relative deviation of sqrt(0.8 / n); four times that.
                assert param.abs().max() <= spread * (1 + 1e-6), name
                ratio = param.square().mean().item() / (spread**2 / 3)
                assert ratio == pytest.approx(1, abs=4 * math.sqrt(0.8 / n)), name
    if arch == "ncsnpp":
        assert len(model.map_noise.freqs) == 64                     # 128 waves, sine and cosine
        assert model.map_noise.freqs.std().item() == pytest.approx(16, rel=0.36)


ATTENTION = {                                                       # of the tiny networks; three blocks on the way up
    "ddpmpp": ["enc.4x4_block0", "enc.4x4_block1", "dec.4x4_in0", "dec.4x4_block2"],
    "ncsnpp": ["enc.4x4_block0", "enc.4x4_block1", "dec.2x2_in0", "dec.4x4_block2"],
    "adm": ["enc.4x4_block0", "enc.4x4_block1", "dec.4x4_in0", *(f"dec.4x4_block{i}" for i in range(3))],
}


WAYS = {                                                            # down / up
    "ddpmpp": """8x8_conv 8x8_block0 8x8_block1 4x4_down 4x4_block0 4x4_block1
                 / 4x4_in0 4x4_in1 4x4_block0 4x4_block1 4x4_block2
                 8x8_up 8x8_block0 8x8_block1 8x8_block2 8x8_aux_norm 8x8_aux_conv""",
    "ncsnpp": """8x8_conv 8x8_block0 8x8_block1 4x4_down 4x4_aux_residual 4x4_block0 4x4_block1
                 2x2_down 2x2_aux_residual 2x2_block0 2x2_block1
                 / 2x2_in0 2x2_in1 2x2_block0 2x2_block1 2x2_block2 4x4_up 4x4_block0 4x4_block1 4x4_block2
                 8x8_up 8x8_block0 8x8_block1 8x8_block2 8x8_aux_norm 8x8_aux_conv""",
    "adm": """8x8_conv 8x8_block0 8x8_block1 4x4_down 4x4_block0 4x4_block1
              / 4x4_in0 4x4_in1 4x4_block0 4x4_block1 4x4_block2 8x8_up 8x8_block0 8x8_block1 8x8_block2""",
}


@pytest.mark.parametrize("arch", TINY)
def test_names_of_layers(arch):
    """In the order of computation, as they stand in published state dicts."""
    state = tiny(arch).state_dict()
    down, up = (dict.fromkeys(name.split(".")[1] for name in state if name.startswith(way)) for way in ("enc.", "dec."))
    assert [*down, "/", *up] == WAYS[arch].split()
    assert [name.removesuffix(".qkv.weight") for name in state if name.endswith("qkv.weight")] == ATTENTION[arch]
    # A change of resolution at equal width: a filter and, in SongUNet, a convolution on the skip path too.
    skip = {name.rpartition(".")[2] for name in state if name.startswith("enc.4x4_down.skip.")}
    assert skip == ({"resample_filter"} if arch == "adm" else {"resample_filter", "weight", "bias"})


def test_init_names_and_scales():
    th.manual_seed(0)
    layer = Init("kaiming_normal", weight=3.0)(th.nn.Linear(400, 300))
    assert layer.weight.std().item() == pytest.approx(3 / 20, rel=0.02) and not layer.bias.any()


# --- as other networks behave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", TINY)
@th.no_grad()
def test_half_precision_and_memory_formats(arch):
    model, arguments = tiny(arch), inputs(arch)
    full = model(*arguments)
    size = full.abs().max()
    channels_last = tiny(arch).to(memory_format=th.channels_last)
    th.testing.assert_close(channels_last(*arguments), full, rtol=1e-4, atol=1e-5 * size)
    with th.autocast("cpu", dtype=th.bfloat16):
        rounded = model(*arguments)
    assert rounded.dtype == th.float32 and 0 < (rounded - full).abs().max() < 0.06 * size
    model.convert_to_fp16()
    assert model.dtype == th.float16 and model.last_conv.weight.dtype == th.float32
    full_names = [name for name, param in model.named_parameters() if param.dtype == th.float32]
    assert {name for name, _ in model.named_parameters() if "map_" in name or "norm" in name} <= set(full_names)
    assert all(buffer.dtype == th.float32 for buffer in model.buffers())
    half = model(*arguments)
    assert half.dtype == th.float32 and 0 < (half - full).abs().max() < 0.01 * size
    model.convert_to_fp32()
    assert model.dtype == th.float32


@pytest.mark.parametrize("arch", TINY)
def test_recomputed_activations_have_the_same_gradients(arch):
    grads = []
    for use_checkpoint in (False, True):
        model, arguments = tiny(arch, use_checkpoint=use_checkpoint, dropout=0.5), inputs(arch)
        th.manual_seed(1)
        model(*arguments).square().sum().backward()
        grads.append([param.grad for param in model.parameters()])
    assert all(map(th.equal, *grads))


@pytest.mark.parametrize("arch", TINY)
def test_dropout_acts_in_training_alone(arch):
    model, arguments = tiny(arch, dropout=0.5), inputs(arch)
    assert not th.equal(model(*arguments), model(*arguments))
    model.eval()
    assert th.equal(model(*arguments), model(*arguments))


@pytest.mark.parametrize("arch", TINY)
@th.no_grad()
def test_no_augmentation_labels_means_not_augmented_and_others_matter(arch):
    model, (x, t, y, augment) = tiny(arch), inputs(arch)
    assert th.equal(model(x, t, y), model(x, t, y, th.zeros_like(augment)))
    assert (model(x, t, y, augment) - model(x, t, y)).abs().max() > 1e-3


def test_without_augmentation_labels_every_parameter_has_a_gradient():
    """Several ranks wait for each other's gradients of all parameters."""
    model, (x, t, y, _) = tiny("ddpmpp"), inputs("ddpmpp")
    model(x, t, y).sum().backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("arch", TINY)
@th.no_grad()
def test_forward_mode_derivatives(arch):
    model, (x, t, y, augment) = tiny(arch, F64).eval(), inputs(arch, F64)
    direction = th.randn_like(x)
    _, slope = jvp(lambda image: model(image, t, y, augment), (x,), (direction,))
    step = 1e-6
    ends = [model(x + sign * step * direction, t, y, augment) for sign in (1, -1)]
    th.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@th.no_grad()
def test_other_sizes_that_can_be_halved():
    x, t, y, augment = inputs("ncsnpp", side=16)
    assert tiny("ncsnpp")(x, t, y, augment).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("change, message", [
    (dict(img_resolution=6, channel_mult=(1, 1, 1)), "side 6 cannot be halved between the 3 levels"),
    (dict(model_channels=2), "2 channels cannot be normalised.*multiple of 4"),
    (dict(model_channels=132), "132 channels cannot be normalised.*multiple of 32"),
    (dict(embedding_type="fouriee"), "unknown embedding_type 'fouriee'.*Did you mean 'fourier'"),
    (dict(encoder_type="skip"), "unknown encoder_type 'skip'.*standard, residual"),
])
def test_wrong_options(change, message):
    with pytest.raises(UserError, match=message):
        SongUNet(**{**TINY["ddpmpp"], **change})


@pytest.mark.parametrize("change, message", [
    (dict(x=th.zeros(2, 4, 8, 8)), r"x has shape \(2, 4, 8, 8\)"),
    (dict(x=th.zeros(2, 3, 7, 8)), "side 7 cannot be halved"),
    (dict(y=None), "is class-conditional: give y"),
    (dict(y=th.tensor([0, 5])), "not one of the 5 classes, 0 to 4"),
    (dict(y=th.tensor([0])), "one label below 5"),
    (dict(augment_labels=th.zeros(2, 3)), r"expects \(2, 9\).*--augment_dim 9"),
])
def test_wrong_inputs(change, message):
    x, t, y, augment = inputs("ddpmpp")
    with pytest.raises(ValueError, match=message):
        tiny("ddpmpp")(**{"x": x, "noise_labels": t, "y": y, "augment_labels": augment, **change})
    if "y" in change and change["y"] is not None:
        with pytest.raises(ValueError, match="not class-conditional"):
            tiny("ddpmpp", label_dim=0)(x, t, y)


def test_flags_that_do_not_go_together():
    with pytest.raises(UserError, match="--augment_dim 9.*ddpmpp, ncsnpp, adm"):
        create_model(8, 32, 1, channel_mult="1", attention_resolutions="8", augment_dim=9)
    with pytest.raises(UserError, match="unknown arch 'ddpm'.*Did you mean 'ddpmpp'"):
        create_model(8, 32, 1, channel_mult="1", attention_resolutions="8", arch="ddpm")
    with pytest.raises(UserError, match="num_head_channels=24 does not divide the 32 channels"):
        create_model(8, 32, 1, channel_mult="1", attention_resolutions="8", arch="adm", num_head_channels=24)
