"""The stages of a chain: what is run again, signals, and what a user is told."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from cm.errors import UserError
from cm.quickstart import stages
from cm.quickstart.stages import Commands, Stage, execute, mpiexec, ranks_to_start, run_chain


def test_a_training_that_was_stopped_is_not_finished(tmp_path, monkeypatch, capsys):
    """It ends with status 0, too."""
    product = tmp_path / "run" / stages.FINISHED
    stage = Stage("training run", product, ("train.py",))
    product.parent.mkdir()

    def train(command, **_):
        (product.parent / stages.STATUS).write_text(json.dumps({"finished": finished}))
        return 0

    monkeypatch.setattr(stages, "execute", train)
    finished = False
    with pytest.raises(SystemExit, match="'training run' was stopped; the same command resumes"):
        stage.run("quickstart")
    assert not product.exists() and not stage.is_done
    product.touch()
    assert not stage.is_done, "as an earlier version left it"
    finished = True
    stage.run("quickstart")
    assert stage.is_done and capsys.readouterr().out.count("$ ") == 2
    stage.run("quickstart")
    assert "reusing" in capsys.readouterr().out


@pytest.mark.parametrize("signum, of_all", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_command_that_is_stopped_may_save_first(signum, of_all):
    """The chain waits for it, and is there to say what was stopped; a terminal sends SIGINT to both."""
    # os.write, as a print in a handler may not interrupt another print.
    child = f"import os, signal, sys, time; signal.signal({int(signum)}, lambda *_: (time.sleep(0.5), " \
            "os.write(1, b'saved\\n'), sys.exit(0))); os.write(1, b'ready\\n'); time.sleep(60)"
    chain = textwrap.dedent(f"""
        import sys
        from cm.quickstart.stages import execute
        print("status", execute([sys.executable, "-c", {child!r}]), flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", chain], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signum) if of_all else process.send_signal(signum)
    assert process.communicate(timeout=20)[0] == "saved\nstatus 0\n"


def test_handlers_of_signals_are_as_before():
    before = signal.getsignal(signal.SIGTERM)
    assert execute([sys.executable, "-S", "-c", "import os, sys; sys.exit(int(os.environ['STATUS_IT_WANTS']))"],
                   STATUS_IT_WANTS="3") == 3
    assert signal.getsignal(signal.SIGTERM) == before and "STATUS_IT_WANTS" not in os.environ


def test_ranks_need_mpiexec(monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="mpiexec, which starts 2 ranks, was not found"):
        mpiexec(2)
    with pytest.raises(SystemExit) as ended:
        run_chain(lambda: mpiexec(2))
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: mpiexec, which starts 2 ranks")
    with pytest.raises(SystemExit) as ended:
        run_chain(interrupted)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted; the same command resumes from here\n"
    monkeypatch.setattr(stages.shutil, "which", lambda name: "/usr/bin/mpiexec")
    assert mpiexec(2) == ["mpiexec", "-n", "2"]


@pytest.mark.parametrize("gpus, wanted, demo, quickstart", [
    (0, None, 2, 0), (1, None, 0, 0), (2, None, 2, 2), (8, None, 2, 8), (1, 4, 4, 4), (8, 1, 0, 0), (8, 0, 0, 0),
])
def test_a_gpu_has_at_most_one_rank(monkeypatch, gpus, wanted, demo, quickstart):
    """As the demo and quickstart ask; 0 is a start without mpiexec."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ranks_to_start(wanted, on_cpu=2, at_most=2) == demo
    assert ranks_to_start(wanted, on_cpu=1) == quickstart


def test_ranks_are_no_negative_number():
    with pytest.raises(UserError, match="--ranks -3: it must be at least 1"):
        ranks_to_start(-3, on_cpu=2)


def interrupted():
    raise KeyboardInterrupt


def test_only_trainings_and_samplings_have_ranks(tmp_path):
    make = Commands(tmp_path, tmp_path / "scripts", 2)
    assert make.training("edm", "edm_train").ranks == make.sampling("key", "a name", tmp_path, 3).ranks == 2
    assert make.classifier("digits", 8).ranks == make.report(["edm"]).ranks == 0
    assert make.classifier("digits", 8).command[0] == sys.executable
    assert make.training("edm", "edm_train").command[1:3] == ["-n", "2"]
