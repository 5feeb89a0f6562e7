"""The command that finds multistep schedules, on handwritten digits with a network of random weights."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.config.flags import parse
from cm.config.schema import DiffusionConfig, ModelConfig
from cm.data.sources import open_source
from cm.errors import UserError
from cm.generate.schedule_scorer import Scorer
from cm.logging import logger
from cm.setup.model import model_from
from evaluations.evaluator import evaluate
from evaluations.features import load_extractor, save_torchscript
from support.as_module import as_module
from support.command_line import overridden
from support.mpi import find_mpiexec, start
from support.warm import mpiexec

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "ternary_search.py"
QUIET = {"OPENAI_LOG_FORMAT": "log"}
NETWORK = ["--image_size", "8", "--num_head_channels", "32", "--attention_resolutions", "8"]
BUILD = [*NETWORK, "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1", "--class_cond", "True",
         "--num_classes", "10"]


class Tiny(th.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = th.nn.Conv2d(3, 8, 8)

    def forward(self, images):
        return self.conv(images.float() / 255).flatten(1)


def random_network():
    """Weights large enough that every stage changes the image; a fresh network returns zeros."""
    th.manual_seed(0)
    model = model_from(parse("", ModelConfig, DiffusionConfig, argv=BUILD))
    with th.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.15 if weight.ndim > 1 else 0.05)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    th.save(random_network().state_dict(), folder / "model.pt")
    np.savez(folder / "ref.npz", arr_0=open_source("digits", 8).images(np.arange(200)))
    save_torchscript(Tiny(), str(folder / "features.ts"), "tiny", "none")
    return folder


def flags(folder, log_dir, *options):
    return overridden([*NETWORK, "--model_path", str(folder / "model.pt"), "--ref_batch", str(folder / "ref.npz"),
            "--inception", str(folder / "features.ts"), "--trust_extractor", "--log_dir", str(log_dir),
            "--num_samples", "21",
            "--batch_size", "8", "--steps", "12", *options])


@pytest.fixture(scope="module")
def script():
    yield as_module(SCRIPT)
    del sys.modules["ternary_search"]


@pytest.fixture
def search(script, folder, monkeypatch):
    """The command in this process; returns its result."""
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log")

    def run(log_dir, *options):
        monkeypatch.setattr(sys, "argv", ["ternary_search.py", *flags(folder, log_dir, *options)])
        script.main(script.read_flags())
        return read(log_dir)

    yield run
    logger.reset()


def read(log_dir):
    return json.loads((Path(log_dir) / "ternary_search.json").read_text())


def scores_in(log_dir):
    return json.loads((Path(log_dir) / "ternary_search_state.json").read_text())["scores"]


@pytest.mark.mpi
def test_two_ranks_find_a_schedule_that_image_sample_takes_and_the_evaluator_confirms(folder, search, tmp_path):
    """Batches of 7 leave the second rank without work in the last round of 21."""
    log_dir = tmp_path / "run"
    done = mpiexec(2, [SCRIPT, *flags(folder, log_dir, "--num_ts", "2", "--batch_size", "7")], timeout=100, env=QUIET)
    assert done.rc == 0, done
    result = read(log_dir)
    ts = [int(index) for index in result["ts"].split(",")]
    assert len(ts) == 4 and ts[0] == 0 and ts[-1] == 11
    assert result["frechet_distance"] == scores_in(log_dir)[result["ts"]]
    assert 2 * result["network_evaluations"] <= result["naive_network_evaluations"]
    assert Image.open(log_dir / "ternary_search.png").width > 100
    log = (log_dir / "log.txt").read_text()
    assert result["command"] in log and "<- lowest" in log

    launcher, count, ranks, _, *words = shlex.split(result["command"])
    assert (launcher, count, ranks) == ("mpiexec", "-n", "2")
    done = start([find_mpiexec(), "-n", "2", sys.executable, *words, "--log_dir", str(tmp_path / "samples")],
                 timeout=100, env=QUIET)
    assert done.rc == 0, done
    samples = tmp_path / "samples" / "samples_21x8x8x3.npz"
    extractor = load_extractor(str(folder / "features.ts"), trusted=True)
    theirs = evaluate(str(folder / "ref.npz"), str(samples), extractor, metrics=["fid"])
    # The images are the same; only the extractor's batches differ, which float32 rounds to 1e-7 of the features.
    assert result["frechet_distance"] == pytest.approx(theirs["metrics"]["frechet_distance"]["value"], rel=1e-5)

    alone = search(tmp_path / "alone", "--num_ts", "2", "--batch_size", "21")
    both = scores_in(log_dir).keys() & scores_in(tmp_path / "alone").keys()
    assert {"0,11", alone["rounds"][0]["ts"]} <= both
    for name in both:                                               # other batches round otherwise: single grey levels
        assert scores_in(log_dir)[name] == pytest.approx(scores_in(tmp_path / "alone")[name], rel=1e-3)


def test_interrupted_and_started_again_is_the_same_search(search, tmp_path, monkeypatch):
    whole = search(tmp_path / "whole", "--num_ts", "2")
    score, calls = Scorer.__call__, []

    def interrupted(self, ts):
        calls.append(ts)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(self, ts)

    monkeypatch.setattr(Scorer, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "twice", "--num_ts", "2")
    assert len(scores_in(tmp_path / "twice")) == 4
    again = search(tmp_path / "twice", "--num_ts", "2")
    assert scores_in(tmp_path / "twice") == scores_in(tmp_path / "whole")
    assert len(set(calls)) == len(calls) - 1, "only the interrupted score is computed twice"
    assert "resuming with 4 scores" in (tmp_path / "twice" / "log.txt").read_text()
    of_the_run = ("seconds", "network_evaluations")
    assert all(again[key] == whole[key] for key in whole if key not in of_the_run)
    assert again["network_evaluations"] == whole["network_evaluations"] + 21       # the first stage, for want of memory

    more = search(tmp_path / "twice", "--num_ts", "3")
    assert more["rounds"][:2] == whole["rounds"] and len(more["ts"].split(",")) == 5
    with pytest.raises(UserError, match="seed was 42 and is now 7.*Choose another --log_dir"):
        search(tmp_path / "twice", "--seed", "7")


def test_memory_changes_no_score(search, tmp_path):
    plenty, none = (search(tmp_path / room, "--num_ts", "1", "--cache_gib", room) for room in ("1", "0"))
    assert scores_in(tmp_path / "1") == scores_in(tmp_path / "0")
    assert plenty["network_evaluations"] < none["network_evaluations"]
    assert "--cache_gib 0 held only a part" in (tmp_path / "0" / "log.txt").read_text()


def test_a_stub_score_with_its_bottom_anywhere(search, tmp_path, monkeypatch):
    """The whole command with the original's default interval, 0 to 39."""
    for bottom in (1, 2, 20, 37, 38):
        monkeypatch.setattr(Scorer, "__call__", lambda self, ts, bottom=bottom: (
            (50.0, 0) if len(ts) == 2 else (float(abs(ts[1] - bottom)), 0)))
        assert search(tmp_path / str(bottom), "--steps", "40")["ts"] == f"0,{bottom},39"


def test_limits_and_fixed_points(search, tmp_path):
    assert search(tmp_path / "a", "--begin", "0", "--end", "1")["ts"] == "0,1,11"
    assert search(tmp_path / "b", "--begin", "0,4", "--end", "6,11")["ts"] == "0,4,5,6,11"


BAD = {
    "missing model": (["--model_path", ""], "--model_path is missing"),
    "model that is not there": (["--model_path", "nowhere.pt"], "--model_path nowhere.pt: no such file"),
    "missing reference": (["--ref_batch", ""], "--ref_batch is missing"),
    "reference that is not there": (["--ref_batch", "nowhere.npz"], "nowhere.npz does not exist"),
    "extractor that is not there": (["--inception", "nowhere.ts"], "feature extractor nowhere.ts does not exist"),
    "begin above end": (["--begin", "0,7", "--end", "5"], "--begin must end below where --end begins"),
    "begin at end": (["--begin", "0,5", "--end", "5"], "--begin must end below where --end begins"),
    "no room": (["--end", "4", "--num_ts", "5"], "4 more points fit, and --num_ts asks for 5"),
    "too many points": (["--num_ts", "11"], "10 more points fit, and --num_ts asks for 11"),
    "no points": (["--num_ts", "0"], "num_ts=0 is too small"),
    "end beyond the grid": (["--end", "39"], "the noise levels are 0 to 11"),
    "class that is not there": (["--class_label", "10"], "classes 0 to 9"),
    "noise that differs": (["--generator", "dummy"], "--generator dummy"),
    "schedule given": (["--ts", "0,5,11"], "--ts is what this command looks for"),
    "churn": (["--s_churn", "1"], "--s_churn 1"),
    "no consistency model": (["--training_mode", "edm"], "multistep schedules are for consistency models"),
    "one image": (["--num_samples", "1"], "at least 2 images"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(search, tmp_path, name):
    options, message = BAD[name]
    with pytest.raises(UserError, match=message):
        search(tmp_path, *options)


def test_dry_run_writes_nothing(search, script, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", *flags(folder, tmp_path / "run", "--dry_run")])
    script.main(script.read_flags())
    assert json.loads(capsys.readouterr().out)["end"] == "11"
    assert not (tmp_path / "run").exists()
