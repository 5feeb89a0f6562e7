"""Numbers and words of config files are what they seem to be."""

import re

import pytest

from cm.config.flags import parse
from cm.config.flat_file import parse_flat
from cm.config.schema import RunConfig, TrainConfig


@pytest.mark.parametrize("text, message", [
    ("lr: 1\nseed: 010", "line 2: 010 is ambiguous as a whole number"),
    ("save_interval: 1:30", "line 1: 1:30 is ambiguous as a whole number"),
    ("seed: 0x10", "0x10 is ambiguous as a whole number"),
    ("lr: 1:30.5", "1:30.5 is ambiguous as a number"),
])
def test_numbers_that_yaml_reads_otherwise_are_refused(text, message):
    """YAML 1.1 takes 010 for 8, and 1:30 for 90."""
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_flat(text.encode())


@pytest.mark.parametrize("text, value", [
    ("5", 5), ("+5", 5), ("-5", -5), ("0", 0), ("1_000", 1000), ("3.", 3.0), ("1.0e+3", 1000.0), (".inf", float("inf")),
    ("-.INF", -float("inf")), ("1.5E+3", 1500.0),
])
def test_numbers(text, value):
    found = parse_flat(f"a: {text}".encode())["a"]
    assert found == value and str(found) == text


def test_words_that_look_like_numbers_stay_as_they_are_written(tmp_path):
    """As on the command line: a folder 1_000 is not 1000, and an average 0.90 is not named ema_0.9."""
    file = tmp_path / "run.yaml"
    file.write_text("log_dir: 1_000\nema_rate: [0.90, 0.9990]\n"
                    "checkpoint_dir: 2024-1-2\nsave_interval: 1_000\nlr: 1.0E-3")
    values = parse("", TrainConfig, RunConfig, argv=["--config", str(file)]).values
    assert [values[name] for name in ("log_dir", "ema_rate", "checkpoint_dir", "save_interval", "lr")] == [
        "1_000", "0.90,0.9990", "2024-1-2", 1000, 0.001]
    assert type(values["save_interval"]) is int and type(values["lr"]) is float
