"""Outputs that would destroy something, or cannot be written, are refused before any work."""

import os

import pytest

from cm.errors import UserError
from cm.io.outputs import Output, check_outputs


@pytest.fixture
def place(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.zip").write_bytes(b"zip")
    os.link(tmp_path / "a.zip", tmp_path / "hard.zip")
    (tmp_path / "soft.zip").symlink_to("a.zip")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("name, kind, source, message", [
    ("a.zip", "file", "a.zip", "is also the input --source"),
    ("hard.zip", "file", "a.zip", "is also the input --source"),
    ("data/../soft.zip", "file", "a.zip", "is also the input --source"),
    ("data", "folder", "data", "is also the input --source"),
    ("data/new/x.zip", "file", "data", "lies in the input folder --source"),
    ("data", "file", "a.zip", "is a folder: give the name of a file"),
    ("new/", "file", "a.zip", "is a folder: give the name of a file"),
    ("hard.zip", "folder", "data", "is a file: give the name of a folder"),
    ("pipe", "folder", "data", "is a file: give the name of a folder"),
    ("a.zip/b/c.npz", "file", "data", "cannot create the folder .*a.zip is a file"),
])
def test_what_is_refused(place, name, kind, source, message):
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=f"^--dest .*{message}"):
        check_outputs([Output("--dest", f"{place}/{name}", kind)], {"--source": f"{place}/{source}"})
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["ema_0.9999_000006.pt", "checkpoint_000006.json", "config.json", "progress.csv"])
def test_a_file_that_a_run_keeps_is_no_output(place, name):
    """--out runs/edm/ema_0.9999_000006.pt in the place of --model_path, or --json runs/edm/config.json."""
    output = Output("--out", place / name, beside_input=True)
    check_outputs([output], {"--run": place})               # where there is no such file
    (place / name).write_bytes(b"work of a month")
    if name not in ("checkpoint_000006.json", "progress.csv"):
        check_outputs([output], {"--run": place})           # and no run
    (place / "checkpoint_000002.json").write_text("{}")
    with pytest.raises(UserError, match=f"--out .*{name} is a file of the training run in .*, which would be lost"):
        check_outputs([output], {"--run": place})


def test_what_is_allowed(place):
    outputs = [
        Output("--out", place / "new" / "x.ts"), Output("--json", place / "data" / "x.json", beside_input=True),
        Output("--dest", place / "folder", "folder"), Output("--log_dir", ""), Output("--remote", "gs://bucket/a"),
        Output("--none", "/dev/null"),
    ]
    check_outputs(outputs, {"--data": place / "data", "--word": "digits", "--no": None, "--url": "gs://bucket/a"})


def test_two_outputs_are_two_files(place):
    outputs = [Output("--out", place / "my.json"), Output("the facts", f"{place}/data/../my.json")]
    with pytest.raises(UserError, match="--out and the facts are both .*my.json: give them different names"):
        check_outputs(outputs, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(place):
    (place / "data").chmod(0o500)
    with pytest.raises(UserError, match="data cannot be written"):
        check_outputs([Output("--out", place / "data" / "x")], {})
