"""Watchers: training is the same without them, numbers and pictures are those of the commands, the best is kept."""

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.data.loader import load_data
from cm.errors import UserError
from cm.generate.engine import SamplingPlan
from cm.io import storage
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.samplers.sample import SampleOptions
from cm.script_util import create_model
from cm.train_util import TrainLoop
from cm.training.callbacks import AverageSampler, Evaluation, SampleGrids
from evaluations.evaluator import evaluate
from evaluations.features import load_extractor, save_torchscript
from evaluations.in_training import open_metric
from support.nets import TinyExtractor, save_measure
from support.warm import mpiexec

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["--data_dir", "digits", "--image_size", 8, "--num_channels", 32, "--num_res_blocks", 1, "--channel_mult", "1",
         "--attention_resolutions", 8, "--num_head_channels", 32, "--class_cond", True, "--random_flip", False,
         "--lr", 1e-3, "--global_batch_size", 16, "--save_interval", 4, "--log_interval", 2, "--ema_rate", "0.5,0.9"]
SAMPLES = 64


def script(name, *args):
    done = mpiexec(2, [ROOT / "scripts" / name, *map(str, args)], timeout=120, env={"OPENAI_LOG_FORMAT": "log,csv"})
    assert done.rc == 0, done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watchers")
    save_measure(folder)
    return folder


def watching(folder, *more):
    return ["--eval_ref", folder / "ref.npz", "--inception", folder / "tiny.ts", "--trust_extractor",
            "--eval_samples", SAMPLES, "--eval_batch_size", 16, *more]


@pytest.fixture(scope="module")
def watched(folder):
    """An EDM run of 8 steps on 2 ranks, measured at steps 3, 6 and 8, with pictures at its saves."""
    script("edm_train.py", *TRAIN, "--total_training_steps", 8, "--log_dir", folder / "watched",
           *watching(folder, "--eval_interval", 3, "--sample_interval", -1, "--eval_ema_rate", "0.9", "--eval_steps",
                     3))
    return folder / "watched"


def column(directory, name):
    with open(directory / "progress.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


@pytest.mark.mpi
def test_training_is_the_same_bit_for_bit_with_and_without_watchers(folder, watched):
    script("edm_train.py", *TRAIN, "--total_training_steps", 8, "--log_dir", folder / "alone")
    files = sorted(path.name for path in (folder / "alone").glob("*000008.pt") if "trainer" not in path.name)
    assert files == ["ema_0.5_000008.pt", "ema_0.9_000008.pt", "model000008.pt", "opt000008.pt"]
    for name in files:
        assert (watched / name).read_bytes() == (folder / "alone" / name).read_bytes(), name
    assert list(column(watched, "frechet_distance")) == [3, 6, 8], "a row for each measurement, at its own step"
    assert not (folder / "alone" / "samples").exists() and not (folder / "alone" / "best.json").exists()


@pytest.mark.mpi
def test_numbers_and_pictures_are_those_of_the_commands(folder, watched):
    """image_sample.py with the weights of a step, then the evaluator: the distance that training logged."""
    best = json.loads((watched / "best.json").read_text())
    logged = column(watched, "frechet_distance")
    assert best["step"] == min(logged, key=logged.get) and best["value"] == pytest.approx(logged[best["step"]])
    assert best["metric"] == "Frechet distance (tiny features, not Inception)"
    assert best["file"] == f"best/ema_0.9_{best['step']:06d}.pt"
    assert sorted(path.name for path in (watched / "best").iterdir()) == [
        f"checkpoint_{best['step']:06d}.json", f"ema_0.9_{best['step']:06d}.pt"
    ]
    script("image_sample.py", "--model_path", watched / "ema_0.9_000008.pt", "--steps", 3, "--num_samples", SAMPLES,
           "--batch_size", 16, "--log_dir", folder / "drawn")
    samples = folder / "drawn" / f"samples_{SAMPLES}x8x8x3.npz"
    extractor = load_extractor(str(folder / "tiny.ts"), trusted=True)
    result = evaluate(str(folder / "ref.npz"), str(samples), extractor, metrics=["fid"])
    # The extractor's batches differ, and with them float32 rounding.
    assert logged[8] == pytest.approx(result["metrics"]["frechet_distance"]["value"], rel=1e-5)
    assert len(set(logged.values())) == 3
    pictures = sorted((watched / "samples").iterdir())
    assert [path.name for path in pictures] == ["samples_000004.png", "samples_000008.png"]
    assert np.array_equal(Image.open(samples.with_suffix(".png")), Image.open(pictures[1]))
    kept_config = json.loads((watched / "best" / f"checkpoint_{best['step']:06d}.json").read_text())["config"]
    assert kept_config["num_channels"] == 32, "the kept weights load without architecture flags"


@pytest.mark.mpi
def test_consistency_training_is_measured_at_one_step(folder):
    script("cm_train.py", *TRAIN, "--training_mode", "consistency_training", "--loss_norm", "l2", "--start_ema", 0.9,
           "--weight_schedule", "uniform", "--start_scales", 6, "--total_training_steps", 4, "--log_dir", folder / "ct",
           *watching(folder, "--eval_interval", 4))
    best = json.loads((folder / "ct" / "best.json").read_text())
    assert (best["step"], best["settings"]["sampler"]) == (4, "onestep")
    assert column(folder / "ct", "frechet_distance") == {4: pytest.approx(best["value"])}
    saved = th.load(folder / "ct" / "trainer000004.pt", weights_only=True)["watchers"]["evaluation"]
    assert saved["best"] == {"step": 4, "value": best["value"]} and saved["settings"] == best["settings"]


# --- one process ---------------------------------------------------------------------------------------------------


class Listed:
    """A metric whose values are known."""

    key, label, id = "fid", "FID", "listed"

    def __init__(self, values):
        self.values, self.images = iter(values), []

    def distance(self, batches):
        self.images.append(np.concatenate([images for _, images in batches]))
        return next(self.values)


def network():
    return create_model(8, 32, 1, "1", attention_resolutions="8", num_head_channels=32)


def sampler():
    plan = SamplingPlan(num_samples=1, batch_size=5, image_size=8, seed=42, num_classes=None)
    return AverageSampler(network, KarrasDenoiser(loss_norm="l2"), plan, "fp32", "0.5", SampleOptions(2, "euler"))


def evaluation(values, **settings):
    return Evaluation(sampler(), interval=2, num_samples=7, metric=Listed(values), settings=settings)


def loop(directory, steps, *callbacks, **options):
    logger.configure(str(directory), format_strs=["csv", "log"])
    th.manual_seed(0)
    return TrainLoop(
        model=network(), diffusion=KarrasDenoiser(loss_norm="l2"), batch_size=4, lr=1e-3, ema_rate="0.5",
        log_interval=1, save_interval=100, total_training_steps=steps, callbacks=callbacks,
        data=partial(stream), config={"image_size": 8}, **options,
    )


def stream(start):
    return load_data(data_dir="digits", batch_size=4, image_size=8, start=start, num_workers=0)


@pytest.fixture(autouse=True)
def closed_log():
    yield
    logger.reset()


def kept(directory):
    best = json.loads((directory / "best.json").read_text())
    names = {path.name for path in (directory / "best").iterdir()}
    assert names == {Path(best["file"]).name, f"checkpoint_{best['step']:06d}.json"}
    return best["step"], best["value"]


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_best_that_cannot_be_saved_is_a_failed_save(tmp_path, monkeypatch, on_save_error):
    real, full = storage.write_atomically, []

    def write_atomically(path, write, **options):
        if "/best/" in str(path) and "000004" in str(path):
            full.append(path)
            raise OSError(28, "No space left on device")
        return real(path, write, **options)

    monkeypatch.setattr(storage, "write_atomically", write_atomically)
    callback = evaluation([5.0, 3.0, 4.0])
    training = loop(tmp_path, 6, callback, on_save_error=on_save_error)
    if on_save_error == "stop":
        with pytest.raises(UserError, match="No space left"):
            training.run_loop()
    else:
        training.run_loop()
        assert callback.best == {"step": 6, "value": 4.0} and kept(tmp_path) == (6, 4.0)
    assert full


def test_the_best_is_kept_and_a_resumed_run_goes_on_knowing_it(tmp_path):
    loop(tmp_path, 4, evaluation([5.0, 3.0])).run_loop()
    assert kept(tmp_path) == (4, 3.0)
    worse = evaluation([4.0, float("nan"), 2.5])
    loop(tmp_path, 10, worse).run_loop()
    assert worse.best == {"step": 10, "value": 2.5}
    assert "FID 4 of 7 samples" in (tmp_path / "log.txt").read_text()
    assert "best so far 3 at step 4" in (tmp_path / "log.txt").read_text()
    assert kept(tmp_path) == (10, 2.5)
    assert list(column(tmp_path, "fid")) == [2, 4, 6, 8, 10]
    whole = tmp_path / "whole"
    loop(whole, 10, evaluation([5.0, 3.0, 4.0, float("nan"), 2.5])).run_loop()
    for name in ("trainer000010.pt", "model000010.pt", "opt000010.pt", "best/ema_0.5_000010.pt", "best.json"):
        assert (whole / name).read_bytes() == (tmp_path / name).read_bytes(), f"{name}: the run that nobody stopped"


def test_a_worse_one_leaves_the_kept_weights_alone(tmp_path):
    loop(tmp_path, 4, evaluation([3.0, 5.0])).run_loop()
    assert kept(tmp_path) == (2, 3.0)
    weights = th.load(tmp_path / "best" / "ema_0.5_000002.pt", weights_only=True)
    last = th.load(tmp_path / "ema_0.5_000004.pt", weights_only=True)
    assert weights.keys() == last.keys() and not th.equal(weights["out.2.weight"], last["out.2.weight"])


def test_of_equal_values_the_first_stays_the_best(tmp_path):
    equal = evaluation([3.0, 3.0, 3.0])
    loop(tmp_path, 6, equal).run_loop()
    assert equal.best == {"step": 2, "value": 3.0} and kept(tmp_path) == (2, 3.0)
    assert (tmp_path / "log.txt").read_text().count("best so far 3 at step 2") == 3


def test_values_of_another_measurement_are_not_compared(tmp_path):
    loop(tmp_path, 2, evaluation([3.0], seed=1)).run_loop()
    other = evaluation([8.0], seed=2)
    loop(tmp_path, 4, other).run_loop()
    assert "metric is measured differently than before (seed)" in (tmp_path / "log.txt").read_text()
    assert kept(tmp_path) == (4, 8.0)


def test_a_checkpoint_of_a_run_that_nobody_watched_can_be_watched_and_back(tmp_path):
    loop(tmp_path, 2).run_loop()
    loop(tmp_path, 4, evaluation([8.0])).run_loop()
    loop(tmp_path, 5).run_loop()
    assert kept(tmp_path) == (4, 8.0)


def test_random_streams_stand_where_they_stood(tmp_path):
    measured = evaluation([1.0])
    training = loop(tmp_path, 2, measured)
    training.step = 2
    before = th.get_rng_state()
    training.clock = 0.0
    training.run_callbacks()
    SampleGrids(sampler(), interval=1, num_samples=3).after_step(training)
    assert th.equal(th.get_rng_state(), before)
    assert measured.metric.images[0].shape == (7, 8, 8, 3) and measured.metric.images[0].dtype == np.uint8
    assert (tmp_path / "samples" / "samples_000002.png").exists()


def test_the_time_of_watchers_is_not_the_trainings(tmp_path):
    training = loop(tmp_path, 2, evaluation([1.0]))
    training.step, training.clock = 2, 100.0
    training.run_callbacks()
    assert training.clock > 100.0


class Inception(TinyExtractor):
    """Only its last layer has Inception's form."""

    def __init__(self):
        super().__init__()
        self.output = th.nn.Linear(2048, 1008, bias=False)


@pytest.mark.parametrize("network, key, label", [
    (Inception, "fid", "FID"),
    (TinyExtractor, "frechet_distance", "Frechet distance (none features, not Inception)"),
])
def test_only_inceptions_distance_is_called_fid(folder, tmp_path, network, key, label):
    save_torchscript(network(), str(tmp_path / "net.ts"), "none", "none")
    metric = open_metric(str(folder / "ref.npz"), str(tmp_path / "net.ts"), 8, 16, 50, True)
    assert (metric.key, metric.label) == (key, label)
    assert metric.distance([(0, np.load(folder / "ref.npz")["arr_0"])]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("watch", [
    lambda drawing: SampleGrids(drawing, 2), lambda drawing: Evaluation(drawing, 2, 7, Listed([1.0]), {}),
])
def test_samples_that_are_not_finite_end_a_watched_run(tmp_path, monkeypatch, watch):
    drawing = sampler()
    weights = drawing.weights
    monkeypatch.setattr(
        AverageSampler, "weights", lambda self, loop: {k: v * float("nan") for k, v in weights(loop).items()}
    )
    with pytest.raises(UserError, match="images drawn are not finite"):
        loop(tmp_path / "refused", 2, watch(drawing)).run_loop()
    assert not list(tmp_path.glob("refused/samples/*"))
    allowed = replace(drawing, plan=replace(drawing.plan, allow_non_finite=True))
    loop(tmp_path / "allowed", 2, watch(allowed)).run_loop()
