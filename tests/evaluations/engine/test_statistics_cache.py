"""Means and covariances are computed once for the same images and network, and kept within bounds."""

import os
import shutil

import numpy as np
import pytest

from evaluations.engine.readers import Statistics
from evaluations.engine.statistics_cache import KEPT, StatisticsCache
from evaluations.evaluator import evaluate, main, report
from support.tiny_evaluation import StandIn, images_of, values, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_files(folder)
    return folder


class Counting(StandIn):
    def __init__(self, name="torch-0123"):
        self.id, self.images = name, 0

    def extract(self, images):
        self.images += len(images)
        return super().extract(images)


def test_statistics_are_computed_once_for_the_same_images_and_network(folder, tmp_path):
    cache = StatisticsCache(tmp_path / "cache")
    first, second, other = Counting(), Counting(), Counting("torch-4567")
    files = folder / "ref.npz", folder / "sample.npz"
    before = evaluate(*files, first, metrics=["fid", "sfid"], cache=cache)
    shutil.copy(files[0], tmp_path / "renamed.npz")         # the content counts, not the name
    after = evaluate(tmp_path / "renamed.npz", files[1], second, metrics=["fid", "sfid"], cache=cache)
    assert first.images == 2 + 60 + 50 and second.images == 2
    assert values(after) == values(before) == values(evaluate(*files, Counting(), metrics=["fid", "sfid"]))
    fields = after["metrics"]["frechet_distance"]
    assert (fields["reference_source"], fields["sample_source"]) == ("cached statistics",) * 2
    assert (fields["reference_count"], fields["sample_count"]) == (60, 50)
    assert "samples: N=50, cached statistics; reference: N=60, cached statistics; torch-0123" in report(after)
    evaluate(*files, other, metrics=["fid"], cache=cache)
    assert other.images == 2 + 60 + 50                      # another network
    np.savez(tmp_path / "changed.npz", np.roll(images_of(files[0]), 1, 0))
    evaluate(tmp_path / "changed.npz", files[1], second, metrics=["fid"], cache=cache)
    assert second.images == 2 + 2 + 60                      # other content


def test_a_cache_that_cannot_be_used_costs_only_time(folder, tmp_path):
    cache = StatisticsCache(tmp_path / "cache")
    files = folder / "ref.npz", folder / "sample.npz"
    expected = values(evaluate(*files, Counting(), metrics=["fid"], cache=cache))
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 2
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:200])         # half a file, by somebody else's fault
    damaged = Counting()
    assert values(evaluate(*files, damaged, metrics=["fid"], cache=cache)) == expected and damaged.images > 100
    (tmp_path / "file").write_text("no folder")
    assert values(evaluate(*files, Counting(), metrics=["fid"], cache=StatisticsCache(tmp_path / "file"))) == expected


def test_the_cache_forgets_what_was_not_used_for_longest(tmp_path):
    cache = StatisticsCache(tmp_path)
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "images.npz").rename(tmp_path / "images")   # not an entry
    np.savez(tmp_path / "samples.npz", np.zeros(3))         # the user's own, and the oldest
    os.utime(tmp_path / "samples.npz", (0, 0))
    statistics = Statistics(np.zeros(2), np.eye(2), "torch-0", 2)
    for number in range(KEPT + 3):
        cache.save(str(tmp_path / "images"), statistics, choice=str(number))
        for entry in tmp_path.glob(f"*-{number}-torch-0.npz"):
            os.utime(entry, (number, number))
        assert number > 3 or cache.load(str(tmp_path / "images"), "torch-0", choice="0").num_images == 2
    (tmp_path / "samples.npz").unlink()                     # still there
    left = {int(entry.name.split("-")[1]) for entry in tmp_path.glob("*.npz")}
    assert left == {0, *range(4, KEPT + 3)}                 # the first was read in between


def test_the_command_keeps_statistics_unless_told_not_to(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [str(folder / "ref.npz"), str(folder / "sample.npz"), "--inception", str(folder / "two.ts"),
          "--trust_extractor",
               "--metrics", "fid"]
    main([*command, "--cache", "off"])
    assert not list(tmp_path.rglob("*.npz"))
    main([*command, "--cache", str(tmp_path / "mine")])
    main(command)
    kept = [list(place.glob("*.npz")) for place in (tmp_path / "mine", tmp_path / "consistency-toolkit/statistics")]
    assert [len(each) for each in kept] == [2, 2]
