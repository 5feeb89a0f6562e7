"""A chain of the toolkit's own commands: each is printed before it runs, and skipped if its output exists."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm.distributed import failure
from cm.distributed.parent import stop_with_parent
from cm.errors import UserError
from cm.io.storage import write_bytes
from cm.io.terminal import without_controls

FINISHED = "finished"                                       # an empty file in the folder of a run that has ended
STATUS = "status.json"                                      # where a training says whether it was stopped


@dataclass(frozen=True)
class Stage:
    """A command and its product.

    :param product: the file that shows that the command has ended; `run` writes it if its name is `finished`.
    :param words: the command, without the interpreter.
    :param ranks: number of ranks; 0: start without mpiexec.
    """

    name: str
    product: Path
    words: tuple[str, ...]
    ranks: int = 0

    @property
    def command(self) -> list[str]:
        """The whole command line."""
        return [*(mpiexec(self.ranks) if self.ranks else []), sys.executable, *self.words]

    @property
    def is_done(self) -> bool:
        """Whether the product exists, so that there is nothing to do."""
        return self.product.exists() and not self.was_stopped

    @property
    def was_stopped(self) -> bool:
        """Whether a training has ended before its last step, as it does after a signal, with status 0."""
        if self.product.name != FINISHED:
            return False
        try:
            return not json.loads((self.product.parent / STATUS).read_text())["finished"]
        except (OSError, ValueError, KeyError, TypeError):  # no training, or one that says nothing
            return False

    def run(self, who: str) -> None:
        """Run the command, unless its product is there.

        :param who: name of the chain in messages, such as "demo". If the command fails, the process ends.
        """
        marks = self.product.name == FINISHED
        if self.is_done:
            print(without_controls(f"[{self.name}] reusing {self.product.parent if marks else self.product}"))
            return
        started = any(self.product.parent.glob("checkpoint_*.json"))
        line = f"\n[{self.name}]{' resuming' if started else ''}\n$ {shlex.join(self.command)}"
        print(without_controls(line), flush=True)
        status = execute(self.command, OPENAI_LOG_FORMAT="log,csv,json")
        if status:
            sys.exit(f"{who}: the stage {self.name!r} ended with status {status}; see its messages above")
        if self.was_stopped:
            sys.exit(f"{who}: the stage {self.name!r} was stopped; the same command resumes from there")
        if marks:
            write_bytes(self.product, b"")


@dataclass(frozen=True)
class Commands:
    """Makes the stages of a chain with all files in one folder.

    :param scripts: the folder of the commands, in the repository or in an installed package.
    :param ranks: number of ranks for training and sampling; 0: start without mpiexec.
    """

    out: Path
    scripts: Path
    ranks: int

    def script(self, name: str) -> str:
        """The path of a command."""
        return str(self.scripts / f"{name}.py")

    def training(self, run: str, script: str, *options: str) -> Stage:
        """A training run in the folder of its name."""
        words = (self.script(script), *options, "--log_dir", str(self.out / run))
        return Stage(f"training {run}", self.out / run / FINISHED, words, self.ranks)

    def sampling(self, key: str, name: str, model: Path, num_samples: int, *options: str) -> Stage:
        """Samples of a model in the folder `key`."""
        words = (self.script("image_sample"), "--model_path", str(model), "--num_samples", str(num_samples),
                 "--precision", "auto", "--log_dir", str(self.out / key), *options)
        return Stage(f"sampling {name}", self.out / key / FINISHED, words, self.ranks)

    def evaluation(self, key: str, name: str, samples: Path, *options: str) -> Stage:
        """The metrics of samples, compared with `real.npz`; written to metrics.json in their folder."""
        result = self.out / key / "metrics.json"
        words = ("-m", "evaluations.evaluator", str(self.out / "real.npz"), str(samples), "--json", str(result),
                 "--cache", "off", *options)
        return Stage(f"evaluating {name}", result, words)

    def classifier(self, data_dir: str, image_size: int) -> Stage:
        """A small classifier of labelled images, as a feature extractor in place of Inception; classifier.ts."""
        path = self.out / "classifier.ts"
        return Stage("classifier", path, (self.script("classifier_train"), "--data_dir", data_dir, "--image_size",
                                          str(image_size), "--out", str(path)))

    def report(self, runs: Sequence[str]) -> Stage:
        """The training runs on a web page."""
        page = self.out / "report.html"
        folders = [str(self.out / run) for run in runs]
        return Stage("report", page, (self.script("report"), *folders, "--out", str(page)))


def execute(command: Sequence[str], **variables: str) -> int:
    """Run a command to its end; its status.

    A training that is asked to stop saves first, so this process waits for it: it passes SIGTERM and SIGHUP on, and
    leaves to it the SIGINT that a terminal sends to both. If this process is killed, the kernel sends the command
    SIGTERM.

    :param variables: of the environment, beside those of this process.
    """
    process = subprocess.Popen(command, env=os.environ | variables, preexec_fn=stop_with_parent())

    def pass_on(signum: int, frame: Any) -> None:
        if signum != signal.SIGINT:
            process.send_signal(signal.SIGTERM)

    before = {each: signal.signal(each, pass_on) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
              if signal.getsignal(each) not in (signal.SIG_IGN, None)}
    try:
        return process.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ranks_to_start(wanted: int | None, *, on_cpu: int, at_most: int = sys.maxsize) -> int:
    """How many ranks mpiexec starts; 0 for a single one, which is started without it.

    :param wanted: the user's number; None for one rank per GPU.
    :param on_cpu: the number on a machine without GPUs, if none is wanted.
    :param at_most: the largest number that is chosen for the user.
    :raises UserError: for a negative number.
    """
    if wanted is None:
        from torch.cuda import device_count  # takes a second

        wanted = min(device_count() or on_cpu, at_most)
    if wanted < 0:
        raise UserError(f"--ranks {wanted}: it must be at least 1")
    return wanted if wanted > 1 else 0


def mpiexec(ranks: int) -> list[str]:
    """The start of a command on several ranks, by the mpiexec of this Python environment if it has one.

    :raises UserError: if there is none.
    """
    own = Path(sys.executable).with_name("mpiexec")
    if not own.exists() and shutil.which("mpiexec") is None:
        raise UserError(f"mpiexec, which starts {ranks} ranks, was not found: pip install mpi4py mpich, or give "
                        "--ranks 1")
    return [str(own if own.exists() else "mpiexec"), "-n", str(ranks)]


def run_chain(chain: Callable[[], None]) -> None:
    """Call a chain. An error of the user ends the process with one line and status 2, Ctrl-C with status 130."""
    try:
        chain()
    except UserError as error:
        failure.say(f"error: {error}")
        sys.exit(failure.USER_STATUS)
    except KeyboardInterrupt:
        failure.say("interrupted; the same command resumes from here")
        sys.exit(128 + signal.SIGINT)
