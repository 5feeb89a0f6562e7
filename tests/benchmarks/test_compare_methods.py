"""benchmarks/compare_methods.py at the size of a test: a teacher, its student, scores, the table, the pictures."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import compare_methods
from bench import contest

from cm.config.schema import SAMPLER_NAMES


def test_every_training_has_samplers_that_exist_and_a_teacher_that_takes_part():
    for training in contest.TRAININGS.values():
        assert training.samplers and all(contest.WAYS[name].name in SAMPLER_NAMES for name in training.samplers)
        assert training.teacher is None or contest.TRAININGS[training.teacher].teacher is None


def test_teachers_are_trained_before_their_students():
    trainings = {name: contest.TRAININGS[name] for name in ("ECT of EDM", "EDM, slow clock", "CDM", "iCT")}
    assert compare_methods.generations(trainings) == [["CDM", "EDM, slow clock", "iCT"], ["ECT of EDM"]]
    assert compare_methods.generations({"CT": contest.TRAININGS["CT"]}) == [["CT"]]


def test_at_equal_seconds_a_fast_training_takes_more_steps_and_its_teacher_as_many():
    trainings = {name: contest.TRAININGS[name] for name in ("EDM, slow clock", "ECT of EDM", "CT", "MeanFlow")}
    earlier = {"steps": dict.fromkeys(trainings, 200),
               "seconds": {"EDM, slow clock": [9], "ECT of EDM": [20, 21, 90], "CT": [25], "MeanFlow": [42]}}
    assert compare_methods.equal_seconds(earlier, trainings) == {"ECT of EDM": 400, "CT": 336, "MeanFlow": 200}


@pytest.mark.slow
def test_a_teacher_and_its_student_are_trained_sampled_and_compared(tmp_path, monkeypatch):
    few = {"EDM": ("Euler 35",), "CD of EDM": ("one step",)}
    chosen = {name: contest.Training(each.script, each.flags, few[name], each.teacher)
              for name, each in contest.TRAININGS.items() if name in few}
    monkeypatch.setattr(compare_methods, "TRAININGS", chosen)
    args = argparse.Namespace(data="digits", reference="", out=tmp_path, trainings=None, seeds=1, jobs=1, steps=2,
                              student_steps=0, stage=None, points=2, equal_seconds=None,
                              num_samples=12, num_reference=40, batch_size=8, classifier_epochs=1)
    match = compare_methods.Contest(args)
    match.reference()
    match.classifier()
    for name in ("EDM", "CD of EDM"):
        match.train(name, 0)
    scores = match.measure_run("EDM", 0) + match.measure_run("CD of EDM", 0)
    points = match.measure_curve("EDM", 0) + match.measure_curve("CD of EDM", 0)
    match.write(scores, points, [0])
    assert [score.evaluations for score in scores] == [35, 1]
    assert all(np.isfinite(score.distance) and score.distance > 0 for score in scores)
    assert "| CD of EDM | one step | 1 |" in (tmp_path / "table.md").read_text()
    assert Image.open(tmp_path / "distances.png").size[0] == 900 and (tmp_path / "samples.png").exists()
    raw = json.loads((tmp_path / "results.json").read_text())
    assert [row["distance"] for row in raw["scores"]] == [score.distance for score in scores]
    assert set(raw["seconds"]) == set(few) and all(len(each) == 1 for each in raw["seconds"].values())
    assert [point.images for point in points] == [64, 128] * 2, "after one and two steps of 64 images"
    assert points[1].distance == scores[0].distance != points[0].distance, "a curve ends where the table stands"
    assert raw["curves"][0]["distance"] == points[0].distance and (tmp_path / "curves.png").exists()
    kept = json.loads((tmp_path / "edm_0" / "scores.json").read_text())
    assert kept[0]["distance"] == scores[0].distance, "a second call takes them from here"
