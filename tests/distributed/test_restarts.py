"""torchrun's restarts: ranks meet again where one was killed, and a mistake of the user's is made once."""

import os
import socket

import pytest

from cm.distributed import restarts
from support.mpi import ROOT, program, python

KILLED_ONCE = """
import os, signal
from cm.distributed import setup as dist
from cm.distributed.restarts import attempt

def main():
    dist.setup_dist(60)
    assert dist.all_gather_object(dist.get_rank()) == [0, 1]
    if attempt() == 0 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    print(f"met again {attempt()}\\n", end="", flush=True)

dist.run(main)
"""


def torchrun(*words, restarts=2, timeout=120):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return python(["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", restarts,
                   "--master-addr", "127.0.0.1", "--master-port", port, *words], timeout=timeout)


@pytest.mark.mpi
def test_ranks_meet_again_at_a_fixed_port_after_one_was_killed(tmp_path):
    done = torchrun(program(tmp_path, KILLED_ONCE), restarts=1)
    assert done.rc == 0 and done.stdout.count("met again 1") == 2, done


@pytest.mark.mpi
def test_torchrun_does_not_repeat_a_mistake_and_promises_no_checkpoint(tmp_path):
    done = torchrun(ROOT / "scripts/edm_train.py", "--data_dir", tmp_path / "nowhere", "--log_dir", tmp_path / "run",
                    "--image_size", 8, "--num_channels", 32, "--channel_mult", "1", restarts=1)
    assert done.rc != 0
    assert done.stderr.count("not tried again, because it would fail in the same way: error: ") == 1, done
    assert "with a checkpoint" not in done.stderr


def test_notes_are_for_later_attempts_of_the_same_torchrun(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "2"}
    second = first | {"TORCHELASTIC_RESTART_COUNT": "1"}
    restarts.leave_note("no such file", first)
    restarts.leave_note("of another rank", first)
    assert restarts.note(second) == "no such file"
    assert restarts.note(first) is None and restarts.note(second | {"TORCHELASTIC_RUN_ID": "b"}) is None
    assert restarts.note({}) is None and restarts.attempt({}) == 0


def test_no_note_where_nothing_will_be_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    last = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "2"}
    restarts.leave_note("no such file", last)
    restarts.leave_note("no such file", {})
    assert os.listdir(tmp_path) == []
