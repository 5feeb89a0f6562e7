"""What is known of a run goes through JSON unchanged, and results are found in the files of the evaluators."""

import json

import pytest

from cm.report.run_facts import Measurement, RunFacts, measurements_of

FACTS = RunFacts("a.zip", 5, 10, 80, 1.5, "cm-train", (Measurement("FID", 1.0, 50, "x"), Measurement("KID", 0.5)))


def test_there_and_back():
    assert RunFacts.from_json(json.loads(json.dumps(FACTS.as_json()))) == FACTS
    assert RunFacts.from_json({"unknown": 1}) == RunFacts()


@pytest.mark.parametrize("content", [
    [], {"data": 3}, {"step": True}, {"step": -1}, {"step": 1.5}, {"seconds": float("inf")}, {"measured": {}},
    {"measured": [3]}, {"measured": [{"label": None}]}, {"measured": [{}]}, {"measured": [{"label": "FID"}]},
    {"step": 10**400}, {"seconds": float("nan")},
])
def test_other_kinds_are_refused(content):
    with pytest.raises(ValueError):
        RunFacts.from_json(content)


def test_files_of_the_evaluators():
    evaluator = {"metrics": {
        "fid": {"label": "FID", "value": 2.0, "sample_count": 50, "extractor": "inception"},
        "kid": {"label": "KID", "value": None}, "odd": 3,
    }}
    fid = {"label": "Frechet distance", "value": 7, "num_images": 9, "extractor": {"name": "tiny", "id": "t1"}}
    assert list(measurements_of(evaluator)) == [Measurement("FID", 2.0, 50, "inception")]
    assert list(measurements_of(fid)) == [Measurement("Frechet distance", 7.0, 9, "tiny (t1)")]
    assert not list(measurements_of({"value": 3}))
