"""Guidance from flags: label dropout in training, sampling and editing with a guide, distilling a guided teacher."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.checkpoints import file_names, manifest
from cm.config.flags import Settings, parse
from cm.config.schema import TRAINING_SECTIONS
from cm.diffusion.schedules import append_zero, karras_grid
from cm.errors import UserError
from cm.logging import logger
from cm.networks.build import NetworkConfig, build_network
from cm.objectives.karras_denoiser import KarrasDenoiser
from cm.random_util import SampleStreams
from cm.script_util import model_and_diffusion_defaults
from cm.setup import guide
from cm.setup import train as setup
from cm.setup.guide import parse_interval
from cm.training.master_weights import store_as_computed
from support.casts import Casts
from support.command_line import overridden
from support.commands import samples_of

ROOT = Path(__file__).resolve().parents[2]
DATA = ["--data_dir", "digits", "--random_flip", "False", "--log_interval", "1", "--global_batch_size", "16"]
NETWORK = ["--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1",
           "--attention_resolutions", "8", "--num_head_channels", "32"]
W, STEPS = 2.5, 4


def train(folder, mode, *options, steps=2):
    argv = overridden([*DATA, "--training_mode", mode, "--total_training_steps", steps, "--save_interval", 1,
                       "--lr", "1e-2", "--ema_rate", "0.5", "--log_dir", folder, *options])
    setup.train(parse("", *TRAINING_SECTIONS, argv=argv))
    logger.reset()
    return folder


def edm(folder, *options, steps=1):
    return train(folder, "edm", *NETWORK, *options, steps=steps)


FLAGS = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8",
         "num_head_channels": 32, "num_classes": 10}
MODELS = {
    "dropout": {"class_cond": True, "null_class": True},
    "plain": {},
    "classes": {"class_cond": True, "arch": "ddpmpp", "precond": "vp", "num_head_channels": -1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of random networks: with a label of no class, without classes, and of another kind with classes."""
    folder = tmp_path_factory.mktemp("guides")
    for name, changes in MODELS.items():
        config = model_and_diffusion_defaults() | {"training_mode": "edm"} | FLAGS | changes
        for step in (1, 2):
            model = build_network(network_config(config))
            for param in model.parameters():
                th.nn.init.normal_(param, std=0.08, generator=th.Generator().manual_seed(step + param.numel()))
            (folder / name).mkdir(exist_ok=True)
            manifest.save(str(folder / name), step, {"ema_0.5": model.state_dict()}, config, 16 * step)
    return folder


def network_config(config):
    return NetworkConfig(**{name: config[name] for name in set(NetworkConfig.__dataclass_fields__) & set(config)})


def weights(folder, step=2, name="ema_0.5"):
    return folder / file_names.file_name(name, step)


def another(run, folder, **flags):
    """The weights of a run in a new folder, with other flags."""
    folder.mkdir()
    config = manifest.beside(str(weights(run))).config | flags
    manifest.save(str(folder), 2, {"ema_0.5": th.load(weights(run))}, config, 0)
    return weights(folder)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run a script in this process: the arrays it leaves, and its summary."""
    def run(script, *options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        words = overridden(["--log_dir", folder, "--num_samples", 3, *options])
        monkeypatch.setattr(sys, "argv", [script, *words])
        return samples_of(script, folder)

    return run


def sample(command, *options):
    return command("image_sample.py", "--steps", STEPS, *options)


def same_images(a, b):
    return np.abs(a.astype(int) - b).max() <= 1 and (a != b).mean() < 0.02


# --- training --------------------------------------------------------------------------------------------------------


def test_label_dropout_makes_a_network_that_knows_no_class(tmp_path):
    run = edm(tmp_path / "run", "--class_cond", "True", "--label_dropout", "0.3", steps=4)
    config = manifest.newest(str(run)).config
    assert (config["num_classes"], config["null_class"], config["label_dropout"]) == (10, True, 0.3)
    before, after = (th.load(weights(run, step, "model"))["label_emb.weight"] for step in (3, 4))
    assert len(before) == 11 and not th.equal(before[10], after[10]), "its row is trained"
    edm(tmp_path / "other", "--class_cond", "True")
    assert not manifest.newest(str(tmp_path / "other")).config["null_class"]


@pytest.mark.parametrize("options, message", [
    (["--label_dropout", "0.1"], "label_dropout=0.1 drops class labels, and this network has none: add --class_cond"),
    (["--label_dropout", "0.1", "--class_cond", "True", "--null_class", "False"], "needs --null_class True"),
    (["--teacher_guide_scale", "2"], "--teacher_guide_scale 2.0 guides a teacher, and --objective edm has none"),
])
def test_flags_of_training_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        edm(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_network_that_has_not_learnt_it_is_not_trained_on(runs, tmp_path):
    with pytest.raises(UserError, match="asks for null_class=True, but the checkpoint .* with null_class=False"):
        train(tmp_path, "edm", "--class_cond", "True", "--label_dropout", "0.1", "--resume_checkpoint",
              weights(runs / "classes"))


# --- sampling --------------------------------------------------------------------------------------------------------


def denoiser(path):
    """D(x, sigma, y) of a file, built by hand from its manifest."""
    config = manifest.beside(str(path)).config
    model = build_network(network_config(config))
    model.load_state_dict(th.load(path))
    scale = 1000.0 if config["arch"] == "unet" else 1.0
    bound = KarrasDenoiser(loss_norm="l2", precond=config["precond"], time_scale=scale).bind(model.eval())
    return bound if config["class_cond"] else lambda x, sigma, y: bound(x, sigma)


@th.no_grad()
def heun(good, bad, w, lowest, highest, y, x):
    """EDM's sampler with D_g written out: images as the script rounds them, and the evaluations of both networks."""
    sigmas, calls = append_zero(karras_grid(STEPS)).tolist(), 0

    def D(x, sigma):
        nonlocal calls
        level = th.full((len(x),), sigma)
        denoised, calls = good(x, level, y=y), calls + 1
        if lowest < sigma <= highest:
            worse, calls = bad(x, level), calls + 1
            denoised = worse + w * (denoised - worse)
        return denoised.clamp(-1, 1)

    for t, r in zip(sigmas, sigmas[1:]):
        slope = (x - D(x, t)) / t
        end = x + (r - t) * slope
        if r:
            end = x + (r - t) * (slope + (end - D(end, r)) / r) / 2
        x = end
    return ((x.clamp(-1, 1) + 1) * 127.5).to(th.uint8).permute(0, 2, 3, 1).numpy(), calls


def noise():
    """What a run of 3 images starts from."""
    return 80 * SampleStreams(42, range(3), stream="sample").randn(3, 3, 8, 8)


@pytest.mark.parametrize("guide", ["itself", "earlier", "plain", "classes"])
def test_samples_are_those_of_the_formula(runs, command, guide):
    path = weights(runs / "dropout")
    other = {"earlier": weights(runs / "dropout", 1), "plain": weights(runs / "plain"),
             "classes": weights(runs / "classes")}.get(guide)
    options = ("--model_path", path, "--guide_scale", W, "--guide_interval", "0.5,50")
    drawn, summary = sample(command, *options, *(("--guide_path", other) if other else ()))
    good, y = denoiser(path), th.from_numpy(drawn["arr_1"])
    worse = denoiser(other) if other else good
    label = y if other else th.full_like(y, 10)
    expected, calls = heun(good, lambda x, sigma: worse(x, sigma, y=label), W, 0.5, 50.0, y, noise())
    assert same_images(drawn["arr_0"], expected)
    assert summary["network_evaluations"] == calls and 2 * STEPS - 1 < calls < 4 * STEPS - 2
    assert (summary["guide_scale"], summary["guide_interval"]) == (W, "0.5,50")
    assert summary["guide_path"] == (str(other) if other else "")


def test_a_guide_acts_at_the_noise_levels_that_it_knows(runs, command):
    """VE's networks know no level below 0.02."""
    path = another(runs / "plain", runs / "ve", precond="ve")
    options = ("--sampler", "euler", "--model_path", weights(runs / "dropout"), "--guide_scale", 2, "--guide_path")
    for sigma_min, expected in ((0.03, 2 * STEPS), (0.01, 2 * STEPS - 1)):
        _, summary = sample(command, *options, path, "--sigma_min", sigma_min)
        assert summary["network_evaluations"] == expected
    _, summary = sample(command, *options, path, "--guide_interval", "0.02,80", "--sigma_min", 0.02)
    assert summary["network_evaluations"] == 2 * STEPS - 1, "the lower end is outside"


def test_scale_one_is_no_guidance(runs, command):
    options = ("--model_path", weights(runs / "dropout"))
    plain, without = sample(command, *options)
    one, summary = sample(command, *options, "--guide_scale", 1, "--guide_path", weights(runs / "plain"))
    two, _ = sample(command, *options, "--guide_scale", 2, "--guide_path", weights(runs / "plain"))
    assert np.array_equal(plain["arr_0"], one["arr_0"]) and not np.array_equal(plain["arr_0"], two["arr_0"])
    assert summary["network_evaluations"] == without["network_evaluations"] == 2 * STEPS - 1
    assert "guide_scale" not in without


def test_edits_take_a_guide(runs, command):
    options = ("--model_path", weights(runs / "dropout"), "--task", "inpaint", "--images", "digits", "--mask_box",
               "2,3,4,3", "--sampler", "euler", "--steps", STEPS)
    plain, without = command("image_edit.py", *options)
    edited, summary = command("image_edit.py", *options, "--guide_scale", 3)
    known = np.ones((8, 8), bool)
    known[2:6, 3:6] = False
    assert np.array_equal(edited["arr_0"][:, known], plain["arr_0"][:, known])
    assert not np.array_equal(edited["arr_0"], plain["arr_0"])
    assert (without["network_evaluations"], summary["network_evaluations"]) == (STEPS, 2 * STEPS)


def test_a_folder_of_pngs_remembers_its_guide(runs, command, tmp_path):
    folder, own = tmp_path / "pngs", ("--model_path", weights(runs / "dropout"), "--seeds", "0-2", "--guide_scale", 2)
    own = ("--outdir", folder, *own)

    def draw(*options):
        with pytest.raises(StopIteration):                  # it writes no npz
            sample(command, *own, "--num_samples", 3, *options)
        return json.loads((folder / "sampling.json").read_text())

    recipe = draw()
    assert recipe["guide_scale"] == 2 and recipe["guide_path"] == "" and draw() == recipe
    with pytest.raises(UserError, match="holds images made with guide_path=''"):
        draw("--guide_path", weights(runs / "plain"))


# --- distilling ------------------------------------------------------------------------------------------------------

CD = ("--loss_norm", "l2", "--start_scales", "6", "--end_scales", "6", "--weight_schedule", "uniform", "--start_ema",
      "0.9", "--precision", "fp32")


def test_a_guided_teacher_is_distilled(runs, tmp_path, command):
    """The student differs from that of a plain teacher, says how it was made, and is not guided once more."""
    teacher = weights(runs / "dropout")
    makers = {"plain": (), "free": ("--teacher_guide_scale", 2), "auto": (
        "--teacher_guide_scale", 2, "--teacher_guide_path", weights(runs / "classes"),
        "--teacher_guide_interval", "0.5,50")}
    students = {
        name: th.load(weights(train(tmp_path / name, "consistency_distillation", "--teacher_model_path", teacher, *CD,
                                    *options, steps=1), 1))["out.2.weight"]
        for name, options in makers.items()
    }
    assert len({tuple(weight.flatten().tolist()) for weight in students.values()}) == 3
    config = manifest.newest(str(tmp_path / "auto")).config
    assert (config["teacher_guide_scale"], config["teacher_guide_interval"]) == (2, "0.5,50")
    assert config["null_class"] and config["label_dropout"] == 0
    student = weights(tmp_path / "free", 1)
    one_step = ("image_sample.py", "--model_path", student, "--sampler", "onestep")
    assert command(*one_step)[1]["network_evaluations"] == 1
    with pytest.raises(UserError, match="consistency_distillation, and only a diffusion model can be guided when it is "
                                        "sampled. Guide its teacher instead: cm_train.py --teacher_guide_scale 2"):
        command(*one_step, "--guide_scale", 2)
    with pytest.raises(UserError, match="was trained with --training_mode consistency_distillation; a guide is a"):
        sample(command, "--model_path", teacher, "--guide_path", student, "--guide_scale", 2)


def test_a_dry_run_counts_the_memory_of_the_guide(runs, tmp_path, capsys):
    plain, teacher = weights(runs / "classes"), weights(runs / "dropout")

    def device(*options):
        train(tmp_path / "run", "consistency_distillation", "--teacher_model_path", teacher, *CD, *options, "--dry_run")
        said = capsys.readouterr().out
        return json.loads(said[said.index("{"):])["memory"]["device"]

    parameters = sum(value.numel() for value in th.load(plain).values())
    guided = device("--teacher_guide_scale", 2, "--teacher_guide_path", plain)
    assert guided.pop("guide of the teacher") == 4 * parameters and guided == device("--teacher_guide_scale", 2)
    bf16 = ("--precision", "bf16", "--teacher_guide_scale", 2, "--teacher_guide_path", plain)
    assert 2 * parameters < device(*bf16)["guide of the teacher"] < 3 * parameters


def test_a_guide_holds_the_casts_of_bf16(runs, tmp_path, monkeypatch):
    """It is not cast at every pass, and the student is the same, bit for bit."""
    options = ("--teacher_model_path", weights(runs / "dropout"), *CD, "--precision", "bf16",
               "--teacher_guide_scale", 2, "--teacher_guide_path", weights(runs / "classes"))
    students, counts, store = [], [], guide.store_as_computed
    for stores in (True, False):
        guides = []

        def keep(model, precision, stores_casts, stores=stores, guides=guides):
            assert precision == "bf16" and stores_casts
            store(model, precision, stores)
            guides.append(model)

        monkeypatch.setattr(guide, "store_as_computed", keep)
        with Casts(guides) as casts:
            folder = train(tmp_path / str(stores), "consistency_distillation", *options)
        counts.append(casts.count)
        students.append(th.load(weights(folder)))
    assert counts[0] == 0 and counts[1] > 20
    assert all(th.equal(value, students[1][name]) for name, value in students[0].items())


def test_a_guide_that_is_asked_in_full_precision_keeps_it():
    model = build_network(network_config(FLAGS))
    store_as_computed(model, "bf16", stores_casts=False)
    assert {param.dtype for param in model.parameters()} == {th.float32}


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, known, message", [
    (10, 7, "g.pt has 7 classes, .* 10; choose another guide"), (0, 7, "g.pt is class-conditional, .* is not"),
])
def test_a_guide_with_classes_has_those_of_the_model(classes, known, message):
    model, own = ({"image_size": 8, "channels": 3, "class_cond": count > 0, "num_classes": count, "guide_path": "g.pt"}
                  for count in (classes, known))
    with pytest.raises(UserError, match=message):
        guide._check_fit(Settings(model, {}), Settings(own, {}), guide.SAMPLING)
    guide._check_fit(Settings(own, {}), Settings(own | {"null_class": False}, {}), guide.SAMPLING)


@pytest.mark.parametrize("options, message", [
    (("--guide_scale", 2), "guides by this model without its class, which it has not learnt: give --guide_path.*or "
                           "train with --class_cond True --label_dropout 0.1"),
    (("--guide_path", "x.pt"), "--guide_path x.pt has no effect without --guide_scale"),
    (("--guide_interval", "1,2"), "--guide_interval 1,2 has no effect without --guide_scale"),
    (("--guide_scale", 2, "--classifier_path", "c.pt"), "--classifier_path c.pt and --guide_scale 2.0 are two ways of"),
    (("--guide_scale", 2, "--guide_path", "nowhere.pt"), "--guide_path nowhere.pt: no such file"),
    (("--guide_scale", 2, "--guide_path", "CLASSES"), "is class-conditional, this model is not"),
    (("--guide_scale", 2, "--guide_path", "PLAIN", "--guide_interval", "3,1"), "'3,1' is not a pair lo,hi of noise"),
    (("--guide_scale", 2, "--guide_path", "PLAIN", "--guide_interval", "500,900"),
     "--guide_interval 500,900 is outside the noise levels 0.002 to 80"),
])
def test_guides_that_cannot_be(runs, command, options, message):
    files = {"CLASSES": weights(runs / "classes"), "PLAIN": weights(runs / "plain")}
    with pytest.raises(UserError, match=message):
        sample(command, "--model_path", files["PLAIN"], *(files.get(word, word) for word in options))


def test_a_guide_needs_a_manifest_and_images_of_the_same_size(runs, command, tmp_path):
    bare = tmp_path / "bare.pt"
    bare.write_bytes(weights(runs / "plain").read_bytes())
    options = ("--model_path", weights(runs / "plain"), "--guide_scale", 2, "--guide_path")
    with pytest.raises(UserError, match="bare.pt has no manifest next to it.*convert_checkpoint.py writes one"):
        sample(command, *options, bare)
    with pytest.raises(UserError, match="has image_size=16, this model has 8; choose another guide"):
        sample(command, *options, another(runs / "plain", tmp_path / "large", image_size=16))


def test_intervals():
    assert parse_interval("", "x") == (0, float("inf")) == parse_interval("0,inf", "x")
    assert parse_interval("0.1, 3", "x") == (0.1, 3)
    for text in ("1", "1,2,3", "-1,2", "2,2", "a,b", "nan,1"):
        with pytest.raises(UserError, match=f"--x '{text}' is not a pair lo,hi"):
            parse_interval(text, "x")
