"""Generate images from a checkpoint: one npz for the evaluator and an image grid, or one PNG per seed.

mpiexec -n 8 python scripts/image_sample.py --model_path runs/cd/ema_0.9999_600000.pt --sampler onestep \\
    --num_samples 50000 --log_dir runs/cd_samples
mpiexec -n 8 python scripts/image_sample.py --model_path runs/edm/ema_0.9999_600000.pt --steps 18 \\
    --seeds 0-49999 --outdir samples --subdirs
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.sampling_schema import GuidanceConfig, PngConfig, SampleConfig, SeedsConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig, VaeConfig
from cm.data.class_names import named
from cm.errors import UserError
from cm.generate.grids import captioned_grid, grid_scale, save_picture
from cm.generate.png import PngFolder
from cm.io.outputs import Output, check_outputs
from cm.io.storage import write_json
from cm.logging import logger

if TYPE_CHECKING:
    from cm.generate.engine import PngResult, SamplingPlan, SamplingResult
    from cm.setup.guide import Guide

FIRST = ("model_path", "log_dir", "sampler", "steps", "ts", "num_samples", "batch_size", "class_label", "guide_scale",
         "seed", "outdir", "precision")                     # what --help shows


def read_flags() -> Settings:
    """The flags of the command line, with the defaults of this command."""
    return parse(
        __doc__ or "", SampleConfig, SolverConfig, GuidanceConfig, SeedsConfig, PngConfig, ModelConfig, DiffusionConfig,
        VaeConfig, RunConfig, first=FIRST, seed=42,
    )


def main(settings: Settings) -> None:
    """Sample all images on all ranks."""
    from cm.distributed import setup as dist
    from cm.generate.engine import sample_to_npz, sample_to_pngs
    from cm.generate.npz import type_of
    from cm.setup.dry_run import dry_run
    from cm.setup.guide import SAMPLING, choose_guide
    from cm.setup.latents import load_decoder
    from cm.setup.run import open_log, run_precision
    from cm.setup.sample import (
        choose_seeds,
        guided_diffusion,
        inherit_model,
        load_classifier,
        load_model,
        sampling_plan,
    )
    from cm.setup.sampler import sampler_options

    dist.setup_dist(device=settings.values["device"])
    inputs = {f"--{name}": settings.values[name] for name in ("model_path", "classifier_path", "guide_path", "vae")}
    dist.on_main(check_outputs, [Output("--outdir", settings.values["outdir"], "folder")], inputs)
    config = inherit_model(settings)
    guide = choose_guide(settings, SAMPLING)
    seeds = choose_seeds(settings)
    pngs, classifier = settings.section(PngConfig), load_classifier(settings)
    plan = replace(sampling_plan(settings, classifier), seeds=seeds, rounding=pngs.rounding)
    options = sampler_options(settings)         # checked before anything is loaded
    decoder = load_decoder(settings)
    if settings.dry_run:
        return dry_run(settings)
    plan = replace(plan, decoder=decoder)
    folder = claim_folder(settings, pngs, plan, guide) if pngs.outdir else None
    open_log(settings)
    if type_of(plan.result_channels).kind == "f":
        logger.log(f"the samples stay latents of {plan.channels} channels, as the network makes them: --vae FOLDER "
                   "decodes them to pictures")
    if folder:
        result = sample_to_pngs(
            load_model(settings), guided_diffusion(settings, classifier, guide), plan, folder,
            run_precision(settings), options,
        )
        return dist.on_main(report_pngs, folder, plan, result)
    result = sample_to_npz(
        load_model(settings),
        guided_diffusion(settings, classifier, guide),
        plan,
        logger.get_dir(),
        run_precision(settings),
        options,
    )
    dist.on_main(report, config, plan, result, guide)


def claim_folder(settings: Settings, pngs: PngConfig, plan: SamplingPlan, guide: Guide | None) -> PngFolder:
    """The folder of --outdir.

    :raises UserError: if it holds images of another model or of other flags, or the noise has no seeds.
    """
    from cm.distributed import setup as dist
    from cm.setup.channels import demand_pictures
    from cm.setup.sample import png_recipe

    if plan.decoder is None:
        demand_pictures(settings, f"--outdir {pngs.outdir}: a PNG")
    if plan.generator == "dummy":
        raise UserError("--generator dummy has no seeds of single images; choose determ, or drop --outdir")
    folder = PngFolder(pngs.outdir, pngs.subdirs)
    dist.on_main(folder.claim, png_recipe(settings, guide, plan.classes, plan.decoder))
    return folder


def report_pngs(folder: PngFolder, plan: SamplingPlan, result: PngResult) -> None:
    """Write a grid of the first images to the log directory, and log what was done; call it on rank 0."""
    from cm.generate.engine import SHOWN, captions_of

    first = np.arange(min(plan.num_samples, SHOWN))
    rows = first[~np.isin(plan.indices(first), folder.missing(plan.indices(first)))]
    shown = folder.read(plan.indices(rows))
    grid_path = os.path.join(logger.get_dir(), "grid.png")
    save_picture(grid_path, captioned_grid(shown, captions_of(rows, plan), columns=8, scale=grid_scale(plan.side)))
    logger.log(f"{folder.outdir}: {result.drawn} images drawn, {result.there} were there already, "
               f"{result.evaluations} network evaluations each, {result.drawn / result.seconds:.3f} images/s")
    logger.log(f"grid: {grid_path}")


def report(config: SampleConfig, plan: SamplingPlan, result: SamplingResult, guide: Guide | None) -> None:
    """Write a grid and a summary next to the npz, and log them; call it on rank 0."""
    from cm.generate.engine import captions_of

    path = result.paths["samples"]
    summary = {
        "samples": path,
        "model_path": config.model_path,
        "sampler": config.sampler,
        "steps": config.steps,
        "ts": config.ts,
        "class_label": config.class_label,
        "seed": plan.seed,
        "num_samples": plan.num_samples,
        "network_evaluations": result.evaluations,
        "seconds": round(result.seconds, 3),
        "images_per_second": round(plan.num_samples / result.seconds, 3),
        **(guide.record() if guide else {}),
        **({"vae": plan.decoder.vae.loaded.name} if plan.decoder else {}),
    }
    write_json(path.removesuffix(".npz") + ".json", summary)
    grid_path = path.removesuffix(".npz") + ".png"
    shown = result.first_images["samples"]
    captions = captions_of(np.arange(len(shown)), plan)
    save_picture(grid_path, captioned_grid(shown, captions, columns=8, scale=grid_scale(plan.side)))
    if plan.classes:
        logger.log("classes: " + ", ".join(named(number, plan.class_names) for number in plan.classes))
    logger.log(f"{plan.num_samples} images, {result.evaluations} network evaluations each, "
               f"{summary['images_per_second']} images/s")
    logger.log(f"samples: {path}\ngrid: {grid_path}")


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
