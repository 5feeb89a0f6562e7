"""A program for several ranks that the tests start once for many runs, because starting ranks takes seconds.

    mpiexec -n 2 python tests/system/resume_cases.py FOLDER '{"bitwise": [NAME, ...], "go_on": [[NAME, STEPS], ...]}'

Its findings go to FOLDER/report.json.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch as th

from cm.diffusion.noise_sampling import create_named_schedule_sampler
from cm.distributed import setup as dist
from cm.karras_diffusion import KarrasDenoiser
from cm.objectives import DENOISING
from cm.setup.data import RunBatches
from cm.training.non_finite import NonFiniteError
from support.training import MODES, digest, loop, second_moment

SIZE = 4                                                    # of images; CPUs are slow at fp16
BATCH, STEPS, STOPS = 8, 5, (2, 3)                          # over all ranks; progdist changes its stage after 2 steps

CASES = {
    "edm": {},
    "edm fp16 workers": {"use_fp16": True, "num_workers": 2},
    "edm loss-second-moment": {"memory": True},
    "edm loss-second-moment fp16": {"memory": True, "use_fp16": True},
    "edm dropout microbatches workers": {"dropout": 0.3, "microbatch": 2, "lr_anneal_steps": 20, "num_workers": 2},
    "consistency_distillation": {"dropout": 0.2},
    "consistency_distillation fp16 workers": {"dropout": 0.2, "use_fp16": True, "num_workers": 2},
    "consistency_training workers": {"num_workers": 2},
    "consistency_training fp16": {"use_fp16": True},
    "cdm": {},
    "stf fp16 workers": {"use_fp16": True, "num_workers": 2},
    "sadpm": {"dropout": 0.2},
    "progdist": MODES["progdist"],
    "progdist fp16 workers": {**MODES["progdist"], "use_fp16": True, "num_workers": 2},
}


def make_images(folder: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)
    path = folder / "images.npz"
    dist.on_main(partial(np.savez, path, arr_0=pixels, arr_1=np.arange(20) % 3))
    return str(path)


def batches(images, num_workers, references):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = len(range(rank, BATCH, ranks))
    options = {"data_dir": images, "batch_size": share, "global_batch": BATCH, "image_size": SIZE, "class_cond": True,
               "seed": 3, "num_workers": num_workers}
    return RunBatches(rank, ranks, options, references)


def denoising(name):
    """The objective of `--objective`, with little work for each step."""
    diffusion, options = KarrasDenoiser(loss_norm="l2"), {"stf": {"num_references": 12}}
    return DENOISING[name].of(diffusion, create_named_schedule_sampler("lognormal", diffusion), options.get(name, {}))


def prepare(images, directory, steps, mode, memory=False, num_workers=0, **options):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if memory:
        options["schedule_sampler"] = second_moment()
    references = 0
    if mode in DENOISING and mode != "edm":
        options["objective"], mode = denoising(mode), "edm"
        references = options["objective"].references
    return loop(
        images, directory, steps, mode=mode,
        data=batches(images, num_workers, references),
        batch_size=len(range(rank, BATCH, ranks)), global_batch_size=BATCH, **options,
    )


def train(images, directory, steps, name):
    prepare(images, directory, steps, name.split(" ")[0], **CASES[name]).run_loop()


def bitwise(images, folder, name):
    """Which files of a run with stops equal those of a straight one."""
    straight, stopped = folder / name / "straight", folder / name / "stopped"
    train(images, straight, STEPS, name)
    for stop in (*STOPS, STEPS):
        train(images, stopped, stop, name)
    if not dist.is_main():
        return None
    one, other = digest(straight, STEPS), digest(stopped, STEPS)
    return {file: one[file] == other.get(file) for file in one}


def spoilt(images, directory, value, rank, **options):
    """What every rank says and holds after an image of one rank's batches was spoilt, until training stops."""
    training = prepare(images, directory, 60, "edm", **options)
    said, steps = "", []
    try:
        for _ in range(60):
            batch = next(training.data)
            if dist.get_rank() == rank:
                batch.images[1] = value
            training.run_step(batch)
            steps.append(training.report.stepped)
    except NonFiniteError as error:
        said = str(error)
    facts = {
        "said": said, "stepped": sum(steps), "skipped": training.trainer.skipped_steps,
        "scale": training.trainer.lg_loss_scale, "image": int(batch.indices[1]), "step": training.step,
        "weights": th.cat([param.detach().reshape(-1) for param in training.trainer.master_params]).sum().item(),
    }
    return dist.all_gather_object(facts)


def main():
    dist.setup_dist()
    folder, tasks = Path(sys.argv[1]), json.loads(sys.argv[2])
    images, report = make_images(folder), {}
    for name in tasks.get("bitwise", []):
        report[name] = bitwise(images, folder, name)
    for name, steps in tasks.get("go_on", []):
        train(images, folder / name, steps, "edm dropout microbatches workers" if "dropout" in name else "edm")
    for name, options in tasks.get("spoilt", {}).items():
        report[name] = spoilt(images, folder / name, float("nan"), 1, **options)
    if dist.is_main():
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    dist.run(main)
