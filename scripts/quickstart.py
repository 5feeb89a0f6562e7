"""Make a few-step generator from images in a given time: measure, plan, train, distil, sample and evaluate.

python scripts/quickstart.py --data_dir IMAGES --hours 2

Run the same command again to resume. --plan only prints the plan and writes it as files for --config.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from cm.config import early_exit
from cm.config.flags import str2bool
from cm.config.parser import Parser, positive
from cm.io import storage
from cm.quickstart.stages import ranks_to_start, run_chain

SCRIPTS = Path(__file__).resolve().parent                   # in the repository as in an installed package


def read_flags() -> argparse.Namespace:
    """The flags of the command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_dir", required=True, help="images: a folder, a zip, an npz, or the word digits")
    parser.add_argument("--hours", type=hours, required=True, help="time limit in hours for everything, such as 0.5")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"),
                        help="folder for all files [default: runs/quickstart]")
    parser.add_argument("--plan", action="store_true", help="only measure and plan; writes teacher.yaml and "
                        "student.yaml for --config of the training commands")
    parser.add_argument("--ranks", type=positive, help="number of ranks; more than one are started by "
                        "mpiexec [default: one for each GPU, or 1 on the CPU]")
    parser.add_argument("--method", choices=("ect", "cd"), default="ect",
                        help="few-step method: easy consistency tuning or consistency distillation [default: ect]")
    parser.add_argument("--size", choices=("tiny", "small", "medium", "large"), default="",
                        help="network: a preset of configs/size [default: chosen by the plan]")
    parser.add_argument("--image_size", type=positive, default=0, help="side of the images in pixels [default: chosen]")
    parser.add_argument("--num_samples", type=positive, default=1000, help="images generated per method; fewer where "
                        "they would take too long [default: 1000]")
    parser.add_argument("--max_steps", type=positive, default=0,
                        help="maximum number of steps of each training, for a quick trial [default: no limit]")
    parser.add_argument("--random_flip", type=str2bool, help="mirror images [default: True, False for grey ones]")
    parser.add_argument("--labels", choices=("auto", "folders", "names"), default="auto",
                        help="where classes come from, as in training [default: auto]")
    parser.add_argument("--inception", default=os.environ.get("CM_INCEPTION", ""), metavar="PATH",
                        help="feature extractor of the evaluation [default: $CM_INCEPTION; a small classifier for "
                        "digits; else none]")
    parser.add_argument("--trust_extractor", action="store_true",
                        help="trust the extractor and run it: a TorchScript file is a program")
    parser.add_argument("--train_options", default="", help="flags for both trainings, quoted as one argument")
    return parser.parse_args()


def hours(word: str) -> float:
    """A positive, finite number of hours."""
    value = float(word)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{word} must be more than 0, such as 0.5")
    return value


def main(args: argparse.Namespace) -> None:
    """Plan, and unless only a plan is asked for, do it.

    :raises UserError: for images, a folder or a time that cannot be used.
    """
    from cm.quickstart.plan import Wish
    from cm.quickstart.workflow import DIGITS, Order, Workflow

    place = args.data_dir == DIGITS or storage.is_remote(args.data_dir)
    wish = Wish(
        args.hours, args.method, args.size, args.image_size, args.num_samples, args.max_steps, args.random_flip,
        args.labels, evaluates=bool(args.inception) or args.data_dir == DIGITS,
    )
    workflow = Workflow(Order(
        args.data_dir if place else os.path.abspath(args.data_dir), args.out.resolve(), wish,
        ranks_to_start(args.ranks, on_cpu=1), SCRIPTS, tuple(shlex.split(args.train_options)), args.inception,
        args.trust_extractor,
    ))
    workflow.prepare()
    if not args.plan:
        return workflow.run()
    print("The commands")
    for stage in workflow.stages():
        print(f"  {'# done: ' if stage.is_done else ''}{shlex.join(stage.command)}")
    print(f"The plan as files: {workflow.out / 'teacher.yaml'}, {workflow.out / 'student.yaml'}")


if __name__ == "__main__":
    flags = early_exit.parse_or_exit(read_flags)
    run_chain(lambda: main(flags))
