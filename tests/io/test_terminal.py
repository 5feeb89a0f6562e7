"""A stream whose reader has gone, and text that a terminal shows as it is."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cm.errors import UserError
from cm.io import terminal

ROOT = Path(__file__).resolve().parents[2]


class Full:
    closed = False

    def write(self, text):
        raise OSError(errno.ENOSPC, "full")

    def fileno(self):
        raise OSError("no descriptor")


def test_a_stream_without_reader_falls_silent():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        stream = terminal.LastingStream(pipe)
        for _ in range(2):
            assert stream.write("x") == 1
            stream.flush()
        os.write(write_end, b"also what bypasses it")


def test_a_full_disk_is_an_error_unless_text_may_be_lost(monkeypatch):
    with pytest.raises(UserError, match="a stream cannot be written: full"):
        terminal.LastingStream(Full()).write("x")
    stream = terminal.LastingStream(Full(), lossy=True)
    assert stream.write("x") == 1
    monkeypatch.setattr("sys.stdout", stream)               # of a training, until it prints a result: --help, --dry_run
    terminal.demand_stdout()
    with pytest.raises(UserError, match="full"):
        print("x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_command_says_once_that_its_result_could_not_be_written(tmp_path):
    """Also where text is held back until the end; what cannot go to stderr is lost, and ends nothing."""
    code = "from cm.config import early_exit, schema; from cm.config.flags import parse;" \
        "early_exit.parse_or_exit(lambda: parse('x', schema.RunConfig)); print('x', file=sys.stderr); print('done')"
    for words, out, err, expected in ((["--help"], "full", "err", 2), (["--dry_run"], "out", "full", 0)):
        with open("/dev/full", "w") as full, open(tmp_path / "text", "w") as text:
            done = subprocess.run([sys.executable, "-c", f"import sys; {code}", *words], cwd=ROOT,
                                  stdout=full if out == "full" else text, stderr=full if err == "full" else text)
        assert done.returncode == expected, (tmp_path / "text").read_text()
        told = (tmp_path / "text").read_text().splitlines()
        assert told == (["error: stdout cannot be written: No space left on device"] if out == "full" else ["done"])


def test_control_characters_become_escapes():
    assert terminal.printable("é a\x1b[31m\n\udce9") == "é a\\x1b[31m\\n\\xe9"
    assert terminal.without_controls("a\tb\n\x07\u202e") == "a\tb\n\\x07\\u202e"


def test_stdout_may_be_kept_for_data(capsys):
    """The lines of a log then go to stderr: `... --dry_run | jq` gets JSON alone."""
    from cm.config.flags import parse
    from cm.config.schema import RunConfig
    from cm.logging import logger

    for words, streams in ((["--dry_run"], ("", "a line\n")), ([], ("a line\n", ""))):
        parse("", RunConfig, argv=words)
        logger.log("a line")
        assert tuple(capsys.readouterr()) == streams
