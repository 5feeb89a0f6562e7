"""Edit images with a trained model: inpaint, colorize, superres, stroke, denoise; or interpolate between two samples.

python scripts/image_edit.py --task inpaint --images photos --mask_box 16,16,32,32 \\
    --model_path runs/cd/ema_0.9999_600000.pt --ts 0,22,39 --steps 40 --log_dir runs/inpainted
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.sampling_schema import EditConfig, GuidanceConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig, VaeConfig
from cm.generate.grids import grid_scale, labelled_rows, save_picture
from cm.io.outputs import Output, check_outputs
from cm.io.storage import write_json
from cm.logging import logger

if TYPE_CHECKING:
    from cm.generate.edit_tasks import EditJob
    from cm.generate.engine import SamplingResult
    from cm.setup.guide import Guide

COLUMNS = 8                                                 # images in the comparison
FIRST = ("model_path", "log_dir", "task", "images", "mask", "mask_box", "superres_factor", "denoise_sigma", "ts",
         "num_samples", "seed", "precision")                # what --help shows


def read_flags() -> Settings:
    """The flags of the command line, with the defaults of this command."""
    return parse(
        __doc__ or "", EditConfig, SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig, VaeConfig, RunConfig,
        first=FIRST, seed=42,
    )


def main(settings: Settings) -> None:
    """Edit all images on all ranks."""
    from cm.distributed import setup as dist
    from cm.generate.edit_tasks import edit_images, make_job
    from cm.generate.engine import at_precision, collect_to_npz
    from cm.setup.dry_run import dry_run
    from cm.setup.guide import SAMPLING, choose_guide
    from cm.setup.latents import load_decoder
    from cm.setup.run import open_log, run_precision
    from cm.setup.sample import guided_diffusion, inherit_model, load_classifier, load_model, sampling_plan
    from cm.setup.sampler import sampler_of

    dist.setup_dist(device=settings.values["device"])
    read = ("model_path", "images", "mask", "classifier_path", "guide_path", "vae")
    inputs = {f"--{name}": settings.values[name] for name in read}
    dist.on_main(check_outputs, [Output("--log_dir", settings.values["log_dir"], "folder")], inputs)
    inherit_model(settings)
    guide = choose_guide(settings, SAMPLING)
    classifier = load_classifier(settings)
    plan = replace(sampling_plan(settings, classifier), decoder=load_decoder(settings))
    job = make_job(settings, plan, *sampler_of(settings))
    if settings.dry_run:
        if job.source is not None:
            job.source.images(np.arange(1))
        return dry_run(settings)
    open_log(settings)
    model, diffusion = load_model(settings), guided_diffusion(settings, classifier, guide)
    with at_precision(model, run_precision(settings)):
        result = collect_to_npz(partial(edit_images, job, model, diffusion), job.plan, logger.get_dir(), job.kinds)
    dist.on_main(report, settings, job, result, guide)


def report(settings: Settings, job: EditJob, result: SamplingResult, guide: Guide | None) -> None:
    """Write a comparison and a summary next to the results, and log them; call it on rank 0."""
    config = settings.section(EditConfig)
    stem = result.paths["samples"].removesuffix(".npz")
    summary = result.paths | {
        "task": config.task,
        "model_path": config.model_path,
        "images": config.images,
        "sampler": config.sampler,
        "steps": config.steps,
        "ts": config.ts,
        "seed": job.plan.seed,
        "num_samples": job.plan.num_samples,
        "network_evaluations": result.evaluations,
        "seconds": round(result.seconds, 3),
        **(guide.record() if guide else {}),
        **({"vae": job.plan.decoder.vae.loaded.name} if job.plan.decoder else {}),
    }
    write_json(f"{stem}.json", summary)
    save_picture(f"{stem}.png", labelled_rows(comparison(job, result), grid_scale(job.plan.side)))
    logger.log(f"{job.plan.num_samples} results, {result.evaluations} network evaluations each")
    for kind, path in result.paths.items():
        logger.log(f"{kind}: {path}")
    logger.log(f"comparison: {stem}.png")


def comparison(job: EditJob, result: SamplingResult) -> list[tuple[str, np.ndarray]]:
    """Named rows of the first images: original, known and result, or a row for each pair."""
    results = result.first_images["samples"]
    if job.arcs is not None:
        starts = range(0, len(results), job.arcs.per_pair)
        return [("{} to {}".format(*job.arcs.ends[i]), results[i : i + job.arcs.per_pair]) for i in starts]
    results, known = results[:COLUMNS], result.first_images["inputs"][:COLUMNS]
    original = job.originals(np.arange(len(results)))
    changed = [("known", known)] if (known != original).any() else []
    return [("original", original), *changed, ("result", results)]


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
