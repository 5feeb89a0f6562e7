"""--help shows the flags used most, --help all every flag; both without what takes seconds to import."""

import re
from pathlib import Path

import pytest

from cm.config.flags import parse
from cm.config.help import ALWAYS
from cm.config.schema import FIRST_OF_DISTILLATION, FIRST_OF_TRAINING, TRAINING_SECTIONS
from support.as_module import as_module

ROOT = Path(__file__).resolve().parents[2]
MANY_FLAGS = ("edm_train", "cm_train", "image_sample", "image_edit", "ternary_search")


def help_of(capsys, script, *words):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", [f"{script}.py", *words])
        as_module(ROOT / "scripts" / f"{script}.py").read_flags()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def flags_in(text):
    return re.findall(r"^  (?:-\w(?: \S+)?, )?--(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("script", MANY_FLAGS)
def test_help_shows_about_ten_flags_and_how_to_see_all(capsys, script):
    status, short, _ = help_of(capsys, script, "--help")
    assert status == 0 and 10 <= len(flags_in(short)) - len(ALWAYS) <= 12 and len(short.splitlines()) < 60
    status, full, err = help_of(capsys, script, "--help", "all")
    assert status == 0 and not err and full.startswith("usage:")
    assert set(flags_in(short)) < set(flags_in(full)) and len(flags_in(full)) > 50
    assert f"--help all shows all {len(flags_in(full))} flags." in short
    assert help_of(capsys, script, "-h") == (0, short, "")


@pytest.mark.parametrize("first", [FIRST_OF_TRAINING, FIRST_OF_DISTILLATION])
def test_they_stand_in_their_order(capsys, first):
    with pytest.raises(SystemExit):
        parse("Train.", *TRAINING_SECTIONS, argv=["--help"], first=first)
    assert flags_in(capsys.readouterr().out) == [*first, *ALWAYS]


def test_a_command_with_few_flags_shows_them_all(capsys):
    for words in (["--help"], ["--help", "all"]):
        status, text, _ = help_of(capsys, "classifier_train", *words)
        assert status == 0 and {"epochs", "holdout", "help"} <= set(flags_in(text))


def test_another_word_is_a_mistake(capsys):
    status, out, err = help_of(capsys, "edm_train", "--help", "lr")
    assert status == 2 and not out and "--help lr: --help stands alone, or before the word all" in err


def test_only_rank_0_answers(capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    for words in (["--help"], ["--help", "all"]):
        assert help_of(capsys, "edm_train", *words) == (0, "", "")


def test_a_flag_of_the_list_must_exist():
    with pytest.raises(KeyError):
        parse("Train.", *TRAINING_SECTIONS, argv=["--help"], first=["no_such_flag"])
