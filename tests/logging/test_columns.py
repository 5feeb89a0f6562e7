"""The order of a log's columns: the same in every format, whatever order the values came in."""

import csv

import pytest

from cm.logging import logger
from cm.logging.columns import ordered

OF_A_RUN = ["step", "samples", "loss", "loss_q0", "loss_q3", "mse", "grad_norm", "fid", "lr", "images_per_second",
            "elapsed_seconds"]


def test_what_a_row_is_about_comes_first_and_what_it_cost_last():
    mixed = ["elapsed_seconds", "mse", "lr", "loss_q3", "grad_norm", "step", "images_per_second", "loss", "fid",
             "samples", "loss_q0"]
    assert ordered(mixed) == OF_A_RUN
    assert ordered(["b", "a"]) == ["b", "a"], "unknown names stay as they are given"


@pytest.fixture
def close_log():
    yield
    logger.reset()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_header_that_is_there_keeps_its_order_and_new_columns_come_after_it(tmp_path, close_log):
    """A file of an earlier version, whose columns are sorted by name."""
    (tmp_path / "progress.csv").write_text("grad_norm,loss,step\n0.5,1.0,1\n0.25,0.75,2\n")
    logger.configure(tmp_path, ["csv"], resume_step=1)
    logger.logkvs({"step": 2, "loss": 0.5, "samples": 16, "grad_norm": 0.125, "lr": 1e-3})
    logger.dumpkvs()
    assert rows_of(tmp_path / "progress.csv") == [
        ["grad_norm", "loss", "step", "samples", "lr"], ["0.5", "1.0", "1", "", ""],
        ["0.125", "0.5", "2", "16", "0.001"],
    ]


def test_what_was_not_measured_is_an_empty_cell_and_what_is_not_finite_is_not(tmp_path, close_log, capsys):
    logger.configure(tmp_path, ["stdout", "csv", "json", "stats"])
    logger.logkvs({"loss": float("nan"), "loss_q1": None, "step": 1})
    logger.dumpkvs()
    assert rows_of(tmp_path / "progress.csv") == [["step", "loss", "loss_q1"], ["1", "nan", ""]]
    assert (tmp_path / "progress.json").read_text() == '{"step": 1, "loss": null, "loss_q1": null}\n'
    assert '"Loss/loss_q1": {"num": 0, "mean": null' in (tmp_path / "stats.jsonl").read_text()
    assert "loss_q1" not in capsys.readouterr().out
