"""Files appear complete or not at all, whatever happens while they are written, and every failure is one message."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch as th

from cm.checkpoints import leftovers, manifest
from cm.errors import UserError
from cm.generate.grids import save_picture
from cm.generate.npz import NpzWriter
from cm.io import atomic, storage
from support.mpi import clean_environment, program, start
from support.own_mounts import NAMESPACES, needs_own_mounts


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def npz(folder):
    writer = NpzWriter(str(folder), 4, 8, 8, with_labels=True)
    writer.put(np.arange(4), np.full((4, 8, 8, 3), 7, np.uint8), np.arange(4))
    return writer.close()


# --- on the disk before it counts ------------------------------------------------------------------------------------


SAVES = {
    "checkpoint": lambda folder: manifest.save(str(folder), 3, {"model": {"w": th.ones(3)}}, {}, 3),
    "json": lambda folder: storage.write_json(folder / "x.json", [1]),
    "npz": npz,
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_file_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch, save):
    """A rename that reaches the disk before the data, or does not reach it, would lose the file in a power cut."""
    events, fsync, replace = [], os.fsync, os.replace

    def sync(handle):
        info = os.fstat(handle)
        events.append(("folder" if stat.S_ISDIR(info.st_mode) else "file", info.st_ino))
        fsync(handle)

    def rename(path, new):
        events.append(("rename", os.stat(path).st_ino))
        replace(path, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    save(tmp_path)
    saved = [i for i, (what, _) in enumerate(events) if what == "rename"]
    assert saved
    for i in saved:
        assert events[i - 1] == ("file", events[i][1]), "the data of this very file, before its rename"
        assert events[i + 1] == ("folder", os.stat(tmp_path).st_ino), "its folder, after the rename"


def test_files_of_a_set_that_is_checked_later_need_not_be_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("not asked for"))
    assert storage.write_atomically(tmp_path / "x", lambda file: file.write(b"abc"), durable=False)["size"] == 3
    assert (tmp_path / "x").read_bytes() == b"abc"


# --- killed ----------------------------------------------------------------------------------------------------------


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from cm.generate.npz import NpzWriter
    from cm.io import storage

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    folder = Path(sys.argv[1])
    if sys.argv[2] == "json":
        os.replace = die                                    # after the write, before the rename
        storage.write_json(folder / "x.json", ["new"] * 1000)
    else:
        writer = NpzWriter(str(folder), 100, 64, 64, with_labels=False)
        writer.put(np.arange(50), np.ones((50, 64, 64, 3), np.uint8), None)
        die()
"""


def kill_while_writing(tmp_path, folder, what):
    code = textwrap.dedent(KILLED)
    done = subprocess.run([sys.executable, "-c", code, str(folder), what], env=clean_environment(), timeout=120)
    assert done.returncode == -signal.SIGKILL


def test_a_kill_before_the_rename_leaves_the_old_file_and_a_temporary_one_that_is_recognized(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    storage.write_json(folder / "x.json", "old")
    (folder / "x.json.partial").write_text("of another program")
    os.utime(folder / "x.json.partial", (0, 0))
    kill_while_writing(tmp_path, folder, "json")
    assert json.loads((folder / "x.json").read_text()) == "old"
    (left,) = set(names(folder)) - {"x.json", "x.json.partial"}
    assert atomic.written_for(left) == "x.json"
    atomic.remove_old_temporaries(folder)
    assert left in names(folder), "another process may still be writing it"
    os.utime(folder / left, (0, 0))
    atomic.remove_old_temporaries(folder)
    assert names(folder) == ["x.json", "x.json.partial"]
    kill_while_writing(tmp_path, folder, "json")
    atomic.remove_temporaries(folder / "another.json")
    assert len(names(folder)) == 3
    atomic.remove_temporaries(folder / "x.json")
    assert names(folder) == ["x.json", "x.json.partial"]


def test_a_kill_while_sampling_leaves_nothing(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    kill_while_writing(tmp_path, folder, "npz")
    assert names(folder) == []


def test_a_start_removes_what_is_of_checkpoints_and_nothing_else(tmp_path):
    manifest.save(str(tmp_path), 1, {"model": {}}, {}, 1)
    strangers = ["download.partial", "notes.txt.partial", ".x.json.cm-0123456789ab.partial", "model000002.pt.part"]
    ours = ["model000002.pt.partial", ".model000002.pt.cm-0123456789ab.partial", "checkpoint_000002.json.partial",
            ".checkpoint_000003.json.partial.cm-0123456789ab.partial", "model000003.pt"]
    for name in [*strangers, *ours]:
        (tmp_path / name).write_text("x")
    leftovers.remove_partial(str(tmp_path))
    assert names(tmp_path) == sorted([*strangers, "model000001.pt", "checkpoint_000001.json"])


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.json", "a b\n.pt", "\u00e9" * 90, os.fsdecode(b"\xff\xfe"), "y" * 200])
def test_temporary_names_say_what_they_are_for(tmp_path, name):
    temporary = os.path.basename(atomic.temporary_path(str(tmp_path / name)))
    assert atomic.written_for(temporary) == name and temporary.startswith(".")
    storage.write_bytes(tmp_path / name, b"x")
    assert names(tmp_path) == [name]


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path):
    storage.write_bytes(tmp_path / ("z" * 255), b"x")
    assert names(tmp_path) == ["z" * 255]


def test_names_of_other_programs_are_not_taken_for_temporary_ones():
    others = ("x.partial", ".x.partial", ".x.cm-0123.partial", ".x.cm-0123456789ab.part", "x.cm-0123456789ab.partial")
    for name in others:
        assert atomic.written_for(name) is None


def test_links_are_never_followed(tmp_path, monkeypatch):
    """Not even one that stands under the temporary name; one under the final name is replaced."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "x").symlink_to(victim)
    storage.write_bytes(tmp_path / "x", b"new")
    assert not (tmp_path / "x").is_symlink() and (tmp_path / "x").read_bytes() == b"new"
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda count: "0" * 12)
    (tmp_path / atomic.temporary_path("x")).symlink_to(victim)
    with pytest.raises(UserError, match="cannot write .*x: File exists"):
        storage.write_bytes(tmp_path / "x", b"newer")
    assert victim.read_text() == "mine" and (tmp_path / "x").read_bytes() == b"new"


def test_a_device_or_pipe_is_written_to_and_not_replaced(tmp_path):
    """A pipe of the test's own is written to; a device of the machine is only looked at, so that no failure of this
    test can replace it.
    """
    assert atomic.is_stream(os.devnull) and not atomic.is_stream(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    storage.write_json(tmp_path / "pipe", [1])
    assert os.read(reader, 100) == b"[\n  1\n]" and names(tmp_path) == ["pipe"]
    os.close(reader)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("x"), UserError("mine")], ids=repr)
def test_what_is_raised_inside_goes_on_and_leaves_nothing(tmp_path, error):
    def breaks(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as raised:
        storage.write_atomically(tmp_path / "x", breaks)
    assert raised.value is error and names(tmp_path) == []


@pytest.mark.parametrize("path, words", [
    ("nowhere/x", "No such file or directory.*Create the folder"),
    ("file/x", "Not a directory"),
    ("folder", "Is a directory"),
])
def test_places_where_nothing_can_be_written(tmp_path, path, words):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"cannot write {re.escape(str(tmp_path / path))}: {words}"):
        storage.write_bytes(tmp_path / path, b"x")
    assert names(tmp_path) == ["file", "folder"]


WRITERS = """
    import os
    import sys
    from pathlib import Path

    import numpy as np
    import torch as th
    from PIL import Image

    from cm.checkpoints import manifest
    from cm.checkpoints.formats import safetensor_files
    from cm.errors import UserError
    from cm.generate.grids import save_picture
    from cm.generate.npz import NpzWriter
    from cm.generate.png import _write_png
    from cm.io import storage
    from cm.logging.files import replace_file

    folder, how = Path(sys.argv[1]), sys.argv[2]
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    storage.free_bytes = lambda directory: 10**9            # a check before the save would find the full disk already
    MARKER = "checkpoint_000001.json.partial"               # the first file of a checkpoint
    WRITERS = {
        "model000001.pt": lambda path: manifest.save(str(folder), 1, {"model": {"w": th.ones(10**5)}}, {}, 1),
        "x.safetensors": lambda path: safetensor_files.write(str(path), {"w": th.ones(10**5)}),
        "x.json": lambda path: storage.write_json(path, "x" * 10**6),
        "grid.png": lambda path: save_picture(path, Image.fromarray(noise)),
        "000000.png": lambda path: _write_png(path, noise),
        "samples_4x99x99x3.npz": lambda path: NpzWriter(str(folder), 4, 99, 99, False).close(),
        "progress.csv": lambda path: replace_file(path, "x" * 10**6),
    }
    for name, write in WRITERS.items():
        before = sorted(os.listdir(folder))
        try:
            write(folder / name)
            print(name, "was written")
        except UserError as error:
            text = str(error)
            named = any(text.startswith(f"cannot write {folder / each}: ") for each in (name, MARKER))
            remedy = "Free some space" in text or "Make the folder writable" in text
            print(named, how in text, f"MiB are free in {folder}. " in text, remedy,
                  sorted(os.listdir(folder)) == before or name)
    print(len(WRITERS), "done")
"""


@needs_own_mounts
@pytest.mark.parametrize("how, prepare", [
    ("No space left", "head -c 250000 /dev/zero > {}/filler"),
    ("Read-only file system", "mount -o remount,ro none {}"),
])
def test_every_writer_reports_a_full_disk_and_a_folder_that_takes_nothing(tmp_path, how, prepare):
    """A real disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    source = program(tmp_path, WRITERS)
    script = (f"mount -t tmpfs -o size=256k none {disk} && {prepare.format(disk)} && "
              f"{sys.executable} {source} {disk} '{how}'")
    done = start([*NAMESPACES, "sh", "-c", script])
    assert done.rc == 0, done
    *lines, last = done.stdout.splitlines()
    assert last == f"{len(lines)} done" and len(lines) == 7 and set(lines) == {"True True True True True"}, done


def test_a_disk_that_fills_up_while_an_npz_is_packed(tmp_path, monkeypatch):
    """The rows are there already; their copy finds no room."""
    writer = NpzWriter(str(tmp_path), 4, 8, 8, with_labels=False)

    def full(source, target, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cm.generate.npz.shutil.copyfileobj", full)
    with pytest.raises(UserError, match="cannot write .*samples_4x8x8x3.npz: No space left.*MiB are free.*Free some"):
        writer.close()
    assert names(tmp_path) == []


def test_a_picture_is_the_same_file_as_pillows_own(tmp_path):
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    picture.save(tmp_path / "theirs.png")
    save_picture(tmp_path / "ours.png", picture)
    assert (tmp_path / "ours.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()


# --- fixed names that cannot be replaced -----------------------------------------------------------------------------


def test_a_file_of_a_fixed_name_is_no_link_and_no_pipe(tmp_path):
    victim, link, pipe = tmp_path / "victim", tmp_path / "log.txt", tmp_path / "pipe"
    victim.write_text("a month of work")
    link.symlink_to(victim)
    os.mkfifo(pipe)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for flags in (append, append | os.O_TRUNC, os.O_RDONLY):
        with pytest.raises(OSError, match="log.txt is a symbolic link, which is not followed: remove it"):
            atomic.open_own(link, flags)
    link.unlink()
    link.symlink_to(tmp_path / "not-there-yet")
    with pytest.raises(OSError, match="symbolic link"):
        atomic.open_own(link, append)
    for flags in (os.O_RDWR, os.O_RDONLY):
        with pytest.raises(OSError, match="pipe is no regular file"):
            atomic.open_own(pipe, flags)
    assert victim.read_text() == "a month of work" and names(tmp_path) == ["log.txt", "pipe", "victim"]
    os.close(atomic.open_own(tmp_path / "new", append))
    assert (tmp_path / "new").read_bytes() == b""


def test_a_file_that_another_command_has_removed_is_not_a_missing_folder(tmp_path):
    writer = atomic.AtomicFile(tmp_path / "x.zip")
    writer.file.write(b"half")
    atomic.remove_temporaries(tmp_path / "x.zip")           # as a second command does at its start
    with pytest.raises(UserError, match="x.zip: what was written so far is gone; another command that writes"):
        writer.commit()
    with pytest.raises(UserError, match="Create the folder"):
        atomic.AtomicFile(tmp_path / "nowhere" / "x.zip")
