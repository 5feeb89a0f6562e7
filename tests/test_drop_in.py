"""Commands and calls of the original that must work here, or end with one clear error."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch as th

from cm.diffusion.noise_sampling import create_named_schedule_sampler
from cm.errors import UserError
from cm.karras_diffusion import (
    iterative_colorization,
    iterative_inpainting,
    iterative_superres,
    karras_sample,
)
from cm.logging import logger
from cm.networks.build import CHANNEL_MULT
from cm.objectives import distances
from cm.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    cm_train_defaults,
    create_model,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from cm.setup import train as set_up
from support.command_line import overridden

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1",
         "--attention_resolutions", "8", "--num_head_channels", "32"]


def flags(*argv):
    """Flags as scripts written against guided-diffusion read them."""
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, model_and_diffusion_defaults() | cm_train_defaults())
    return parser.parse_args(argv)


def model_and_diffusion(*argv, **more):
    args = flags(*SMALL, *argv)
    return create_model_and_diffusion(
        **args_to_dict(args, model_and_diffusion_defaults().keys()), loss_norm=args.loss_norm, **more
    )


def run_script(monkeypatch, name, *argv):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *overridden(argv)])
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv")
    return script


@pytest.fixture
def close_log():
    yield
    logger.reset()


# --- network and denoiser from flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_norm", ["l1", "l2", "l2-32", "lpips", "pseudo-huber"])
def test_flags_reach_the_denoiser(loss_norm):
    model, diffusion = model_and_diffusion(
        "--loss_norm", loss_norm, "--weight_schedule", "snr", "--sigma_min", "0.01", "--sigma_max", "50",
        "--dropout", "0.3", "--class_cond", "True", distillation=True,
    )
    assert diffusion.distance is distances.DISTANCES[loss_norm]
    assert (diffusion.weight_schedule, diffusion.sigma_min, diffusion.sigma_max) == ("snr", 0.01, 50)
    assert diffusion.distillation and not model_and_diffusion()[1].distillation
    assert model.num_classes == 1000 and model.input_blocks[1][0].out_layers[2].p == 0.3


class NotNeeded(Exception):
    pass


def test_lpips_is_built_by_those_who_measure_with_it_and_nobody_else(monkeypatch):
    def lpips_network(*args):
        raise NotNeeded

    monkeypatch.setattr(distances, "lpips_network", lpips_network)
    x0 = th.zeros(2, 3, 8, 8)
    model, diffusion = model_and_diffusion(distillation=True)                # loss_norm lpips, the default
    diffusion.training_losses(model, x0, th.ones(2))
    karras_sample(diffusion, model, x0.shape, 2)
    with pytest.raises(NotNeeded):
        diffusion.consistency_losses(model, x0, 5, target_model=model)
    l2 = model_and_diffusion("--loss_norm", "l2", distillation=True)[1]
    assert l2.consistency_losses(model, x0, 5, target_model=model)["loss"].shape == (2,)


@pytest.mark.parametrize("loss_norm", ["l2-32", "pseudo-huber"])
def test_cm_train_measures_with_the_loss_norm_it_is_given(monkeypatch, tmp_path, close_log, loss_norm):
    script = run_script(
        monkeypatch, "cm_train", *SMALL, "--training_mode", "consistency_training", "--loss_norm", loss_norm,
        "--data_dir", "digits", "--global_batch_size", 2, "--log_dir", tmp_path,
    )
    loops = []

    class Loop:
        step, total_training_steps, stop_signal = 0, 1, 15
        checkpoints = SimpleNamespace(keep=3)

        def __init__(self, config, parts):
            loops.append(parts)

        def resume(self):
            pass

        def run_loop(self):
            pass

    monkeypatch.setattr(set_up, "TrainLoop", Loop)
    script.main(script.read_flags())
    assert loops[0].objective.distance is distances.DISTANCES[loss_norm]


def network(**changes):
    with th.device("meta"):
        return create_model(**{"image_size": 32, "num_channels": 32, "num_res_blocks": 1, **changes})


@pytest.mark.parametrize("image_size", CHANNEL_MULT)
def test_every_size_with_a_default_has_a_network(image_size):
    model = network(image_size=image_size, num_channels=64, attention_resolutions="8")
    assert model.shrinkage == 2 ** (len(CHANNEL_MULT[image_size]) - 1)
    assert model.input_blocks[0][0].out_channels == 64 * CHANNEL_MULT[image_size][0]
    assert image_size != 512 or model.input_blocks[0][0].out_channels == 32


def test_fractions_are_multipliers():
    model = network(num_channels=64, channel_mult="0.5, 1.5")
    assert model.input_blocks[0][0].out_channels == 32 and model.middle_block[0].in_layers[2].out_channels == 96


@pytest.mark.parametrize("changes, message", [
    ({"channel_mult": "1,x"}, "--channel_mult '1,x' is not a list of positive numbers"),
    ({"channel_mult": "1,-2"}, "--channel_mult '1,-2' is not a list of positive numbers"),
    ({"image_size": 48}, "no default channel_mult for image_size 48 .*give --channel_mult"),
    ({"num_channels": 48}, "level 0 would be 48 channels wide .*multiples of 32"),
    ({"channel_mult": "1,1.5"}, "level 1 would be 48 channels wide .*multiples of 32"),
    ({"attention_resolutions": "64"}, "no attention is possible at resolution 64: .* works at 32, 16, 8"),
    ({"attention_resolutions": "16,12"}, "no attention is possible at resolution 12"),
    ({"attention_resolutions": "16;8"}, "--attention_resolutions '16;8' is not a list of image sides"),
    ({"image_size": 30, "channel_mult": "1,1,1", "attention_resolutions": "15"},
     "side 30 cannot be halved between the 3 levels.*multiple of 4"),
    ({"learn_sigma": True}, "--learn_sigma True: .*drop the flag"),
])
def test_flags_without_a_network(changes, message):
    with pytest.raises(UserError, match=message):
        network(**changes)


def test_resolutions_below_the_last_level_are_harmless():
    """The default, 32,16,8, goes with networks of any depth."""
    names = [set(network(channel_mult="1,2", attention_resolutions=sides).state_dict()) for sides in ("16", "16,8")]
    assert names[0] == names[1]


@pytest.mark.parametrize("argv, message", [
    (["--attention_resolutions", "64"], "no attention is possible at resolution 64"),
    (["--image_size", "9", "--channel_mult", "1,1", "--attention_resolutions", "9"], "side 9 cannot be halved"),
    (["--num_channels", "48"], "multiples of 32"),
    (["--learn_sigma", "True"], "--learn_sigma"),
    (["--data_dir", ""], "--data_dir is missing"),
    (["--data_dir", "nowhere"], "nowhere"),
])
def test_edm_train_ends_before_it_has_begun(monkeypatch, tmp_path, close_log, argv, message):
    script = run_script(monkeypatch, "edm_train", *SMALL, "--data_dir", "digits", "--log_dir", tmp_path, *argv)
    monkeypatch.setattr(set_up, "TrainLoop", None)
    if "--data_dir" in argv:                                # no model is built for data that is not there
        monkeypatch.setattr(set_up, "model_from", None)
    with pytest.raises(UserError, match=message):
        script.main(script.read_flags())


@pytest.mark.parametrize("size, mult, sides", [(16, "1,2,2", "16,8"), (48, "1,2", ""), (8, "1,2", "8")])
def test_the_default_resolutions_go_with_images_of_any_size(monkeypatch, tmp_path, capsys, size, mult, sides):
    script = run_script(
        monkeypatch, "edm_train", "--image_size", size, "--channel_mult", mult, "--log_dir", tmp_path / "run",
        "--dry_run", "--data_dir", "digits",
    )
    script.main(script.read_flags())
    assert f'"attention_resolutions": "{sides}"' in capsys.readouterr().out


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lognormal", "uniform", "loss-second-moment"])
def test_guided_diffusions_training_step(name):
    """A schedule sampler draws noise levels and weights, the diffusion makes losses of them."""
    model, diffusion = model_and_diffusion()
    th.manual_seed(0)
    sigmas, weights = create_named_schedule_sampler(name, diffusion).sample(2, "cpu")
    losses = diffusion.training_losses(model, th.randn(2, 3, 8, 8), sigmas)
    (losses["loss"] * weights).mean().backward()
    assert model.out[2].weight.grad.isfinite().all() and model.out[2].weight.grad.any()


# --- editing ---------------------------------------------------------------------------------------------------------


class Distiller(th.nn.Module):
    """Takes images of its own precision and no other."""

    def __init__(self, dtype):
        super().__init__()
        self.conv = th.nn.Conv2d(3, 3, 3, padding=1, dtype=dtype)

    def forward(self, x, sigma):
        return self.conv(x / sigma[:, None, None, None])


def edits(images, x, dtype):
    distiller = Distiller(dtype)
    mask = th.zeros(images.shape[-2:])
    mask[: len(mask) // 2] = 1
    return {
        "inpainting": lambda: iterative_inpainting(distiller, images, x, (0, 2, 5), steps=6, mask=mask),
        "colorization": lambda: iterative_colorization(distiller, images, x, (0, 2, 5), steps=6),
        "superres": lambda: iterative_superres(distiller, images, x, (0, 2, 5), steps=6, factor=side_factor(images)),
    }


def side_factor(images):
    return next(factor for factor in (8, 6, 3) if images.shape[-1] % factor == 0)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("n, side", [(3, 32), (1, 36)])
@pytest.mark.parametrize("name", ["inpainting", "colorization", "superres"])
def test_editing_takes_any_number_of_images_of_any_size(name, n, side, dtype):
    """Without a generator and without a font; a network of any precision."""
    th.manual_seed(0)
    images = 2 * th.rand(n, 3, side, side, dtype=dtype) - 1
    x, known = edits(images, 80 * th.randn_like(images), dtype)[name]()
    assert x.shape == known.shape == images.shape and x.dtype == dtype and x.isfinite().all()
    if name == "inpainting":
        assert th.equal(x[:, :, : side // 2], images[:, :, : side // 2])
        assert not (x[:, :, side // 2 :] == images[:, :, side // 2 :]).any()
