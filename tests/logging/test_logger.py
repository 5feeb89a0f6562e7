"""Rows and lines, on the screen and in files that survive resuming."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch as th

from cm.errors import UserError
from cm.io import terminal
from cm.logging import logger
from cm.logging.tables import TableWriter
from cm.logging.writers import Writer
from support.mpi import clean_environment, program, start
from support.own_mounts import NAMESPACES, needs_own_mounts


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No logger of another test, and no launcher's or logger's variables."""
    clean = clean_environment()
    for name in set(os.environ) - set(clean):
        monkeypatch.delenv(name)
    logger.reset()
    yield
    logger.reset()


def dump(**row):
    logger.logkvs(row)
    return logger.dumpkvs()


def csv_rows(folder, name="progress.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def json_rows(folder, name="progress.json"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- rows --------------------------------------------------------------------------------------------------------


def test_a_row_holds_last_values_and_means():
    logger.logkv("step", 1)
    logger.logkv("step", 2)
    for loss in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", loss)
    logger.logkvs({"lr": 1e-4, "name": "x"})
    assert logger.getkvs() == {"step": 2, "loss": 3.0, "lr": 1e-4, "name": "x"}
    assert logger.dumpkvs() == {"step": 2, "loss": 3.0, "lr": 1e-4, "name": "x"}
    assert logger.getkvs() == {} == logger.dumpkvs()


def test_means_of_tensors_are_exact_and_leave_the_graph():
    values = [th.tensor(1e8), th.tensor(1.0), th.tensor(1.0, dtype=th.float16), th.tensor([4.0], requires_grad=True)]
    for value in values:
        logger.logkv_mean("loss", value)
    logger.logkv("grad_norm", th.tensor(3, dtype=th.int32))
    row = logger.dumpkvs()
    # In float32 the ones would vanish beside 1e8.
    assert row == {"loss": (1e8 + 6) / 4, "grad_norm": 3}
    assert type(row["loss"]) is float and type(row["grad_norm"]) is int


class Unread(th.Tensor):
    """A tensor that notices being read, which on a GPU means waiting for it."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (th.Tensor.item, th.Tensor.tolist, th.Tensor.__float__, th.Tensor.cpu, th.Tensor.numpy):
            Unread.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_are_read_once_for_all_keys_and_only_for_the_row():
    for step in range(5):
        for key in "abc":
            logger.logkv_mean(key, th.tensor(float(step)).as_subclass(Unread))
    assert Unread.reads == 0
    assert logger.dumpkvs() == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert Unread.reads == 1


@pytest.mark.parametrize("value", [th.zeros(2), np.zeros((1, 3)), [1, 2]])
def test_only_single_numbers_go_into_a_row(value):
    for put in (logger.logkv, logger.logkv_mean):
        with pytest.raises(ValueError, match="'loss' has shape"):
            put("loss", value)


def test_numpy_numbers_become_plain(tmp_path):
    logger.configure(tmp_path, ["json"])
    row = dump(a=np.float32(0.5), b=np.int64(3), c=np.array([2.0]), d=np.bool_(True))
    assert row == {"a": 0.5, "b": 3, "c": 2.0, "d": True}
    assert json_rows(tmp_path) == [row]


def test_time_spent_is_summed():
    for _ in range(2):
        with logger.profile_kv("data"):
            pass
    assert 0 < logger.getkvs()["wait_data"] < 1


# --- the screen and log.txt ---------------------------------------------------------------------------------------


def test_the_table_is_readable(tmp_path, capsys):
    logger.configure(tmp_path, ["stdout", "log"])
    dump(step=1000000, loss=0.123456, samples=123456.0, lr=1e-4, bad=float("nan"),
         **{"a_very_long_name_for_a_single_number": 1})
    table = capsys.readouterr().out
    assert table == (tmp_path / "log.txt").read_text()
    assert table.splitlines() == [
        "--------------------------------------------",
        "| step                           | 1000000 |",
        "| samples                        | 123456  |",
        "| loss                           | 0.1235  |",
        "| bad                            | nan     |",
        "| a_very_long_name_for_a_sing... | 1       |",
        "| lr                             | 0.0001  |",
        "--------------------------------------------",
    ]


def test_text_has_levels(tmp_path, capsys):
    logger.configure(tmp_path, ["stdout", "log", "csv", "json"])
    logger.log("one", 2, th.float16)
    logger.debug("whisper")
    logger.set_level(logger.ERROR)
    logger.warn("hm")
    logger.error("no")
    logger.set_level(logger.DISABLED)
    logger.error("nothing")
    dump(step=1)
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == "one 2 torch.float16\nno\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt"]


def test_without_a_directory_only_the_screen_is_used(capsys):
    logger.log("hello")
    logger.logkv("step", 1)
    logger.dumpkvs()
    assert capsys.readouterr().out.startswith("hello\n-----")


# --- files -------------------------------------------------------------------------------------------------------


def test_files_are_named_as_ever(tmp_path):
    logger.configure(tmp_path / "new" / "folder", ["log", "csv", "json"], log_suffix="_eval")
    dump(step=1, loss=0.5)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["log_eval.txt", "progress_eval.csv", "progress_eval.json"]
    assert logger.get_dir() == str(tmp_path / "new" / "folder")


def test_a_new_column_widens_the_old_rows(tmp_path):
    logger.configure(tmp_path, ["csv", "json"])
    dump(step=1, loss=0.5)
    dump(step=2, loss=0.25, extra='a "b", c')
    dump(step=3)
    assert csv_rows(tmp_path) == [
        {"loss": "0.5", "step": "1", "extra": ""},
        {"loss": "0.25", "step": "2", "extra": 'a "b", c'},
        {"loss": "", "step": "3", "extra": ""},
    ]
    assert json_rows(tmp_path) == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "extra": 'a "b", c'}, {"step": 3}
    ]


def test_json_stays_json(tmp_path):
    logger.configure(tmp_path, ["csv", "json"])
    dump(loss=float("nan"), scale=float("inf"))
    assert (tmp_path / "progress.json").read_text() == '{"loss": null, "scale": null}\n'
    assert csv_rows(tmp_path) == [{"loss": "nan", "scale": "inf"}]


def test_numbers_in_files_keep_all_their_digits(tmp_path):
    logger.configure(tmp_path, ["csv", "json"])
    dump(loss=1 / 3)
    assert float(csv_rows(tmp_path)[0]["loss"]) == 1 / 3 == json_rows(tmp_path)[0]["loss"]


def test_a_second_run_goes_on_with_the_files(tmp_path):
    for first in (1, 3):
        logger.configure(tmp_path, ["log", "csv", "json"])
        logger.log(f"from {first}")
        for step in (first, first + 1):
            dump(step=step, **({"late": 1} if step == 4 else {}))
    assert [row["step"] for row in csv_rows(tmp_path)] == ["1", "2", "3", "4"]
    assert [row["late"] for row in csv_rows(tmp_path)] == ["", "", "", "1"]
    assert [row["step"] for row in json_rows(tmp_path)] == [1, 2, 3, 4]
    assert "from 1\n" in (tmp_path / "log.txt").read_text() and "from 3\n" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("late", [False, True], ids=["configure", "drop_after"])
def test_a_resumed_run_counts_no_step_twice(tmp_path, late):
    logger.configure(tmp_path, ["csv", "json"])
    dump(note="no step")
    for step in (1, 2, 3, 4):
        dump(step=step, loss=step / 10)
    if late:
        logger.configure(tmp_path, ["csv", "json"])
        logger.drop_after(2)
    else:
        logger.configure(tmp_path, ["csv", "json"], resume_step=2)
    dump(step=3, loss=0.9)
    assert [(row["step"], row["loss"]) for row in csv_rows(tmp_path)] == [
        ("", ""), ("1", "0.1"), ("2", "0.2"), ("3", "0.9")
    ]
    assert json_rows(tmp_path)[1:] == [
        {"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.9}
    ]


def test_a_row_torn_by_a_crash_goes_and_nothing_else(tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss,lr\n1,0.5,0.1\n2,0.")
    (tmp_path / "progress.json").write_text('{"step": 1}\n# a note by hand\n{"step": 2, "lo')
    logger.configure(tmp_path, ["csv", "json"])
    dump(step=2, loss=0.25, lr=0.1)
    assert [row["loss"] for row in csv_rows(tmp_path)] == ["0.5", "0.25"]
    assert (tmp_path / "progress.json").read_text().splitlines() == [
        '{"step": 1}', "# a note by hand", '{"step": 2, "loss": 0.25, "lr": 0.1}'
    ]


def test_an_empty_file_is_no_trouble(tmp_path):
    for name in ("progress.csv", "progress.json"):
        (tmp_path / name).touch()
    logger.configure(tmp_path, ["csv", "json"], resume_step=0)
    dump(step=1)
    assert csv_rows(tmp_path) == [{"step": "1"}] and json_rows(tmp_path) == [{"step": 1}]


def test_a_rewriting_is_all_or_nothing(tmp_path, monkeypatch, capsys):
    logger.configure(tmp_path, ["csv"])
    dump(step=1)
    before = (tmp_path / "progress.csv").read_text()

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        dump(step=2, loss=0.5)
        assert (tmp_path / "progress.csv").read_text() == before
    assert "No space left on device" in capsys.readouterr().err
    dump(step=3)
    assert [row["step"] + ":" + row["loss"] for row in csv_rows(tmp_path)] == ["1:", "2:0.5", "3:"]


@needs_own_mounts
def test_a_full_disk_does_not_end_a_run_and_rows_wait_for_room(tmp_path):
    """A real one, of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    source = program(tmp_path, """
        import sys
        from pathlib import Path
        from cm.logging import logger

        folder, filler = Path(sys.argv[1]), Path(sys.argv[1]) / "filler"
        logger.configure(folder, ["log", "csv", "json"])

        def dump(steps):
            for step in steps:
                logger.log("a line of text " * 20)
                logger.logkvs({"step": step, "loss": step / 7})
                logger.dumpkvs()

        dump(range(3))
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            dump(range(3, 203))
            filler.unlink()
        dump(range(203, 205))
        csv, json = (folder / "progress.csv").read_text(), (folder / "progress.json").read_text()
        print([line.split(",")[0] for line in csv.splitlines()[1:]] == [str(i) for i in range(205)],
              len(json.splitlines()) == 205, "204" in (folder / "log.txt").read_text())
    """)
    script = f"mount -t tmpfs -o size=256k none {disk} && {sys.executable} {source} {disk}"
    done = start([*NAMESPACES, "sh", "-c", script])
    assert done.rc == 0 and done.stdout == "True True True\n", done
    assert 1 <= done.stderr.count("No space left on device") <= 3, done         # not once for each of 200 rows


class Full(Writer):
    """A writer on a disk that has no room until it is told so."""

    def __init__(self):
        self.rows, self.has_room = [], False

    def scalars(self, step, row):
        if not self.has_room:
            raise OSError(28, "No space left on device")
        self.rows.append(step)


def test_of_more_rows_than_may_wait_the_oldest_are_lost(monkeypatch, capsys):
    monkeypatch.setattr(logger, "WAITING_ROWS", 4)
    output = Full()
    log = logger.Logger(None, [output])

    def dump(*steps):
        for step in steps:
            log.logkv("step", step)
            log.dumpkvs()

    dump(*range(10))
    assert [row["step"] for row in log.waiting[id(output)]] == [6, 7, 8, 9]
    output.has_room = True
    dump(10, 11)
    assert output.rows == [6, 7, 8, 9, 10, 11]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_as_many_rows_wait_for_room_as_the_constant_says(capsys):
    output = Full()
    log = logger.Logger(None, [output])
    for step in range(10_010):
        log.logkv("step", step)
        log.dumpkvs()
    output.has_room = True
    log.logkv("step", "newest")
    log.dumpkvs()
    assert output.rows == [*range(10, 10_010), "newest"]


class Broken(Writer):
    """A writer one of whose methods fails, and that notes what it is asked."""

    def __init__(self, method):
        self.calls = []
        for name in ("config", "scalars", "images", "text", "close"):
            setattr(self, name, lambda *args, name=name: self.call(name, method))

    def call(self, name, method):
        self.calls.append(name)
        if name == method:
            raise RuntimeError("no such server")


@pytest.mark.parametrize("method", ["config", "scalars", "images", "text", "close"])
def test_a_writer_that_fails_is_let_go_with_one_line_and_the_others_go_on(tmp_path, capsys, method):
    broken, table = Broken(method), TableWriter(tmp_path / "log.txt")
    log = logger.Logger(str(tmp_path), [broken, table])
    for step in (1, 2):
        log.config({"lr": 1})
        log.logkv("step", step)
        log.dumpkvs()
        log.images(step, "samples", np.zeros((2, 2, 3), np.uint8))
        log.log(f"after step {step}")
        log.close("finished")
    assert capsys.readouterr().err == (
        "log format Broken failed (RuntimeError: no such server); the run continues without it\n"
    )
    assert broken.calls.count(method) == 1 and broken.calls[-1] == method
    assert "after step 1" in (tmp_path / "log.txt").read_text() and "after step 2" in (tmp_path / "log.txt").read_text()


# --- where and who -----------------------------------------------------------------------------------------------


def test_the_environment_chooses_directory_and_formats(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "a"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json, csv")
    logger.configure()
    dump(step=1)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["progress.csv", "progress.json"]
    logger.configure(tmp_path / "b", ["csv"])
    dump(step=1)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["progress.csv"]


def test_by_default_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = logger.get_dir()
    logger.configure()
    assert first != logger.get_dir() and len(list(tmp_path.glob("openai-*"))) == 2
    assert sorted(path.name for path in (tmp_path / first).iterdir()) == ["log.txt"]


def test_only_rank_0_writes(tmp_path, capsys):
    logger.configure(tmp_path / "a", ["stdout", "log", "csv", "json"], rank=1)
    logger.log("hello")
    assert dump(step=1) == {"step": 1}
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []
    assert logger.get_dir() == str(tmp_path / "a")


def test_the_launcher_says_who_is_rank_0(tmp_path, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "3")
    logger.configure(tmp_path / "a", ["csv"])
    dump(step=1)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_if_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "log,csv")
    logger.configure(tmp_path, ["json"], rank=2)
    logger.log("hello")
    dump(step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log-rank002.txt", "progress-rank002.csv"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write a log to .*file/x: Not a directory.*--log_dir"):
        logger.configure(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="local directory"):
        logger.configure("gs://bucket/run")


def test_a_format_that_does_not_exist_is_refused_and_the_old_log_stays(tmp_path):
    logger.configure(tmp_path, ["csv"])
    with pytest.raises(UserError, match="unknown log format 'jsn'.*Did you mean 'json'"):
        logger.configure(tmp_path, ["jsn"])
    dump(step=1)
    assert csv_rows(tmp_path) == [{"step": "1"}]


def test_another_log_for_a_while(tmp_path):
    logger.configure(tmp_path / "outer", ["csv"])
    logger.logkv("step", 1)
    with logger.scoped_configure(tmp_path / "inner", ["csv"]):
        dump(step=7)
        with pytest.raises(ZeroDivisionError), logger.scoped_configure(tmp_path / "third", ["csv"]):
            1 / 0  # noqa: B018
        assert logger.get_dir() == str(tmp_path / "inner")
    logger.dumpkvs()
    assert csv_rows(tmp_path / "outer") == [{"step": "1"}] and csv_rows(tmp_path / "inner") == [{"step": "7"}]


# --- a terminal or a folder that goes away -------------------------------------------------------------------------


def test_a_folder_that_was_removed_returns_with_its_header(tmp_path):
    logger.configure(tmp_path / "run", ["csv", "log"])
    dump(step=1)
    shutil.rmtree(tmp_path / "run")
    dump(step=2)
    assert csv_rows(tmp_path / "run") == [{"step": "2"}]
    assert "| step | 2 |" in (tmp_path / "run/log.txt").read_text()


def test_control_characters_are_shown_as_escapes(tmp_path, capsys):
    logger.configure(tmp_path, ["stdout", "log"])
    logger.log("a\x1b[31m\udce9\nb")
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == "a\\x1b[31m\\xe9\nb\n"


def test_a_closed_pipe_is_no_error(tmp_path, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    logger.configure(tmp_path, ["stdout", "csv"])
    with os.fdopen(write_end, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", terminal.LastingStream(pipe))
        logger.log("x")
        dump(step=1)
    assert csv_rows(tmp_path) == [{"step": "1"}]


@pytest.mark.parametrize("name", ["log.txt", "progress.csv", "progress.json"])
def test_a_log_that_is_a_link_is_refused_and_leads_nowhere(tmp_path, name):
    (tmp_path / "victim").write_text("a,b\n1,2\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        logger.configure(str(tmp_path / "run"), ["log", "csv", "json"])
    assert (tmp_path / "victim").read_text() == "a,b\n1,2\n"


def test_a_log_that_becomes_a_link_takes_no_more_lines(tmp_path):
    logger.configure(str(tmp_path / "run"), ["log", "csv"])
    dump(step=1)
    (tmp_path / "victim").write_text("a month of work")
    for name in ("log.txt", "progress.csv"):
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    logger.log("a line")
    dump(step=2)                                            # a run goes on without its log
    assert (tmp_path / "victim").read_text() == "a month of work"


def test_a_folder_of_its_own_is_a_new_one(tmp_path, monkeypatch):
    """Anybody can make folders and links in the system's temporary folder."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "taken")
    for name in ("taken", "link"):
        monkeypatch.setattr(logger, "_default_directory", lambda name=name: str(tmp_path / name))
        with pytest.raises(UserError, match="cannot write a log to"):
            logger.configure(None, ["log"])
    assert not list((tmp_path / "taken").iterdir())
