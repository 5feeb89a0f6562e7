"""Run the complete workflow on handwritten digits: train, distil, sample, evaluate; print a table and draw a picture.

Every stage is one of the toolkit's own commands, printed before it runs. Running the demo again reuses completed stages
and resumes an interrupted one; `make demo-clean` deletes all results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cm.config import early_exit
from cm.config.flags import Parser
from cm.data.sources import open_source
from cm.generate.grids import labelled_rows, save_picture
from cm.io.atomic import AtomicFile
from cm.io.storage import write_bytes
from cm.io.terminal import without_controls

SCRIPTS = Path(__file__).resolve().parent
REAL_SEED = 7


def read_flags() -> argparse.Namespace:
    """The flags of the command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"),
                        help="folder for all files of the demo [default: runs/demo]")
    parser.add_argument("--ranks", type=int, default=2, help="ranks for training and sampling [default: 2]")
    parser.add_argument("--num_samples", type=int, default=1000, help="images generated per method [default: 1000]")
    parser.add_argument("--train_options", default="", help="flags for every training stage, quoted as one argument")
    return parser.parse_args()


@dataclass(frozen=True)
class Method:
    """A row of the table: a checkpoint and how to sample from it."""

    name: str
    run: str                                    # folder of the training run
    options: tuple[str, ...]
    guide_scale: float = 1.0                    # above 1: guided by the first checkpoint of the same run


TWO_STEPS = ("--sampler", "multistep", "--steps", "18", "--ts", "0,8,17")

HEUN = ("--sampler", "heun", "--steps", "18")

METHODS = {
    "teacher_heun": Method("EDM teacher, Heun 18", "edm", HEUN),
    "teacher_guided": Method("EDM, autoguidance", "edm", HEUN, guide_scale=1.5),
    "cd_onestep": Method("CD, one step", "cd", ("--sampler", "onestep")),
    "cd_twostep": Method("CD, two steps", "cd", TWO_STEPS),
    "ect_onestep": Method("ECT, one step", "ect", ("--sampler", "onestep")),
    "ect_twostep": Method("ECT, two steps", "ect", TWO_STEPS),
    "ct_onestep": Method("CT, one step", "ct", ("--sampler", "onestep")),
    "ct_twostep": Method("CT, two steps", "ct", TWO_STEPS),
}


class Demo:
    """The stages of the demo; each writes its files to `out` and is skipped if they exist.

    :param extra: flags added to every training stage.
    """

    def __init__(self, out: Path, ranks: int, num_samples: int, extra: list[str]):
        self.out, self.ranks, self.num_samples, self.extra = out, ranks, num_samples, extra
        out.mkdir(parents=True, exist_ok=True)

    # --- stages ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All stages in their order, then the table."""
        start = time.monotonic()
        self.reference()
        self.classifier()
        self.train("edm", "edm_train", "--time_scale", "1")     # a slow clock, which ECT needs: docs/few-step.md
        teacher = self.checkpoint("edm")
        measured = ("--eval_interval", "50", "--eval_samples", "1000", "--eval_batch_size", "250", "--eval_ref",
                    str(self.out / "real.npz"), "--inception", str(self.out / "classifier.ts"))
        self.train("cd", "cm_train", "--teacher_model_path", str(teacher), *measured)
        self.train("ect", "cm_train", "--teacher_model_path", str(teacher), *measured)
        self.train("ct", "cm_train", *measured)
        for key, method in METHODS.items():
            self.sample(key, method)
        rows = [self.evaluate(key, method) for key, method in METHODS.items()]
        picture, report = self.picture(), self.report("edm", "cd", "ect", "ct")
        print("\n" + table(rows, self.classifier_accuracy()))
        print(f"\n{time.monotonic() - start:.0f} s in total. The picture: {picture}; the trainings: {report}")

    def reference(self) -> None:
        """The real digits as a batch for the evaluator."""
        path = self.out / "real.npz"
        if not path.exists():
            source = open_source("digits", 8, channels=1)
            assert source.labels is not None, "digits have classes"
            with AtomicFile(path) as file:
                np.savez(file, arr_0=source.images(np.arange(len(source))), arr_1=source.labels)

    def classifier(self) -> None:
        """The feature extractor: a small classifier that never sees a generated image."""
        self.stage(
            "classifier", self.out / "classifier.ts",
            [script("classifier_train"), "--data_dir", "digits", "--image_size", "8",
             "--out", str(self.out / "classifier.ts")],
        )

    def train(self, run: str, command: str, *options: str) -> None:
        """A training run on `ranks` ranks, by the preset of its name."""
        self.stage(
            f"training {run}", self.out / run / "finished",
            [script(command), "--config", f"digits/{run}",
             "--log_dir", str(self.out / run), *options, *self.extra],
            ranks=self.ranks,
        )
        write_bytes(self.out / run / "finished", b"")

    def sample(self, key: str, method: Method) -> None:
        """Samples of a method."""
        self.stage(
            f"sampling {method.name}", self.out / key / "finished",
            [script("image_sample"), "--model_path", str(self.checkpoint(method.run)),
             "--num_samples", str(self.num_samples), "--batch_size", "250", "--precision", "auto",
             "--log_dir", str(self.out / key), *method.options, *self.guide(method)],
            ranks=self.ranks,
        )
        write_bytes(self.out / key / "finished", b"")

    def evaluate(self, key: str, method: Method) -> dict:
        """A row of the table."""
        result = self.out / key / "metrics.json"
        self.stage(
            f"evaluating {method.name}", result,
            ["-m", "evaluations.evaluator", str(self.out / "real.npz"), str(self.samples(key)), "--inception",
             str(self.out / "classifier.ts"), "--class_accuracy", "--json", str(result), "--cache", "off"],
        )
        summary = json.loads(self.samples(key).with_suffix(".json").read_text())
        return {
            "method": method.name,
            "nfe": summary["network_evaluations"],
            "images_per_second": summary["images_per_second"],
            "metrics": json.loads(result.read_text())["metrics"],
        }

    def picture(self, columns: int = 16) -> Path:
        """Real digits of the same classes above the samples of each method; a column starts from one noise."""
        with np.load(self.samples("teacher_heun")) as first:
            labels = first["arr_1"][:columns]
        with np.load(self.out / "real.npz") as real:
            rng = np.random.default_rng(REAL_SEED)
            chosen = [rng.choice(np.flatnonzero(real["arr_1"] == label)) for label in labels]
            rows = [("real digits", real["arr_0"][chosen])]
        for key, method in METHODS.items():
            with np.load(self.samples(key)) as samples:
                rows.append((method.name, samples["arr_0"][:columns]))
        path = self.out / "demo.png"
        save_picture(path, labelled_rows(rows, scale=6))
        return path

    def report(self, *runs: str) -> Path:
        """The training runs on a web page."""
        page = self.out / "report.html"
        folders = [str(self.out / run) for run in runs]
        self.stage("report", page, [script("report"), *folders, "--out", str(page)])
        return page

    # --- parts ---------------------------------------------------------------------------------------------------

    def stage(self, name: str, product: Path, command: list[str], ranks: int = 0) -> None:
        """Run a command unless its product is there."""
        if product.exists():
            print(f"[{name}] reusing {product.parent if product.name == 'finished' else product}")
            return
        started = any(product.parent.glob("checkpoint_*.json"))
        full = [*(mpiexec(ranks) if ranks else []), sys.executable, *command]
        print(without_controls(f"\n[{name}]{' resuming' if started else ''}\n$ {shlex.join(full)}"), flush=True)
        status = subprocess.run(full, env=os.environ | {"OPENAI_LOG_FORMAT": "log,csv,json"}).returncode
        if status:
            sys.exit(f"demo: the stage {name!r} ended with status {status}; see its messages above")

    def checkpoint(self, run: str) -> Path:
        """The newest averaged weights of a training run."""
        return sorted((self.out / run).glob("ema_*.pt"))[-1]

    def guide(self, method: Method) -> tuple[str, ...]:
        """Autoguidance (Karras et al. 2024, arXiv 2406.02507): each run holds a worse network, an early one."""
        if method.guide_scale == 1:
            return ()
        first = sorted((self.out / method.run).glob("ema_*.pt"))[0]
        return "--guide_path", str(first), "--guide_scale", str(method.guide_scale)

    def samples(self, key: str) -> Path:
        """The npz of a method's samples."""
        return next((self.out / key).glob("samples_*.npz"))

    def classifier_accuracy(self) -> str:
        """The held-out accuracy of the feature extractor, to print."""
        facts = self.out / "classifier.json"
        return f"{json.loads(facts.read_text())['held_out_accuracy']:.1%}" if facts.exists() else "unknown"


def table(rows: list[dict], classifier_accuracy: str) -> str:
    """The comparison, as text. The features are a digit classifier's: these are not Inception numbers."""
    head = ("method", "NFE", "Frechet distance*", "precision*", "recall*", "class accuracy*", "images/s")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        m = {name: result["value"] for name, result in row["metrics"].items()}
        lines.append((
            row["method"], str(row["nfe"]), f"{m['frechet_distance']:.3f}", f"{m['precision']:.3f}",
            f"{m['recall']:.3f}", f"{m['class_accuracy']:.1%}", f"{row['images_per_second']:.0f}",
        ))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    text.append(
        "* in the features of the digit classifier trained in this demo (held-out accuracy "
        f"{classifier_accuracy}); not Inception FID, and not comparable with it"
    )
    return "\n".join(text)


def script(name: str) -> str:
    """A command of the toolkit: it lies beside this one, in the repository as in an installed package."""
    return str(SCRIPTS / f"{name}.py")


def mpiexec(ranks: int) -> list[str]:
    """The start of a command on several ranks, by the mpiexec of this Python environment if it has one."""
    own = Path(sys.executable).with_name("mpiexec")
    return [str(own if own.exists() else "mpiexec"), "-n", str(ranks)]


def main() -> None:
    """Run the demo as the flags say."""
    args = early_exit.parse_or_exit(read_flags)
    Demo(args.out.resolve(), args.ranks, args.num_samples, shlex.split(args.train_options)).run()


if __name__ == "__main__":
    main()
