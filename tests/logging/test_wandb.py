"""A run of Weights & Biases in its offline mode, read back from the file that `wandb sync` would send."""

import json
import shutil
import time
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest

from cm.errors import UserError
from cm.logging import logger
from cm.logging.wandb import SECONDS_TO_SEND


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    logger.reset()


def records(folder):
    """What the files of a folder's runs hold, in their order: (kind, record)."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            yield kind, getattr(record, kind)


def finished_records(folder):
    """`records`, once W&B's own process has written the last of them."""
    deadline = time.monotonic() + 20
    while True:
        found = list(records(folder))
        if any(kind == "exit" for kind, _ in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def test_flags_rows_pictures_and_the_end_of_two_starts_of_one_run(tmp_path):
    run, found = tmp_path / "my-run", []
    for start, status in ((0, "stopped"), (2, "failed")):
        logger.configure(run, ["wandb"], resume_step=start)
        logger.log_config({"lr": 0.25, "arch": "unet"})
        logger.logkvs({"step": start + 1, "loss": 0.5, "loss_q0": None})
        logger.dumpkvs()
        logger.log_images(start + 1, "samples", np.zeros((4, 6, 3), np.uint8))
        logger.close(status)
        logger.logkv("step", 99)
        logger.dumpkvs()                                    # after the end: ignored
        found += finished_records(run)
        assert len(list(run.glob("wandb/offline-run-*/files/media/images/samples*.png"))) == 1
        shutil.rmtree(run / "wandb")
        time.sleep(1 - time.time() % 1)                     # W&B names a folder by the second
    runs = [record for kind, record in found if kind == "run"]
    assert {each.run_id for each in runs} == {(run / "wandb_id.txt").read_text().strip()}, "one run, started twice"
    assert {(each.display_name, each.project) for each in runs} == {("my-run", "consistency-toolkit")}
    config = {item.key or item.nested_key[0]: json.loads(item.value_json)
              for kind, record in found if kind == "config" for item in record.update}
    assert config["lr"] == 0.25 and config["arch"] == "unet"
    rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.item}
            for kind, record in found if kind == "history"]
    assert [(row["step"], row.get("loss"), "samples" in row or "samples/_type" in row) for row in rows] == [
        (1, 0.5, False), (1, None, True), (3, 0.5, False), (3, None, True)
    ]
    assert not any("loss_q0" in row for row in rows)
    assert [record.exit_code for kind, record in found if kind == "exit"] == [0, 1]


def test_a_refusal_at_the_start_is_a_mistake_of_the_users(tmp_path, monkeypatch):
    import wandb

    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="log format 'wandb': No API key.*WANDB_MODE=offline"):
        logger.configure(tmp_path / "run", ["wandb"])


def test_a_server_that_hears_nothing_does_not_hold_up_the_end(tmp_path, monkeypatch):
    """`finish` waits for ever; the end of a failed run must be quick, for the other ranks wait for it."""
    assert SECONDS_TO_SEND == {"finished": 60, "stopped": 10, "failed": 3}
    run = SimpleNamespace(define_metric=lambda *args, **kwargs: None, finish=lambda exit_code: Event().wait())
    monkeypatch.setattr("wandb.init", lambda **settings: run)
    monkeypatch.setitem(SECONDS_TO_SEND, "failed", 0.05)
    logger.configure(tmp_path / "run", ["wandb"])
    logger.close("failed")
