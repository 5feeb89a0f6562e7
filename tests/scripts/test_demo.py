"""scripts/demo.py: which commands it starts, and which of them again; the commands themselves are tested elsewhere."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.quickstart import stages
from support.as_module import as_module

ROOT = Path(__file__).resolve().parents[2]
DEMO = as_module(ROOT / "scripts" / "demo.py")
METRICS = ("frechet_distance", "precision", "recall", "class_accuracy")


def after(words: list[str], flag: str) -> Path:
    return Path(words[words.index(flag) + 1])


def leave_products(words: list[str]) -> None:
    """What a command would leave, without its work."""
    command = next(Path(word).stem for word in words if "demo" not in word and re.search(r"\.py$|^evaluations\.", word))
    if words[words.index("-m") + 1 if "-m" in words else 0] == "evaluations.evaluator":
        after(words, "--json").write_text(json.dumps({"metrics": {name: {"value": 0.5} for name in METRICS}}))
    elif command in ("edm_train", "cm_train"):
        folder = after(words, "--log_dir")
        folder.mkdir(exist_ok=True)
        for name in ("ema_0.99_000400.pt", "checkpoint_000400.json"):
            (folder / name).touch()
    elif command == "image_sample":
        folder = after(words, "--log_dir")
        folder.mkdir(exist_ok=True)
        np.savez(folder / "samples_16x8x8x3.npz", arr_0=np.zeros((16, 8, 8, 1), np.uint8), arr_1=np.arange(16) % 10)
        (folder / "samples_16x8x8x3.json").write_text('{"network_evaluations": 1, "images_per_second": 2}')
    elif command == "classifier_train":
        after(words, "--out").touch()
        after(words, "--out").with_suffix(".json").write_text('{"held_out_accuracy": 0.98}')
    else:
        after(words, "--out").touch()


@pytest.fixture
def started(monkeypatch):
    """The commands that were started, a list of words each."""
    commands = []

    def run(words, **_):
        commands.append(words)
        leave_products(words)
        return 0

    monkeypatch.setattr(stages, "execute", run)
    return commands


def test_complete_stages_are_reused_and_an_interrupted_one_is_resumed(started, tmp_path, capsys):
    demo = DEMO.Demo(tmp_path, 2, 16, [])
    demo.run()
    assert len(started) == 22                               # classifier, 4 trainings, 8 x samples and numbers, report
    assert "not Inception FID, and not comparable with it" in capsys.readouterr().out
    first = list(started)
    teacher = parse("", *TRAINING_SECTIONS, argv=next(words for words in first if str(tmp_path / "edm") in words)[5:])
    assert teacher.values["save_interval"] == teacher.values["milestone_interval"] == 100, "the guide's average stays"
    started.clear()
    demo.run()
    assert not started and capsys.readouterr().out.count("reusing") == 22
    (tmp_path / "ct" / "finished").unlink()                 # stopped in the middle: a checkpoint, and no end
    demo.run()
    training, = started
    assert training in first and str(tmp_path / "ct") in training
    assert "[training ct] resuming" in capsys.readouterr().out


def test_a_stage_that_fails_ends_the_demo(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "execute", lambda words, **_: 7)
    with pytest.raises(SystemExit, match="the stage 'classifier' ended with status 7"):
        DEMO.Demo(tmp_path, 2, 16, []).run()
