"""posthoc_ema.py: which widths are asked for and can be made, the files it leaves, and their distances."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.checkpoints import file_names, manifest
from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.logging import logger
from cm.setup import train as setup
from cm.setup.posthoc import parse_widths, plan_averages, snapshots_until
from cm.training.ema_snapshots import FOLDER, Snapshot, find_snapshots
from cm.training.power_ema import Profile, gamma_of, mix
from support.as_module import as_module
from support.command_line import overridden
from support.nets import save_measure

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["--data_dir", "digits", "--random_flip", "False", "--image_size", 8, "--num_channels", 32, "--num_res_blocks",
         1, "--channel_mult", "1", "--attention_resolutions", "8", "--class_cond", "True",
         "--arch", "ncsnpp", "--global_batch_size", 16, "--lr", "1e-2", "--ema_rate", "power0.05,power0.10"]


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_widths():
    assert parse_widths("0.05") == [0.05] and parse_widths("0.1,0.05,0.1") == [0.1, 0.05]
    assert parse_widths("0.02:0.20") == [round(0.01 * i, 2) for i in range(2, 21)]
    assert parse_widths("0.02:0.1:0.04, 0.15") == [0.02, 0.06, 0.1, 0.15]
    for text in ("", "x", "0.1:0.05", "0.1:0.2:0", "0.1:0.2:0.1:3", "nan:0.1"):
        with pytest.raises(UserError, match="is not a width such as 0.05, nor a rising range"):
            parse_widths(text)
    with pytest.raises(UserError, match="0.3 is not a width of a power-function average"):
        parse_widths("0.1,0.3")


def snapshots_of(count, batch=100):
    """As many of each of two widths; their checkpoints hold no file."""
    checkpoints = [manifest.Checkpoint("run", 10 * i, 10 * i * batch, {}, {}) for i in range(1, count + 1)]
    return [Snapshot(each, f"ema_power{std}") for each in checkpoints for std in ("0.05", "0.10")]


def test_a_step_between_snapshots_has_the_images_of_a_constant_batch():
    snapshots = snapshots_of(5)
    assert snapshots_until(snapshots, 0) == (snapshots, 50, 5000)
    assert snapshots_until(snapshots, 27) == (snapshots[:4], 27, 2700)
    for step in (9, 51):
        with pytest.raises(UserError, match=f"--step {step}: there are snapshots from step 10 to 50"):
            snapshots_until(snapshots, step)


@pytest.mark.parametrize("count, std, says", [
    (50, 0.04, ""), (50, 0.07, ""), (50, 0.2, ""), (50, 0.21, "warned"), (50, 0.25, "warned"), (50, 0.251, "refused"),
    (50, 0.02, "warned"), (20, 0.02, "refused"), (20, 0.2, "warned"), (20, 0.25, "refused"), (100, 0.26, "refused"),
])
def test_what_snapshots_do_not_determine_is_warned_of_or_refused(count, std, says, monkeypatch):
    """Above twice the widest tracked width, or where the profile is off by 1 %; above 2.5 times, or by 5 %."""
    said, snapshots = [], snapshots_of(count)
    monkeypatch.setattr(logger, "warn", said.append)
    images = count * 1000
    if says == "refused":
        with pytest.raises(UserError, match=f"--std: width {std:g}: the profile made of {2 * count} snapshots, the "
                                            "widest of 0.1, differs by .*%.*or give --extrapolate True"):
            plan_averages([std], snapshots, images, extrapolate=False)
    average, = plan_averages([std], snapshots, images, extrapolate=says == "refused")
    assert bool(said) == bool(says)
    expected = mix([each.profile for each in snapshots], Profile(images, gamma_of(std)))
    assert np.array_equal(average.mix.coefficients, expected.coefficients)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 8 steps with snapshots of each."""
    folder = tmp_path_factory.mktemp("run")
    argv = overridden([*TRAIN, "--total_training_steps", 8, "--ema_snapshot_interval", 1, "--log_dir", folder / "run"])
    setup.train(parse("", *TRAINING_SECTIONS, argv=argv, training_mode="edm"))
    logger.reset()
    save_measure(folder)
    return folder


def posthoc(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["posthoc_ema.py", *map(str, words)])
    script = as_module(ROOT / "scripts" / "posthoc_ema.py")
    script.main(script.read_flags())
    logger.reset()


def test_averages_are_files_that_sampling_reads(trained, monkeypatch, tmp_path):
    """A width that was tracked comes out as it was; a later call adds to the same checkpoint."""
    run, folder = trained / "run", tmp_path / "made"
    posthoc(monkeypatch, run, "--std", "0.05,0.07", "--log_dir", folder)
    posthoc(monkeypatch, run, "--std", "0.1", "--log_dir", folder)
    made = manifest.read(str(folder / "checkpoint_000008.json"))
    assert made.names() == ["ema_posthoc0.05", "ema_posthoc0.07", "ema_posthoc0.1"] and made.problem() is None
    assert (made.step, made.images_seen) == (8, 128)
    assert made.class_names == manifest.newest(str(run)).class_names != (), "they come along"
    weights = {name: th.load(made.path(f"ema_posthoc{name}")) for name in ("0.05", "0.07", "0.1")}
    tracked = {name: th.load(run / f"ema_power{name}_000008.pt") for name in ("0.05", "0.10")}
    for name, value in tracked["0.05"].items():
        th.testing.assert_close(weights["0.05"][name], value, rtol=1e-5, atol=1e-6)
        th.testing.assert_close(weights["0.1"][name], tracked["0.10"][name], rtol=1e-5, atol=1e-6)
    changing = [name for name in weights["0.07"] if not weights["0.07"][name].equal(tracked["0.05"][name])]
    frozen = [name for name in weights["0.07"] if name not in changing]
    assert "map_noise.freqs" in frozen and len(changing) > len(frozen), "random frequencies are copied"

    monkeypatch.setattr(sys, "argv", overridden(["image_sample.py", "--model_path", made.path("ema_posthoc0.07"),
                                                 "--steps", 2, "--num_samples", 2, "--log_dir", tmp_path / "drawn"]))
    script = as_module(ROOT / "scripts" / "image_sample.py")
    script.main(script.read_flags())
    logger.reset()
    assert np.load(next((tmp_path / "drawn").glob("*.npz")))["arr_0"].shape == (2, 8, 8, 3)


def test_distances_over_widths_are_measured_once_and_plotted(trained, monkeypatch):
    options = (trained / "run", "--std", "0.05:0.07", "--ref", trained / "ref.npz", "--inception", trained / "tiny.ts",
               "--trust_extractor", "--num_samples", 20, "--batch_size", 20, "--steps", 2, "--step", 6)
    posthoc(monkeypatch, *options)
    folder = trained / "run" / "posthoc"
    result = json.loads((folder / "posthoc_ema.json").read_text())
    assert (result["step"], result["images"]) == (6, 96) and result["run"] == str(trained / "run")
    assert [row["std"] for row in result["averages"]] == [0.05, 0.06, 0.07]
    distances = [row["distance"] for row in result["averages"]]
    assert len({*distances}) == 3 and min(distances) > 0
    assert (folder / "posthoc_ema.png").read_bytes().startswith(b"\x89PNG")

    def forbidden(*args, **options):
        raise AssertionError("this was measured before")

    monkeypatch.setattr("cm.setup.posthoc.distance_of", forbidden)
    posthoc(monkeypatch, *options)
    assert json.loads((folder / "posthoc_ema.json").read_text()) == result


def test_a_consistency_model_is_sampled_in_one_step(trained, monkeypatch, tmp_path, capsys):
    found = find_snapshots(str(trained / "run"))[0]
    config = found.checkpoint.config | {"training_mode": "consistency_training"}
    manifest.save(str(tmp_path), 1, {found.name: th.load(found.path)}, config, 16)
    posthoc(monkeypatch, tmp_path, "--dry_run")
    assert json.loads(capsys.readouterr().out)["sampler"] == "onestep"


@pytest.mark.parametrize("words, message", [
    ((), "--run is missing: posthoc_ema.py RUN"),
    (("RUN", "--model_path", "x.pt"), "--model_path x.pt: this command makes its networks from --run"),
    (("RUN", "--step", 100), "--step 100: there are snapshots from step 1 to 8"),
    (("RUN", "--std", 0.28), "differs by .*choose a width nearer to the tracked ones"),
    (("nowhere",), "nowhere has no power-function averages"),
])
def test_mistakes(trained, monkeypatch, tmp_path, words, message):
    words = [trained / "run" if word == "RUN" else word for word in words]
    with pytest.raises(UserError, match=message):
        posthoc(monkeypatch, *words, "--log_dir", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_no_other_files_are_taken_over(trained, monkeypatch, tmp_path):
    """The snapshots keep their folder, and another run its checkpoint of the same step."""
    with pytest.raises(UserError, match="--log_dir .*ema_snapshots is also the input the snapshots of --run"):
        posthoc(monkeypatch, trained / "run", "--log_dir", trained / "run" / FOLDER)
    other = manifest.save(str(tmp_path), 8, {"model": {"w": th.ones(1)}}, {"lr": 7.0}, 16)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="has a checkpoint of step 8 of another run, .*checkpoint_000008.json"):
        posthoc(monkeypatch, trained / "run", "--log_dir", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and other.problem() is None


def test_snapshots_need_power_functions(tmp_path):
    argv = overridden([*TRAIN, "--ema_rate", "0.9", "--ema_snapshot_interval", 1, "--log_dir", tmp_path / "run"])
    with pytest.raises(UserError, match="--ema_snapshot_interval 1 is for power-function averages, and --ema_rate 0.9"):
        setup.train(parse("", *TRAINING_SECTIONS, argv=argv, training_mode="edm"))


def test_the_run_has_its_snapshots(trained):
    assert file_names.steps(str(trained / "run" / FOLDER)) == list(range(1, 9))
    assert len(find_snapshots(str(trained / "run"))) == 16
