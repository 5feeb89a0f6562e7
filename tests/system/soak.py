"""A fault campaign: training is struck at random moments, the same command goes on, and the end is always the same.

python tests/system/soak.py --minutes 10 --seed 3
python tests/system/soak.py --shares            # networks in shards, checkpoints written by all ranks in the background

Trains a tiny network on 2 ranks, undisturbed; then again and again with faults, until the time is up. Each time the
final checkpoint must have the bytes of the undisturbed one, and the log its losses. The seed chooses faults and moments
(what a moment hits depends on the machine all the same).
"""

import argparse
import collections
import contextlib
import csv
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # started as a program, too

from PIL import Image

from support.mpi import ROOT, Finished, clean_environment, descendants, find_mpiexec, kill_tree

PYTHON = [sys.executable]                       # what starts a program
STEPS, SAVE_INTERVAL, IMAGES = 60, 5, 64
END_S, START_S = 15.0, 60.0                     # for a job to end after a fault; to end or take a step after its start
DISK_BYTES, SPARE_BYTES = 64 * 2**20, 2**17     # of the small disk; what a full one still has, for a line of the log
TRAIN = [
    str(ROOT / "scripts/edm_train.py"), "--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1",
    "--channel_mult", "1", "--attention_resolutions", "8", "--num_head_channels", "32", "--dropout", "0.1",
    "--class_cond", "True", "--lr", "1e-3", "--global_batch_size", "16", "--log_interval", "1",
    "--save_interval", str(SAVE_INTERVAL), "--keep_checkpoints", "2", "--total_training_steps", str(STEPS),
]

SHARES = ["--parallel", "fsdp", "--checkpoint_format", "dcp", "--async_save", "True"]


class Run:
    """One training run, started as often as need be."""

    def __init__(self, folder: Path, rng: random.Random):
        self.data, self.log_dir, self.rng = folder / "data", folder / "run", rng
        self.log_dir.mkdir(parents=True)
        write_digits(self.data)
        self.output = folder / "output.txt"
        self.job: subprocess.Popen | None = None

    def start(self) -> None:
        flags = [*TRAIN, "--data_dir", self.data, "--log_dir", self.log_dir]
        command = [find_mpiexec(), "-n", "2", *PYTHON, *flags]
        self.first_step, self.begun = self.step(), time.monotonic()
        with open(self.output, "w") as file:
            self.job = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=clean_environment({"OPENAI_LOG_FORMAT": "log,csv"}), start_new_session=True,
            )

    def finish(self, within: float) -> Finished:
        """Wait for the end of the job, after which nothing of it may run on."""
        try:
            rc = self.job.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within} s: {self.text()}") from None
        deadline = time.monotonic() + 5                     # a killed process needs a moment to give its memory back
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"{left} run on after the job has ended"
        return Finished(rc, self.text(), "", time.monotonic() - self.begun)

    def complete(self) -> None:
        self.start()
        done = self.finish(within=120)
        assert done.rc == 0, done
        assert (self.log_dir / f"checkpoint_{STEPS:06d}.json").exists(), done

    def is_over(self) -> bool:
        return self.job.poll() is not None

    def wait_for_a_moment(self) -> bool:
        """Some moment of the start, or some step; False if the job has ended before."""
        if self.rng.random() < 0.25:
            deadline, steps = self.begun + self.rng.uniform(0, 4), STEPS + 1
        else:
            deadline, steps = self.begun + START_S, self.first_step + self.rng.randint(1, 3 * SAVE_INTERVAL)
        while not self.is_over() and time.monotonic() < deadline and self.step() < steps:
            time.sleep(0.002)
        time.sleep(self.rng.uniform(0, 0.05))
        return not self.is_over()

    def has_trained(self) -> bool:
        """Whether this start of the job has taken a step."""
        return self.step() > self.first_step

    def step(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def rows(self) -> list[dict[str, str]]:
        try:
            text = (self.log_dir / "progress.csv").read_text()
        except FileNotFoundError:
            return []
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))

    def losses(self) -> list[tuple[str, str]]:
        return [(row["step"], row["loss"]) for row in self.rows()]

    def processes(self) -> list[int]:
        """Of this run, whoever started them."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.log_dir).encode() in entry.read_bytes():
                    found.append(int(entry.parent.name))
        return found

    def ranks(self) -> list[int]:
        mine = set(descendants(self.job.pid))
        return [pid for pid in self.processes() if pid in mine and is_python(pid)]

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def newest(self) -> list[Path]:
        """The files of the newest checkpoint, its manifest the last."""
        manifests = sorted(self.log_dir.glob("checkpoint_*.json"))
        if not manifests:
            return []
        return [*self.files(manifests[-1].stem.removeprefix("checkpoint_")), manifests[-1]]

    def resumable(self) -> int:
        """How many checkpoints a run can resume from; of older ones only the averages are kept."""
        steps = [path.stem.removeprefix("checkpoint_") for path in self.log_dir.glob("checkpoint_*.json")]
        return sum(any("opt" in path.relative_to(self.log_dir).parts[0] for path in self.files(step)) for step in steps)

    def final_files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.log_dir)): path.read_bytes() for path in self.files(f"{STEPS:06d}")}

    def files(self, step: str) -> list[Path]:
        """Of one checkpoint, but its manifest."""
        return sorted([*self.log_dir.glob(f"*{step}.pt"), *self.log_dir.glob(f"*{step}.dcp/*")])


def write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)           # [1797,64] in 0..16, [1797]
    folder.mkdir()
    for i in range(IMAGES):
        pixels = (images[i].reshape(8, 8) * (255 / 16)).round().astype("uint8")
        Image.fromarray(pixels).save(folder / f"{labels[i]}_{i}.png")


def is_python(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(sys.executable.encode())
    except OSError:
        return False


# --- the faults; each leaves the run ended, and says what it did ------------------------------------------------------


def kill(run: Run) -> str:
    """kill -9 of a rank: the job ends with an error, and nobody is left."""
    run.start()
    ranks = run.ranks() if run.wait_for_a_moment() else []
    if not ranks:
        return ended_before(run)
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.rng.choice(ranks), signal.SIGKILL)
    done = run.finish(END_S)
    assert done.rc != 0 or run.step() == STEPS, done
    return "killed"


def terminate(run: Run) -> str:
    """SIGTERM to mpiexec or a rank: once training, all save and leave in good order."""
    run.start()
    targets = [run.job.pid, *run.ranks()] if run.wait_for_a_moment() else []
    if not targets:
        return ended_before(run)
    trained, target = run.has_trained(), run.rng.choice(targets)
    with contextlib.suppress(ProcessLookupError):
        os.kill(target, signal.SIGTERM)
    done = run.finish(END_S)
    assert done.rc == 0 or not trained, f"SIGTERM to {target} of mpiexec and ranks {targets}: {done}"
    return "stopped" if trained else "stopped at the start"


def truncate(run: Run) -> str:
    """A rank is killed, and of the newest checkpoint a file is cut off or has a bit changed."""
    outcome = kill(run)
    if run.resumable() < 2:
        return f"{outcome}, no second checkpoint yet"       # damage to the only one is for the user to decide on
    path = run.rng.choice(run.newest()[:-1])
    data = bytearray(path.read_bytes())
    place = run.rng.randrange(len(data))
    if run.rng.random() < 0.5:
        data[place] ^= 1
    else:
        del data[place:]
    path.write_bytes(data)
    return f"{outcome}, damaged"


def unmanifest(run: Run) -> str:
    """A rank is killed, and the newest checkpoint loses its manifest."""
    outcome, files = kill(run), run.newest()
    if not files:
        return f"{outcome}, no checkpoint yet"
    if run.resumable() == 1 and len(list(run.log_dir.glob("checkpoint_*.json"))) > 1:
        return f"{outcome}, no second checkpoint to resume from"    # averages alone would be left
    files[-1].unlink()
    return f"{outcome}, deleted"


def fill_disk(run: Run) -> str:
    """The disk is full when the next checkpoint is to be written: the run says so, and the old one stays."""
    filler, before = run.log_dir / "filler", run.newest()
    try:
        free = shutil.disk_usage(run.log_dir).free
        with open(filler, "wb") as file:
            file.write(bytes(max(0, free - SPARE_BYTES)))
        run.start()
        done = run.finish(START_S)
    finally:
        filler.unlink()
    if done.rc == 0 and run.step() == STEPS:
        return "was complete before"
    assert done.rc != 0 and "bytes" in done.stdout and "Traceback" not in done.stdout, done
    assert run.newest() == before, done
    return "filled"


def break_image(run: Run) -> str:
    """An image becomes unreadable: the run stops and names it. It is repaired."""
    path = run.rng.choice(sorted(run.data.glob("*.png")))
    sound = path.read_bytes()
    path.write_bytes(sound[: run.rng.randrange(40)])
    try:
        run.start()
        done = run.finish(START_S)
    finally:
        path.write_bytes(sound)
    if done.rc == 0 and run.step() == STEPS:
        return "was complete before"
    assert done.rc == 2 and path.name in done.stdout and "Traceback" not in done.stdout, done
    return "named"


def ended_before(run: Run) -> str:
    done = run.finish(END_S)
    assert done.rc == 0, done
    return "had ended before"


FAULTS = {
    "kill -9 of a rank": kill,
    "SIGTERM": terminate,
    "damaged newest checkpoint": truncate,
    "deleted manifest": unmanifest,
    "full disk": fill_disk,
    "unreadable image": break_image,
}


# --- the campaign ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path):
    """A folder that is a disk of its own; "" and the reason where this user may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], capture_output=True, text=True
    )
    try:
        yield "" if mounted.returncode == 0 else f"needs root to mount a small disk ({mounted.stderr.strip()})"
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


def differing_bytes(found: dict[str, bytes], expected: dict[str, bytes]) -> int:
    """Over all files; a file that only one side has counts in full."""
    count = 0
    for name in {*found, *expected}:
        a, b = found.get(name, b""), expected.get(name, b"")
        count += abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b)) if a != b else 0
    return count


def disturbed(folder: Path, rng: random.Random, faults: list[str], count: collections.Counter) -> Run:
    """A run to its end, through these faults."""
    run = Run(folder, rng)
    try:
        for name in faults:
            at = run.step()
            outcome = FAULTS[name](run)
            count[name, outcome] += 1
            print(f"  {name}: {outcome}, started at step {at}, ended at {run.step()} of {STEPS}", flush=True)
        run.complete()
    finally:
        if run.job is not None and run.job.poll() is None:
            kill_tree(run.job.pid)
    return run


def campaign(folder: Path, seed: int, seconds: float, faults_per_run: int | None) -> int:
    """Returns how many bytes differed.

    :param seconds: no new run begins after that.
    :param faults_per_run: None for each kind once.
    """
    rng, count, differing, runs, deadline = random.Random(seed), collections.Counter(), 0, 0, time.monotonic() + seconds
    print(f"seed {seed}", flush=True)
    (folder / "undisturbed").mkdir()
    calm = Run(folder / "undisturbed" / "0", rng)
    calm.complete()
    expected, losses = calm.final_files(), calm.losses()
    assert len({name.split('/')[0] for name in expected}) == 4 and len(losses) == STEPS
    with small_disk(folder / "disk") as why_not:
        names = [name for name in FAULTS if name != "full disk" or not why_not]
        if why_not:
            print(f"full disk: skipped, {why_not}")
        while runs == 0 or time.monotonic() < deadline:
            faults = rng.sample(names, len(names)) if faults_per_run is None else rng.choices(names, k=faults_per_run)
            run = disturbed(folder / "disk" / str(runs), rng, faults, count)
            different = differing_bytes(run.final_files(), expected)
            assert run.losses() == losses, f"the log is another: {sorted({*run.losses()} ^ {*losses})}, {run.text()}"
            print(f"run {runs}: {different} bytes differ", flush=True)
            differing, runs = differing + different, runs + 1
            shutil.rmtree(folder / "disk" / str(runs - 1))
    print(f"\n{runs} runs of {STEPS} steps on 2 ranks")
    for (name, outcome), times in sorted(count.items()):
        print(f"{times:5d}  {name}: {outcome}")
    kills = sum(times for (_, outcome), times in count.items() if outcome.startswith("killed"))
    print(f"faults survived: {sum(count.values())}, with kills: {kills}; bytes differing: {differing}", flush=True)
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="no new run begins after that")
    parser.add_argument("--seed", type=int, default=None, help="of faults and moments; default: a new one")
    parser.add_argument("--faults", type=int, default=8, help="per run; 0 for each kind once")
    parser.add_argument("--python", help="words that start a program, instead of this Python")
    parser.add_argument("--shares", action="store_true", help="networks in shards, checkpoints by all ranks")
    args = parser.parse_args()
    if args.python:
        PYTHON[:] = shlex.split(args.python)
    if args.shares:
        TRAIN.extend(SHARES)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        sys.exit(campaign(Path(folder), seed, 60 * args.minutes, args.faults or None) != 0)


if __name__ == "__main__":
    main()
