"""Sample images from a checkpoint: an npz for the evaluator, and a grid to look at.

mpiexec -n 8 python scripts/image_sample.py --model_path runs/cd/ema_0.9999_600000.pt --sampler onestep \\
    --num_samples 50000 --log_dir runs/cd_samples
"""

from __future__ import annotations

import json
from typing import Any

from cm import dist_util, logger, run_util, script_util
from cm.checkpoints import weights
from cm.config import DiffusionConfig, ModelConfig, RunConfig, SampleConfig
from cm.flags import Settings, parse
from cm.registry import UserError
from cm.sample_files import grid_scale, image_grid
from cm.samplers import make_sampler
from cm.sampling import SamplingPlan, SamplingResult, sample_to_npz

RHO = 7.0                                                   # of the Karras grid


def main() -> None:
    settings = parse(__doc__, SampleConfig, ModelConfig, DiffusionConfig, RunConfig, seed=42)
    dist_util.setup_dist()
    config = settings.section(SampleConfig)
    if not config.model_path:
        raise UserError("--model_path is missing: give a checkpoint, such as runs/edm/ema_0.9999_600000.pt")
    script_util.adopt_checkpoint(settings, "model_path", also=("training_mode",))
    script_util.attend_where_possible(settings)
    config = settings.section(SampleConfig)
    if settings.dry_run:
        return run_util.describe(settings)

    plan = make_plan(settings, config)
    options = sampler_options(settings, config)
    run_util.open_log(settings)
    model = script_util.model_from(settings)
    weights.fit(model, dist_util.load_state_dict(config.model_path), config.model_path)
    script_util.place(model, dist_util.dev()).eval()
    distillation = config.training_mode in ("consistency_distillation", "consistency_training")
    result = sample_to_npz(
        model,
        script_util.diffusion_from(settings, distillation),
        plan,
        logger.get_dir(),
        script_util.choose_precision(settings.values["precision"], settings.values["use_fp16"], dist_util.dev()),
        **options,
    )
    dist_util.on_main(report, config, plan, result)


def make_plan(settings: Settings, config: SampleConfig) -> SamplingPlan:
    values = settings.values
    num_classes = (values["num_classes"] or script_util.PUBLISHED_CLASSES) if values["class_cond"] else None
    if config.class_label >= 0 and num_classes is None:
        raise UserError(f"--class_label {config.class_label}: this model is not class-conditional; drop the flag")
    if num_classes is not None and config.class_label >= num_classes:
        raise UserError(f"--class_label {config.class_label}: the model has classes 0 to {num_classes - 1}")
    return SamplingPlan(
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        image_size=values["image_size"],
        seed=values["seed"],
        num_classes=num_classes,
        class_label=config.class_label,
        generator=config.generator,
    )


def sampler_options(settings: Settings, config: SampleConfig) -> dict[str, Any]:
    """What `cm.karras_diffusion.sample` takes from the flags, tried out before anything is loaded."""
    values = settings.values
    ts = script_util.parse_ts(config.ts)
    make_sampler(config.sampler, {"ts": ts, "sigma_min": values["sigma_min"]}).grid(
        config.steps, values["sigma_min"], values["sigma_max"], RHO
    )
    churn = {name: values[name] for name in ("s_churn", "s_tmin", "s_tmax", "s_noise")}
    return {
        "sampler": config.sampler, "steps": config.steps, "ts": ts, "clip_denoised": config.clip_denoised,
        "sigma_min": values["sigma_min"], "sigma_max": values["sigma_max"], **churn,
    }


def report(config: SampleConfig, plan: SamplingPlan, result: SamplingResult) -> None:
    """Leave a grid and a summary beside the npz; on rank 0."""
    summary = {
        "samples": result.path,
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
    with open(result.path.removesuffix(".npz") + ".json", "w") as file:
        json.dump(summary, file, indent=2)
    grid_path = result.path.removesuffix(".npz") + ".png"
    image_grid(result.first_images, columns=8, scale=grid_scale(plan.image_size)).save(grid_path)
    logger.log(f"{plan.num_samples} images, {result.evaluations} network evaluations each, "
               f"{summary['images_per_second']} images/s")
    logger.log(f"samples: {result.path}\ngrid: {grid_path}")


if __name__ == "__main__":
    dist_util.run(main)
