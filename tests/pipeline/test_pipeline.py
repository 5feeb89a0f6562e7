"""`cm.load` and what can be done with it: the images of image_sample.py, edits, files; mistakes are one clear error."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

import cm
from cm.checkpoints import manifest
from cm.errors import UserError
from cm.generate.editing import LUMA
from cm.pipeline import pipeline
from cm.pipeline.pictures import check_range, known_pixels
from cm.pipeline.pipeline import flags_for
from cm.setup import run
from support.as_module import as_module
from support.edm_pickles import KWARGS, creates, dump, net_of, network
from support.weights import TINY, tiny

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def checkpoint(folder, training_mode, class_names=(), **changes):
    """A checkpoint of a tiny network with random weights."""
    flags = {**TINY, **changes}
    values = cm.config.schema.ModelConfig(**flags)
    config = {**vars(values), "training_mode": training_mode}
    manifest.save(str(folder), 3, {"model": tiny(**changes).state_dict()}, config, 24,
                  classes=class_names)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a diffusion model and a consistency model."""
    folder = tmp_path_factory.mktemp("runs")
    return {mode: checkpoint(folder / mode, mode) for mode in ("edm", "consistency_distillation", "progdist")}


def test_the_images_are_those_of_the_command(runs, tmp_path, monkeypatch):
    pipe = cm.load(runs["edm"])
    ours = pipe.sample(5, steps=4, seed=9, batch_size=2, output="array")
    words = ["--model_path", runs["edm"], "--steps", 4, "--seed", 9, "--seeds", "0-4", "--batch_size", 2,
             "--precision", "auto", "--rounding", "nearest", "--outdir", tmp_path / "out", "--log_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["image_sample.py", *map(str, words)])
    script = as_module(SCRIPTS / "image_sample.py")
    script.main(script.read_flags())
    theirs = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))])
    assert ours.shape == theirs.shape == (5, 8, 8, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1                       # the last batch has another size


def test_the_batch_changes_nothing_and_the_seed_everything(runs):
    pipe = cm.load(runs["edm"], precision="fp32")
    whole = pipe.sample(5, steps=3, output="tensor")
    twos = pipe.sample(5, steps=3, batch_size=2, output="tensor")
    th.testing.assert_close(twos, whole, atol=1e-4, rtol=0)                   # sums of up to 288 float32
    assert (pipe.sample(5, steps=3, seed=1, output="tensor") - whole).abs().mean() > 0.1


def test_outputs(runs):
    pipe = cm.load(runs["consistency_distillation"], precision="fp32")
    images = pipe.sample(2)
    assert all(image.size == (8, 8) and image.mode == "RGB" for image in images)
    array, tensor = pipe.sample(2, output="array"), pipe.sample(2, output="tensor")
    assert array.dtype == np.uint8 and tensor.dtype == th.float32 and tensor.shape == (2, 3, 8, 8)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), array)
    assert np.array_equal(((tensor + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy(), array)


@pytest.mark.parametrize("mode, evaluations", [
    ("consistency_distillation", [1, 1, 2, 3]), ("edm", [79, 1, 3, 5]), ("progdist", [40, 1, 2, 3]),
])
def test_steps_follow_the_kind_of_model(runs, mode, evaluations):
    """Network evaluations for steps not given, 1, 2 and 3."""
    pipe, calls = cm.load(runs[mode]), []
    pipe.model.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for steps in (None, 1, 2, 3):
        calls.clear()
        pipe.sample(1, steps=steps)
        found.append(len(calls))
    assert found == evaluations


@pytest.mark.parametrize("mode, few", [
    ("edm", False), ("progdist", False), ("ect", True), ("ict", True), ("sct", True),
])
def test_which_models_need_few_steps(tmp_path, mode, few):
    assert cm.load(checkpoint(tmp_path, mode)).few_steps is few


def test_steps_of_a_consistency_model_are_evenly_spaced_levels():
    assert flags_for("onestep", None, {}) == {"sampler": "onestep"}
    assert flags_for("onestep", 2, {}) == {"sampler": "multistep", "steps": 40, "ts": "0,20,39"}
    assert flags_for("onestep", 3, {"sampler": "heun"}) == {"sampler": "heun", "steps": 3}
    every = flags_for("onestep", 500, {})["ts"].split(",")
    assert [int(index) for index in every] == list(range(40))


def test_labels(runs):
    pipe = cm.load(runs["edm"], precision="fp32")
    assert pipe.num_classes == 5
    each = pipe.sample(3, steps=2, labels=[0, 1, 4], output="tensor")
    for label, image in zip((0, 1, 4), each):
        alone = pipe.sample(3, steps=2, labels=label, output="tensor")
        assert any(th.allclose(image, other, atol=1e-4) for other in alone)
    with pytest.raises(UserError, match="classes 0 to 4"):
        pipe.sample(1, labels=5)
    with pytest.raises(UserError, match="give one class, or 3 integers"):
        pipe.sample(3, labels=[0, 1])
    with pytest.raises(UserError, match="no class is named 'cat': this model has no class names"):
        pipe.sample(1, labels="cat")


def test_labels_by_name(tmp_path):
    names = ("ant", "7", "cat, big", "dog", "emu")
    folder = checkpoint(tmp_path, "edm", class_names=names)
    pipe = cm.load(folder, precision="fp32")
    how = {"steps": 2, "output": "tensor"}
    assert th.equal(pipe.sample(3, labels=["7", "cat, big", "ant"], **how), pipe.sample(3, labels=[1, 2, 0], **how))
    assert th.equal(pipe.sample(2, labels="dog", **how), pipe.sample(2, labels=3, **how))
    assert th.equal(pipe.sample(2, class_label="dog", **how), pipe.sample(2, labels=3, **how))
    with pytest.raises(UserError, match="no class is named 'dogs': the classes are ant, .* Did you mean 'dog'?"):
        pipe.sample(1, labels="dogs")


@pytest.mark.parametrize("options, message", [
    ({"num_samples": 7}, "num_samples=7 is not an option here.*use count"),
    ({"model_path": "x"}, "model_path='x' is not an option here.*use cm.load"),
    ({"labels": 1, "class_label": "2"}, "labels and class_label both set"),
    ({"steps": 2, "ts": "0,39"}, "steps=2 and ts='0,39' both say"),
])
def test_options_that_would_change_nothing(runs, options, message):
    with pytest.raises(UserError, match=message):
        cm.load(runs["consistency_distillation"]).sample(1, **options)


def test_levels_by_their_indices(runs):
    pipe = cm.load(runs["consistency_distillation"], precision="fp32")
    how = {"output": "tensor"}
    assert th.equal(pipe.sample(2, ts="0,13,26,39", **how), pipe.sample(2, steps=3, **how))


def test_a_device_that_is_not_there(runs):
    with pytest.raises(UserError, match="device='cuda:99' cannot be used: .*leave it out"):
        cm.load(runs["edm"], device="cuda:99")


@pytest.mark.parametrize("options", [{"guide_scale": 2}, {"classifier_scale": 1.0}], ids=str)
def test_all_networks_are_on_the_device_of_the_pipeline(runs, options, monkeypatch):
    """"meta" plays a GPU that is not this rank's."""
    devices, classifier = [], th.nn.Linear(1, 1)
    monkeypatch.setattr(run, "to_device", lambda model, device: devices.append(device))
    pipe = cm.load(runs["edm"], device="meta")
    if "guide_scale" in options:
        pipe._guided(pipe._with(options | {"guide_path": str(runs["edm"])}))
        assert devices == [th.device("meta")] * 2
    else:
        monkeypatch.setattr(pipeline, "load_classifier", lambda settings: classifier)
        pipe._guided(pipe._with(options))
        assert devices == [classifier.weight.device] == [th.device("meta")]


def test_guidance_by_another_checkpoint(runs, tmp_path):
    """D_guide + w (D - D_guide): at scale 0 the images of the guide, at 1 those of the model."""
    other = checkpoint(tmp_path / "other", "edm")
    weights = {name: -value for name, value in tiny().state_dict().items()}
    manifest.save(str(other), 4, {"model": weights}, manifest.newest(str(other)).config, 32)
    pipe, guide = cm.load(runs["edm"], precision="fp32"), cm.load(other, precision="fp32")
    how = {"steps": 3, "output": "tensor"}
    alone = pipe.sample(2, **how)
    # Only the network that samples holds products of its weights, which rounds otherwise.
    by_guide, of_guide = pipe.sample(2, guide_scale=0, guide_path=str(other), **how), guide.sample(2, **how)
    th.testing.assert_close(by_guide, of_guide, rtol=1e-4, atol=1e-4)
    between = pipe.sample(2, guide_scale=0.5, guide_path=str(other), **how)
    assert (between - alone).abs().mean() > 0.05
    assert th.equal(pipe.sample(2, **how), alone)                             # a guide leaves nothing behind
    with pytest.raises(UserError, match="without its class, which it has not learnt"):
        pipe.sample(1, guide_scale=2)


# --- editing ---------------------------------------------------------------------------------------------------------


def test_edits_keep_what_they_promise(runs):
    pipe = cm.load(runs["consistency_distillation"], precision="fp32")
    images = th.rand(3, 3, 8, 8, generator=th.Generator().manual_seed(0)) * 1.6 - 0.8
    mask = np.zeros((8, 8)); mask[:, :4] = 1                                  # noqa: E702
    inpainted = pipe.edit(images, "inpaint", mask=mask, output="tensor")
    assert th.allclose(inpainted[..., :4], images[..., :4], atol=1e-6)
    assert not th.allclose(inpainted[..., 4:], images[..., 4:], atol=1e-2)
    enlarged = pipe.edit(images, "superres", factor=4, output="tensor")
    assert th.allclose(*(th.nn.functional.avg_pool2d(x, 4) for x in (enlarged, images)), atol=1e-5)
    coloured, luma = pipe.edit(images, "colorize", output="tensor"), th.tensor(LUMA)
    assert th.allclose(*(th.einsum("nchw,c->nhw", x, luma) for x in (coloured, images)), atol=1e-5)
    assert pipe.edit(images, "stroke", sigma=1.0, steps=2)[0].size == (8, 8)


@pytest.mark.parametrize("task, images, options, message", [
    ("colorize", th.full((1, 3, 8, 8), 200.0), {}, "values from 200 to 200: give a float tensor in"),
    ("denoise", th.full((1, 3, 8, 8), float("nan")), {}, "NaN or infinite pixels"),
    ("denoise", th.zeros(1, 3, 8, 8), {"sigma": -1}, "sigma=-1: the network supports noise levels from 0.002 to 80"),
    ("colorize", th.zeros(1, 3, 8, 8), {"factor": 4}, "factor is for superres, not for colorize"),
    ("superres", th.zeros(1, 3, 8, 8), {"sigma": 1.0}, "sigma is for stroke and denoise, not for superres"),
    ("colorize", th.zeros(1, 3, 8, 8), {"mask": np.ones((8, 8))}, "mask is for inpaint"),
    ("inpaint", th.zeros(1, 3, 8, 8), {"mask": np.full((8, 8), 0.5)}, "mask must hold 1 where a pixel is known"),
    ("inpaint", th.zeros(1, 3, 8, 8), {"mask": np.full((8, 8), np.nan)}, "mask must hold 1"),
])
def test_edits_of_what_is_none(runs, task, images, options, message):
    """They used to give images of something else."""
    with pytest.raises(UserError, match=message):
        cm.load(runs["consistency_distillation"]).edit(images, task, **options)


def test_masks():
    light = np.array([[0, 127], [128, 255]], np.uint8)
    assert known_pixels(Image.fromarray(light)).tolist() == [[False, False], [True, True]]     # as image_edit.py
    for mask in (np.eye(2), np.eye(2, dtype=bool), np.eye(2, dtype=np.uint8) * 255, th.eye(2)):
        assert known_pixels(mask).tolist() == [[True, False], [False, True]]


def test_noise_may_leave_the_range_of_pictures():
    check_range(th.full((1, 3, 2, 2), 9.0), noisy=True)
    check_range(th.full((1, 4, 2, 2), 9.0), noisy=False)                      # latents


def test_an_edit_of_a_consistency_model_visits_all_levels_by_default(runs):
    pipe, calls = cm.load(runs["consistency_distillation"]), []
    pipe.model.register_forward_hook(lambda *_: calls.append(1))
    pipe.edit(Image.new("RGB", (8, 8)), "colorize")
    assert len(calls) == 39


@pytest.mark.parametrize("images, message", [
    (np.zeros((8, 8, 3), np.float32), "images of type float32"),
    (np.zeros((2, 9, 8, 3), np.uint8), r"images of shape \(2, 3, 9, 8\)"),
    ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "different sizes: 8x8, 9x8"),
])
def test_images_that_do_not_fit(runs, images, message):
    with pytest.raises(UserError, match=message):
        cm.load(runs["edm"]).edit(images, "colorize")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_a_saved_model_is_the_same_model(runs, tmp_path, name):
    pipe = cm.load(runs["consistency_distillation"], precision="fp32")
    pipe.save(tmp_path / name)
    again = cm.load(tmp_path / name, precision="fp32")
    assert th.equal(again.sample(2, steps=2, output="tensor"), pipe.sample(2, steps=2, output="tensor"))
    guided = cm.load(runs["edm"], precision="fp32")
    guided.save(tmp_path / f"edm{name}")
    guided.sample(1, steps=2, guide_scale=2, guide_path=str(tmp_path / f"edm{name}"))


def test_the_card_of_a_saved_folder(runs, tmp_path):
    (tmp_path / "fid.json").write_text('{"label": "FID", "value": 2.5, "num_images": 50}')
    pipe = cm.load(runs["consistency_distillation"])
    pipe.save(tmp_path / "m", licence="mit", results=[tmp_path / "fid.json"], picture=pipe.sample(1)[0])
    card = (tmp_path / "m/README.md").read_text()
    assert "license: mit" in card and "| FID | 2.5 | 50 |" in card and "![Samples](samples.png)" in card
    cm.load(tmp_path / "m").save(tmp_path / "again")                          # what was measured goes along
    assert "| FID | 2.5 | 50 |" in (tmp_path / "again/README.md").read_text()
    with pytest.raises(UserError, match="are for the card of a folder"):
        pipe.save(tmp_path / "x.safetensors", licence="mit")
    with pytest.raises(UserError, match="fid.json cannot be read as a picture: it is not an image"):
        pipe.save(tmp_path / "m", picture=tmp_path / "fid.json")


def test_diffusers_and_back(tmp_path):
    # diffusers' network attends in every block of a level, and has no head sizes of its own.
    folder = checkpoint(tmp_path / "run", "consistency_distillation", num_head_channels=16)
    pipe = cm.load(folder, precision="fp32")
    pipe.to_diffusers(str(tmp_path / "folder"))
    again = cm.load(tmp_path / "folder", precision="fp32")
    th.testing.assert_close(again.sample(2, output="tensor"), pipe.sample(2, output="tensor"), atol=1e-5, rtol=0)


def test_a_diffusion_model_is_no_diffusers_folder(runs, tmp_path):
    with pytest.raises(UserError, match="trained as edm"):
        cm.load(runs["edm"]).to_diffusers(str(tmp_path / "folder"))


def test_a_pickle_of_edm(tmp_path):
    source = creates(tmp_path / "trace")
    path = dump(tmp_path / "net.pkl", net_of(network("ddpmpp"), KWARGS["ddpmpp"], "VPPrecond", source), source)
    pipe = cm.load(path)
    assert pipe.config["arch"] == "ddpmpp" and "ddpmpp of" in repr(pipe)
    assert pipe.sample(1, steps=2)[0].size == (8, 8) and not (tmp_path / "trace").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"stps": 3}, "no option 'stps'. Did you mean 'steps'"),
    ({"sampler": "huen"}, "Did you mean 'heun'"),
    ({"output": "png"}, "not one of: pil, array, tensor"),
    ({"count": 0}, "too small"),
    ({"steps": 4, "sampler": "heun", "ts": "0,1"}, "^ts 0,1 is for --sampler multistep"),
])
def test_mistakes(runs, options, message):
    pipe = cm.load(runs["edm"])
    with pytest.raises(UserError, match=message):
        pipe.sample(**options)


def test_a_missing_file():
    with pytest.raises(UserError, match="no such file"):
        cm.load("nowhere.pt")


def test_weights_that_overflow_are_no_image(tmp_path):
    folder = checkpoint(tmp_path / "run", "edm")
    pipe = cm.load(folder)
    with th.no_grad():
        next(pipe.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="2 of 2 images have NaN or infinite pixels"):
        pipe.sample(2, steps=2)


def test_the_example_of_the_page(runs, tmp_path, monkeypatch):
    """docs/python.md, as it stands there, on a model of its own."""
    page = (SCRIPTS.parent / "docs/python.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    *examples, training = examples                          # which tests/examples runs in its own way
    assert len(examples) == 2 and "cm.train(" in training
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/cd").symlink_to(runs["consistency_distillation"])
    names: dict = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)
    assert (tmp_path / "sample.png").exists() and (tmp_path / "for_diffusers/model_index.json").exists()
    assert {path.name for path in (tmp_path / "models/cd").iterdir()} == {
        "model.safetensors", "config.json", "README.md", "samples.png"}


def test_importing_cm_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", "import cm, sys; print('torch' in sys.modules, callable(cm.load))"],
                          capture_output=True, text=True)
    assert done.stdout == "False True\n", done
