"""What the compatibility modules compute: against closed forms, torch, scipy and the toolkit's own functions."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image
from scipy import stats

from cm import fp16_util, image_datasets, karras_diffusion, logger, losses, nn, resample, script_util, unet
from cm.data.decode import centre_crop
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.logging import logger as log_of_run
from cm.networks.attention import qkv_attention
from cm.networks.unet import UNet, UNetConfig
from cm.objectives.distances import DISTANCES
from cm.random_util import DeterministicGenerator, get_generator
from cm.samplers import Churn, integrate, make_sampler
from support.warm import mpi_program

SHAPE = (3, 3, 4, 4)


@pytest.fixture
def rng() -> DeterministicGenerator:
    return DeterministicGenerator(len(th.empty(SHAPE)), seed=1)


# --- samplers: those of karras_sample --------------------------------------------------------------------------------


def black(x: th.Tensor, sigma: th.Tensor, **cond: Any) -> th.Tensor:
    """A denoiser to zero."""
    return 0 * x


def doubled_time(x: th.Tensor, t: th.Tensor) -> th.Tensor:
    """A slope 2 t."""
    return 2 * t[:, None, None, None].expand_as(x)


class Half(th.nn.Module):
    """A network whose denoiser is no straight line."""

    def forward(self, x: th.Tensor, time: th.Tensor) -> th.Tensor:
        return th.tanh(x + time[:, None, None, None] / 1000)


def by_karras_sample(sampler: str, **options) -> th.Tensor:
    return karras_diffusion.karras_sample(
        karras_diffusion.KarrasDenoiser(), Half(), SHAPE, 6, sampler=sampler, generator=get_generator("determ", 3, 1),
        clip_denoised=False, **options,
    )


def by_function(function, grid_steps: int = 6, **options) -> th.Tensor:
    generator = get_generator("determ", 3, 1)
    x = generator.randn(*SHAPE) * 80.0
    sigmas = karras_diffusion.get_sigmas_karras(grid_steps, 0.002, 80.0)
    D = karras_diffusion.KarrasDenoiser().bind(Half())
    return function(D, x, sigmas, generator=generator, **options).clamp(-1, 1)


CHURN: dict[str, Any] = {"s_churn": 3.0, "s_tmin": 0.01, "s_tmax": 50.0, "s_noise": 1.01}


@pytest.mark.parametrize("name, function, options", [
    ("heun", karras_diffusion.sample_heun, {}),
    ("heun", karras_diffusion.sample_heun, CHURN),
    ("dpm", karras_diffusion.sample_dpm, CHURN),
    ("euler", karras_diffusion.sample_euler, {}),
    ("ancestral", karras_diffusion.sample_euler_ancestral, {}),
    ("onestep", karras_diffusion.sample_onestep, {}),
])
def test_a_sampler_function_gives_the_samples_of_karras_sample(name, function, options):
    # The grid of the functions is float32, that of karras_sample is rounded later.
    assert th.allclose(by_function(function, **options), by_karras_sample(name, **options), rtol=0, atol=2e-5)


def test_a_sampler_function_is_the_sampler_bit_for_bit(rng):
    D = karras_diffusion.KarrasDenoiser().bind(Half())
    sigmas = karras_diffusion.get_sigmas_karras(5, 0.002, 80.0)
    x = 80 * rng.randn(*SHAPE)
    for name, function in (("heun", karras_diffusion.sample_heun), ("dpm", karras_diffusion.sample_dpm)):
        expected = integrate(make_sampler(name, {}), D, x, sigmas, get_generator("determ", 3, 2), churn=Churn(**CHURN))
        assert th.equal(function(D, x, sigmas, get_generator("determ", 3, 2), **CHURN), expected)


def test_progdist_leaves_out_the_zero():
    assert th.allclose(
        by_function(karras_diffusion.sample_progdist, grid_steps=7), by_karras_sample("progdist"), rtol=0, atol=2e-5
    )


def test_multistep_by_function():
    expected = by_karras_sample("multistep", ts=(0, 2, 5))
    calls: tuple[dict[str, Any], ...] = (
        {"sigmas": None, "ts": (0, 2, 5)},
        {"sigmas": (0, 2, 5)},                              # as ternary_search.py does
    )
    for call in calls:
        generator = get_generator("determ", 3, 1)
        x = generator.randn(*SHAPE) * 80.0
        D = karras_diffusion.KarrasDenoiser().bind(Half())
        found = karras_diffusion.stochastic_iterative_sampler(D, x, generator=generator, steps=6, **call)
        assert th.equal(found.clamp(-1, 1), expected)


def test_multistep_may_repeat_levels_and_end_with_noise(rng):
    """Of a denoiser to zero, the noise of the last level is left, and nothing else."""
    sampler = karras_diffusion.stochastic_iterative_sampler
    many = DeterministicGenerator(4000, seed=0)
    x = sampler(black, th.zeros(4000, 1, 1, 1), None, many, (0, 0, 2), t_max=2.0, steps=3)
    assert not x.any()
    level = float(karras_diffusion.get_sigmas_karras(3, 0.002, 2.0)[1])
    x = sampler(black, th.zeros(4000, 1, 1, 1), None, many, (0, 1), t_max=2.0, steps=3)
    assert float(x.std()) == pytest.approx(level, rel=0.05)


def test_callbacks_of_samplers():
    states: list[dict] = []
    by_function(karras_diffusion.sample_heun, callback=states.append, **CHURN)
    sigmas = karras_diffusion.get_sigmas_karras(6, 0.002, 80.0)
    assert [state["i"] for state in states] == list(range(6))
    assert all(state["sigma"] == float(sigmas[state["i"]]) for state in states)
    assert [state["sigma_hat"] > state["sigma"] for state in states] == [0.01 <= s <= 50 for s in sigmas[:-1].tolist()]


def test_slopes_and_ancestral_steps():
    x, denoised, sigma = th.randn(SHAPE), th.randn(SHAPE), th.tensor([1.0, 2.0, 4.0])
    assert th.allclose(karras_diffusion.to_d(x, sigma, denoised)[2], (x[2] - denoised[2]) / 4)
    down, up = karras_diffusion.get_ancestral_step(th.tensor(5.0), th.tensor(3.0))
    assert float(down) == pytest.approx(9 / 5) and float(down**2 + up**2) == pytest.approx(9)
    assert karras_diffusion.get_ancestral_step(5.0, 0.0) == (0.0, 0.0)


def test_the_midpoint_method_solves_a_quadrature_exactly():
    """dx/dt = 2 t from 0 to 1 is a straight slope, for which the midpoint is exact: x(1) = x(0) + 1."""
    x = th.zeros(2, 1, 1, 1, dtype=th.float64)
    found = karras_diffusion.sample_midpoint_ancestral(doubled_time, x, th.arange(5) / 5, generator=None)
    assert th.allclose(found, th.ones_like(x))


def test_inpainting_without_a_mask_fills_in_a_letter():
    images = th.rand(2, 3, 32, 32) * 2 - 1
    x, known = karras_diffusion.iterative_inpainting(black, images, 80 * images, (0, 5), steps=6)
    mask = karras_diffusion.letter_mask(32, 32).bool()
    assert 0.03 < 1 - mask.float().mean() < 0.6
    assert th.equal(x[:, :, mask], images[:, :, mask]) and (x[:, :, ~mask] == 0).all()
    assert (known[:, :, ~mask] == -1).all()
    same = karras_diffusion.iterative_inpainting(black, images, 80 * images, (0, 5), steps=6, mask=mask)[0]
    assert th.equal(x, same)


def test_loss_norm_may_be_set_after_construction():
    diffusion = karras_diffusion.KarrasDenoiser(0.5, 80.0, 0.002, 7.0, "karras", True, "lpips")     # by position
    model, x = Half(), th.rand(2, 3, 8, 8)
    values = []
    for name in ("l1", "l2"):
        diffusion.loss_norm = name
        assert diffusion.distance is DISTANCES[name]
        th.manual_seed(0)
        found = diffusion.consistency_losses(model, x, 5, target_model=model, noise=th.ones_like(x),
                                             indices=th.tensor([1, 2]))
        values.append(found["loss"])
    assert not th.allclose(*values)
    diffusion.loss_norm = "l3"
    with pytest.raises(UserError, match="unknown loss_norm 'l3'; choose one of: l1"):
        diffusion.consistency_losses(model, x, 5, target_model=model)


# --- losses ---------------------------------------------------------------------------------------------------------


def test_normal_kl():
    """Against the integral of p ln(p / q)."""
    grid = th.linspace(-30, 30, 200_001, dtype=th.float64)
    log_p, log_q = (stats.norm.logpdf(grid.numpy(), *law) for law in ((0.3, math.exp(0.2)), (-1.0, math.exp(0.5))))
    expected = np.trapezoid(np.exp(log_p) * (log_p - log_q), grid.numpy())
    found = losses.normal_kl(th.tensor(0.3, dtype=th.float64), 0.4, -1.0, 1.0)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert losses.normal_kl(th.zeros(2, 1), 0.0, th.ones(3), 0.0).shape == (2, 3)
    with pytest.raises(TypeError, match="needs a tensor"):
        losses.normal_kl(0.0, 0.0, 0.0, 0.0)


def test_the_normal_law_is_approximated():
    x = th.linspace(-6, 6, 1001, dtype=th.float64)
    assert np.abs(losses.approx_standard_normal_cdf(x).numpy() - stats.norm.cdf(x.numpy())).max() < 2e-4


def test_likelihood_of_eight_bits():
    levels = th.arange(256, dtype=th.float64) / 127.5 - 1
    mean, log_scale = th.full_like(levels, 0.1), th.full_like(levels, -1.5)
    found = losses.discretized_gaussian_log_likelihood(levels, means=mean, log_scales=log_scale).exp()
    law = stats.norm(0.1, math.exp(-1.5))
    edges = np.concatenate([[-np.inf], levels[:-1].numpy() + 1 / 255, [np.inf]])
    assert np.abs(found.numpy() - np.diff(law.cdf(edges))).max() < 1e-4
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        losses.discretized_gaussian_log_likelihood(levels, means=mean[:1], log_scales=log_scale)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_scale_module_and_append_zero():
    layer = th.nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    assert nn.scale_module(layer, 3.0) is layer and th.equal(layer.weight, 3 * before)
    assert nn.append_zero(th.ones(2)).tolist() == [1, 1, 0]


def plain_attention(qkv: th.Tensor, heads: int, more: th.Tensor | None = None) -> th.Tensor:
    """Spelt out, head by head."""
    q, k, v = qkv.chunk(3, dim=1)
    if more is not None:
        more_k, more_v = more.chunk(2, dim=1)
        k, v = th.cat([more_k, k], 2), th.cat([more_v, v], 2)
    out = []
    for part_q, part_k, part_v in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1)):
        weights = (part_q.transpose(1, 2) @ part_k / math.sqrt(part_q.shape[1])).softmax(2)     # [N,T,S]
        out.append(part_v @ weights.transpose(1, 2))
    return th.cat(out, 1)


@pytest.mark.parametrize("layer", [unet.QKVAttention, unet.QKVAttentionLegacy])
def test_attention_layers(layer):
    qkv = th.randn(2, 24, 5)
    assert th.allclose(layer(2)(qkv), plain_attention(qkv, 2), atol=1e-6)
    assert th.equal(layer(2)(qkv), qkv_attention(qkv, 2))


def test_attention_to_an_encoder():
    qkv, more = th.randn(2, 24, 5), th.randn(2, 16, 7)
    assert th.allclose(unet.QKVAttention(2)(qkv, more), plain_attention(qkv, 2, more), atol=1e-6)
    with pytest.raises(ValueError, match="needs 16"):
        unet.QKVAttention(2)(qkv, more[:, :8])
    with pytest.raises(ValueError, match="24 channels"):
        unet.QKVAttention(5)(qkv)


def test_attention_pool():
    pool = unet.AttentionPool2d(4, 8, 4, output_dim=6)
    assert {name for name, _ in pool.named_parameters()} == {
        "positional_embedding", "qkv_proj.weight", "qkv_proj.bias", "c_proj.weight", "c_proj.bias"
    }
    x = th.randn(2, 8, 4, 4)
    tokens = th.cat([x.flatten(2).mean(2, keepdim=True), x.flatten(2)], 2) + pool.positional_embedding
    expected = pool.c_proj(plain_attention(pool.qkv_proj(tokens), 2))[:, :, 0]
    assert pool(x).shape == (2, 6) and th.allclose(pool(x), expected, atol=1e-6)


def test_flops_of_attention():
    layer = unet.QKVAttention(2)
    layer.total_ops = th.zeros(1, dtype=th.float64)
    layer.count_flops(layer, (), (th.zeros(2, 8, 4, 4),))
    assert float(layer.total_ops) == 2 * 2 * 16**2 * 8


def test_a_network_by_the_originals_arguments():
    th.manual_seed(0)
    flat = unet.UNetModel(8, 3, 32, 6, 1, iter([2]), 0.25, (1, 2), False, 2, 4, True, True, 2, 16, 4, True, True, True)
    config = UNetConfig(
        image_size=8, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=(2,),
        dropout=0.25, channel_mult=(1, 2), conv_resample=False, dims=2, num_classes=4, use_checkpoint=True,
        num_heads=2, num_head_channels=16, num_heads_upsample=4, use_scale_shift_norm=True, resblock_updown=True,
    )
    assert flat.config == config and flat.use_fp16
    th.manual_seed(0)
    structured = UNet(config)
    assert list(flat.state_dict()) == list(structured.state_dict())
    assert all(map(th.equal, flat.state_dict().values(), structured.state_dict().values()))


@pytest.mark.parametrize("use_fp16", [False, True])
def test_create_model_makes_the_originals_class(use_fp16: bool):
    model = script_util.create_model(8, 32, 1, attention_resolutions="4", use_fp16=use_fp16)
    assert type(model) is unet.UNetModel and model.use_fp16 is use_fp16


# --- float32 masters, flat -------------------------------------------------------------------------------------------


def test_master_params_go_there_and_back():
    model = th.nn.Sequential(th.nn.Linear(3, 4), th.nn.Conv2d(1, 2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    assert [len(group) for group, _ in groups] == [2, 2]
    masters = fp16_util.make_master_params(groups)
    assert [tuple(master.shape) for master in masters] == [(6,), (1, 30)]
    state = fp16_util.master_params_to_state_dict(model, groups, masters, use_fp16=True)
    assert all(th.equal(state[name], value) for name, value in before.items())
    again = fp16_util.state_dict_to_master_params(model, state, use_fp16=True)
    assert all(th.equal(a, b) for a, b in zip(again, masters))
    for master in masters:
        master.data.mul_(2)
    fp16_util.master_params_to_model_params(groups, masters)
    assert all(th.equal(value, 2 * before[name]) for name, value in model.state_dict().items())
    plain = fp16_util.state_dict_to_master_params(model, before, use_fp16=False)
    state = fp16_util.master_params_to_state_dict(model, None, plain, use_fp16=False)
    assert all(th.equal(state[name], value) for name, value in before.items())


def test_master_grads_train_a_half_precision_network():
    """A step of the flat masters is a step of the parameters."""
    model = th.nn.Conv2d(1, 2, 3)
    fp16_util.convert_module_to_f16(model)
    assert model.weight.dtype == th.float16
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    masters = fp16_util.make_master_params(groups)
    model.weight.grad = th.ones_like(model.weight)                          # and none for the bias
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert masters[0].grad is not None and not masters[0].grad.any() and masters[0].dtype == th.float32
    before = model.weight.detach().clone()
    th.optim.SGD(masters, lr=0.25).step()
    fp16_util.master_params_to_model_params(groups, masters)
    assert th.allclose(model.weight, before - 0.25, atol=1e-3)
    fp16_util.zero_grad([model.weight])
    fp16_util.zero_master_grads(masters)
    assert not model.weight.grad.any() and masters[1].grad is None
    fp16_util.convert_module_to_f32(model)
    assert model.weight.dtype == th.float32


def test_overflow():
    assert fp16_util.check_overflow(float("inf")) and fp16_util.check_overflow(th.tensor(float("nan")))
    assert not fp16_util.check_overflow(1.0)


# --- noise levels of training ----------------------------------------------------------------------------------------


def test_laws_from_a_diffusion():
    diffusion = karras_diffusion.KarrasDenoiser()
    kinds = {"uniform": resample.UniformSampler, "loss-second-moment": resample.LossSecondMomentResampler}
    for name, kind in kinds.items():
        law = resample.create_named_schedule_sampler(name, diffusion)
        assert type(law) is kind and isinstance(law, resample.ScheduleSampler) and law.weights().tolist() == [1.0] * 40
        sigma, weight = law.sample(500, "cpu")
        assert set(sigma.tolist()) <= set(diffusion.noise_levels(40).tolist()) and (weight == 1).all()
    assert isinstance(resample.create_named_schedule_sampler("lognormal", diffusion), resample.LogNormalSampler)
    with pytest.raises(UserError, match="choose one of"):
        resample.create_named_schedule_sampler("normal", diffusion)


def test_a_law_that_follows_losses():
    law = resample.LossSecondMomentResampler(karras_diffusion.KarrasDenoiser(), 2, 0.0)
    assert isinstance(law, resample.LossAwareSampler)
    sigmas = law.sigmas.repeat(2)
    law.update_with_local_losses(sigmas, th.arange(80) % 40 + 1.0)                  # by levels
    assert law.weights() == pytest.approx(np.arange(1, 41) / 820)
    law.update_with_all_losses([0, 0], [40.0, 40.0])                                # by indices
    assert law.weights()[0] == pytest.approx(40 / 859)


def test_a_law_of_ones_own():
    class Even(resample.ScheduleSampler):
        def weights(self) -> np.ndarray:
            return np.array([1.0, 0.0, 3.0])

    index, weight = Even().sample(4000, "cpu")
    assert set(index.tolist()) == {0, 2} and float((index == 2).float().mean()) == pytest.approx(0.75, abs=0.03)
    assert float(weight.mean()) == pytest.approx(2 / 3, abs=0.03)               # E[w] = sum over levels of p / (K p)


def test_even_lognormal_levels_lie_in_intervals_of_their_own():
    law = resample.LogNormalSampler(p_mean=-1.2, p_std=1.2, even=True)
    sigma, weight = law.sample(bs=64, device="cpu")
    places = stats.norm(-1.2, 1.2).cdf(sigma.log().numpy()) * 64
    assert (places.astype(int) == np.arange(64)).all() and (weight == 1).all()


@pytest.mark.mpi
def test_losses_are_gathered_and_ranks_have_their_own_streams(tmp_path: Path):
    finished = mpi_program(tmp_path, 2, """
        import torch as th
        from cm import dist_util
        from cm.image_datasets import load_data
        from cm.random_util import get_generator
        from cm.resample import LogNormalSampler, LossSecondMomentResampler

        dist_util.setup_dist()
        rank = dist_util.get_rank()
        law = LossSecondMomentResampler(th.tensor([3.0, 2.0, 1.0]), 1, 0.0)
        ts = th.tensor([3.0, 2.0]) if rank == 0 else th.tensor([1.0])
        law.update_with_local_losses(ts, ts * 2)
        even = sum(dist_util.all_gather_object(LogNormalSampler(even=True).sample(8, "cpu")[0].tolist()), [])
        draws = dist_util.all_gather_object(get_generator("determ", 4, 0).randn(2, 3).tolist())
        data = load_data(data_dir="digits", batch_size=2, image_size=8, deterministic=True, random_flip=False)
        seen = sum(dist_util.all_gather_object(next(data).indices.tolist()), [])
        if rank == 0:
            weights = [round(weight, 3) for weight in law.weights().tolist()]
            print(weights, sorted(even) == even, draws[0] != draws[1], sorted(seen))
    """)
    assert finished.stdout.strip() == "[0.5, 0.333, 0.167] True True [0, 1, 2, 3]", finished


# --- flags ------------------------------------------------------------------------------------------------------------


def test_flags_of_the_scripts():
    defaults = script_util.cm_train_defaults()
    assert script_util.NUM_CLASSES == 1000 and defaults["total_training_steps"] == 600_000
    curriculum = script_util.create_ema_and_scales_fn(
        target_ema_mode="fixed", start_ema=0.9, scale_mode="fixed", start_scales=40, end_scales=40, total_steps=10,
        distill_steps_per_iter=5,
    )
    assert curriculum(3) == (0.9, 40)
    assert script_util.str2bool("yes") and not script_util.str2bool(False)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    for i, name in enumerate(("b/x_1.png", "a.png", "z.jpg", ".hidden.png", "note.txt")):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def test_an_image_dataset(folder):
    paths = image_datasets._list_image_files_recursively(str(folder))
    assert [Path(path).name for path in paths] == ["a.png", "x_1.png", "z.jpg"]
    data = image_datasets.ImageDataset(16, paths, classes=[5, 6, 7], shard=1, num_shards=2, random_flip=False)
    assert len(data) == 1
    image, cond = data[0]
    with Image.open(paths[1]) as picture:
        expected = centre_crop(picture.convert("RGB"), 16)
        assert (image_datasets.center_crop_arr(picture, 16) == expected).all()
    assert image.dtype == np.float32 and (image == expected.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1).all()
    assert cond["y"] == 6 and np.asarray(cond["y"]).dtype == np.int64
    with pytest.raises(UserError, match="note.txt cannot be read: it is not an image"):
        image_datasets.ImageDataset(16, [str(folder / "note.txt")])[0]


def test_random_crops(folder):
    random.seed(0)
    with Image.open(folder / "a.png") as picture:
        crops = [image_datasets.random_crop_arr(picture, 8, min_crop_frac=0.5) for _ in range(20)]
        whole = image_datasets.random_crop_arr(picture.crop((0, 0, 20, 20)), 8, 1.0, 1.0)
        assert (whole == centre_crop(picture.crop((0, 0, 20, 20)), 8)).all()
    assert all(crop.shape == (8, 8, 3) for crop in crops) and len({crop.tobytes() for crop in crops}) > 10
    flips = image_datasets.ImageDataset(8, [str(folder / "a.png")])
    pictures = {flips[0][0].tobytes() for _ in range(20)}
    assert len(pictures) == 2


# --- the log ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def close_log():
    yield
    logger.reset()


def test_a_log_by_the_originals_calls(tmp_path: Path, close_log, monkeypatch):
    monkeypatch.delenv("OPENAI_LOG_FORMAT", raising=False)
    logger.configure(dir=str(tmp_path), format_strs=["log", "json", "csv"], comm=None, log_suffix="-a")
    assert logger.get_current() is log_of_run.get_current() and logger.get_current().get_dir() == str(tmp_path)
    logger.record_tabular(key="loss", val=2.0)
    logger.logkv_mean(key="loss_mean", val=1.0)
    logger.get_current().logkv_mean(key="loss_mean", val=3.0)

    @logger.profile("nap")
    def nap() -> int:
        """Rest."""
        return 5

    assert nap() == 5 and nap.__doc__ == "Rest."
    assert logger.getkvs()["loss_mean"] == 2
    row = logger.dump_tabular()
    assert row["loss"] == 2 and row["wait_nap"] >= 0
    assert json.loads((tmp_path / "progress-a.json").read_text())["loss_mean"] == 2
    logger.set_level(logger.DISABLED)
    logger.log("unheard", level=logger.ERROR)
    assert "unheard" not in (tmp_path / "log-a.txt").read_text()
    with logger.scoped_configure(str(tmp_path / "inner"), ["json"], None):
        assert logger.get_dir() == str(tmp_path / "inner")
    assert logger.get_dir() == str(tmp_path)


def test_formats_in_a_log_beside_the_current_one(tmp_path: Path):
    class Heard(logger.KVWriter, logger.SeqWriter):
        def __init__(self) -> None:
            self.rows: list[dict] = []
            self.lines: list[str] = []

        def writekvs(self, kvs) -> None:
            self.rows.append(dict(kvs))

        def writeseq(self, seq) -> None:
            self.lines.append(" ".join(seq))

    text, heard = io.StringIO(), Heard()
    outputs = [
        logger.HumanOutputFormat(text), heard, logger.JSONOutputFormat(str(tmp_path / "rows.json")),
        logger.CSVOutputFormat(str(tmp_path / "rows.csv")),
        logger.make_output_format(format="log", ev_dir=str(tmp_path / "logs"), log_suffix="1"),
    ]
    log = logger.Logger(dir=str(tmp_path), output_formats=outputs, comm=None)
    log.logkv(key="x", val=1.5)
    log.dumpkvs()
    log.log("a", 1)
    log.set_level(logger.ERROR)
    log.log("unheard")
    log.close()
    assert heard.rows == [{"x": 1.5}] and heard.lines == ["a 1"]
    assert (tmp_path / "rows.csv").read_text() == "x\n1.5\n" and json.loads((tmp_path / "rows.json").read_text())
    assert "| x | 1.5 |" in text.getvalue() and text.getvalue() == (tmp_path / "logs/log1.txt").read_text()
    assert log.get_dir() == str(tmp_path)
    with pytest.raises(UserError, match="choose one of: stdout, log, json"):
        logger.make_output_format("xml", str(tmp_path))


def test_a_communicator_is_refused(tmp_path: Path):
    for call in (
        lambda: logger.configure(str(tmp_path), comm=object()), lambda: logger.Logger(None, [], comm=object()),
        lambda: logger.scoped_configure(str(tmp_path), comm=object()),
    ):
        with pytest.raises(UserError, match="leave comm out"):
            call()


def test_ranks_without_mpi(monkeypatch):
    monkeypatch.setattr(dist, "_job", None)
    monkeypatch.setenv("PMI_RANK", "3")
    assert logger.get_rank_without_mpi_import() == 3
