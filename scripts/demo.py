"""Run the complete workflow on handwritten digits: train, distil, sample, evaluate; print a table and draw a picture.

Every stage is one of the toolkit's own commands, printed before it runs. Running the demo again reuses completed stages
and resumes an interrupted one; `make demo-clean` deletes all results.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from cm.config import early_exit
from cm.config.parser import Parser
from cm.data.sources import open_source
from cm.quickstart.results import picture, row, samples_in, table, write_real
from cm.quickstart.stages import Commands, Stage, ranks_to_start, run_chain

SCRIPTS = Path(__file__).resolve().parent                   # in the repository as in an installed package


def read_flags() -> argparse.Namespace:
    """The flags of the command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"),
                        help="folder for all files of the demo [default: runs/demo]")
    parser.add_argument("--ranks", type=int, help="number of ranks for training and sampling "
                        "[default: 2, or 1 on a machine with one GPU]")
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
        self.out, self.num_samples, self.extra = out, num_samples, extra
        self.commands = Commands(out, SCRIPTS, ranks)
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """All stages in their order, then the table."""
        start = time.monotonic()
        self.reference()
        self.stage(self.commands.classifier("digits", 8))   # a small classifier that never sees a generated image
        # A slow clock, which ECT needs (docs/few-step.md); and the average of step 100 stays, to guide.
        self.train("edm", "edm_train", "--time_scale", "1", "--milestone_interval", "100")
        teacher = self.checkpoint("edm")
        measured = ("--eval_interval", "50", "--eval_samples", "1000", "--eval_batch_size", "250", "--eval_ref",
                    str(self.out / "real.npz"), "--inception", str(self.out / "classifier.ts"))
        self.train("cd", "cm_train", "--teacher_model_path", str(teacher), *measured)
        self.train("ect", "cm_train", "--teacher_model_path", str(teacher), *measured)
        self.train("ct", "cm_train", *measured)
        for key, method in METHODS.items():
            self.sample(key, method)
        rows = [self.evaluate(key, method) for key, method in METHODS.items()]
        path = self.out / "demo.png"
        folders = {method.name: self.out / key for key, method in METHODS.items()}
        picture(path, self.out / "real.npz", "real digits", folders, scale=6)
        report = self.stage(self.commands.report(["edm", "cd", "ect", "ct"])).product
        print("\n" + table(rows, self.note()))
        print(f"\n{time.monotonic() - start:.0f} s in total. The picture: {path}; the trainings: {report}")

    def stage(self, stage: Stage) -> Stage:
        """Run a stage unless its product is there."""
        stage.run("demo")
        return stage

    def reference(self) -> None:
        """The real digits as a batch for the evaluator."""
        path = self.out / "real.npz"
        if not path.exists():
            write_real(path, open_source("digits", 8, channels=1))

    def train(self, run: str, command: str, *options: str) -> None:
        """A training run by the preset of its name."""
        self.stage(self.commands.training(run, command, "--config", f"digits/{run}", *options, *self.extra))

    def sample(self, key: str, method: Method) -> None:
        """Samples of a method."""
        self.stage(self.commands.sampling(
            key, method.name, self.checkpoint(method.run), self.num_samples, "--batch_size", "250", *method.options,
            *self.guide(method),
        ))

    def evaluate(self, key: str, method: Method) -> dict:
        """A row of the table."""
        self.stage(self.commands.evaluation(
            key, method.name, samples_in(self.out / key), "--inception", str(self.out / "classifier.ts"),
            "--class_accuracy",
        ))
        return row(method.name, self.out / key)

    def checkpoint(self, run: str) -> Path:
        """The newest averaged weights of a training run."""
        return sorted((self.out / run).glob("ema_*.pt"))[-1]

    def guide(self, method: Method) -> tuple[str, ...]:
        """Autoguidance (Karras et al. 2024, arXiv 2406.02507): each run holds a worse network, an early one."""
        if method.guide_scale == 1:
            return ()
        first = sorted((self.out / method.run).glob("ema_*.pt"))[0]
        return "--guide_path", str(first), "--guide_scale", str(method.guide_scale)

    def note(self) -> str:
        """What the numbers of the table are, with the held-out accuracy of the feature extractor."""
        facts = self.out / "classifier.json"
        accuracy = f"{json.loads(facts.read_text())['held_out_accuracy']:.1%}" if facts.exists() else "unknown"
        return ("* in the features of the digit classifier trained in this demo (held-out accuracy "
                f"{accuracy}); not Inception FID, and not comparable with it")


def main() -> None:
    """Run the demo as the flags say."""
    args = early_exit.parse_or_exit(read_flags)
    run_chain(lambda: demo_of(args).run())


def demo_of(args: argparse.Namespace) -> Demo:
    """The demo that the flags describe."""
    ranks = ranks_to_start(args.ranks, on_cpu=2, at_most=2)
    return Demo(args.out.resolve(), ranks, args.num_samples, shlex.split(args.train_options))


if __name__ == "__main__":
    main()
