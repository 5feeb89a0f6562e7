"""Compare objectives and samplers with the same network and number of images, over several seeds: a table and a plot.

python benchmarks/compare_methods.py --data digits --out runs/compare
python benchmarks/compare_methods.py --data cifar10-train.zip --reference cifar10-test.zip --stage images32 --points 6

Completed stages are reused, and interrupted trainings are resumed. The distances use the features of a small classifier
of the same data, not of Inception.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from bench.contest import STAGES, TRAININGS, WAYS, Flags, Stage, Training
from tqdm import tqdm

from cm.config.flags import parse
from cm.config.sampling_schema import SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.data.sources import open_source
from cm.distributed import setup as dist
from cm.distributed.parent import stop_with_parent
from cm.generate.engine import draw, labels_of
from cm.generate.grids import labelled_rows, save_picture
from cm.io.atomic import AtomicFile
from cm.io.storage import write_bytes, write_json
from cm.report.plots import dot_plot, line_plot
from cm.setup.sample import inherit_model, load_model, sampling_diffusion, sampling_plan
from cm.setup.sampler import sampler_options
from evaluations.features import load_extractor
from evaluations.th_evaluator import ThEvaluator

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 16                                                  # samples of each training in the picture


@dataclass(frozen=True)
class Score:
    """What one training with one sampler came to."""

    training: str
    sampler: str
    seed: int
    distance: float
    evaluations: int                                        # of the network, per image


@dataclass(frozen=True)
class Point:
    """The distance by a training's first sampler after `images` images, one point of its curve."""

    training: str
    seed: int
    images: int
    distance: float


class Contest:
    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out.resolve()
        self.stage: Stage = STAGES[args.stage or ("digits" if args.data == "digits" else "images")]
        self.steps = args.steps or self.stage.steps
        self.trainings = {name: TRAININGS[name] for name in args.trainings or TRAININGS}
        self.steps_of = {name: self.steps if training.teacher is None else args.student_steps or self.steps
                         for name, training in self.trainings.items()}
        if args.equal_seconds:
            self.steps_of |= equal_seconds(json.loads(args.equal_seconds.read_text()), self.trainings)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        self.reference()
        self.classifier()
        seeds = range(self.args.seeds)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for generation in generations(self.trainings):  # students start when all teachers are there
                list(pool.map(self.train, *zip(*[(name, seed) for seed in seeds for name in generation])))
        scores, curves = self.measure(list(seeds))
        self.write(scores, curves, list(seeds))

    # --- stages ----------------------------------------------------------------------------------------------------

    def reference(self) -> None:
        path = self.out / "real.npz"
        if not path.exists():
            source = open_source(self.args.reference or self.args.data, self.stage.network["image_size"])
            rows = np.arange(min(len(source), self.args.num_reference))
            with AtomicFile(path) as file:
                np.savez(file, arr_0=source.images(rows), arr_1=source.labels[rows])

    def classifier(self) -> None:
        size = self.stage.network["image_size"]
        self.command(self.out / "classifier.ts", [
            "scripts/classifier_train.py", "--data_dir", self.args.data, "--image_size", str(size),
            "--epochs", str(self.args.classifier_epochs), "--out", str(self.out / "classifier.ts"),
        ])

    def train(self, name: str, seed: int) -> None:
        training, folder, steps = TRAININGS[name], self.folder(name, seed), self.steps_of[name]
        flags: dict[str, str | int | float] = {
            "data_dir": self.args.data, "seed": seed, "total_training_steps": steps,
            "save_interval": max(1, steps // self.args.points), "keep_checkpoints": 0,
            "log_interval": max(1, steps // 20), "precision": "auto", "log_dir": str(folder),
            **self.stage.training, **training.flags,
        }
        if training.teacher:
            flags |= {"teacher_model_path": str(self.checkpoints(training.teacher, seed)[-1]), "lr": flags["lr"] / 2}
        else:
            flags |= self.stage.network
        if seconds := self.command(folder / "seconds.json", [f"scripts/{training.script}", *words(flags)]):
            write_json(folder / "seconds.json", seconds)

    def command(self, product: Path, command: list[str]) -> float:
        """Run a command of the toolkit on one thread, unless its product is there.

        :return: seconds of the processor, which other programs change little; 0 if it did not run.
        """
        if product.exists():
            return 0.0
        log = product.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENAI_LOG_FORMAT": "csv"}
        with log.open("w") as output:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=output, stderr=output,
                                       preexec_fn=stop_with_parent())
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}; see {log}")
        return used.ru_utime + used.ru_stime

    # --- measuring -------------------------------------------------------------------------------------------------

    def measure(self, seeds: list[int]) -> tuple[list[Score], list[Point]]:
        """The distance of samples of every training by each of its samplers, and its curve, on a thread each."""
        runs = [(name, seed) for seed in seeds for name in self.trainings]
        with ProcessPoolExecutor(self.args.jobs, get_context("spawn"), th.set_num_threads, (1,)) as pool:
            scores = list(tqdm(pool.map(self.measure_run, *zip(*runs)), "measuring", len(runs)))
            curves = pool.map(self.measure_curve, *zip(*runs)) if self.args.points > 1 else []
            return list(chain(*scores)), list(chain(*curves))

    def measure_run(self, name: str, seed: int) -> list[Score]:
        """The scores of one training; they are kept in its folder."""
        path = self.folder(name, seed) / "scores.json"
        if path.exists():
            return [Score(**row) for row in json.loads(path.read_text())]
        distance = self.distance()
        scores = []
        for way in TRAININGS[name].samplers:
            images, evaluations = self.sample(self.checkpoints(name, seed)[-1], way, self.args.num_samples)
            scores.append(Score(name, way, seed, distance(images), evaluations))
        write_json(path, [asdict(score) for score in scores])
        return scores

    def measure_curve(self, name: str, seed: int) -> list[Point]:
        """The distance at every checkpoint of one training; it is kept in its folder."""
        path = self.folder(name, seed) / "curve.json"
        if path.exists():
            return [Point(**row) for row in json.loads(path.read_text())]
        distance, way, batch = self.distance(), TRAININGS[name].samplers[0], self.stage.training["global_batch_size"]
        points = [
            Point(name, seed, step_of(checkpoint) * batch,
                  distance(self.sample(checkpoint, way, self.args.num_samples)[0]))
            for checkpoint in self.checkpoints(name, seed)
        ]
        write_json(path, [asdict(point) for point in points])
        return points

    def distance(self) -> Callable[[np.ndarray], float]:
        """The Fréchet distance of images [N,S,S,3] uint8 to the reference images."""
        extractor = load_extractor(str(self.out / "classifier.ts"))
        evaluator = ThEvaluator(str(self.out / "real.npz"), extractor, self.stage.network["image_size"])
        return lambda images: evaluator.evaluate([(0, images)])["frechet_distance"].value

    def sample(self, checkpoint: Path, way: str, count: int) -> tuple[np.ndarray, int]:
        """[count,S,S,3] uint8, of the same noises for every training, and the evaluations of the network."""
        flags = {"model_path": str(checkpoint), "num_samples": count, "precision": "fp32",
                 "sampler": WAYS[way].name, **WAYS[way].flags}
        sections = (SampleConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig)
        settings = parse("", *sections, argv=words(flags), seed=42)
        inherit_model(settings)
        plan, options = sampling_plan(settings), sampler_options(settings)
        model, diffusion = load_model(settings), sampling_diffusion(settings)
        parts, evaluations = [], 0
        for rows in np.array_split(np.arange(count), -(-count // self.args.batch_size)):
            images, evaluations, _ = draw(model, diffusion, plan, rows, labels_of(rows, plan), options)
            parts.append(images)
        return np.concatenate(parts), evaluations

    # --- results ---------------------------------------------------------------------------------------------------

    def write(self, scores: list[Score], curves: list[Point], seeds: list[int]) -> None:
        rows: dict[tuple[str, str], list[Score]] = {}
        for score in scores:
            rows.setdefault((score.training, score.sampler), []).append(score)
        raw = self.raw_results(scores, curves, seeds)
        text = "\n".join(table(raw))
        write_bytes(self.out / "table.md", (text + "\n").encode())
        write_json(self.out / "results.json", raw)
        ordered = sorted(rows.items(), key=lambda row: np.mean([score.distance for score in row[1]]))
        dots = {f"{name}, {way}": [score.distance for score in row] for (name, way), row in ordered}
        picture = dot_plot(dots, "Frechet distance in classifier features; a dot is a seed")
        write_bytes(self.out / "distances.png", picture)
        if curves:
            lines = {f"{name}, {TRAININGS[name].samplers[0]}": curve_of(name, curves) for name in self.trainings}
            write_bytes(self.out / "curves.png", line_plot(lines, "training images", "Frechet distance", log=True))
        pictures = [(name, self.sample(self.checkpoints(name, seeds[0])[-1], training.samplers[0], SHOWN)[0])
                    for name, training in self.trainings.items()]
        scale = max(1, 48 // self.stage.network["image_size"])
        save_picture(self.out / "samples.png", labelled_rows(pictures, scale))
        print(text)

    def raw_results(self, scores: list[Score], curves: list[Point], seeds: list[int]) -> dict:
        """Everything that the table and the picture are made of."""
        return {
            "command": " ".join(["python", "benchmarks/compare_methods.py", *sys.argv[1:]]),
            "steps": self.steps_of, "images_per_step": self.stage.training["global_batch_size"],
            "samples": self.args.num_samples, "scores": [asdict(score) for score in scores],
            "curves": [asdict(point) for point in curves],
            "seconds": {name: [self.seconds(name, seed) for seed in seeds] for name in self.trainings},
        }

    # --- parts -----------------------------------------------------------------------------------------------------

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{name.lower().replace(' ', '_')}_{seed}"

    def checkpoints(self, name: str, seed: int) -> list[Path]:
        """The averaged weights of a training, the last at the end."""
        return sorted(self.folder(name, seed).glob("ema_*.pt"), key=step_of)

    def seconds(self, name: str, seed: int) -> float:
        return json.loads((self.folder(name, seed) / "seconds.json").read_text())


def table(raw: Mapping[str, Any]) -> list[str]:
    """The rows of a Markdown table of raw results, by the mean of the seeds; the seconds are medians of these."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for score in raw["scores"]:
        found.setdefault((score["training"], score["sampler"]), []).append(score)
    distances = {key: [score["distance"] for score in scores] for key, scores in found.items()}
    lines = ["| training | sampler | NFE | distance, mean | lowest to highest | training, CPU s |",
             "|---|---|---|---|---|---|"]
    for key in sorted(distances, key=lambda key: np.mean(distances[key])):
        name, way = key
        seeds, seconds = distances[key], np.median(raw["seconds"][name])
        lines.append(f"| {name} | {way} | {found[key][0]['evaluations']} | {np.mean(seeds):.3g} | "
                     f"{min(seeds):.3g} to {max(seeds):.3g} | {seconds:.0f} |")
    return lines


def generations(trainings: Mapping[str, Training]) -> list[list[str]]:
    """Trainings without a teacher, the longest first, and then those that start from one of them."""
    free = [name for name, training in trainings.items() if training.teacher is None]
    students = [name for name in trainings if name not in free]
    return [part for part in (sorted(free, key=lambda name: name != "CDM"), students) if part]


def equal_seconds(earlier: Mapping[str, Any], trainings: Mapping[str, Training]) -> dict[str, int]:
    """Steps in which every training takes as long as the slowest did; those of teachers are not changed.

    :param earlier: the raw results of a comparison at equal steps.
    """
    teachers = {training.teacher for training in trainings.values()}
    seconds = {name: float(np.median(earlier["seconds"][name])) for name in trainings if name not in teachers}
    longest = max(seconds.values())
    return {name: round(earlier["steps"][name] * longest / own) for name, own in seconds.items()}


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint, as in ema_0.98_000200.pt."""
    return int(checkpoint.stem.rpartition("_")[2])


def curve_of(name: str, points: list[Point]) -> list[tuple[float, float]]:
    """Images seen and the mean distance of the seeds, in order."""
    own = [point for point in points if point.training == name]
    return [(images, float(np.mean([point.distance for point in own if point.images == images])))
            for images in sorted({point.images for point in own})]


def words(flags: Flags) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or labelled images: a folder, zip or npz")
    parser.add_argument("--reference", default="", help="held-out images to compare with; empty: the training images")
    parser.add_argument("--stage", choices=STAGES, help="network and length; without it: digits, or images at 16x16")
    parser.add_argument("--equal_seconds", type=Path, help="results.json of an earlier comparison: each training "
                        "takes as many steps as fit in the seconds of the slowest")
    parser.add_argument("--points", type=int, default=1, help="checkpoints per training to measure the distance at")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for all files")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, each with a training of every method")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel trainings, with one thread each")
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, help="trainings to run; default: all")
    parser.add_argument("--steps", type=int, default=0, help="steps of every training; 0: those of the stage")
    parser.add_argument("--student_steps", type=int, default=0, help="steps with a teacher; 0: as the others")
    parser.add_argument("--num_samples", type=int, default=2000, help="samples per training and sampler")
    parser.add_argument("--num_reference", type=int, default=10000, help="maximum number of reference images")
    parser.add_argument("--batch_size", type=int, default=250, help="samples per pass")
    parser.add_argument("--classifier_epochs", type=int, default=15, help="epochs of the feature classifier")
    args = parser.parse_args()
    dist.setup_dist()
    th.set_num_threads(1)                                   # as many jobs as cores, of one thread each
    Contest(args).run()


if __name__ == "__main__":
    main()
