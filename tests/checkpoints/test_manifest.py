"""Checkpoints appear whole or not at all, survive a power cut, and are found again."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch as th

from cm.checkpoints import file_names, leftovers, manifest
from cm.checkpoints.loading import WeightsFile
from cm.errors import UserError
from support.damage import flip_a_bit, truncate

CONTENT = {"model": {"w": th.arange(6.0)}, "ema_0.9999": {"w": th.ones(6)}, "opt": {"state": {}}}


def save(directory, step):
    return manifest.save(str(directory), step, CONTENT, {"image_size": 8}, step * 4)


def test_a_saved_checkpoint_is_found_with_everything_it_holds(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    found = manifest.newest(str(tmp_path))
    assert (found.step, found.images_seen, found.config) == (20, 80, {"image_size": 8})
    assert sorted(found.names()) == ["ema_0.9999", "model", "opt"]
    assert th.equal(th.load(found.path("model"), weights_only=True)["w"], CONTENT["model"]["w"])
    assert found.path("target_model") is None
    assert manifest.beside(str(tmp_path / "ema_0.9999_000010.pt")).step == 10
    assert manifest.beside(str(tmp_path / "ema_0.9999_000011.pt")) is None


def test_class_names_are_kept_and_older_manifests_have_none(tmp_path):
    manifest.save(str(tmp_path), 10, CONTENT, {}, 40, classes=("ant", "cat"))
    path = tmp_path / "checkpoint_000010.json"
    assert manifest.read(str(path)).class_names == ("ant", "cat")
    content = json.loads(path.read_text())
    for names, message in ((["ant", "ant"], "a name twice"), ("ant", "not a list"), ([1], "not a list")):
        changed = content | {"class_names": names}
        path.write_text(json.dumps(changed | {manifest.CHECKSUM: manifest.checksum(changed)}))
        with pytest.raises(UserError, match=message):
            manifest.read(str(path))
    del content["class_names"]
    path.write_text(json.dumps(content | {manifest.CHECKSUM: manifest.checksum(content)}))
    assert manifest.read(str(path)).class_names == ()


def test_a_power_cut_after_a_save_finds_all_of_it(tmp_path, monkeypatch):
    """Each file is on disk before it has its name, each name before the manifest, and the manifest's before the end."""
    real, synced = os.fsync, []                             # (is a folder, inode, names in the folder at that moment)

    def fsync(handle):
        about = os.fstat(handle)
        synced.append((stat.S_ISDIR(about.st_mode), about.st_ino, set(os.listdir(tmp_path))))
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    saved = save(tmp_path, 10)
    order = [*saved.files, "checkpoint_000010.json"]
    inodes = {name: (tmp_path / name).stat().st_ino for name in order}
    names_of_folder = [names for is_folder, inode, names in synced if is_folder and inode == tmp_path.stat().st_ino]
    for name, later in zip(order, [*order[1:], None]):
        at_sync = [names for is_folder, inode, names in synced if not is_folder and inode == inodes[name]]
        assert len(at_sync) == 1 and name not in at_sync[0], f"{name} had its name before its content was on disk"
        assert any(name in names and later not in names for names in names_of_folder), f"the name {name} may be lost"


DAMAGES = {
    "file missing": lambda folder: (folder / "opt000020.pt").unlink(),
    "file truncated": lambda folder: truncate(folder / "model000020.pt"),
    "bit flipped": lambda folder: flip_a_bit(folder / "ema_0.9999_000020.pt"),
    "manifest missing": lambda folder: (folder / "checkpoint_000020.json").unlink(),
    "manifest truncated": lambda folder: truncate(folder / "checkpoint_000020.json"),
    "manifest of another kind": lambda folder: (folder / "checkpoint_000020.json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(tmp_path)
    assert manifest.newest(str(tmp_path)).step == 10


def test_nothing_to_find(tmp_path):
    assert manifest.newest(str(tmp_path)) is None
    assert manifest.newest(str(tmp_path / "absent")) is None


def test_killed_while_saving_never_leaves_a_broken_newest(tmp_path):
    program = tmp_path / "saver.py"
    program.write_text(textwrap.dedent(f"""
        import itertools, torch as th
        from cm.checkpoints import manifest
        for step in itertools.count(1):
            manifest.save({str(tmp_path)!r}, step, {{"model": {{"w": th.full((300_000,), float(step))}}}}, {{}}, step)
            print(step, flush=True)
    """))
    for kill in range(3):
        saver = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
        saver.stdout.readline()
        time.sleep(0.013 * (kill + 1))
        os.kill(saver.pid, signal.SIGKILL)
        saver.wait()
        found = manifest.newest(str(tmp_path))
        assert (th.load(found.path("model"), weights_only=True)["w"] == found.step).all()
    (tmp_path / "model000001.pt.partial").write_bytes(b"left behind")
    leftovers.remove_partial(str(tmp_path))
    assert not list(tmp_path.glob("*.partial"))


def test_a_changed_manifest_is_passed_over_and_refused(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = tmp_path / "checkpoint_000020.json"
    good = json.loads(path.read_text())
    for change in ({"images_seen": 24}, {"step": 21}, {"config": {"image_size": 9}}, {"format": 1}):
        path.write_text(json.dumps(good | change))
        assert manifest.newest(str(tmp_path)).step == 10
        with pytest.raises(UserError, match="checkpoint_000020.json is damaged or was edited.*restore it"):
            manifest.beside(str(tmp_path / "model000020.pt"))
    path.write_text(json.dumps(good, sort_keys=True))
    assert manifest.newest(str(tmp_path)).step == 20
    path.rename(tmp_path / "checkpoint_000030.json")
    with pytest.raises(UserError, match="is a manifest of step 20, but its name says 30"):
        manifest.read(str(tmp_path / "checkpoint_000030.json"))


def test_a_manifest_of_an_older_version_is_read_with_one_notice(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(manifest.logger, "log", lambda *words: said.append(words[0]))
    save(tmp_path, 10)
    path = tmp_path / "checkpoint_000010.json"
    old = json.loads(path.read_text()) | {"format": 1}
    del old["manifest_crc32"]
    path.write_text(json.dumps(old))
    assert manifest.newest(str(tmp_path)).step == manifest.newest(str(tmp_path)).step == 10
    assert len(said) == 1 and "without its own checksum" in said[0]


@pytest.mark.parametrize("name", ["model", "ema_0.9999", "opt", "manifest"])
def test_every_flipped_bit_is_noticed_or_harmless(tmp_path, name):
    """By resuming (newest), and by what sampling and conversion read: the manifest, and the file that it describes."""
    saved = save(tmp_path, 10)
    path = tmp_path / ("checkpoint_000010.json" if name == "manifest" else file_names.file_name(name, 10))
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(good), 100):
        data = bytearray(good)
        data[place // 8] ^= 1 << (place % 8)
        path.write_bytes(data)
        found = manifest.newest(str(tmp_path))
        assert found is None or (name == "manifest" and found == saved), place
        try:
            beside = manifest.beside(str(tmp_path / "model000010.pt"))
            read = path if name != "manifest" else tmp_path / "model000010.pt"
            WeightsFile(str(read), expected=beside.facts(str(read))).take()
        except UserError:
            continue
        assert name == "manifest" and beside == saved, place


def test_only_own_files_are_swept(tmp_path):
    save(tmp_path, 10)
    for stranger in ("notes.partial", "video.mp4.partial", "model.pt.partial", ".x.cm-0123456789ab.partial"):
        (tmp_path / stranger).write_text("not ours")
    for folder in ("model000010.pt.partial", "checkpoint_000030.json.partial"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model000030.pt").write_text("of a run without manifests")
    (tmp_path / ".opt000010.pt.cm-0123456789ab.partial").write_text("ours")
    before = set(os.listdir(tmp_path))
    leftovers.remove_partial(str(tmp_path))
    assert before - set(os.listdir(tmp_path)) == {".opt000010.pt.cm-0123456789ab.partial"}
