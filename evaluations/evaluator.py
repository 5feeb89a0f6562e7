"""Compare a batch of samples with a reference batch.

python evaluations/evaluator.py VIRTUAL_imagenet64_labeled.npz samples_50000x64x64x3.npz --inception inception.pt

Stored statistics (mu, sigma, mu_s, sigma_s) serve the Frechet distances where a file has them; images serve the rest.
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Parser
from evaluations.flags import evaluator_parser


def make_parser() -> Parser:
    return evaluator_parser(__doc__.splitlines()[0])


if __name__ == "__main__":                                  # the imports below take seconds
    early_exit.parse_or_exit(make_parser().parse_args)

import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch as th

from cm.distributed import setup as dist
from cm.errors import UserError
from cm.registry import lookup
from evaluations.defaults import BATCH_SIZE, EXTRACTOR_VARIABLE, METRIC_NAMES, NEIGHBOURS, SPLIT_SIZE
from evaluations.engine.comparison import KID_SEED, KID_SUBSETS, METRICS, Comparison, Metric
from evaluations.engine.image_sets import COMPUTED, ImageSet, Unavailable
from evaluations.engine.readers import check_same_size
from evaluations.engine.statistics_cache import StatisticsCache, open_cache
from evaluations.features import Extractor, load_extractor
from evaluations.features.inception_files import FILES


def __getattr__(name: str) -> Any:
    """guided-diffusion's classes, from `evaluations.compat` when they are asked for."""
    from evaluations import compat

    return getattr(compat, name)


DESCRIPTION = ("id", "name", "resize", "is_inception")
PROBED = 2                                                              # images the extractor is tried on


def evaluate(
    ref_path: str,
    sample_path: str,
    extractor: Extractor | None = None,
    *,
    device: th.device | str = "cpu",
    metrics: Sequence[str] = METRIC_NAMES,
    batch_size: int = BATCH_SIZE,
    split_size: int = SPLIT_SIZE,
    k: int = NEIGHBOURS,
    pr_dtype: str = "float32",
    cache: StatisticsCache | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare two npz files; returns what --json writes.

    When the whole of `METRIC_NAMES` is asked for, those of its metrics that the files or the extractor cannot give are
    left out, with their reasons under "skipped"; otherwise they are an error.

    :param extractor: None for the one that $CM_INCEPTION names, or else Inception, on `device`, if a metric needs one.
    :param metrics: names in `METRICS`.
    :param pr_dtype: of the distances of precision and recall, a name in `PR_DTYPES`.
    :param cache: where means and covariances are looked for and kept.
    :returns: {"metrics": {key: the fields of a Result}, "skipped": {name: reason}, "warnings": [...], "extractor",
        "reference", "samples", "settings", "versions", "seconds"}; the keys are those of `comparison.NAMES`.
    :raises UserError: if a file or the extractor cannot be used, the two sides come from different extractors, or a
        metric that was asked for cannot be computed.
    """
    start = time.monotonic()
    chosen = {name: lookup(METRICS, name, "metric") for name in metrics}
    optional = METRIC_NAMES if set(METRIC_NAMES) <= set(chosen) else ()
    run = Comparison(ImageSet(ref_path, "reference images"), ImageSet(sample_path, "samples"), extractor, split_size, k,
                     pr_dtype, progress)

    skipped = unavailable(chosen, lambda metric: metric.prepare(run), optional)
    chosen = {name: metric for name, metric in chosen.items() if name not in skipped}
    sides = [side for side in run.sides if side.needs_extractor]
    check_counts_and_sizes(run, sides)
    if sides:
        run.extractor = extractor or load_extractor(None, device, default_kind(run))
        run.probe = run.extractor.extract(next(sides[0].file.batches(PROBED)))
        if cache is not None:
            for side in sides:
                side.look_up(cache, run.extractor)
    skipped |= unavailable(chosen, lambda metric: metric.check(run), optional)

    for side in sides:
        if side.needs_extractor:                            # the cache may have had all
            side.extract(run.extractor, run.probe, batch_size, progress, cache)
    for name, metric in chosen.items():
        if name not in skipped:
            metric.measure(run)
    if not run.results:
        raise UserError("nothing can be computed: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    return {
        "metrics": {key: asdict(result) for key, result in run.results.items()},
        "skipped": skipped,
        "warnings": run.warnings,
        "extractor": run.extractor and {name: getattr(run.extractor, name) for name in DESCRIPTION},
        "reference": run.ref.path,
        "samples": run.sample.path,
        "settings": {"split_size": split_size, "k": k, "pr_dtype": pr_dtype, "kid_subsets": KID_SUBSETS,
                     "kid_seed": KID_SEED, "kid_subset_size": run.kid_subset_size},
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 3),
    }


def versions() -> dict[str, str]:
    """Of what the numbers come from."""
    found = {"python": platform.python_version(), "numpy": np.__version__, "torch": th.__version__}
    tensorflow = sys.modules.get("tensorflow")
    return found | ({"tensorflow": tensorflow.__version__} if tensorflow else {})


def unavailable(
    metrics: Mapping[str, Metric], step: Callable[[Metric], None], optional: Sequence[str]
) -> dict[str, str]:
    """Take a step of each metric; returns the reasons of those that cannot be computed.

    :raises UserError: if such a metric is not optional.
    """
    reasons = {}
    for name, metric in metrics.items():
        try:
            step(metric)
        except Unavailable as reason:
            if name not in optional:
                raise UserError(f"{name} cannot be computed: {reason}") from None
            reasons[name] = str(reason)
    return reasons


def default_kind(run: Comparison) -> str:
    """The kind of Inception that stored statistics come from, or else TensorFlow's if TensorFlow is there."""
    stored = [statistics for side in run.sides for statistics in side.stored.values() if statistics is not None]
    kinds = [str(statistics.extractor).partition("-")[0] for statistics in stored]
    recorded = next((kind for kind in kinds if kind in FILES), None)
    return recorded or ("tf" if importlib.util.find_spec("tensorflow") else "torch")


def check_counts_and_sizes(run: Comparison, looked_at: Sequence[ImageSet]) -> None:
    """:raises UserError: if a side is a single image, or the images of the two sides have different sizes.

    :param looked_at: the sides whose images the extractor will see.
    """
    for side in run.sides:
        if len(side) == 1 and not any(side.stored.values()):
            raise UserError(f"{side.path} has 1 image; sets of images are compared, of at least 2")
    check_same_size({side.path: side.file.image_shape[1:3] for side in looked_at})


# --- the command ---------------------------------------------------------------------------------------------------


def report(result: Mapping[str, Any]) -> str:
    """The result in lines, in the words of guided-diffusion's evaluator where the features are Inception's."""
    lines = [f"reference: {result['reference']}", f"samples: {result['samples']}"]
    if result["extractor"]:
        lines.append("extractor: {name} ({id}), resize: {resize}".format(**result["extractor"]))
    lines += [f"{fields['label']}: {number(fields)}  [{provenance(fields)}]" for fields in result["metrics"].values()]
    lines += [f"{name}: left out, {reason}" for name, reason in result["skipped"].items()]
    lines += [f"warning: {text}" for text in result["warnings"]]
    return "\n".join(lines)


def number(fields: Mapping[str, Any]) -> str:
    spread = "" if fields["std"] is None else f" +- {fields['std']:.2g}"
    return f"{fields['value']:.6g}{spread}"


def provenance(fields: Mapping[str, Any]) -> str:
    parts = [side("samples", fields["sample_count"], fields["sample_source"])]
    if fields["reference_source"]:
        parts.append(side("reference", fields["reference_count"], fields["reference_source"]))
    extractor = fields["extractor"] or "extractor not recorded"
    return "; ".join([*parts, f"{extractor}, resize {fields['resize']}" if fields["resize"] else extractor])


def side(role: str, count: int | None, source: str) -> str:
    size = "N not recorded" if count is None else f"N={count}"
    return f"{role}: {size}{'' if source == COMPUTED else f', {source}'}"


def chosen_metrics(text: str, class_accuracy: bool) -> tuple[str, ...]:
    names = METRIC_NAMES if text == "all" else tuple(name.strip() for name in text.split(","))
    return tuple(dict.fromkeys([*names, *(["class_accuracy"] if class_accuracy else [])]))


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if dist.get_world_size() > 1:
        raise UserError("the evaluator is one process: start it without mpiexec, or th_evaluator.py with it")
    dist.setup_dist()
    make_folder_of(args.json)
    named = args.inception or os.environ.get(EXTRACTOR_VARIABLE)
    result = evaluate(
        args.ref_batch,
        args.sample_batch,
        load_extractor(named, dist.dev()) if named else None,
        device=dist.dev(),
        metrics=chosen_metrics(args.metrics, args.class_accuracy),
        batch_size=args.batch_size,
        split_size=args.split_size,
        k=args.k,
        pr_dtype=args.pr_dtype,
        cache=open_cache(args.cache),
        progress=True,
    )
    print(report(result))
    write_json(args.json, result)


def make_folder_of(path: str | None) -> None:
    """Find out before the work whether there is a place for its result."""
    if path:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    dist.run(main)
