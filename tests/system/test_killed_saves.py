"""kill -9 of all ranks while they write a checkpoint in the background: it does not exist, and nothing else is lost."""

import csv
import hashlib
import subprocess
import sys
import time

import pytest

from cm.checkpoints import file_names
from cm.setup.weights_path import weights_in
from support.mpi import clean_environment, find_mpiexec, kill_tree, program
from support.warm import mpi_program

RUN = """
    import sys, time
    from pathlib import Path

    import torch as th

    from cm.checkpoints import share_writer
    from cm.distributed import setup as dist
    from system.resume_cases import make_images, prepare

    folder, write, save, tensors = Path({folder!r}), share_writer.write_shares, th.save, []

    def stuck(tensor, file):
        tensors.append(tensor)
        if len(tensors) == 3:                               # two lie in the open file
            (folder / f"writing{{dist.get_rank()}}").touch()
            time.sleep(600)
        save(tensor, file)

    def write_until_step_4(directory, step, *args):
        th.save = stuck if step == 4 else save
        return write(directory, step, *args)

    def train(name, steps):
        prepare(make_images(folder), folder / name, steps, "edm", checkpoint_format="dcp", async_save=True,
                save_interval=2).run_loop()

    def killed():
        share_writer.write_shares = write_until_step_4
        train("stopped", 20)

    def resumed():
        train("stopped", 6)
        train("straight", 6)

    def main():
        dist.setup_dist()
        {what}()

    dist.run(main)
"""


def until(condition, job):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)


def digests(folder, step):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file() and f"{step:06d}" in str(path.relative_to(folder))
            and not path.name.startswith("checkpoint_")}


def steps_of(folder):
    try:
        with open(folder / "progress.csv") as file:
            return [int(row["step"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


@pytest.mark.mpi
def test_a_background_save_that_is_killed_never_was(tmp_path):
    run, source = tmp_path / "stopped", RUN.format(folder=str(tmp_path), what="killed")
    job = subprocess.Popen(
        [find_mpiexec(), "-n", "2", sys.executable, str(program(tmp_path, source))], env=clean_environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    try:
        until(lambda: len(list(tmp_path.glob("writing*"))) == 2 and 5 in steps_of(run), job)
        partial = list(run.glob("*000004.dcp/.*.partial"))
        assert len(partial) == 2, "each rank has a file open, and the run goes on"
    finally:
        kill_tree(job.pid)
        job.wait()
    assert file_names.steps(str(run)) == [2] and weights_in(str(run), "model_path").endswith("model000002.dcp")

    done = mpi_program(tmp_path, 2, RUN.format(folder=str(tmp_path), what="resumed"))
    assert done.rc == 0, done
    assert steps_of(run)[-4:] == [3, 4, 5, 6], "from the checkpoint before"
    one, other = digests(run, 6), digests(tmp_path / "straight", 6)
    assert one == other and any(name.endswith("__1_0.distcp") for name in one)
    assert not list(run.rglob("*.partial"))
