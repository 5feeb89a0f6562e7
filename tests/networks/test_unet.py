"""The U-Net against the original's numbers, the published keys, and itself under other precisions and layouts."""

import json

import pytest
import torch as th
from torch import nn
from torch.func import jvp

from cm.networks.attention import AttentionBlock
from cm.networks.unet import UNet, UNetConfig, attention_factors
from cm.networks.unet_blocks import Downsample, ResBlock, TimestepEmbedSequential, Upsample
from support import golden

IMAGENET64 = dict(
    image_size=64, in_channels=3, model_channels=192, out_channels=3, num_res_blocks=3,
    attention_resolutions=attention_factors(64, (32, 16, 8)), dropout=0.1, channel_mult=(1, 2, 3, 4), num_classes=1000,
    num_head_channels=64, resblock_updown=True, use_scale_shift_norm=True,
)
LSUN256 = dict(
    image_size=256, in_channels=3, model_channels=256, out_channels=3, num_res_blocks=2,
    attention_resolutions=attention_factors(256, (32, 16, 8)), channel_mult=(1, 1, 2, 2, 4, 4),
    num_head_channels=64, resblock_updown=True, use_scale_shift_norm=False,
)
TINY = dict(
    image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2), num_head_channels=16,
)


def tiny(**changes) -> UNet:
    """A small network without zero-initialised layers, so that every parameter matters."""
    th.manual_seed(0)
    model = UNet(UNetConfig(**{**TINY, **changes}))
    with th.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return model


def inputs(n: int = 2, side: int = 8, dtype: th.dtype = th.float32) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(1)
    x = th.randn(n, 3, side, side, dtype=dtype, generator=generator)
    return x, 250 * th.linspace(-3, 4, n, dtype=dtype)


def golden_difference(model: UNet, case: str, **to) -> float:
    x, timesteps, y, out = (golden.tensor(f"{case}/{name}") for name in ("x", "timesteps", "y", "out"))
    with th.no_grad():
        return (model(x.to(**to), timesteps, y) - out).abs().max().item()


# --- the original's numbers ------------------------------------------------------------------------------------------

# Half the golden tolerance for forward/out is 4.4e-5: float32 rounding is 1e-5, a GroupNorm eps of 1e-6 makes 1.3e-4.
@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
@pytest.mark.parametrize("case", ["forward", "forward_rect"])
def test_golden_forward(case, memory_format):
    model = golden.build().to(memory_format=memory_format)
    bound = golden.tolerance(f"{case}/out") / 2
    assert bound < 5e-5
    assert golden_difference(model, case, memory_format=memory_format) < bound


def test_golden_forward_notices_a_wrong_eps_and_a_wrong_head_layout():
    model = golden.build()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    assert golden_difference(model, "forward") > golden.tolerance("forward/out") / 2
    model = golden.build()
    for module in model.modules():
        if isinstance(module, AttentionBlock):
            rows = module.qkv.weight.data
            module.qkv.weight.data = rows.unflatten(0, (3, module.num_heads, -1)).transpose(0, 1).reshape(rows.shape)
    assert golden_difference(model, "forward") > 0.1


def test_number_of_heads_is_the_same_said_either_way():
    model = golden.build(num_heads=4, num_head_channels=-1)         # 64 channels, 16 per head
    assert golden_difference(model, "forward") < golden.tolerance("forward/out") / 2
    assert golden_difference(golden.build(num_heads=2, num_head_channels=-1), "forward") > 1e-2


def test_num_heads_upsample_acts_on_the_way_up_only():
    model = tiny(num_head_channels=-1, num_heads=2, num_heads_upsample=4)
    heads = {name: m.num_heads for name, m in model.named_modules() if isinstance(m, AttentionBlock)}
    assert heads == {"input_blocks.3.1": 2, "middle_block.1": 2, "output_blocks.0.1": 4, "output_blocks.1.1": 4}


# --- names and shapes ------------------------------------------------------------------------------------------------

def test_imagenet64_has_the_published_keys():
    with th.device("meta"):
        model = UNet(UNetConfig(**IMAGENET64))
    published = json.loads((golden.DATA / "unet_keys_imagenet64.json").read_text())
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == published
    assert sum(p.numel() for p in model.parameters()) == 295_899_267


def test_lsun256_has_the_published_size():
    with th.device("meta"):
        model = UNet(UNetConfig(**LSUN256))
    assert len(model.state_dict()) == 566
    assert sum(p.numel() for p in model.parameters()) == 526_304_771


def test_golden_parameter_order():
    assert [name for name, _ in golden.build(None).named_parameters()] == list(golden.numpy("param_order"))


@pytest.mark.parametrize("conv_resample", [True, False])
def test_plain_resampling(conv_resample):
    model = tiny(conv_resample=conv_resample)
    keys = set(model.state_dict())
    assert isinstance(model.input_blocks[2][0], Downsample)
    assert isinstance(model.output_blocks[1][2], Upsample)
    assert ("input_blocks.2.0.op.weight" in keys) == conv_resample
    assert ("output_blocks.1.2.conv.weight" in keys) == conv_resample
    assert model(*inputs()).shape == (2, 3, 8, 8)


def test_resampling_by_hand():
    x = th.arange(16.0).view(1, 1, 4, 4)
    assert Downsample(1, use_conv=False)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    doubled = Upsample(1, use_conv=False)(x[..., :2, :2])
    assert doubled[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]]
    depth = th.zeros(1, 1, 3, 4, 4)
    assert Downsample(1, False, dims=3)(depth).shape == (1, 1, 3, 2, 2)
    assert Upsample(1, True, dims=3, out_channels=2)(depth).shape == (1, 2, 3, 8, 8)


def test_attention_stands_where_it_was_asked_for():
    model = tiny(attention_resolutions=(1, 4), channel_mult=(1, 1, 1))
    places = {name for name, module in model.named_modules() if isinstance(module, AttentionBlock)}
    assert places == {
        "input_blocks.1.1", "input_blocks.5.1", "middle_block.1",
        "output_blocks.0.1", "output_blocks.1.1", "output_blocks.4.1", "output_blocks.5.1",
    }


@pytest.mark.parametrize("dims, shape", [(1, (2, 3, 8)), (3, (2, 3, 3, 8, 8))])
def test_other_dimensions(dims, shape):
    for resblock_updown in (True, False):
        model = tiny(dims=dims, resblock_updown=resblock_updown)
        assert model(th.randn(shape), th.zeros(2)).shape == shape


def test_a_fraction_as_multiplier():
    model = tiny(model_channels=64, channel_mult=(0.5, 1))
    assert model.input_blocks[0][0].out_channels == 32
    assert model.middle_block[0].in_layers[2].out_channels == 64
    assert model(*inputs()).shape == (2, 3, 8, 8)


def test_a_new_network_is_zero_and_its_blocks_are_the_identity():
    assert not UNet(UNetConfig(**TINY))(*inputs()).any()
    x, emb = th.randn(2, 32, 4, 4), th.randn(2, 16)
    assert th.equal(ResBlock(32, 16, dropout=0.0)(x, emb), x)


# --- behaviour -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("use_scale_shift_norm", [True, False])
def test_res_block_by_hand(use_scale_shift_norm):
    th.manual_seed(0)
    block = ResBlock(32, 16, 0.0, 64, use_scale_shift_norm=use_scale_shift_norm).double()
    nn.init.normal_(block.out_layers[3].weight)
    x, emb = th.randn(2, 32, 4, 4, dtype=th.float64), th.randn(2, 16, dtype=th.float64)
    told = block.emb_layers[1](emb * emb.sigmoid())[..., None, None]
    h = block.in_layers[2](nn.functional.silu(block.in_layers[0](x)))
    if use_scale_shift_norm:
        h = block.out_layers[0](h) * (1 + told[:, :64]) + told[:, 64:]
    else:
        h = block.out_layers[0](h + told)
    expected = block.skip_connection(x) + block.out_layers[3](nn.functional.silu(h))
    th.testing.assert_close(block(x, emb), expected, rtol=1e-12, atol=1e-12)


def test_res_block_changes_width_with_a_3x3_convolution_if_asked():
    assert ResBlock(32, 16, 0.0, 64, use_conv=True).skip_connection.kernel_size == (3, 3)
    assert ResBlock(32, 16, 0.0, 64).skip_connection.kernel_size == (1, 1)


def test_sequential_hands_the_embedding_to_those_who_take_it():
    block = ResBlock(32, 16, 0.0)
    nn.init.normal_(block.out_layers[3].weight)
    x, emb = th.randn(2, 32, 4, 4), th.randn(2, 16)
    expected = nn.functional.silu(block(x, emb))
    assert th.equal(TimestepEmbedSequential(block, nn.SiLU())(x, emb), expected)


def test_time_class_and_dropout_reach_the_output():
    model = tiny(num_classes=3, dropout=0.5).eval()
    x, t = inputs()
    out = model(x, t, th.tensor([0, 1]))
    assert th.equal(out, model(x, t, th.tensor([0, 1])))
    assert (out - model(x, t, th.tensor([0, 2]))).abs().amax(dim=(1, 2, 3)).gt(1e-4).tolist() == [False, True]
    assert (out - model(x, t + 1, th.tensor([0, 1]))).abs().max() > 1e-4
    model.train()
    assert (out - model(x, t, th.tensor([0, 1]))).abs().max() > 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(dropout):
    x, t = inputs()
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny(use_checkpoint=use_checkpoint, dropout=dropout, resblock_updown=True).train()
        th.manual_seed(5)
        model(x, t).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        assert plain.any()
        th.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)        # the original: 6 % off with dropout


def test_channels_last_stays_channels_last_throughout():
    model = tiny(resblock_updown=True).to(memory_format=th.channels_last)
    layouts = []

    def look(module, args, out):
        layouts.extend(t.is_contiguous(memory_format=th.channels_last) for t in (args[0], out))

    for module in model.modules():
        if isinstance(module, ResBlock | AttentionBlock | nn.Conv2d):
            module.register_forward_hook(look)
    x, t = inputs()
    model(x.contiguous(memory_format=th.channels_last), t)
    assert len(layouts) > 40 and all(layouts)


@pytest.mark.parametrize("use_scale_shift_norm, resblock_updown", [(True, True), (False, False)])
def test_forward_mode_derivative_equals_finite_differences(use_scale_shift_norm, resblock_updown):
    model = tiny(use_scale_shift_norm=use_scale_shift_norm, resblock_updown=resblock_updown).double()
    x, t = inputs(dtype=th.float64)
    t = t / 250                             # so that a step of h in t is small for the fastest wave too
    dx, dt = th.randn_like(x), th.tensor([0.3, -0.2], dtype=th.float64)
    out, derivative = jvp(model, (x, t), (dx, dt))
    h = 1e-5
    expected = (model(x + h * dx, t + h * dt) - model(x - h * dx, t - h * dt)) / (2 * h)
    th.testing.assert_close(derivative, expected.detach(), rtol=1e-6, atol=1e-7)
    th.testing.assert_close(out, model(x, t))


def test_forward_mode_without_gradients_gives_the_same():
    model, (x, t) = tiny(dropout=0.3).train(), inputs()
    th.manual_seed(2)
    expected = jvp(model, (x, t), (x, t))[1]
    th.manual_seed(2)
    with th.no_grad():
        derivative = jvp(model, (x, t), (x, t))[1]
    th.testing.assert_close(derivative, expected.detach(), rtol=1e-4, atol=1e-3)


# --- precision -------------------------------------------------------------------------------------------------------

def test_fp16_trunk():
    model = golden.build()
    model.convert_to_fp16()
    assert model.dtype == th.float16
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        in_trunk = name.startswith(("input_blocks", "middle_block", "output_blocks"))
        assert p.dtype == (th.float16 if in_trunk and isinstance(module, nn.Conv2d) else th.float32), name
    # Half precision rounds at 5e-4; the original's own half attention alone moves the output by 5e-4.
    assert golden_difference(model, "forward") < 0.02
    model.convert_to_fp32()
    assert model.dtype == th.float32 and all(p.dtype == th.float32 for p in model.parameters())
    assert golden_difference(model, "forward") < 0.02


def test_bf16_autocast_returns_unrounded_float32():
    model, (x, t) = golden.build(), inputs(4, side=32)
    y = th.arange(4)
    embeddings = []
    model.time_embed.register_forward_hook(lambda module, args, out: embeddings.append(out))
    with th.no_grad():
        expected = model(x, t, y)
        with th.autocast("cpu", dtype=th.bfloat16):
            out = model(x, t, y)
    assert out.dtype == th.float32
    assert not th.equal(out, out.bfloat16().float())
    assert th.equal(*embeddings)                                # nor is the noise level
    assert (out - expected).std() / expected.std() < 0.03       # bf16 rounds at 0.4 %, through 30 convolutions


def test_output_has_the_dtype_of_the_input():
    model, (x, t) = tiny(), inputs()
    assert model(x.double(), t).dtype == th.float64
    assert model(x.half(), t).dtype == th.float16
    assert model.double()(x, t).dtype == th.float32


# --- errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(model_channels=48), r"level 0 would be 48 channels wide \(num_channels 48 times channel_mult 1\)"),
    (dict(channel_mult=(1, 0.5)), "level 1 would be 16 channels wide"),
    (dict(channel_mult=(0, 1)), "level 0 would be 0 channels wide"),
    (dict(channel_mult=()), "channel_mult is empty"),
    (dict(num_head_channels=48), "num_head_channels=48 does not divide the 64 channels"),
    (dict(num_head_channels=-1, num_heads=3), "num_heads=3 does not divide the 64 channels"),
    (dict(num_head_channels=-1, num_heads_upsample=5), "num_heads=5 does not divide"),
    (dict(image_size=9), r"side 9 cannot be halved between the 2 levels.*multiple of 2"),
    (dict(image_size=30, channel_mult=(1, 1, 1)), "side 30 cannot be halved between the 3 levels.*multiple of 4"),
    (dict(attention_resolutions=(0,)), "factor 0 is impossible"),
    (dict(attention_resolutions=(2, 6)), "factor 6 is impossible"),
    (dict(dims=4), "unsupported dims 4"),
])
def test_impossible_networks(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(UNetConfig(**{**TINY, **changes}))


def test_inputs_that_do_not_fit():
    model, (x, t) = tiny(), inputs()
    for bad, message in (
        (x[:, :2], r"expects \[N, 3, ...\]"),
        (x[0], "2 axes of positions"),
        (x[..., :7], "side 7 cannot be halved"),
        (x[..., :0], "side 0 cannot be halved"),
    ):
        with pytest.raises(ValueError, match=message):
            model(bad, t)
    with pytest.raises(ValueError, match="not class-conditional: call it without y"):
        model(x, t, th.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"timesteps must be one number per sample"):
        model(x, t[:, None])


def test_labels_that_do_not_fit():
    model, (x, t) = tiny(num_classes=3), inputs()
    with pytest.raises(ValueError, match="give y, one label below 3 per sample"):
        model(x, t)
    with pytest.raises(ValueError, match=r"y has shape \(1,\), but x holds 2 samples"):
        model(x, t, th.tensor([0]))
    with pytest.raises(ValueError, match=r"not one of the 3 classes, 0 to 2: \[0, 3\]"):
        model(x, t, th.tensor([0, 3]))


def test_the_label_of_no_class_has_a_row_of_its_own():
    """One more row in the embedding, after those of the classes; the classes are as without it."""
    plain, model, (x, t) = tiny(num_classes=3), tiny(num_classes=3, null_class=True), inputs()
    weights = model.state_dict()
    assert weights["label_emb.weight"].shape == (4, weights["time_embed.2.weight"].shape[0])
    plain.load_state_dict(weights | {"label_emb.weight": weights["label_emb.weight"][:3]})
    y = th.tensor([0, 2])
    assert th.equal(model(x, t, y), plain(x, t, y))
    none = model(x, t, th.tensor([3, 3]))
    assert not th.allclose(none, model(x, t, th.tensor([2, 2])))
    with pytest.raises(ValueError, match="not one of the 4 classes"):
        model(x, t, th.tensor([3, 4]))


def test_attention_factors():
    assert attention_factors(64, (32, 16, 8)) == (2, 4, 8)
    assert attention_factors(32, [32]) == (1,)
    assert attention_factors(32, ()) == ()
    assert attention_factors(32, (16,), levels=2) == (2,)
    for size, resolution, levels, reached in (
        (32, 64, None, "32, 16, 8, 4, 2, 1"), (48, 16, None, "48, 24, 12, 6, 3"), (32, 8, 2, "32, 16"),
        (32, 0, None, "32, 16, 8, 4, 2, 1"),
    ):
        with pytest.raises(ValueError, match=f"resolution {resolution}: a network .* side {size} works at {reached}$"):
            attention_factors(size, (resolution,), levels)
