"""Ranks by srun, and jobs by sbatch, on a real SLURM: the one that is configured here, or one of this machine alone."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from support.hello import HELLO, hellos
from support.mpi import ROOT, clean_environment, program, start
from support.one_machine_slurm import cluster, wait_until, why_not

pytestmark = [pytest.mark.mpi, pytest.mark.slow]
TINY = [
    "--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1",
    "--attention_resolutions", "8", "--global_batch_size", "8", "--precision", "fp32", "--log_interval", "5",
]


def works() -> bool:
    """Whether the SLURM that is configured here, if there is one, starts jobs of this user."""
    if not shutil.which("srun"):
        return False
    return subprocess.run(["srun", "-n", "2", "true"], capture_output=True, timeout=120).returncode == 0


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    if works():
        yield {}
    elif reason := why_not():
        pytest.skip(reason=f"no SLURM to try: {reason}")
    else:
        with cluster(tmp_path_factory.mktemp("slurm")) as env:
            yield env


def srun(slurm, tmp_path, *options):
    return start(["srun", *options, "-n", "2", sys.executable, program(tmp_path, HELLO)], timeout=120, env=slurm)


def test_ranks_by_pmi2_find_each_other(slurm, tmp_path):
    assert [row[:2] + row[3:] for row in hellos(srun(slurm, tmp_path, "--mpi=pmi2"))] == [
        ["0", "2", "2"], ["1", "2", "2"]]


def test_ranks_without_pmi_are_refused_with_the_remedy(slurm, tmp_path):
    done = srun(slurm, tmp_path, "--mpi=none")
    assert done.rc == 2 and "start with `srun --mpi=pmi2`" in done.stderr and "Traceback" not in done.stderr, done


def test_torchrun_inside_a_task(slurm, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(["srun", "-n", "1", *command, program(tmp_path, HELLO)], timeout=120, env=slurm)
    assert hellos(done) == [["0", "2", "0", "2"], ["1", "2", "1", "2"]]


def write_images(folder):
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def job(slurm, tmp_path):
    """The sbatch script of this project with a recipe on a tiny network, submitted with options: its number."""
    numbers = []
    write_images(tmp_path / "cifar10")

    def submit(*options, recipe="edm_cifar10", flags=()):
        env = slurm | {"DATA": str(tmp_path), "RUNS": str(tmp_path / "runs"), "PYTHON": sys.executable}
        done = start(["sbatch", "--parsable", "--nodes", "1", "--ntasks-per-node", "2", "--gpus-per-node", "0",
                      "--cpus-per-task", "1", "--output", str(tmp_path / "job.log"), *options,
                      str(ROOT / "scripts" / "slurm" / "train.sbatch"), recipe, *TINY, *flags], env=env)
        assert done.rc == 0, done
        numbers.append(done.stdout.strip())
        return numbers[-1]

    yield submit
    for number in numbers:
        start(["scancel", number], env=slurm)


def fields(slurm, number):
    """What SLURM knows of a job: JobState, Restarts and so on."""
    shown = subprocess.run(["scontrol", "show", "job", number], env=clean_environment(slurm), text=True,
                           capture_output=True)
    return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)


def status(tmp_path, recipe="edm_cifar10"):
    path = tmp_path / "runs" / recipe / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_a_job_at_its_time_limit_saves_and_queues_for_the_rest(slurm, tmp_path, job):
    number = job("--time", "1", "--signal", "USR1@45", flags=("--total_training_steps", "1000000"))
    wait_until(lambda: fields(slurm, number).get("Restarts") == "1", 150, "the job was not put back into the queue")
    left = status(tmp_path)
    assert left["finished"] is False and left["step"] > 0, left
    assert (tmp_path / "runs" / "edm_cifar10" / f"checkpoint_{left['step']:06d}.json").exists()


def test_a_job_that_is_told_to_end_saves_and_one_that_is_done_does_not_queue_again(slurm, tmp_path, job):
    number = job("--time", "5", flags=("--total_training_steps", "3"))
    wait_until(lambda: fields(slurm, number).get("JobState") == "COMPLETED", 120, "the job did not end")
    assert status(tmp_path)["finished"] is True and fields(slurm, number)["Restarts"] == "0"
    more = job("--time", "5", flags=("--total_training_steps", "1000000"))
    rows = tmp_path / "runs" / "edm_cifar10" / "progress.csv"
    before = rows.stat().st_size
    wait_until(lambda: rows.stat().st_size > before, 120, "training did not go on")
    start(["scancel", "--signal=TERM", more], env=slurm)
    wait_until(lambda: fields(slurm, more).get("Restarts") == "1", 120, "the job was not put back into the queue")
    assert status(tmp_path)["finished"] is False


def test_a_job_that_fails_is_not_started_again(slurm, tmp_path, job):
    number = job("--time", "5", flags=("--lr", "hello"))
    wait_until(lambda: fields(slurm, number).get("JobState") == "FAILED", 120, "the job did not fail")
    assert fields(slurm, number)["Restarts"] == "0" and "hello" in (tmp_path / "job.log").read_text()
