"""Edit handwritten digits with a consistency model: a picture of each task, and the error with fewer noise levels.

python benchmarks/editing.py --model_path runs/digits/cd --log_dir runs/editing

The pictures are made by image_edit.py with the commands of docs/editing.md. The error is the root mean square
difference, in grey levels, between an original and its inpainted or colourised copy.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cm
from cm.checkpoints import manifest
from cm.config.flags import option, parse
from cm.data.sources import open_source
from cm.io.storage import write_json
from cm.setup.weights_path import weights_in

ROOT = Path(__file__).resolve().parents[1]
TASKS = {
    "inpaint": ["--images", "digits", "--mask_box", "2,2,4,4"],
    "colorize": ["--images", "digits"],
    "superres": ["--images", "digits", "--superres_factor", "4"],
    "stroke": ["--images", "digits", "--stroke_start", "9"],
    "denoise": ["--images", "digits", "--denoise_sigma", "0.5"],
    "interpolate": ["--interpolate_pairs", "0:1,2:3,4:5"],
}
EDITS = {"inpaint": {"mask": "box"}, "colorize": {}}
EVALUATIONS = (1, 2, 5, 0)
"""Of the network, at evenly spaced levels of the model's grid; 0: at all of them."""


@dataclass(frozen=True)
class EditingConfig:
    """editing"""

    model_path: str = option("runs/demo/cd", "a consistency model of the digits, such as that of the demo")
    num_samples: int = option(200, "images per measurement", minimum=1)
    pictures: bool = option(True, "also make the pictures")
    log_dir: str = option("editing", "folder for pictures and results")


def main() -> None:
    config = parse(__doc__ or "", EditingConfig).section(EditingConfig)
    folder = Path(config.log_dir)
    for task, flags in TASKS.items() if config.pictures else ():
        draw(task, flags, config.model_path, folder)
    write_json(folder / "editing.json", measure(config))


def draw(task: str, flags: list[str], model_path: str, folder: Path) -> None:
    """The comparison of image_edit.py, as TASK.png."""
    count = [] if task == "interpolate" else ["--num_samples", "8"]
    run = folder / task
    subprocess.run([sys.executable, str(ROOT / "scripts/image_edit.py"), "--task", task, *flags, *count, "--model_path",
                    model_path, "--log_dir", str(run)], check=True, cwd=ROOT)
    picture, = run.glob("samples_*.png")
    shutil.copy(picture, folder / f"{task}.png")
    shutil.rmtree(run)


def measure(config: EditingConfig) -> dict:
    """{"num_samples", "levels", "rms": {task: {evaluations: grey levels}}}."""
    source, pipe = open_source("digits", 8), cm.load(config.model_path)
    rows = np.arange(config.num_samples)
    originals, labels = source.images(rows), source.labels[rows]
    checkpoint = manifest.beside(weights_in(config.model_path, "model_path"))
    levels = checkpoint.config["start_scales"] if checkpoint else 40
    mask = np.ones((8, 8), bool)
    mask[2:6, 2:6] = False
    rms: dict[str, dict[str, float]] = {}
    for task, options in EDITS.items():
        known = options | ({"mask": mask} if "mask" in options else {})
        for count in EVALUATIONS:
            evaluations = count or levels - 1
            ts = ",".join(map(str, np.linspace(0, levels - 1, evaluations + 1).round().astype(int)))
            edited = pipe.edit(originals, task, labels=labels, output="array", sampler="multistep", steps=levels,
                               ts=ts, **known)
            error = edited.astype(float) - originals
            rms.setdefault(task, {})[str(evaluations)] = round(float(np.sqrt((error**2).mean())), 1)
        print(task, rms[task], flush=True)
    return {"num_samples": config.num_samples, "levels": levels, "rms": rms}


if __name__ == "__main__":
    main()
