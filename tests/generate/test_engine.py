"""Which images are drawn, by whom, and in which order they are written."""

from dataclasses import replace

import numpy as np
import pytest
import torch as th

from cm.config.flags import parse
from cm.config.sampling_schema import SampleConfig, SeedsConfig
from cm.errors import UserError
from cm.generate.engine import (
    SamplingPlan,
    at_precision,
    captions_of,
    labels_of,
    parse_seeds,
    rank_batches,
    sample_to_npz,
)
from cm.karras_diffusion import KarrasDenoiser
from cm.samplers.sample import SampleOptions
from cm.script_util import create_model
from cm.setup.sample import choose_seeds


@pytest.mark.parametrize("text, seeds", [
    ("", ()), (" ", ()), ("7", (7,)), ("0-3,100", (0, 1, 2, 3, 100)), ("9, 2-4 ,0", (9, 2, 3, 4, 0)), ("5-5", (5,)),
])
def test_lists_of_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text, message", [
    ("0-63,", "'' is neither a number nor a rising range such as 0-63"),
    ("3-1", "'3-1' is neither"), ("-3", "'-3' is neither"), ("1..4", r"'1\.\.4' is neither"), ("0-", "'0-' is neither"),
    ("0-5,9,3", "'0-5,9,3' names 3 twice"), ("0-99999999999999", "lists 100,000,000,000,000 images; the most"),
    ("9" * 5000, "is neither"),
])
def test_what_is_no_list_of_seeds(text, message):
    with pytest.raises(UserError, match=f"--seeds .*{message}"):
        parse_seeds(text)


def choose(*argv):
    settings = parse("", SampleConfig, SeedsConfig, argv=argv)
    return choose_seeds(settings), settings.values["num_samples"]


def test_seeds_say_how_many_images(tmp_path):
    assert choose() == ((), 10000)
    assert choose("--seeds", "4-6") == ((4, 5, 6), 3)
    assert choose("--seeds", "4-6", "--num_samples", "3") == ((4, 5, 6), 3)
    with pytest.raises(UserError, match="--seeds 4-6 lists 3 images, but --num_samples asks for num_samples=50"):
        choose("--seeds", "4-6", "--num_samples", "50")
    with pytest.raises(UserError, match="--generator dummy has no seeds.*or drop --seeds"):
        choose("--seeds", "4-6", "--generator", "dummy")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_is_made_once(ranks):
    plan = SamplingPlan(7, 2, 8, seed=0, num_classes=None, seeds=(9, 2, 3, 4, 0, 100, 1))
    shares = [list(rank_batches(plan, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    rows = np.concatenate([np.concatenate(parts) for parts in zip(*shares)])
    assert plan.indices(rows).tolist() == list(plan.seeds)


def test_captions_are_the_names_of_the_classes_that_are_drawn():
    plan = SamplingPlan(6, 2, 8, seed=0, num_classes=3, seeds=(9, 2, 3, 4, 0, 100), class_names=("cat", "dog"))
    rows = np.array([1, 0, 2, 5, 4])
    words = ["cat", "dog", "2"]
    expected = [words[labels_of(np.array([plan.seeds[row]]), plan)[0]] for row in rows]
    assert captions_of(rows, plan) == expected and len(set(expected)) == 3
    assert captions_of(rows, replace(plan, classes=(1,))) == ["dog"] * 5
    for nameless in (replace(plan, class_names=()), replace(plan, num_classes=None)):
        assert captions_of(rows, nameless) == []


@pytest.fixture(scope="module")
def model():
    th.manual_seed(0)
    network = create_model(8, 32, 1, "1", class_cond=True, num_classes=5, attention_resolutions="8")
    for param in network.parameters():
        th.nn.init.normal_(param, std=0.1)
    return network


def draw(model, directory, **options):
    directory.mkdir()
    plan = SamplingPlan(**{"image_size": 8, "seed": 1, "num_classes": 5, "batch_size": 4, **options})
    diffusion = KarrasDenoiser(loss_norm="l2")
    result = sample_to_npz(model, diffusion, plan, str(directory), "fp32", SampleOptions(3, "euler"))
    return dict(np.load(result.paths["samples"]))


def test_the_image_of_a_seed_does_not_depend_on_the_others(model, tmp_path):
    first = draw(model, tmp_path / "first", num_samples=12)
    assert "seeds" not in first
    seeds = (11, 3, 4, 5, 0, 100)
    some = draw(model, tmp_path / "some", num_samples=6, seeds=seeds)
    assert some["seeds"].tolist() == list(seeds)
    shared = np.array(seeds[:5])
    assert np.array_equal(some["arr_1"][:5], first["arr_1"][shared])
    # Rows of other batches may round differently in the last bit, which truncation can show as one grey level.
    assert np.abs(some["arr_0"][:5].astype(int) - first["arr_0"][shared]).max() <= 1
    alone = draw(model, tmp_path / "alone", num_samples=1, seeds=(100,), batch_size=1)
    assert np.abs(alone["arr_0"][0].astype(int) - some["arr_0"][5]).max() <= 1
    assert len({image.tobytes() for image in some["arr_0"]}) == 6
    other = draw(model, tmp_path / "other", num_samples=1, seeds=(100,), seed=2)
    assert np.abs(other["arr_0"][0].astype(int) - alone["arr_0"][0]).max() > 1


def test_one_class_for_all():
    plan = SamplingPlan(2, 2, 8, seed=0, num_classes=5, classes=(3,), seeds=(8, 9))
    assert labels_of(np.array([8, 9]), plan).tolist() == [3, 3]


def test_autocast_is_that_of_the_device_of_the_network(monkeypatch):
    """Which may be another one than this rank's: with a GPU there, a network on the CPU computes in bf16, too."""
    asked = []
    monkeypatch.setattr(th, "autocast", lambda device, dtype: asked.append((device, dtype)))
    at_precision(th.nn.Linear(1, 1, device="meta"), "bf16")
    assert asked == [("meta", th.bfloat16)]
