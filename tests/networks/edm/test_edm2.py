"""EDM2's network: published sizes, a block against slow sums, forced normalisation, precisions, what does not fit."""

import math

import pytest
import torch as th
import torch.nn.functional as F

from cm.checkpoints import manifest
from cm.errors import UserError
from cm.networks.edm import EDM2Config, EDM2Network
from cm.networks.edm.edm2 import EDM2Block
from cm.networks.edm.magnitude import EPS, MPConv
from cm.networks.jvp import jvp
from cm.script_util import create_model
from cm.training.mixed_precision import MixedPrecisionTrainer
from support.mpi import program
from support.training import digest, run
from support.warm import mpiexec

F64 = th.float64
TINY = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=3, model_channels=16, channel_mult=(1, 2),
            num_blocks=1, attn_resolutions=(4,), channels_per_head=8)


def tiny(dtype=th.float32, **changes):
    """A small network all of whose layers matter: its gains, which start at 0, are drawn."""
    th.manual_seed(0)
    model = EDM2Network(EDM2Config(**{**TINY, **changes}))
    with th.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("gain"):
                param.uniform_(0.3, 1)
    return model.to(dtype)


def inputs(dtype=th.float32):
    x = th.randn(2, 3, 8, 8, generator=th.Generator().manual_seed(1), dtype=dtype)
    return x, th.linspace(-1.5, 1.1, 2, dtype=dtype), th.tensor([2, 0])


# --- sizes -----------------------------------------------------------------------------------------------------------


PUBLISHED = {                                                       # arXiv 2312.02696, table 2: millions of parameters
    "XS": (128, 125), "S": (192, 280), "M": (256, 498), "L": (320, 777), "XL": (384, 1119), "XXL": (448, 1523),
}


def counted(c, images=4, classes=1000):
    """Parameters of the widths c, 2c, 3c, 4c with 3 blocks each and attention in the lower two, by the paper's figure.

    A block of a to b channels: two 3x3 convolutions, the embedding, a gain; a 1x1 on the skip path if a is not b;
    attention: 3 + 1 times b x b.
    """
    emb = 4 * c

    def block(a, b, inner, attends):
        return 9 * inner * b + 9 * b * b + emb * b + 1 + (a * b if a != b else 0) + (4 * b * b if attends else 0)

    total, skips, channels = 9 * (images + 1) * c, [c], c
    for level in range(1, 5):
        if level > 1:
            total, skips = total + block(channels, channels, channels, False), [*skips, channels]
        for _ in range(3):
            total += block(channels, level * c, level * c, level > 2)
            channels = level * c
            skips.append(channels)
    total += block(channels, channels, channels, True) + block(channels, channels, channels, False)
    for level in range(4, 0, -1):
        if level < 4:
            total += block(channels, channels, channels, False)
        for _ in range(4):
            a = channels + skips.pop()
            total += block(a, level * c, a, level > 2)
            channels = level * c
    return total + 9 * c * images + 1 + c * emb + classes * emb + 128


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    channels, millions = PUBLISHED[size]
    with th.device("meta"):
        model = create_model(64, channels, 3, "1,2,3,4", arch="edm2", attention_resolutions="16,8", channels=4,
                             class_cond=True, num_classes=1000)
    count = sum(param.numel() for param in model.parameters())
    assert round(count / 1e6) == millions and count == counted(channels)


def test_published_names_and_beginnings():
    th.manual_seed(0)
    model = EDM2Network(EDM2Config(**TINY))
    state = model.state_dict()
    assert {
        "unet.out_gain", "unet.emb_fourier.freqs", "unet.emb_fourier.phases", "unet.emb_noise.weight",
        "unet.emb_label.weight", "unet.enc.8x8_conv.weight", "unet.enc.4x4_down.conv_res0.weight",
        "unet.enc.8x8_block0.emb_gain", "unet.dec.4x4_in0.attn_qkv.weight", "unet.dec.4x4_block1.conv_skip.weight",
        "unet.dec.8x8_up.emb_linear.weight", "unet.out_conv.weight", "logvar_fourier.freqs", "logvar_linear.weight",
    } <= set(state)
    assert state["unet.enc.8x8_conv.weight"].shape == (16, 4, 3, 3)         # a channel of ones
    assert state["unet.dec.4x4_in0.attn_qkv.weight"].shape == (96, 32, 1, 1)
    for name, value in state.items():
        if name.endswith("gain"):
            assert value.shape == () and value == 0
        elif name.endswith("weight"):
            assert (rms(value) - 1).abs().max() < 5e-3, name
    assert not model(*inputs()).any()                                       # the gain of the output begins at 0


def rms(weight):
    """By output channel; 1 up to the EPS of the normalisation, which counts where a first weight was small."""
    return weight.flatten(1).square().mean(1).sqrt()


# --- against slow sums -----------------------------------------------------------------------------------------------


def unit(x, axes):
    return x / (x.square().mean(axes, keepdim=True).sqrt() + 1e-4)


def slow_conv(weight, x, gain=1.0):
    weight = unit(weight, tuple(range(1, weight.ndim)))
    weight = gain * weight / math.sqrt(weight[0].numel())
    if weight.ndim == 2:
        return th.einsum("oc,nc->no", weight, x)
    k, (_, _, h, w) = weight.shape[-1], x.shape
    x = F.pad(x, [k // 2] * 4)
    return sum(th.einsum("oc,nchw->nohw", weight[:, :, i, j], x[:, :, i:i + h, j:j + w])
               for i in range(k) for j in range(k))


def slow_silu(x):
    return x / (1 + (-x).exp()) / 0.596


def slow_block(state, x, emb, is_encoder, resample, head):
    """Figure 21 of the paper."""
    if resample == "down":
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    if resample == "up":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    skip = slow_conv(state["conv_skip.weight"], x) if "conv_skip.weight" in state else x
    x = unit(skip, (1,)) if is_encoder else x
    y = slow_conv(state["conv_res0.weight"], slow_silu(x))
    y = slow_silu(y * (1 + slow_conv(state["emb_linear.weight"], emb, state["emb_gain"]))[:, :, None, None])
    y = slow_conv(state["conv_res1.weight"], y)
    x = (0.7 * (x if is_encoder else skip) + 0.3 * y) / math.sqrt(0.58)
    if "attn_qkv.weight" in state:
        n, c, h, w = x.shape
        qkv = slow_conv(state["attn_qkv.weight"], x).reshape(n, c // head, head, 3, h * w)
        q, k, v = unit(qkv, (2,)).unbind(3)
        cosines = th.einsum("nhcq,nhck->nhqk", q, k) / head
        y = th.einsum("nhqk,nhck->nhcq", (cosines * math.sqrt(head)).softmax(3), v).reshape(n, c, h, w)
        x = (0.7 * x + 0.3 * slow_conv(state["attn_proj.weight"], y)) / math.sqrt(0.58)
    return x.clamp(-256, 256)


@pytest.mark.parametrize("a, b, is_encoder, resample, attention", [
    (16, 32, True, "", True), (16, 16, True, "down", False), (32, 16, False, "up", True), (24, 16, False, "", False),
])
@th.no_grad()
def test_blocks(a, b, is_encoder, resample, attention):
    th.manual_seed(0)
    block = EDM2Block(a, b, EDM2Config(**TINY), 8, is_encoder, resample, attention).to(F64)
    block.emb_gain.fill_(0.7)
    x, emb = th.randn(2, a, 4, 4, dtype=F64), th.randn(2, 32, dtype=F64)
    x[0, :, 0, 0] = 500.0                                           # what is clamped, unless it is normalised
    slow = slow_block(block.state_dict(), x, emb, is_encoder, resample, 8)
    th.testing.assert_close(block(x, emb), slow, rtol=1e-10, atol=1e-10)


@th.no_grad()
def test_embedding_and_uncertainty():
    model, (_, t, y) = tiny(F64), inputs(F64)
    state = model.state_dict()

    def waves(name):
        return math.sqrt(2) * (t[:, None] * state[f"{name}.freqs"] + state[f"{name}.phases"]).cos()

    noise = slow_conv(state["unet.emb_noise.weight"], waves("unet.emb_fourier"))
    label = slow_conv(state["unet.emb_label.weight"], math.sqrt(3) * th.eye(3, dtype=F64)[y])
    th.testing.assert_close(model.unet.embed(t, th.eye(3, dtype=F64)[y]), (noise + label) / math.sqrt(2))
    th.testing.assert_close(
        model.log_variance(t), slow_conv(state["logvar_linear.weight"], waves("logvar_fourier"))[:, 0])


# --- as other networks behave ----------------------------------------------------------------------------------------


def test_every_parameter_has_a_gradient_and_recomputing_changes_none():
    """Ranks wait for each other's gradients of all parameters; that of the uncertainty is 0 without its loss."""
    grads = []
    for use_checkpoint in (False, True):
        model = tiny(use_checkpoint=use_checkpoint, dropout=0.3)
        th.manual_seed(1)
        model(*inputs()).square().sum().backward()
        grads.append({name: param.grad for name, param in model.named_parameters()})
    assert [name for name, grad in grads[0].items() if not grad.any()] == ["logvar_linear.weight"]
    assert all(th.equal(grad, grads[1][name]) for name, grad in grads[0].items())


@th.no_grad()
def test_half_precision_bf16_and_memory_formats():
    model, arguments = tiny(), inputs()
    full, size = model(*arguments), model(*arguments).abs().max()
    th.testing.assert_close(tiny().to(memory_format=th.channels_last)(*arguments), full, rtol=1e-4, atol=1e-5)
    with th.autocast("cpu", dtype=th.bfloat16):
        rounded = model(*arguments)
    assert rounded.dtype == th.float32 and 0 < (rounded - full).abs().max() < 0.06 * size
    model.convert_to_fp16()
    assert model.dtype == th.float16 and all(param.dtype == th.float32 for param in model.parameters())
    half = model(*arguments)
    assert half.dtype == th.float32 and 0 < (half - full).abs().max() < 0.01 * size
    model.convert_to_fp32()
    assert model.dtype == th.float32 and th.equal(model(*arguments), full)


@th.no_grad()
def test_forward_mode_derivatives():
    model, (x, t, y) = tiny(F64).eval(), inputs(F64)
    v = th.randn_like(x)
    _, slope = jvp(lambda image, time: model(image, time, y), (x, t), (v, th.ones_like(t)))
    ends = [model(x + d * v, t + d, y) for d in (1e-6, -1e-6)]
    th.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@th.no_grad()
def test_dropout_acts_in_training_alone_and_zeros_are_no_class():
    model, (x, t, y) = tiny(dropout=0.5, null_class=True), inputs()
    assert not th.equal(model(x, t, y), model(x, t, y))
    model.eval()
    assert th.equal(model(x, t, y), model(x, t, y))
    assert th.equal(model(x, t, th.tensor([3, 3])), model(x, t, th.zeros(2, 3)))


def test_what_does_not_fit():
    with pytest.raises(UserError, match="--augment_dim 9: the network of --arch edm2 takes no augmentation"):
        tiny(augment_dim=9)
    with pytest.raises(UserError, match="num_head_channels=24 does not divide"):
        tiny(channels_per_head=24)
    with pytest.raises(UserError, match="side 6 cannot be halved"):
        tiny(img_resolution=6, channel_mult=(1, 1, 1))
    with pytest.raises(ValueError, match="give y"):
        tiny()(*inputs()[:2])


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_of_unit_magnitude_after_every_step(precision):
    model = tiny()
    trainer = MixedPrecisionTrainer(model=model, precision=precision)
    trainer.backward(model(*inputs()).square().mean())
    masters = dict(zip((name for name, _ in model.named_parameters()), trainer.master_params))
    assert trainer.optimize(th.optim.Adam(trainer.master_params, lr=0.3))
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, MPConv)]
    assert len(names) == sum(param.ndim > 0 for param in model.parameters())
    for name in names:
        assert (rms(masters[name]) - 1).abs().max() < 5e-3, name
    assert all(map(th.equal, trainer.master_params, model.parameters()))
    with th.no_grad():                                              # gains are free
        assert any(abs(value.item()) > 1.2 or value < 0.3 for value in masters.values() if value.ndim == 0)


@th.no_grad()
def test_forced_normalisation_does_not_change_the_function():
    model = tiny(F64)
    for param in model.parameters():
        if param.ndim:
            param.mul_(1.7)
    before = model(*inputs(F64))
    model.constrain(dict(model.named_parameters()))
    th.testing.assert_close(model(*inputs(F64)), before, rtol=0, atol=5e-3 * before.abs().max().item())
    assert rms(model.unet.out_conv.weight).max() < 1.001


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_is_the_same_bit_for_bit(images, tmp_path, precision):
    def train(folder, steps):
        return run(images, tmp_path / folder, steps, model=tiny(dropout=0.1), precision=precision)

    whole = train("whole", 3)
    train("parts", 2)
    train("parts", 3)
    assert digest(tmp_path / "parts", 3) == digest(tmp_path / "whole", 3) and manifest.newest(str(tmp_path / "parts"))
    assert not all(map(th.equal, whole.trainer.master_params, tiny().parameters()))


SHARDED = """
    import sys

    from cm.data.loader import load_data
    from cm.distributed import setup as dist
    from cm.objectives.uncertainty import Uncertainty
    from cm.setup.model import create_diffusion
    from networks.edm.test_edm2 import tiny
    from support.training import loop

    def main():
        dist.setup_dist()

        def stream(start):
            return load_data(data_dir=sys.argv[1], batch_size=2, global_batch=4, image_size=8, class_cond=True,
                             seed=3, start=start, num_workers=0, rank=dist.get_rank(), world_size=2)

        for shard in (False, True):
            loop(sys.argv[1], f"{sys.argv[2]}/{shard}", 2, data=stream, model=tiny(), batch_size=2,
                 shard_optimizer=shard).run_loop()
        diffusion = create_diffusion(arch="edm2")
        objective = Uncertainty.of(diffusion, None, {"noise_mean": -0.4, "noise_std": 1.0})
        loop(sys.argv[1], f"{sys.argv[2]}/uncertain", 2, data=stream, model=tiny(), batch_size=2,
             objective=objective).run_loop()

    dist.run(main)
"""


@pytest.mark.mpi
def test_a_sharded_optimizer_normalises_the_same_weights(images, tmp_path):
    done = mpiexec(2, [program(tmp_path, SHARDED), images, tmp_path], timeout=120)
    assert done.rc == 0, done
    whole, shared = (digest(tmp_path / name, 2) for name in ("False", "True"))
    assert whole and whole == shared
    name = "logvar_linear.weight"                                   # learns by its own objective alone
    files = (tmp_path / run / "model000002.pt" for run in ("uncertain", "True"))
    learned, idle = (th.load(file, weights_only=True)[name] for file in files)
    start = tiny().state_dict()[name]
    assert (learned - start).abs().max() > 1e-6 and (idle - start).abs().max() < 3 * EPS * start.abs().max()
    weights = th.load(tmp_path / "True" / "model000002.pt", weights_only=True)
    for name, value in weights.items():
        if value.ndim > 1:
            assert (rms(value) - 1).abs().max() < 5e-3, name
