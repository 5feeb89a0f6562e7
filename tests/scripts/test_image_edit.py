"""scripts/image_edit.py: every task from flags to files, the same on any number of ranks, and bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.config.flags import defaults_of
from cm.config.sampling_schema import EditConfig
from cm.config.schema import EDIT_NAMES, ModelConfig
from cm.errors import UserError
from cm.generate.edit_tasks import TASKS
from cm.logging import logger
from cm.script_util import create_model
from support.as_module import as_module
from support.command_line import overridden
from support.warm import mpiexec, python

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/image_edit.py"
QUIET = {"OPENAI_LOG_FORMAT": "log"}
NETWORK = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8",
           "num_head_channels": 32}
BOX = "2,3,4,3"
FILLED = np.zeros((8, 8), bool)
FILLED[2:6, 3:6] = True


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A random network, with and without classes, 5 images, 3 of them labelled small ones, and masks."""
    room = tmp_path_factory.mktemp("edit")
    for name, classes in (("model", {}), ("classes", {"class_cond": True, "num_classes": 10})):
        th.manual_seed(0)
        network = create_model(**{**defaults_of(ModelConfig), **NETWORK, **classes})
        for param in network.parameters():
            th.nn.init.normal_(param, std=0.05)
        th.save(network.state_dict(), room / f"{name}.pt")
    rng = np.random.default_rng(0)
    np.savez(room / "five.npz", arr_0=rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))
    np.savez(room / "small.npz", arr_0=rng.integers(0, 256, (3, 2, 2, 3), dtype=np.uint8), arr_1=np.array([7, 0, 9]))
    np.savez(room / "many.npz", arr_0=rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8), arr_1=np.array([10]))
    Image.fromarray(np.where(FILLED, 0, 255).astype(np.uint8)).save(room / "mask.png")
    np.save(room / "mask.npy", ~FILLED)
    for name, mask in {"large": np.ones((16, 8)), "known": np.ones((8, 8)), "unknown": np.zeros((8, 8)),
                       "grey": np.full((8, 8), 7), "objects": np.array([{}])}.items():
        np.save(room / f"{name}.npy", mask)
    Image.fromarray(np.ones((8, 8), np.uint8)).save(room / "ones.png")
    (room / "empty").mkdir()
    return room


def flags(room, *options, model="model", task="inpaint", images="five.npz", classes=False):
    network = [word for name, value in NETWORK.items() for word in (f"--{name}", value)]
    cond = ["--class_cond", True, "--num_classes", 10] if classes else []
    words = ["--model_path", room / f"{model}.pt", *network, *cond, "--training_mode", "consistency_distillation",
             *(["--task", task] if task else [])]
    if "--sampler" not in options or "multistep" in options:    # the usual one
        words += ["--steps", 6, "--ts", "0,2,5"]
    given = ["--images", room / images] if images else []
    return overridden(str(word).format(room=room) for word in (*words, *given, *options))


@pytest.fixture
def edit(room, tmp_path, monkeypatch):
    """Run the script's main in this process: the results, and what was known."""
    script = as_module(SCRIPT)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)

    def run(*options, **more):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        monkeypatch.setattr(sys, "argv", ["image_edit.py", *flags(room, *options, "--log_dir", folder, **more)])
        script.main(script.read_flags())
        logger.reset()
        return saved(folder)

    return run


def saved(folder):
    """Arrays of every npz by its kind, the summary, and the comparison."""
    arrays = {path.name.split("_")[0]: dict(np.load(path)) for path in folder.glob("*.npz")}
    (summary,), (picture,) = folder.glob("samples_*.json"), folder.glob("samples_*.png")
    return {kind: held["arr_0"] for kind, held in arrays.items()} | {
        "labels": arrays["samples"].get("arr_1"), "summary": json.loads(summary.read_text()),
        "picture": Image.open(picture),
    }


def pixels(room, name="five.npz"):
    return np.load(room / name)["arr_0"]


def bright(images):
    return images.astype(float) @ (0.2989, 0.5870, 0.1140)


# --- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [("--mask_box", BOX), ("--mask", "{room}/mask.png"), ("--mask", "{room}/mask.npy")])
def test_inpaint_keeps_every_known_pixel_to_the_bit(edit, room, how):
    done, images = edit(*how), pixels(room)
    assert np.array_equal(done["samples"][:, ~FILLED], images[:, ~FILLED])
    assert (done["samples"][:, FILLED] != images[:, FILLED]).mean() > 0.9
    assert np.array_equal(done["inputs"], np.where(FILLED[..., None], 0, images))
    assert done["summary"]["network_evaluations"] == 2 and done["summary"]["task"] == "inpaint"
    assert done["picture"].height > 3 * 64                          # original, known, result


def test_every_grey_level_survives_inpainting(edit, room):
    """A level in four is lost where floats are truncated."""
    np.savez(room / "levels.npz", arr_0=np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3))
    done = edit("--mask_box", "0,0,1,1", images="levels.npz")
    assert np.array_equal(done["samples"][:, 1:], pixels(room, "levels.npz")[:, 1:])


def test_colorize(edit, room):
    done, images = edit(task="colorize"), pixels(room)
    assert np.array_equal(done["inputs"], done["inputs"][..., :1].repeat(3, -1))
    assert np.abs(bright(done["inputs"]) - bright(images)).max() <= 0.51
    inside = ((done["samples"] > 0) & (done["samples"] < 255)).all(-1)         # where a clamp has changed nothing
    assert inside.mean() > 0.3
    assert np.abs(bright(done["samples"]) - bright(images))[inside].max() <= 0.51


def means(images, side):
    return images.astype(float).reshape(len(images), 8 // side, side, 8 // side, side, 3).mean((2, 4))


def test_superres_of_large_images(edit, room):
    done = edit("--superres_factor", 4, task="superres")
    assert np.abs(means(done["inputs"], 4) - means(pixels(room), 4)).max() <= 0.5
    assert np.array_equal(done["inputs"], done["inputs"][:, ::4, ::4].repeat(4, 1).repeat(4, 2))


def test_superres_of_small_images(edit, room):
    done = edit("--superres_factor", 4, "--low_resolution", True, task="superres", images="small.npz")
    small = pixels(room, "small.npz")
    assert np.array_equal(done["inputs"], small.repeat(4, 1).repeat(4, 2))
    assert done["samples"].shape == (3, 8, 8, 3)


@pytest.mark.parametrize("channels, kind", [(1, np.uint8), (4, np.float32)])
def test_other_channels(room, tmp_path, monkeypatch, channels, kind):
    """Grey images and latents are inpainted; colours are for RGB alone."""
    network = create_model(**{**defaults_of(ModelConfig), **NETWORK, "channels": channels})
    th.save(network.state_dict(), tmp_path / "model.pt")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, channels)).astype(kind)
    np.savez(tmp_path / "images.npz", arr_0=images)
    script = as_module(SCRIPT)

    def run(*options, **more):
        argv = flags(room, *options, "--model_path", tmp_path / "model.pt", "--images", tmp_path / "images.npz",
                     "--log_dir", tmp_path / "out", **more)
        monkeypatch.setattr(sys, "argv", ["image_edit.py", *argv])
        try:
            script.main(script.read_flags())
        finally:
            logger.reset()

    run("--mask_box", BOX)
    done = np.load(tmp_path / f"out/samples_2x8x8x{channels}.npz")["arr_0"]
    assert done.dtype == kind and np.allclose(done[:, ~FILLED], images[:, ~FILLED], atol=1e-5)
    assert (done[:, FILLED] != images[:, FILLED]).mean() > 0.9
    with pytest.raises(UserError, match=f"--task colorize gives .* makes images of {channels} channel"):
        run(task="colorize")


def test_strokes_change_more_from_a_noisier_start(edit, room):
    images, changes = pixels(room).astype(int), []
    for start in (0, 4):
        done = edit("--stroke_start", start, task="stroke")
        assert np.array_equal(done["inputs"], images)
        changes.append(np.abs(done["samples"] - images).mean())
    assert changes[0] > 4 * changes[1] and done["summary"]["network_evaluations"] == 1


def test_denoise(edit, room):
    noisy = edit("--denoise_sigma", 0.2, task="denoise")
    assert noisy["summary"]["network_evaluations"] == 1
    difference = noisy["inputs"].astype(float) - pixels(room)
    inside = (pixels(room) > 100) & (pixels(room) < 155)            # four deviations from clipping
    assert difference[inside].std() == pytest.approx(0.2 * 127.5, rel=0.2)
    given = edit("--denoise_sigma", 0.2, "--add_noise", False, task="denoise")
    assert np.array_equal(given["inputs"], pixels(room))


def test_interpolation_ends_at_samples_of_image_sample(edit, room, tmp_path, monkeypatch):
    done = edit("--interpolate_pairs", "3:0,1:2", "--interpolate_weights", "0,0.5,1", task="interpolate", images="")
    assert done["samples"].shape == (6, 8, 8, 3) and "inputs" not in done
    argv = flags(room, "--sampler", "multistep", "--num_samples", 4, "--log_dir", tmp_path / "samples", images="",
                 task="")
    monkeypatch.setattr(sys, "argv", ["image_sample.py", *argv])
    script = as_module(ROOT / "scripts/image_sample.py")
    script.main(script.read_flags())
    logger.reset()
    samples = pixels(tmp_path / "samples", "samples_4x8x8x3.npz").astype(int)
    # Edits are rounded where samples are truncated.
    assert np.abs(done["samples"][[0, 2, 3, 5]] - samples[[3, 0, 1, 2]]).max() <= 1
    assert np.abs(done["samples"][1] - samples[3]).max() > 10


def test_neighbours_are_interpolated_by_default(edit):
    assert len(edit(task="interpolate", images="")["samples"]) == 5
    assert len(edit("--num_samples", 3, task="interpolate", images="")["samples"]) == 10


def test_more_results_than_images_edit_them_again_with_other_noise(edit, room):
    done, images = edit("--mask_box", BOX, "--num_samples", 7), pixels(room)
    assert np.array_equal(done["samples"][5:, ~FILLED], images[:2, ~FILLED])
    assert (done["samples"][5, FILLED] != done["samples"][0, FILLED]).mean() > 0.9


def test_a_network_with_classes_is_told_those_of_the_images(edit):
    small = ("--superres_factor", 4, "--low_resolution", True)
    options = dict(model="classes", task="superres", images="small.npz", classes=True)
    assert edit(*small, **options)["labels"].tolist() == [7, 0, 9]
    assert edit(*small, "--class_label", 3, **options)["labels"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("sampler", ["heun", "onestep", "progdist"])
def test_other_samplers_edit_too(edit, room, sampler):
    steps = [] if sampler == "onestep" else ["--steps", 6]
    done = edit("--sampler", sampler, *steps, "--mask_box", BOX, "--training_mode", "edm")
    assert np.array_equal(done["samples"][:, ~FILLED], pixels(room)[:, ~FILLED])


def test_the_flags_agree_with_the_tables():
    assert tuple(TASKS) == EDIT_NAMES == EditConfig.__dataclass_fields__["task"].metadata["choices"]
    assert {option for task in TASKS.values() for option in task.options} < set(EditConfig.__dataclass_fields__)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "no mask": ([], {}, "--mask FILE .* or --mask_box"),
    "two masks": (["--mask", "{room}/mask.png", "--mask_box", BOX], {}, "either --mask"),
    "missing mask": (["--mask", "{room}/nowhere.png"], {}, "nowhere.png"),
    "mask of another size": (["--mask", "{room}/large.npy"], {}, r"large.npy is \[16, 8\].* \[8, 8\]"),
    "mask without unknown part": (["--mask", "{room}/known.npy"], {}, "nothing to fill in"),
    "mask without known part": (["--mask", "{room}/unknown.npy"], {}, "nothing to keep"),
    "mask of ones, not white": (["--mask", "{room}/ones.png"], {}, "white"),
    "mask of other values": (["--mask", "{room}/grey.npy"], {}, "1 where a pixel is known"),
    "mask of objects": (["--mask", "{room}/objects.npy"], {}, "objects.npy cannot be read"),
    "mask that is no picture": (["--mask", "{room}/five.npz"], {}, "five.npz cannot be read .*: it is not an image"),
    "box of three": (["--mask_box", "1,2,3"], {}, "1,2,3 is not top,left,height,width"),
    "box without area": (["--mask_box", "1,2,0,3"], {}, "is not top,left,height,width"),
    "box outside": (["--mask_box", "4,4,5,1"], {}, "outside of images of 8x8"),
    "box of words": (["--mask_box", "a,b,c,d"], {}, "not a list of numbers"),
    "whole box": (["--mask_box", "0,0,8,8"], {}, "--mask_box 0,0,8,8: no pixel is known"),
    "no images": (["--mask_box", BOX], {"images": ""}, "--images is missing"),
    "missing images": (["--mask_box", BOX], {"images": "nowhere"}, "--images .*nowhere does not exist"),
    "empty folder": (["--mask_box", BOX], {"images": "empty"}, "no images in .*empty"),
    "factor": (["--superres_factor", 3], {"task": "superres"}, "superres_factor 3 does not divide .*: 2, 4, 8"),
    "option of another task": (["--mask_box", BOX], {"task": "colorize"}, "--mask_box .* belongs to --task inpaint"),
    "stroke start": (["--stroke_start", 5], {"task": "stroke"}, "--stroke_start 5 .* choose 0 to 4"),
    "sigma": (["--denoise_sigma", 100], {"task": "denoise"}, "--denoise_sigma 100.0.*0.002 to 80.0"),
    "one noise": (["--num_samples", 1], {"task": "interpolate", "images": ""}, "at least two"),
    "pair of one": (["--interpolate_pairs", "4"], {"task": "interpolate", "images": ""}, "'4' is not a pair"),
    "pair of equals": (["--interpolate_pairs", "4:4"], {"task": "interpolate", "images": ""}, "'4:4' is not a pair"),
    "weights": (["--interpolate_weights", "0,2"], {"task": "interpolate", "images": ""}, "between 0 and 1"),
    "no weights": (["--interpolate_weights", "0,nan"], {"task": "interpolate", "images": ""}, "between 0 and 1"),
    "images to interpolate": ([], {"task": "interpolate"}, "between two noises"),
    "pairs and number": (["--interpolate_pairs", "0:1", "--num_samples", 3], {"task": "interpolate", "images": ""},
                         "drop one of them"),
    "class the network lacks": ([], {"task": "colorize", "images": "many.npz", "model": "classes", "classes": True},
                                "11 classes, the network only 10"),
    "unknown task": ([], {"task": "inpant"}, "task='inpant' .*Did you mean 'inpaint'"),
    "indices": (["--ts", "0,9", "--mask_box", BOX], {}, "ts must rise"),
    "churn": (["--s_churn", 1, "--mask_box", BOX], {}, "is for samplers with churn"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(edit, name):
    options, more, message = BAD[name]
    with pytest.raises(UserError, match=message):
        edit(*options, **more)


def test_bad_input_ends_a_program_with_status_2(room, tmp_path):
    done = python([SCRIPT, *flags(room, "--mask", room / "known.npy", "--log_dir", tmp_path / "run")], env=QUIET)
    assert done.rc == 2 and "nothing to fill in" in done.stderr and "Traceback" not in done.stderr, done
    assert not (tmp_path / "run").exists()


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_two_ranks_give_the_same_images(edit, room, tmp_path):
    options = ("--mask_box", BOX, "--num_samples", 7)
    words = flags(room, *options, "--batch_size", 2, "--log_dir", tmp_path / "two")
    done = mpiexec(2, [SCRIPT, *words], env=QUIET)
    assert done.rc == 0, done
    two, one = saved(tmp_path / "two"), edit(*options)
    assert np.array_equal(two["inputs"], one["inputs"])
    # Batches of other sizes may round differently in the last bit, which can show as one grey level.
    assert np.abs(two["samples"].astype(int) - one["samples"]).max() <= 1
    assert (two["samples"] != one["samples"]).mean() < 0.01
    assert np.array_equal(two["samples"][:, ~FILLED], one["samples"][:, ~FILLED])
