"""Which networks fit which images, and that every choice is a network that takes them."""

from dataclasses import replace

import pytest
import torch as th

from cm.config import presets
from cm.config.flags import resolve
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.quickstart.look import Findings
from cm.quickstart.networks import SIZES, candidates, fitting_side, levels, network_flags, preset
from cm.setup.model import model_from

PHOTOS = Findings("photos", 100_000, 1000, (300, 480, 900), 0, False, {"a": 50_000, "b": 50_000})


def test_the_sizes_are_the_presets():
    names = [name.removeprefix("size/") for name in presets.names() if name.startswith("size/")]
    assert sorted(names) == sorted(size.name for size in SIZES)


def test_few_or_small_images_get_small_networks():
    def names(**changes):
        return [each.name for each in candidates(replace(PHOTOS, **changes))]

    assert names() == ["tiny", "small", "medium", "large"]
    assert names(images=60) == ["tiny"] and names(images=1797) == ["tiny", "small"]
    assert names(sides=(8, 8, 8), one_size=8) == ["tiny"] and names(sides=(32, 32, 32)) == ["tiny", "small", "medium"]
    assert [each.name for each in candidates(replace(PHOTOS, images=60), "large")] == ["large"]


@pytest.mark.parametrize("one_size, median, largest, side", [
    (8, 8, 32, 8), (28, 28, 32, 28), (32, 32, 64, 32), (96, 96, 128, 96), (0, 50, 64, 32), (0, 480, 64, 64),
    (0, 5, 32, 8), (30, 30, 32, 16), (512, 512, 64, 64),
])
def test_the_side_of_the_images(one_size, median, largest, side):
    assert fitting_side(replace(PHOTOS, one_size=one_size, sides=(median,) * 3), largest) == side


@pytest.mark.parametrize("side, count", [(8, 1), (28, 2), (32, 3), (9, 0), (10, 1), (4, 0)])
def test_how_often_a_side_can_be_halved(side, count):
    assert levels(side) == count


@pytest.mark.parametrize("side", [8, 10, 28, 32, 96])
def test_every_network_takes_images_of_every_side(side):
    for candidate in candidates(PHOTOS, image_size=side):
        flags = network_flags(candidate, PHOTOS)
        with th.device("meta"):
            model = model_from(resolve(flags | {"num_classes": 2}, *TRAINING_SECTIONS))
            labels = th.zeros(1, dtype=th.long)
            assert model(th.zeros(1, 3, side, side), th.zeros(1), labels).shape == (1, 3, side, side)
        assert flags["attention_resolutions"]


def test_at_its_own_side_a_network_is_the_presets():
    for candidate in candidates(PHOTOS):
        own = preset(candidate.name)
        flags = network_flags(candidate, PHOTOS)
        assert {name: flags[name] for name in own.keys() & flags.keys()} == {
            name: own[name] for name in own.keys() & flags.keys()}


def test_a_side_that_no_network_can_halve():
    with pytest.raises(UserError, match="--image_size 9: .*give an even number of at least 8"):
        candidates(PHOTOS, image_size=9)


@pytest.mark.parametrize("name, millions", [("tiny", 1.2), ("small", 7.3), ("medium", 39.6), ("large", 125.3)])
def test_the_numbers_of_parameters_that_pages_state(name, millions):
    with th.device("meta"):
        model = model_from(resolve(preset(name), *TRAINING_SECTIONS))
    assert sum(param.numel() for param in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
