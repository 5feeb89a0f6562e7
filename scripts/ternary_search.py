"""Search for the schedule of a multistep consistency sampler, adding one noise level at a time where the FID is lowest.

mpiexec -n 8 python scripts/ternary_search.py --model_path runs/cd/ema_0.9999_600000.pt --steps 40 --num_ts 1 \\
    --ref_batch VIRTUAL_imagenet64_labeled.npz --inception inception-2015-12-05.pt --log_dir runs/cd_search

Writes ternary_search.json and a plot, ternary_search.png, to --log_dir, and prints the image_sample.py command for the
schedule it found. Run the same command again to resume an interrupted search, or with a larger --num_ts to extend it.
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.schema import (
    DiffusionConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TernarySearchConfig,
)

SAMPLING = (SampleConfig, ModelConfig, DiffusionConfig, RunConfig)


def read_flags() -> Settings:
    return parse(__doc__, TernarySearchConfig, *SAMPLING, training_mode="consistency_distillation", seed=42)


if __name__ == "__main__":                                  # the imports below take seconds
    early_exit.parse_or_exit(read_flags)

import dataclasses
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch as th
from torch import nn
from tqdm import tqdm

from cm.config.flags import Origin, Provenance
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate.engine import SamplingPlan, at_precision, draw, labels_of, rank_batches
from cm.generate.prefix_cache import PrefixCache
from cm.generate.schedule_search import Round, Schedule, best_schedule, naive_evaluations, read_range, search_schedule
from cm.generate.score_store import ScoreStore, open_score_store
from cm.io import storage
from cm.io.storage import write_bytes, write_json
from cm.logging import logger
from cm.objectives import OBJECTIVES
from cm.report.plots import line_plot
from cm.samplers.sample import SampleOptions
from cm.setup.dry_run import dry_run
from cm.setup.objective import kind_of_result
from cm.setup.run import open_log, run_precision
from cm.setup.sample import inherit_model, load_model, sampling_diffusion, sampling_plan
from evaluations.engine.readers import BatchFile
from evaluations.features import load_extractor
from evaluations.th_evaluator import ThEvaluator

STATE, RESULT, PLOT = "ternary_search_state.json", "ternary_search.json", "ternary_search.png"


def main() -> None:
    settings = read_flags()
    dist.setup_dist()
    asked = tuple(settings.given)
    check_flags(settings)
    settings.given.setdefault("training_mode", Origin(Provenance.DEFAULT, "a multistep schedule"))
    inherit_model(settings)
    config, values = settings.section(TernarySearchConfig), settings.values
    space = read_range(config.begin, config.end, values["steps"], config.num_ts)
    plan = sampling_plan(settings)
    if settings.dry_run:
        return dry_run(settings)

    open_log(settings)
    start = time.monotonic()
    precision = run_precision(settings)
    extractor = load_extractor(config.inception or None, dist.dev())
    store = dist.on_main(start_score_store, settings, precision, extractor.id)
    evaluator = ThEvaluator(config.ref_batch, extractor, plan.image_size, batch_size=plan.batch_size)
    evaluator.warn_of_few(plan.num_samples)
    stages = PrefixCache(sampling_diffusion(settings), config.cache_gib * 2**30)
    scorer = Scorer(load_model(settings), stages, plan, sampler_options(settings), evaluator)
    with at_precision(scorer.model, precision):
        found = list(search_schedule(
            lambda ts: store.score(text(ts), partial(scorer, ts)), space, config.num_ts, stages.share
        ))
    if stages.turned_away:
        logger.log(f"--cache_gib {config.cache_gib:g} held only a part of the shared evaluations; more saves time")
    naive = naive_evaluations(space, found) * plan.num_samples
    result = summary(found, store, naive) | {
        "metric": evaluator.label,
        "command": sampling_command(settings, asked, found[-1].ts),
        "seconds": round(time.monotonic() - start, 3),
    }
    dist.on_main(report, result, found)


def check_flags(settings: Settings) -> None:
    values = settings.values
    if not values["model_path"]:
        raise UserError("--model_path is missing: give a consistency model, such as runs/cd/ema_0.9999_600000.pt")
    if not kind_of_result(values["training_mode"]).distillation:
        raise UserError(
            f"--training_mode {values['training_mode']}: multistep schedules are for consistency models "
            f"({', '.join(name for name, kind in OBJECTIVES.items() if kind.distillation)})"
        )
    if not values["ref_batch"]:
        raise UserError("--ref_batch is missing: give an npz of reference images or statistics")
    BatchFile(values["ref_batch"])                          # fails here rather than after loading the model
    if values["ts"]:
        raise UserError("--ts is what is looked for here: give points that are to stay with --begin and --end")
    if values["generator"] == "dummy":
        raise UserError("--generator dummy gives every candidate other noise; use determ")
    if values["s_churn"] > 0:
        raise UserError(f"--s_churn {values['s_churn']:g}: the multistep sampler takes no churn; drop the flag")
    if values["num_samples"] < 2:
        raise UserError(f"--num_samples {values['num_samples']}: a Frechet distance needs at least 2 images")
    if "sampler" in settings.given and values["sampler"] != "multistep":
        logger.warn(f"--sampler {values['sampler']} has no effect: schedules are searched for the multistep sampler")
    if "end" not in settings.given:
        settings.replace(end=str(values["steps"] - 1))


def sampler_options(settings: Settings) -> SampleOptions:
    names = ("steps", "clip_denoised", "sigma_min", "sigma_max")
    return SampleOptions(sampler="multistep", **{name: settings.values[name] for name in names})


@dataclass
class Scorer:
    """The distance of a schedule's images from the reference.

    They are the images that image_sample.py draws with the same seed, so the distance is the evaluator's.
    """

    model: nn.Module
    stages: PrefixCache
    plan: SamplingPlan
    options: SampleOptions
    evaluator: ThEvaluator

    def __call__(self, ts: Schedule) -> tuple[float, int]:
        """The distance, and how many images went through the network for it: the same numbers on all ranks."""
        before = self.stages.evaluations
        distance = self.evaluator.evaluate(self.batches(ts))["frechet_distance"].value
        logger.log(f"ts {text(ts)}: {distance:.6g}")
        return distance, int(dist.all_reduce_sum(th.tensor(self.stages.evaluations - before)))

    def batches(self, ts: Schedule) -> Iterator[tuple[int, np.ndarray]]:
        """This rank's share of the images: a batch's place in the result, and its [n,H,W,3] uint8."""
        shares = list(rank_batches(self.plan, dist.get_rank(), dist.get_world_size()))
        main = dist.is_main()
        for batch, indices in enumerate(tqdm(shares, f"ts {text(ts)}", unit="batch", disable=not main, leave=False)):
            if len(indices):
                denoiser, labels = self.stages.denoiser(ts, batch), labels_of(indices, self.plan)
                options = replace(self.options, ts=ts)
                yield indices[0], draw(self.model, denoiser, self.plan, indices, labels, options)[0]


def conditions_of(settings: Settings, precision: str, extractor_id: str) -> dict[str, Any]:
    """All that a score depends on; on rank 0, which reads the files."""
    values = settings.values
    without_effect = ("dropout", "use_checkpoint", "use_fp16")
    network = [each.name for each in dataclasses.fields(ModelConfig) if each.name not in without_effect]
    sampling = ("steps", "num_samples", "seed", "class_label", "clip_denoised", "sigma_min", "sigma_max")
    return {
        "model_path": {"path": values["model_path"], **storage.checksum(values["model_path"])},
        "ref_batch": {"path": values["ref_batch"], **storage.checksum(values["ref_batch"])},
        "inception": extractor_id,
        "precision": precision,
        **{name: values[name] for name in (*sampling, *network)},
    }


def start_score_store(settings: Settings, precision: str, extractor_id: str) -> ScoreStore:
    return open_score_store(os.path.join(logger.get_dir(), STATE), conditions_of(settings, precision, extractor_id))


# --- what is left and said -----------------------------------------------------------------------------------------


def summary(found: Sequence[Round], store: ScoreStore, naive: int) -> dict[str, Any]:
    best_ts, best_distance = best_schedule(found)
    return {
        "ts": text(found[-1].ts),
        "frechet_distance": found[-1].score,
        "best_ts": text(best_ts),
        "best_frechet_distance": best_distance,
        "network_evaluations": store.network_evaluations,
        "naive_network_evaluations": naive,
        "rounds": [
            {"before": text(each.before), "before_frechet_distance": each.before_score, "point": each.point,
             "ts": text(each.ts), "frechet_distance": each.score, "tried": each.tried}
            for each in found
        ],
        "settings": store.conditions,
    }


def report(result: dict[str, Any], found: Sequence[Round]) -> None:
    """Leave the result and its plot in the log's folder, and say what was found; on rank 0."""
    directory = logger.get_dir()
    write_json(os.path.join(directory, RESULT), result)
    curves = {f"point {i} added to {text(each.before)}": list(each.tried.items()) for i, each in enumerate(found, 1)}
    write_bytes(os.path.join(directory, PLOT), line_plot(curves, "index of the new point", result["metric"]))
    logger.log(table(found, result["metric"]))
    naive = result["naive_network_evaluations"]
    logger.log(f"images through the network: {result['network_evaluations']}; a search at thirds that shares and "
               f"remembers nothing takes {naive} ({result['network_evaluations'] / naive:.0%} of that)")
    logger.log(f"result: {os.path.join(directory, RESULT)}\nplot: {os.path.join(directory, PLOT)}")
    if result["best_ts"] != result["ts"]:
        logger.log(f"fewer evaluations do better: ts {result['best_ts']} has {result['best_frechet_distance']:.6g}")
    logger.log(f"found: ts {result['ts']}, {result['metric']} {result['frechet_distance']:.6g}; to sample:")
    logger.log(result["command"])


def table(found: Sequence[Round], metric: str) -> str:
    rows = [("round", "point", "ts", metric)]
    for number, each in enumerate(found, start=1):
        rows.append((str(number), "none", text(each.before), f"{each.before_score:.6g}"))
        for point, score in each.tried.items():
            mark = "  <- lowest" if point == each.point else ""
            rows.append((str(number), str(point), text(sorted((*each.before, point))), f"{score:.6g}{mark}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows)


def sampling_command(settings: Settings, asked: Sequence[str], ts: Schedule) -> str:
    """The image_sample.py command for the samples of a schedule, with the flags that were asked for here."""
    values, ranks = settings.values, dist.get_world_size()
    flags = {each.name for section in SAMPLING for each in dataclasses.fields(section)} - {"log_dir"}
    always = ("model_path", "training_mode", "steps", "num_samples", "batch_size", "seed")
    chosen = {name: values[name] for name in (*always, *asked) if name in flags}
    chosen |= {"sampler": "multistep", "ts": text(ts)}
    launcher = ["mpiexec", "-n", str(ranks)] if ranks > 1 else []
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    return shlex.join([*launcher, "python", "scripts/image_sample.py", *words])


def text(ts: Sequence[int]) -> str:
    return ",".join(map(str, ts))


if __name__ == "__main__":
    dist.run(main)
