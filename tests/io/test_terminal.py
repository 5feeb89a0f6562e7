"""A stream whose reader has gone, and text that a terminal shows as it is."""

import errno
import os

import pytest

from cm.io import terminal


class Full:
    closed = False

    def write(self, text):
        raise OSError(errno.ENOSPC, "full")


def test_a_stream_without_reader_falls_silent():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        stream = terminal.LastingStream(pipe)
        for _ in range(2):
            assert stream.write("x") == 1
            stream.flush()
        os.write(write_end, b"also what bypasses it")


def test_a_full_disk_is_an_error_unless_text_may_be_lost():
    with pytest.raises(OSError, match="full"):
        terminal.LastingStream(Full()).write("x")
    assert terminal.LastingStream(Full(), lossy=True).write("x") == 1


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
