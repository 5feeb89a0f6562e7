"""The checkpoints of a run: which stay, which one it goes on from, full disks, stores that fail."""

import dataclasses
import json
import os
import signal
import sys
import time
import types

import pytest
import torch as th

from cm.checkpoints import file_names, manager, serialization
from cm.checkpoints import manifest as state
from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS, TrainConfig
from cm.errors import UserError
from cm.io import storage
from cm.logging import logger
from cm.setup.train import loop_config
from cm.setup.weights_path import weights_in
from support.damage import flip_a_bit, truncate
from support.mpi import program, start
from support.own_mounts import NAMESPACES, needs_own_mounts
from support.training import digest, loop, run

CONTENT = {"model": {"w": th.arange(6.0)}, "ema_0.9": {"w": th.ones(6)}, "opt": {"state": {}}, "trainer": {}}


def steps_of(directory, name):
    found = [parsed for path in directory.iterdir() if (parsed := file_names.parse_name(path.name))]
    return sorted(step for kind, step in found if kind == name)


def save_all(directory, steps, **options):
    keeper = manager.CheckpointManager(str(directory), **options)
    with logger.scoped_configure(str(directory), format_strs=["log"]):
        for step in steps:
            keeper.save(keeper.checkpoint(step, step, {}), CONTENT, is_last=False)
    return keeper


# --- which ones stay --------------------------------------------------------------------------------------------------


def test_the_last_ones_stay_and_the_averages_of_milestones_and_the_best(tmp_path):
    (tmp_path / "best.json").write_text('{"step": 3, "value": 2.5}')
    save_all(tmp_path, range(1, 10), keep=2, milestone_interval=4)
    assert file_names.steps(str(tmp_path)) == [3, 4, 8, 9]
    assert steps_of(tmp_path, "model") == steps_of(tmp_path, "opt") == [3, 8, 9]
    assert steps_of(tmp_path, "ema_0.9") == [3, 4, 8, 9]
    milestone = state.beside(str(tmp_path / "ema_0.9_000004.pt"))
    assert milestone.names() == ["ema_0.9"] and milestone.problem() is None
    for step in (8, 9):
        truncate(tmp_path / f"opt{step:06d}.pt")
    assert state.newest(str(tmp_path)).step == 3            # never the milestone, which lacks the rest


def test_only_files_of_the_checkpoints_own_names_are_removed(tmp_path):
    """A manifest may have been written by others, and list what lies next to it."""
    save_all(tmp_path, [1])
    others = ["notes.txt", "model000007.pt", ".lock"]
    for name in others:
        (tmp_path / name).write_text("a month of work")
    first = state.read(str(tmp_path / "checkpoint_000001.json"))
    facts = {"size": 15, "crc32": 0}
    dataclasses.replace(first, files=first.files | dict.fromkeys(others, facts)).write_manifest()
    save_all(tmp_path, [2], keep=1)
    assert file_names.steps(str(tmp_path)) == [2] and steps_of(tmp_path, "opt") == [2]
    assert all((tmp_path / name).read_text() == "a month of work" for name in others)


def test_all_stay_unless_told_otherwise(tmp_path):
    save_all(tmp_path, range(1, 5))
    assert file_names.steps(str(tmp_path)) == steps_of(tmp_path, "model") == [1, 2, 3, 4]


def test_nothing_is_removed_while_the_best_is_not_known(tmp_path):
    (tmp_path / "best.json").write_text('{"ste')
    save_all(tmp_path, range(1, 4), keep=1)
    assert file_names.steps(str(tmp_path)) == [1, 2, 3]
    assert "old checkpoints" in (tmp_path / "log.txt").read_text()


def test_pruning_a_run_in_training(images, tmp_path):
    run(images, tmp_path, 5, save_interval=1, keep_checkpoints=2, milestone_interval=2)
    assert file_names.steps(str(tmp_path)) == [2, 4, 5] and steps_of(tmp_path, "model") == [4, 5]
    assert steps_of(tmp_path, "ema_0.5") == [2, 4, 5]


def found_and_saved(directory, steps, resume="auto", **options):
    """A manager that looks for its run, as the loop does, and saves."""
    keeper = manager.CheckpointManager(str(directory), **options)
    keeper.find(resume)
    with logger.scoped_configure(str(directory), format_strs=["log"]):
        for step in steps:
            keeper.save(keeper.checkpoint(step, step, {"keep_checkpoints": keeper.keep}), CONTENT, is_last=False)
    return keeper


def test_a_new_run_keeps_three(tmp_path):
    found_and_saved(tmp_path, range(1, 7), keep=None, milestone_interval=2)
    assert file_names.steps(str(tmp_path)) == [2, 4, 5, 6] and steps_of(tmp_path, "model") == [4, 5, 6]
    found_and_saved(tmp_path, [7], keep=None)                       # without milestones: what was one stays
    assert file_names.steps(str(tmp_path)) == [2, 5, 6, 7] and steps_of(tmp_path, "ema_0.9") == [2, 5, 6, 7]
    found_and_saved(tmp_path, [8], keep=1)
    assert file_names.steps(str(tmp_path)) == [2, 8]


@pytest.mark.parametrize("config, keep", [({}, 0), ({"keep_checkpoints": 0}, 0), ({"keep_checkpoints": 5}, 5),
                                          ({"keep_checkpoints": "all"}, 0)])
def test_a_resumed_run_keeps_as_many_as_before(tmp_path, config, keep):
    save_all(tmp_path, range(1, 7))
    newest = state.read(str(tmp_path / "checkpoint_000006.json"))
    dataclasses.replace(newest, config=config).write_manifest()
    assert found_and_saved(tmp_path, [7], keep=None).keep == keep
    assert len(file_names.steps(str(tmp_path))) == (keep or 7)


def test_what_another_run_or_another_tool_saved_stays(tmp_path):
    found_and_saved(tmp_path / "other", range(1, 5))
    own = tmp_path / "own"
    found_and_saved(own, [10, 11], keep=1)
    for path in (tmp_path / "other").iterdir():                     # copied there to have it at hand
        if file_names.belongs(path.name):
            (own / path.name).write_bytes(path.read_bytes())
    (own / "model000005.pt").write_bytes(b"the original's tools write no manifest")
    found_and_saved(own, [12], keep=1)
    assert file_names.steps(str(own)) == [1, 2, 3, 4, 12] and steps_of(own, "model") == [1, 2, 3, 4, 5, 12]


def test_a_run_that_starts_from_another_keeps_out_of_its_folder(tmp_path):
    found_and_saved(tmp_path / "a", [1, 2, 3])
    keeper = found_and_saved(tmp_path / "b", [4, 5], resume=str(tmp_path / "a"), keep=1)
    assert file_names.steps(str(tmp_path / "a")) == [1, 2, 3] and file_names.steps(str(tmp_path / "b")) == [5]
    assert keeper.run != state.read(str(tmp_path / "a/checkpoint_000003.json")).run


@pytest.mark.parametrize("log, kept, given, remedy", [
    ("log", "log", "elsewhere", "give no --checkpoint_dir"),
    ("log", "elsewhere", "log", "give --checkpoint_dir ELSEWHERE"),
])
def test_a_run_is_not_begun_anew_for_want_of_a_flag(tmp_path, log, kept, given, remedy):
    """The log of its first steps would be cut off, and the work done again."""
    save_all(tmp_path / kept, [4])
    (tmp_path / log).mkdir(exist_ok=True)
    config = tmp_path / log / "config.json"
    config.write_text(json.dumps({"checkpoint_dir": "" if kept == log else str(tmp_path / kept)}))
    keeper = manager.CheckpointManager(str(tmp_path / given))
    with logger.scoped_configure(str(tmp_path / log), format_strs=["log"]):
        remedy = remedy.replace("ELSEWHERE", str(tmp_path / kept))
        with pytest.raises(UserError, match=f"keeps its checkpoints in .*{kept}, and .*{given} holds none: {remedy}"):
            keeper.find("auto")
        config.write_text("{")
        assert keeper.find("auto") is None                  # nothing is known of another run


def test_the_flags_say_how_many_stay():
    """The default of the commands, a number given, and milestones at every tenth checkpoint."""
    def config(*words):
        return loop_config(parse("", *TRAINING_SECTIONS, argv=["--save_interval", "50", *words]))

    assert TrainConfig().keep_checkpoints == manager.KEEP == 3
    assert (config().keep_checkpoints, config().milestone_interval) == (None, 500)
    assert config("--keep_checkpoints", "7", "--milestone_interval", "0").keep_checkpoints == 7
    assert config("--milestone_interval", "20").milestone_interval == 20


# --- which one a run goes on from -------------------------------------------------------------------------------------


@pytest.fixture
def straight(images, tmp_path):
    run(images, tmp_path / "straight", 6, save_interval=2)
    return tmp_path / "straight"


@pytest.mark.parametrize("name", ["checkpoint_000002.json", "model000002.pt", "opt000002.pt", "ema_0.5_000002.pt"])
def test_resume_names_a_checkpoint_by_any_of_its_files(images, straight, tmp_path, name):
    directory = tmp_path / "other"
    for steps in (4, 6):                                    # the second time the same command goes on in its own folder
        again = loop(images, directory, steps, resume=str(straight / name))
        assert again.step == (2 if steps == 4 else 4)
        again.run_loop()
    assert digest(directory, 6) == digest(straight, 6)
    assert file_names.steps(str(directory)) == [4, 6]


def test_resume_names_a_folder(images, straight, tmp_path):
    assert loop(images, tmp_path / "other", 8, resume=str(straight)).step == 6
    assert loop(images, straight, 8, resume=str(straight)).step == 6


def test_going_back_in_a_run(images, straight):
    """What comes later is set aside, and the same command again goes on with the new branch."""
    old, path = digest(straight, 6), str(straight / "checkpoint_000002.json")
    back = loop(images, straight, 3, resume=path, seed=1)
    assert back.step == 2 and file_names.steps(str(straight)) == [2]
    assert len((straight / "progress.csv").read_text().splitlines()) == 1 + 2
    assert (straight / "checkpoint_000006.json.aside").exists() and digest(straight, 6) == old
    back.run_loop()
    assert loop(images, straight, 6, resume=path, seed=1).step == 3
    assert loop(images, straight, 6, resume="auto").step == 3


def test_paths_that_cannot_be_resumed(images, straight, tmp_path):
    run(images, tmp_path / "own", 1)
    bare = tmp_path / "model000007.pt"
    bare.write_bytes((straight / "model000006.pt").read_bytes())
    (tmp_path / "empty").mkdir()
    flip_a_bit(straight / "opt000004.pt")
    page = tmp_path / "checkpoint_000001.json"
    page.write_text("<!doctype html>")
    for directory, resume, message in [
        ("new", tmp_path / "nowhere", "no such file; give auto, never, a manifest"),
        ("new", bare, "there is no manifest next to these weights.*--resume_checkpoint"),
        ("new", tmp_path / "empty", "holds no complete checkpoint"),
        ("new", straight / "model000004.pt", "opt000004.pt is truncated or damaged"),
        ("new", page, "is not a manifest"),
        ("own", straight, "holds a run of its own, at step 1.*--log_dir"),
    ]:
        with pytest.raises(UserError, match=message):
            loop(images, tmp_path / directory, 8, resume=str(resume))


LOOKALIKES = {
    "empty": b"", "a page": b"<!DOCTYPE html><html></html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
}


@pytest.mark.parametrize("kind", LOOKALIKES)
@pytest.mark.parametrize("name", ["model000004.pt", "checkpoint_000004.json"])
def test_a_run_goes_on_from_the_one_before_a_damaged_newest(tmp_path, kind, name):
    keeper = save_all(tmp_path, (2, 4))
    (tmp_path / name).write_bytes(LOOKALIKES[kind])
    with logger.scoped_configure(str(tmp_path), format_strs=["log"]):
        assert keeper.find("auto").step == 2
    assert "skipping checkpoint_000004.json" in (tmp_path / "log.txt").read_text()


def test_a_run_of_damaged_checkpoints_alone_does_not_begin_anew_unasked(images, tmp_path):
    """Weeks of training must not be written over because the disk was bad."""
    run(images, tmp_path / "run", 1)
    run(images, tmp_path / "run", 2)
    for step in (1, 2):
        flip_a_bit(tmp_path / "run" / f"model{step:06d}.pt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    with pytest.raises(UserError, match="none that a run can resume from.*--resume never"):
        loop(images, tmp_path / "run", 3, resume="auto")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    assert loop(images, tmp_path / "run", 3, resume="never").step == 0


# --- saves that fail --------------------------------------------------------------------------------------------------


def fail_at(monkeypatch, directory, step):
    """A disk that is full in the middle of a checkpoint."""
    real = serialization.save_tensors

    def full(path, content):
        if path.endswith(f"ema_0.9_{step:06d}.pt"):
            return storage.write_atomically(path, lambda file: (file.write(b"half"), os.write(full_device, b"x")))
        return real(path, content)

    full_device = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(serialization, "save_tensors", full)


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_save_that_fails(images, tmp_path, monkeypatch, on_save_error):
    fail_at(monkeypatch, tmp_path, 4)
    training = loop(images, tmp_path, 6, save_interval=2, on_save_error=on_save_error)
    message = r"cannot write .*ema_0.9_000004.pt.*No space left.*step 4 needs [\d,]+ bytes.*[\d,]+ bytes are free"
    if on_save_error == "stop":
        with pytest.raises(UserError, match=message):
            training.run_loop()
        assert state.newest(str(tmp_path)).step == 2
    else:
        training.run_loop()
        assert file_names.steps(str(tmp_path)) == [2, 6]
    assert steps_of(tmp_path, "model") == file_names.steps(str(tmp_path))    # what was written of step 4 is gone
    assert not list(tmp_path.glob("*.partial"))


def test_the_last_save_must_not_fail(images, tmp_path, monkeypatch):
    fail_at(monkeypatch, tmp_path, 4)
    with pytest.raises(UserError, match="No space left"):
        run(images, tmp_path, 4, save_interval=2, on_save_error="continue")


def test_a_save_that_has_no_room_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda directory: 30)
    message = "not enough space in .*step 1 needs 48 bytes.*30 bytes are free.*--keep_checkpoints"
    with pytest.raises(UserError, match=message):
        state.save(str(tmp_path / "run"), 1, CONTENT, {}, 1)
    assert not list((tmp_path / "run").iterdir())


def test_the_flag_and_its_table():
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    assert set(fields["on_save_error"].metadata["choices"]) == set(manager.ON_SAVE_ERROR)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="File exists|Not a directory"):
        state.save(str(tmp_path / "file" / "run"), 1, CONTENT, {}, 1)


@needs_own_mounts
def test_a_full_disk(tmp_path):
    """A real one, of 2 MiB, whose room vanishes during the save."""
    (tmp_path / "disk").mkdir()
    source = program(tmp_path, """
        import sys
        import torch as th
        from cm.checkpoints import manifest
        from cm.io import storage

        content = {"model": {"w": th.ones(150_000)}, "opt": {"w": th.ones(50_000)}}
        manifest.save(sys.argv[1], 1, content, {}, 1)
        ask = storage.free_bytes
        storage.free_bytes = lambda directory: 10**9        # another job's file comes between question and answer
        try:
            manifest.save(sys.argv[1], 2, {"model": {"w": th.ones(200_000)}, "opt": {"w": th.ones(150_000)}}, {}, 2)
        except ValueError as error:
            print(error)
        storage.free_bytes = ask
        print(manifest.newest(sys.argv[1]).step, ask(sys.argv[1]) > 1_000_000)
    """)
    script = f"mount -t tmpfs -o size=2m none {tmp_path}/disk && {sys.executable} {source} {tmp_path}/disk"
    done = start([*NAMESPACES, "sh", "-c", script])
    assert done.rc == 0, done
    assert "opt000002.pt" in done.stdout and "step 2 needs 1,400,000 bytes" in done.stdout, done
    assert done.stdout.endswith("1 True\n"), done


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_while_saving(tmp_path, kills):
    """The newest checkpoint is always whole, and nothing of an unfinished one is left after the next start."""
    content = {name: {"w": th.zeros(20_000)} for name in ("model", "opt", "ema_0.9")}
    rng, steps = th.Generator().manual_seed(0), 0
    for _ in range(kills):
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(steps + 1, steps + 1000):
                for tensors in content.values():
                    tensors["w"].fill_(step)
                state.save(str(tmp_path), step, content, {}, step)
                os.write(said, b"x")
            os._exit(1)
        os.read(heard, 1)
        time.sleep(float(th.rand(1, generator=rng)) * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(heard), os.close(said)
        with logger.scoped_configure(str(tmp_path / "log"), format_strs=["log"]):
            found = manager.resolve_resume(str(tmp_path), "auto")
        assert found.step > steps
        steps = found.step
        for name in content:
            assert (th.load(found.path(name), weights_only=True)["w"] == steps).all()
        assert not list(tmp_path.glob("*.partial"))
        assert steps_of(tmp_path, "model") == steps_of(tmp_path, "opt") == file_names.steps(str(tmp_path))
        for path in tmp_path.glob("*"):
            if path.is_file() and str(steps) not in path.name:
                path.unlink()
    assert (tmp_path / "log" / "log.txt").read_text() == ""     # nothing had to be passed over


# --- stores ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    """mem://, an object store as blobfile shows one: an object appears when its file is closed without an exception."""
    objects, broken = {}, set()

    class Object:
        def __init__(self, path, mode, partial_writes_on_exc=True):
            assert mode == "rb" or not partial_writes_on_exc
            self.path, self.mode, self.data = path, mode, bytearray()
            self.rest = memoryview(objects[path]) if mode == "rb" else None

        def __enter__(self):
            return self

        def __exit__(self, kind, *_):
            if self.mode == "wb" and kind is None:
                objects[self.path] = bytes(self.data)

        def read(self, size=-1):
            part, self.rest = (self.rest, self.rest[:0]) if size < 0 else (self.rest[:size], self.rest[size:])
            return bytes(part)

        def write(self, data):
            if any(word in self.path for word in broken):
                raise ConnectionError("503 from the store")
            self.data += data

        def flush(self):
            pass

    def listdir(directory):
        start = directory.rstrip("/") + "/"
        return [path[len(start):] for path in objects if path.startswith(start)]

    fake = types.SimpleNamespace(
        BlobFile=Object,
        configure=lambda **_: None, listdir=listdir, remove=objects.pop,
        exists=lambda path: path in objects or bool(listdir(path)),
        isdir=lambda path: path not in objects and bool(listdir(path)),
        stat=lambda path: types.SimpleNamespace(size=len(objects[path])),
        copy=lambda path, new, overwrite: objects.__setitem__(new, objects[path]),
    )
    monkeypatch.setitem(sys.modules, "blobfile", fake)
    storage._blobfile.cache_clear()
    yield types.SimpleNamespace(objects=objects, broken=broken)
    storage._blobfile.cache_clear()


def test_checkpoints_in_a_store(images, straight, tmp_path, store):
    where = {"checkpoint_dir": "mem://bucket/run", "save_interval": 2}
    run(images, tmp_path / "log", 3, **where)
    run(images, tmp_path / "log", 6, keep_checkpoints=1, **where)
    assert {name.rpartition("/")[2] for name in store.objects} == {
        "checkpoint_000006.json", *digest(straight, 6)}
    for name in digest(straight, 6):
        assert store.objects[f"mem://bucket/run/{name}"] == (straight / name).read_bytes()
    assert not list((tmp_path / "log").glob("*.pt"))
    there = loop(images, tmp_path / "new", 8, resume="mem://bucket/run/checkpoint_000006.json")
    assert there.step == 6
    weights = loop(images, tmp_path / "fresh", 8, resume_checkpoint="mem://bucket/run/ema_0.5_000006.pt")
    assert weights.step == 0 and th.equal(weights.trainer.master_params[0], there.ema_params[0][0])
    newest = "mem://bucket/run/ema_0.5_000006.pt"
    assert weights_in("mem://bucket/run", "model_path") == weights_in(newest, "model_path") == newest


def test_a_store_that_fails_in_the_middle_of_a_save(images, tmp_path, store):
    where = {"checkpoint_dir": "mem://bucket/run", "save_interval": 2}
    store.broken.add("opt000004")
    with pytest.raises(UserError, match="cannot write mem://bucket/run/opt000004.pt: ConnectionError: 503"):
        run(images, tmp_path / "log", 6, **where)
    assert loop(images, tmp_path / "log", 6, **where).step == 2
    assert not [name for name in store.objects if "000004" in name]


# --- one job a folder -------------------------------------------------------------------------------------------------


def test_elapsed_time_counts_on(images, tmp_path):
    run(images, tmp_path, 2)
    manifest = tmp_path / "checkpoint_000002.json"
    content = json.loads(manifest.read_text())
    assert content["seconds"] > 0
    del content["manifest_crc32"]                           # as an older version wrote it
    manifest.write_text(json.dumps(content | {"seconds": 1000.0, "format": 1}))
    run(images, tmp_path, 3)
    assert 1000 < state.newest(str(tmp_path)).seconds < 1100
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    column = header.split(",").index("elapsed_seconds")
    assert [float(row.split(",")[column]) > 1000 for row in rows] == [False, False, True]
