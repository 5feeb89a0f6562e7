"""Search for the schedule of a multistep consistency sampler, adding one noise level at a time where the FID is lowest.

mpiexec -n 8 python scripts/ternary_search.py --model_path runs/cd/ema_0.9999_600000.pt --steps 40 --num_ts 1 \\
    --ref_batch VIRTUAL_imagenet64_labeled.npz --inception inception-2015-12-05.pt --log_dir runs/cd_search

Writes ternary_search.json and a plot, ternary_search.png, to --log_dir, and prints the image_sample.py command for the
schedule it found. Run the same command again to resume an interrupted search, or with a larger --num_ts to extend it.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cm.config import early_exit
from cm.config.flags import Origin, Provenance, Settings, parse
from cm.config.sampling_schema import SampleConfig, TernarySearchConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig, VaeConfig
from cm.errors import UserError
from cm.generate.schedule_search import (
    Round,
    Schedule,
    as_text,
    best_schedule,
    naive_evaluations,
    read_range,
    search_schedule,
)
from cm.io import storage
from cm.io.storage import write_bytes, write_json
from cm.logging import logger

if TYPE_CHECKING:
    from cm.generate.engine import SamplingPlan
    from cm.generate.score_store import ScoreStore

STATE, RESULT, PLOT = "ternary_search_state.json", "ternary_search.json", "ternary_search.png"
SAMPLING = (SampleConfig, ModelConfig, DiffusionConfig, VaeConfig, RunConfig)
FIRST = ("model_path", "log_dir", "ref_batch", "inception", "num_ts", "begin", "end", "steps", "num_samples",
         "batch_size", "seed", "precision")                 # what --help shows


def read_flags() -> Settings:
    """The flags of the command line, with the defaults of this command."""
    return parse(__doc__ or "", TernarySearchConfig, *SAMPLING, first=FIRST, training_mode="consistency_distillation",
                 seed=42)


def main(settings: Settings) -> None:
    """Search on all ranks, and report the schedule that was found."""
    from cm.distributed import setup as dist
    from cm.generate.engine import at_precision
    from cm.generate.prefix_cache import PrefixCache
    from cm.generate.schedule_scorer import Scorer
    from cm.samplers import SAMPLERS
    from cm.samplers.sample import SampleOptions
    from cm.setup.channels import demand_pictures
    from cm.setup.dry_run import dry_run
    from cm.setup.latents import load_decoder
    from cm.setup.run import open_log, run_precision, trusts_extractor
    from cm.setup.sample import inherit_model, load_model, sampling_diffusion, sampling_plan
    from cm.setup.sampler import level_of_images, refuse_unused_flags
    from cm.setup.weights_path import fetch_inputs
    from evaluations.features import load_extractor
    from evaluations.th_evaluator import ThEvaluator

    dist.setup_dist(device=settings.values["device"])
    asked = tuple(settings.given)
    fetch_inputs(settings, "ref_batch", "inception")
    check_flags(settings)
    settings.given.setdefault("training_mode", Origin(Provenance.DEFAULT, "a multistep schedule"))
    inherit_model(settings)
    settings.replace(sampler="multistep")
    refuse_unused_flags(settings, SAMPLERS["multistep"])
    config, values = settings.section(TernarySearchConfig), settings.values
    decoder = load_decoder(settings)
    if decoder is None:
        demand_pictures(settings, "a search by the Frechet distance")
    space = read_range(config.begin, config.end, values["steps"], config.num_ts)
    plan = replace(sampling_plan(settings), decoder=decoder)
    if settings.dry_run:
        return dry_run(settings)

    open_log(settings)
    start = time.monotonic()
    precision = run_precision(settings)
    trusted = trusts_extractor(settings)
    extractor = load_extractor(config.inception or None, dist.dev(), trusted=trusted)
    store = dist.on_main(start_score_store, settings, precision, extractor.id, plan)
    evaluator = ThEvaluator(config.ref_batch, extractor, plan.side, batch_size=plan.batch_size)
    evaluator.warn_of_few(plan.num_samples)
    prefixes = PrefixCache(sampling_diffusion(settings), config.cache_gib * 2**30)
    options = {name: values[name] for name in ("steps", "clip_denoised", "sigma_min", "sigma_max")}
    sampling = SampleOptions(sampler="multistep", ends_at=level_of_images(settings), **options)
    scorer = Scorer(load_model(settings), prefixes, plan, sampling, evaluator)
    with at_precision(scorer.model, precision):
        found = list(search_schedule(
            lambda ts: store.score(as_text(ts), partial(scorer, ts)), space, config.num_ts, prefixes.share
        ))
    if prefixes.not_held:
        logger.log(f"--cache_gib {config.cache_gib:g} held only a part of the shared evaluations; more saves time")
    naive = naive_evaluations(space, found) * plan.num_samples
    result = summary(found, store, naive) | {
        "metric": evaluator.label,
        "command": sampling_command(settings, asked, found[-1].ts, dist.get_world_size()),
        "seconds": round(time.monotonic() - start, 3),
    }
    dist.on_main(report, result, found)


def check_flags(settings: Settings) -> None:
    """Check what can be known before the model is loaded, and set the default of --end.

    :raises UserError: for flags that are missing, or make no sense for a search.
    """
    from cm.objectives import OBJECTIVES
    from evaluations.engine.readers import BatchFile

    values = settings.values
    if not values["model_path"]:
        raise UserError("--model_path is missing: give a consistency model, such as runs/cd/ema_0.9999_600000.pt")
    fitting = [name for name, each in OBJECTIVES.items() if each.few_step and not each.second_time]
    if values["training_mode"] not in fitting:
        raise UserError(
            f"--training_mode {values['training_mode']}: multistep schedules are for consistency models "
            f"({', '.join(fitting)})"
        )
    if not values["ref_batch"]:
        raise UserError("--ref_batch is missing: give an npz of reference images or statistics")
    BatchFile(values["ref_batch"])                          # fails here rather than after loading the model
    if values["ts"]:
        raise UserError("--ts is what this command looks for: give points that are to stay with --begin and --end")
    if values["generator"] == "dummy":
        raise UserError("--generator dummy gives every candidate other noise; use determ")
    if values["num_samples"] < 2:
        raise UserError(f"--num_samples {values['num_samples']}: a Frechet distance needs at least 2 images")
    if "sampler" in settings.given and values["sampler"] != "multistep":
        logger.warn(f"--sampler {values['sampler']} has no effect: schedules are searched for the multistep sampler")
    if "end" not in settings.given:
        settings.replace(end=str(values["steps"] - 1))


def conditions_of(settings: Settings, precision: str, extractor_id: str, plan: SamplingPlan) -> dict[str, Any]:
    """All that a score depends on; on rank 0, which reads the files."""
    from cm.setup.sample import recorded_classes

    values = settings.values
    without_effect = ("dropout", "use_checkpoint", "use_fp16", "channels")        # the weights have their channels
    network = [each.name for each in dataclasses.fields(ModelConfig) if each.name not in without_effect]
    sampling = ("steps", "num_samples", "seed", "clip_denoised", "sigma_min", "sigma_max")
    return {
        "model_path": {"path": values["model_path"], **storage.checksum(values["model_path"])},
        "ref_batch": {"path": values["ref_batch"], **storage.checksum(values["ref_batch"])},
        "inception": extractor_id,
        "precision": precision,
        "class_label": recorded_classes(plan.classes),
        **(plan.decoder.identity() if plan.decoder else {}),
        **{name: values[name] for name in (*sampling, *network)},
    }


def start_score_store(settings: Settings, precision: str, extractor_id: str, plan: SamplingPlan) -> ScoreStore:
    """The scores of this search so far; call it on rank 0."""
    from cm.generate.score_store import open_score_store

    conditions = conditions_of(settings, precision, extractor_id, plan)
    return open_score_store(os.path.join(logger.get_dir(), STATE), conditions)


# --- the report ----------------------------------------------------------------------------------------------------


def summary(found: Sequence[Round], store: ScoreStore, naive: int) -> dict[str, Any]:
    """The content of ternary_search.json, but for what `main` adds.

    :param naive: images through the network in a search at thirds that shares nothing.
    """
    best_ts, best_distance = best_schedule(found)
    return {
        "ts": as_text(found[-1].ts),
        "frechet_distance": found[-1].score,
        "best_ts": as_text(best_ts),
        "best_frechet_distance": best_distance,
        "network_evaluations": store.network_evaluations,
        "naive_network_evaluations": naive,
        "rounds": [
            {"before": as_text(each.before), "before_frechet_distance": each.before_score, "point": each.point,
             "ts": as_text(each.ts), "frechet_distance": each.score, "tried": each.tried}
            for each in found
        ],
        "settings": store.conditions,
    }


def report(result: dict[str, Any], found: Sequence[Round]) -> None:
    """Write the result and its plot to the log's folder, and log what was found; call it on rank 0."""
    from cm.report.plots import line_plot

    directory = logger.get_dir()
    write_json(os.path.join(directory, RESULT), result)
    curves = {f"point {i} added to {as_text(each.before)}": list(each.tried.items()) for i, each in enumerate(found, 1)}
    write_bytes(os.path.join(directory, PLOT), line_plot(curves, "index of the new point", result["metric"]))
    logger.log(table(found, result["metric"]))
    naive = result["naive_network_evaluations"]
    logger.log(f"images through the network: {result['network_evaluations']}; a search at thirds that shares and "
               f"stores nothing takes {naive} ({result['network_evaluations'] / naive:.0%} of that)")
    logger.log(f"result: {os.path.join(directory, RESULT)}\nplot: {os.path.join(directory, PLOT)}")
    if result["best_ts"] != result["ts"]:
        logger.log(f"fewer evaluations do better: ts {result['best_ts']} has {result['best_frechet_distance']:.6g}")
    logger.log(f"found: ts {result['ts']}, {result['metric']} {result['frechet_distance']:.6g}; to sample:")
    logger.log(result["command"])


def table(found: Sequence[Round], metric: str) -> str:
    """Every score of every round, as text in columns."""
    rows = [("round", "point", "ts", metric)]
    for number, each in enumerate(found, start=1):
        rows.append((str(number), "none", as_text(each.before), f"{each.before_score:.6g}"))
        for point, score in each.tried.items():
            mark = "  <- lowest" if point == each.point else ""
            rows.append((str(number), str(point), as_text(sorted((*each.before, point))), f"{score:.6g}{mark}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows)


def sampling_command(settings: Settings, asked: Sequence[str], ts: Schedule, ranks: int) -> str:
    """The image_sample.py command for the samples of a schedule, with the flags that the user set here."""
    values = settings.values
    flags = {each.name for section in SAMPLING for each in dataclasses.fields(section)} - {"log_dir"}
    always = ("model_path", "training_mode", "steps", "num_samples", "batch_size", "seed")
    chosen = {name: values[name] for name in (*always, *asked) if name in flags}
    chosen |= {"sampler": "multistep", "ts": as_text(ts)}
    launcher = ["mpiexec", "-n", str(ranks)] if ranks > 1 else []
    arguments = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
    return shlex.join([*launcher, "python", "scripts/image_sample.py", *arguments])


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
