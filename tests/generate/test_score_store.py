"""Scores survive, and belong to one set of conditions."""

import json

import pytest

from cm.errors import UserError
from cm.generate.score_store import open_score_store

CONDITIONS = {"seed": 42, "model_path": {"path": "a.pt", "crc32": 7}}


def test_each_score_is_computed_once_and_kept(tmp_path):
    path = str(tmp_path / "state.json")
    calls = []

    def compute():
        calls.append(None)
        return 0.1 + 0.2, 10

    store = open_score_store(path, CONDITIONS)
    assert not (tmp_path / "state.json").exists()
    assert store.score("0,39", compute) == store.score("0,39", compute) == 0.1 + 0.2
    again = open_score_store(path, CONDITIONS)
    assert again.score("0,39", compute) == 0.1 + 0.2                # the same number to the last bit
    again.score("0,5,39", compute)
    assert len(calls) == 2
    third = open_score_store(path, CONDITIONS)
    assert (list(third.scores), third.network_evaluations) == (["0,39", "0,5,39"], 20)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_what_fails_leaves_no_score(tmp_path):
    store = open_score_store(str(tmp_path / "state.json"), CONDITIONS)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.score("0,39", interrupted)
    assert store.score("0,39", lambda: (1.0, 1)) == 1.0


@pytest.mark.parametrize("change, message", [
    ({"seed": 43}, "seed was 42 and is now 43"),
    ({"model_path": {"path": "a.pt", "crc32": 8}}, "'crc32': 7} and is now .*'crc32': 8"),
    ({"steps": 18}, "steps was None and is now 18"),
])
def test_other_conditions_are_refused(tmp_path, change, message):
    path = str(tmp_path / "state.json")
    open_score_store(path, CONDITIONS).score("0,39", lambda: (1.0, 1))
    with pytest.raises(UserError, match=message):
        open_score_store(path, CONDITIONS | change)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", json.dumps({"conditions": {}, "scores": {"0": "much"}})])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match="state.json is not the state of a search"):
        open_score_store(str(tmp_path / "state.json"), CONDITIONS)
