"""Sample images from a checkpoint: an npz for the evaluator, and a grid to look at.

mpiexec -n 8 python scripts/image_sample.py --model_path runs/cd/ema_0.9999_600000.pt --sampler onestep \\
    --num_samples 50000 --log_dir runs/cd_samples
"""

from __future__ import annotations

import json
from dataclasses import replace

from cm import dist_util, logger, run_util
from cm.config import DiffusionConfig, ModelConfig, RunConfig, SampleConfig, SeedsConfig
from cm.flags import parse
from cm.sample_files import grid_scale, image_grid
from cm.sampling import SamplingPlan, SamplingResult, sample_to_npz


def main() -> None:
    settings = parse(__doc__, SampleConfig, SeedsConfig, ModelConfig, DiffusionConfig, RunConfig, seed=42)
    dist_util.setup_dist()
    config = run_util.adopt_model(settings)
    seeds = run_util.choose_seeds(settings)
    if settings.dry_run:
        return run_util.describe(settings)

    plan = replace(run_util.sampling_plan(settings), seeds=seeds)
    options = run_util.sampler_options(settings)            # tried out before anything is loaded
    run_util.open_log(settings)
    result = sample_to_npz(
        run_util.load_model(settings),
        run_util.sampling_diffusion(settings),
        plan,
        logger.get_dir(),
        run_util.run_precision(settings),
        **options,
    )
    dist_util.on_main(report, config, plan, result)


def report(config: SampleConfig, plan: SamplingPlan, result: SamplingResult) -> None:
    """Leave a grid and a summary beside the npz; on rank 0."""
    path = result.paths["samples"]
    summary = {
        "samples": path,
        "model_path": config.model_path,
        "sampler": config.sampler,
        "steps": config.steps,
        "ts": config.ts,
        "seed": plan.seed,
        "num_samples": plan.num_samples,
        "network_evaluations": result.evaluations,
        "seconds": round(result.seconds, 3),
        "images_per_second": round(plan.num_samples / result.seconds, 3),
    }
    with open(path.removesuffix(".npz") + ".json", "w") as file:
        json.dump(summary, file, indent=2)
    grid_path = path.removesuffix(".npz") + ".png"
    image_grid(result.first_images["samples"], columns=8, scale=grid_scale(plan.image_size)).save(grid_path)
    logger.log(f"{plan.num_samples} images, {result.evaluations} network evaluations each, "
               f"{summary['images_per_second']} images/s")
    logger.log(f"samples: {path}\ngrid: {grid_path}")


if __name__ == "__main__":
    dist_util.run(main)
