"""Every objective with every sampler: same network, same number of images seen, several seeds; a table and a picture.

python benchmarks/compare_methods.py --data digits --out runs/compare
python benchmarks/compare_methods.py --data cifar10-train.zip --reference cifar10-test.zip --out runs/compare_cifar10

A stage that is complete is reused, a training that was interrupted goes on. The distances are in the features of a
small classifier of the same data, not in Inception's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from cm.generate.engine import draw, labels_of
from cm.generate.grids import labelled_rows, save_picture
from cm.io.atomic import AtomicFile
from cm.io.storage import write_bytes, write_json
from cm.report.plots import dot_plot
from cm.setup.sample import inherit_model, load_model, sampler_options, sampling_diffusion, sampling_plan
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


class Contest:
    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out.resolve()
        self.stage: Stage = STAGES["digits" if args.data == "digits" else "images"]
        self.steps = args.steps or self.stage.steps
        self.trainings = {name: TRAININGS[name] for name in args.trainings or TRAININGS}
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        self.reference()
        self.classifier()
        seeds = range(self.args.seeds)
        with ThreadPoolExecutor(self.args.jobs) as pool:    # a chain is a teacher and its students
            ordered = [(seed, first) for seed in seeds for first in chains(self.trainings)]
            list(pool.map(self.train_chain, *zip(*ordered)))
        scores = self.measure(list(seeds))
        self.write(scores, list(seeds))

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

    def train_chain(self, seed: int, first: str) -> None:
        self.train(first, seed)
        for name, training in self.trainings.items():
            if training.teacher == first:
                self.train(name, seed)

    def train(self, name: str, seed: int) -> None:
        training, folder = TRAININGS[name], self.folder(name, seed)
        flags: dict[str, str | int | float] = {
            "data_dir": self.args.data, "seed": seed, "total_training_steps": self.steps, "save_interval": self.steps,
            "log_interval": max(1, self.steps // 20), "precision": "auto", "log_dir": str(folder),
            **self.stage.training, **training.flags,
        }
        if training.teacher:
            flags |= {"teacher_model_path": str(self.checkpoint(training.teacher, seed)), "lr": flags["lr"] / 2}
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
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=output, stderr=output)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}; see {log}")
        return used.ru_utime + used.ru_stime

    # --- measuring -------------------------------------------------------------------------------------------------

    def measure(self, seeds: list[int]) -> list[Score]:
        """Samples of every training by each of its samplers, and their distance, on one thread a training."""
        runs = [(name, seed) for seed in seeds for name in self.trainings]
        with ProcessPoolExecutor(self.args.jobs, get_context("spawn"), th.set_num_threads, (1,)) as pool:
            found = list(tqdm(pool.map(self.measure_run, *zip(*runs)), "measuring", len(runs)))
        return [score for scores in found for score in scores]

    def measure_run(self, name: str, seed: int) -> list[Score]:
        """The scores of one training; they are kept in its folder."""
        path = self.folder(name, seed) / "scores.json"
        if path.exists():
            return [Score(**row) for row in json.loads(path.read_text())]
        extractor = load_extractor(str(self.out / "classifier.ts"))
        evaluator = ThEvaluator(str(self.out / "real.npz"), extractor, self.stage.network["image_size"])
        scores = []
        for way in TRAININGS[name].samplers:
            images, evaluations = self.sample(name, way, seed, self.args.num_samples)
            distance = evaluator.evaluate([(0, images)])["frechet_distance"].value
            scores.append(Score(name, way, seed, distance, evaluations))
        write_json(path, [asdict(score) for score in scores])
        return scores

    def sample(self, name: str, way: str, seed: int, count: int) -> tuple[np.ndarray, int]:
        """[count,S,S,3] uint8, of the same noises for every training, and the evaluations of the network."""
        flags = {"model_path": str(self.checkpoint(name, seed)), "num_samples": count, "precision": "fp32",
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

    def write(self, scores: list[Score], seeds: list[int]) -> None:
        rows: dict[tuple[str, str], list[Score]] = {}
        for score in scores:
            rows.setdefault((score.training, score.sampler), []).append(score)
        raw = self.raw_results(scores, seeds)
        text = "\n".join(table(raw))
        write_bytes(self.out / "table.md", (text + "\n").encode())
        write_json(self.out / "results.json", raw)
        ordered = sorted(rows.items(), key=lambda row: np.mean([score.distance for score in row[1]]))
        dots = {f"{name}, {way}": [score.distance for score in row] for (name, way), row in ordered}
        picture = dot_plot(dots, "Frechet distance in classifier features; a dot is a seed")
        write_bytes(self.out / "distances.png", picture)
        pictures = [(name, self.sample(name, training.samplers[0], seeds[0], SHOWN)[0])
                    for name, training in self.trainings.items()]
        scale = max(1, 48 // self.stage.network["image_size"])
        save_picture(self.out / "samples.png", labelled_rows(pictures, scale))
        print(text)

    def raw_results(self, scores: list[Score], seeds: list[int]) -> dict:
        """Everything that the table and the picture are made of."""
        return {
            "command": " ".join(["python", "benchmarks/compare_methods.py", *sys.argv[1:]]),
            "steps": self.steps, "images_per_step": self.stage.training["global_batch_size"],
            "samples": self.args.num_samples, "scores": [asdict(score) for score in scores],
            "seconds": {name: [self.seconds(name, seed) for seed in seeds] for name in self.trainings},
        }

    # --- parts -----------------------------------------------------------------------------------------------------

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{name.lower().replace(' ', '_')}_{seed}"

    def checkpoint(self, name: str, seed: int) -> Path:
        return sorted(self.folder(name, seed).glob("ema_*.pt"))[-1]

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


def chains(trainings: Mapping[str, Training]) -> list[str]:
    """Trainings without a teacher, the longest first."""
    free = [name for name, training in trainings.items() if training.teacher is None]
    return sorted(free, key=lambda name: name != "CDM")


def words(flags: Flags) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or labelled images: a folder, zip or npz")
    parser.add_argument("--reference", default="", help="held-out images to compare with; empty: the training images")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of everything that is made")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, of one thread each")
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, help="with their teachers; none: all")
    parser.add_argument("--steps", type=int, default=0, help="of every training; 0: as the data set's stage says")
    parser.add_argument("--num_samples", type=int, default=2000, help="images of each training and sampler")
    parser.add_argument("--num_reference", type=int, default=10000, help="reference images at most")
    parser.add_argument("--batch_size", type=int, default=250, help="samples at a time")
    parser.add_argument("--classifier_epochs", type=int, default=15, help="of the classifier whose features compare")
    args = parser.parse_args()
    dist.setup_dist()
    th.set_num_threads(1)                                   # as many jobs as cores, of one thread each
    Contest(args).run()


if __name__ == "__main__":
    main()
