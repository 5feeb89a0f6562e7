"""The EDM networks, whole: against slow sums, published sizes, conditioning, precisions, and what does not fit."""

import math

import pytest
import torch as th
from torch.func import jvp

from cm.errors import UserError
from cm.networks.edm import EDM_NETWORKS
from cm.script_util import create_model
from support import slow_edm
from support.edm_networks import TAPS, TINY, inputs, tiny

F64 = th.float64


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


@th.no_grad()
def test_skip_paths_are_scaled():
    """A block whose own path is silent halves the variance twice where it attends."""
    block = tiny("ddpmpp").enc["4x4_block1"]
    for layer in (block.conv1, block.proj):
        layer.weight.zero_(), layer.bias.zero_()
    x = th.randn(2, 32, 4, 4)
    th.testing.assert_close(block(x, th.randn(2, 64)), x / 2)


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
        EDM_NETWORKS["ddpmpp"](**{**TINY["ddpmpp"], **change})


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


@pytest.mark.parametrize("arch", TINY)
def test_the_label_of_no_class_is_a_row_of_zeros(arch):
    """As EDM drops labels; the network has no parameter more."""
    model, (x, t, y, augment) = tiny(arch, null_class=True), inputs(arch)
    plain = tiny(arch)
    assert [p.shape for p in model.parameters()] == [p.shape for p in plain.parameters()]
    y = y.clone()
    y[0] = 5
    rows = th.eye(6)[y][:, :5]
    assert not rows[0].any() and th.equal(model(x, t, y, augment), plain(x, t, rows, augment))
    with pytest.raises(ValueError, match="not one of the 5 classes"):
        plain(x, t, y, augment)
    with pytest.raises(ValueError, match="not one of the 5 classes"):
        model(x, t, y + 1, augment)


def test_flags_that_do_not_go_together():
    with pytest.raises(UserError, match="--null_class True needs a class-conditional network: add --class_cond True"):
        create_model(8, 32, 1, channel_mult="1", attention_resolutions="8", null_class=True)
    with pytest.raises(UserError, match="--augment_dim 9.*ddpmpp, ncsnpp, adm"):
        create_model(8, 32, 1, channel_mult="1", attention_resolutions="8", augment_dim=9)
    with pytest.raises(UserError, match="unknown arch 'ddpm'.*Did you mean 'ddpmpp'"):
        create_model(8, 32, 1, channel_mult="1", attention_resolutions="8", arch="ddpm")
    with pytest.raises(UserError, match="num_head_channels=24 does not divide the 32 channels"):
        create_model(8, 32, 1, channel_mult="1", attention_resolutions="8", arch="adm", num_head_channels=24)
