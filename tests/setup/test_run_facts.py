"""What lies beside weights is told of them, and the command on a card trains the same."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from cm.checkpoints import manifest
from cm.checkpoints.formats import described
from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.report.run_facts import Measurement, RunFacts
from cm.setup import rules
from cm.setup.run_facts import COMMANDS, facts_of, last_part, measured_in, training_command
from support.as_module import as_module

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def resolved(words, own):
    """The flags of a training command as its manifests have them."""
    settings = parse("", *TRAINING_SECTIONS, argv=words, **own)
    rules.resolve(settings, rules.TRAINING)
    return settings.values


EDM = ["--data_dir", "digits", "--image_size", "8", "--num_channels", "32", "--lr", "0.003", "--total_kimg", "5",
       "--global_batch_size", "16", "--ema_rate", "0.99,0.999", "--random_flip", "False", "--log_dir",
       "/home/me/runs/x"]
ECT = [*EDM, "--training_mode", "ect", "--huber_c", "0.06"]


@pytest.mark.parametrize("words, is_diffusion", [(EDM, True), (ECT, False)])
def test_the_command_trains_the_same(words, is_diffusion):
    command, own = COMMANDS[is_diffusion]
    values = resolved(words, own)
    name, *again = shlex.split(training_command(values))
    assert name == command and "/home/me" not in " ".join(again)
    found = resolved(again, own)
    assert {key: (found[key], values[key]) for key in values if found[key] != values[key]} == {
        "log_dir": ("", "/home/me/runs/x")}
    assert len(again) < 2 * 20                              # not the hundreds that are at their defaults
    assert training_command(values | {"martingale_sde": "other"}) == training_command(values), "it is of another"


def test_the_defaults_are_those_of_the_commands(monkeypatch):
    for is_diffusion, script in ((True, "edm_train.py"), (False, "cm_train.py")):
        monkeypatch.setattr(sys, "argv", [script])
        own = COMMANDS[is_diffusion][1]
        assert as_module(SCRIPTS / script).read_flags().values == parse("", *TRAINING_SECTIONS, argv=[], **own).values


def test_flags_that_train_nothing_give_no_command():
    assert training_command({}) == "" == training_command({"data_dir": "x", "training_mode": "other"})


def test_what_lies_beside_weights(tmp_path):
    config = {"data_dir": "/data/secret/pets.zip", "training_mode": "edm"}
    for step in (10, 20):
        manifest.save(str(tmp_path), step, {"ema_0.9": {}}, config, 8 * step, seconds=2.5)
    best = {"metric": "FID", "value": 3.5, "file": "best/ema_0.9_000020.pt", "step": 20,
            "settings": {"features": "tiny", "num_samples": 50}}
    (tmp_path / "best.json").write_text(json.dumps(best))
    (tmp_path / "classes.json").write_text(json.dumps({"images": 77, "classes": {}}))
    found = facts_of(str(tmp_path / "ema_0.9_000020.pt"))
    assert found == RunFacts("pets.zip", 77, 20, 160, 2.5, "cm-train --data_dir pets.zip",
                             (Measurement("FID", 3.5, 50, "tiny"),))
    assert facts_of(str(tmp_path / "ema_0.9_000010.pt")).measured == ()         # the value is of another step
    manifest.save(str(tmp_path / "best"), 20, {"ema_0.9": {}}, config, 160)
    assert facts_of(str(tmp_path / "best/ema_0.9_000020.pt")).measured == found.measured
    (tmp_path / "best.json").write_text("{")
    assert facts_of(str(tmp_path / "ema_0.9_000020.pt")).measured == ()


def test_facts_travel_with_a_description(tmp_path):
    facts = RunFacts("pets.zip", 5, 10, 80, 1.0, "cm-train")
    described.write(str(tmp_path / "x.safetensors"), {}, described.Description({}, (), facts))
    assert facts_of(str(tmp_path / "x.safetensors")) == facts
    assert facts_of(str(tmp_path / "bare.pt")) == RunFacts()


@pytest.mark.parametrize("value, part", [
    ("digits", "digits"), ("/home/me/x.zip", "x.zip"), ("set-{000..127}.tar", "set-{000..127}.tar"), ("1,2,3", "1,2,3"),
    ("https://host/path/x.pkl?token=secret#sha256=1", "x.pkl"), ("gs://bucket/run/x.pt", "x.pt"),
])
def test_where_a_file_lies_is_not_told(value, part):
    assert last_part(value) == part


def test_results_are_read_or_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"label": "FID", "value": 2, "num_images": 5}')
    assert measured_in([str(tmp_path / "r.json")]) == [Measurement("FID", 2.0, 5)]
    (tmp_path / "s.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="s.json contains no result"):
        measured_in([str(tmp_path / "s.json")])
    with pytest.raises(UserError, match="t.json cannot be read"):
        measured_in([str(tmp_path / "t.json")])
