"""Compare a batch of samples with a reference batch.

python evaluations/evaluator.py VIRTUAL_imagenet64_labeled.npz samples_50000x64x64x3.npz --inception inception.pt
mpiexec -n 8 python evaluations/evaluator.py ...    gives the same numbers

Frechet distances use stored statistics (mu, sigma, mu_s, sigma_s) if a file has them. Other metrics need images.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cm.config.parser import Parser
from evaluations import command
from evaluations.defaults import BATCH_SIZE, EXTRACTOR_VARIABLE, NEIGHBOURS, PR_DTYPES, SPLIT_SIZE
from evaluations.flags import asked_metrics, evaluator_parser
from evaluations.metrics.base import Settings
from evaluations.report import report

if TYPE_CHECKING:                                           # what takes seconds to import is imported when it is used
    import torch as th

    from evaluations.engine.statistics_cache import StatisticsCache
    from evaluations.features import Extractor

__all__ = ["evaluate", "main", "make_parser", "report"]


def __getattr__(name: str) -> Any:
    """guided-diffusion's classes, from `evaluations.compat` when they are asked for."""
    from evaluations import compat

    return getattr(compat, name)


def make_parser() -> Parser:
    """The flags of this command."""
    return evaluator_parser("Compare a batch of samples with a reference batch.")


def evaluate(
    ref_path: str | os.PathLike[str],
    sample_path: str | os.PathLike[str],
    extractor: Extractor | None = None,
    *,
    device: th.device | str = "cpu",
    metrics: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
    split_size: int = SPLIT_SIZE,
    k: int = NEIGHBOURS,
    pr_dtype: str = PR_DTYPES[0],
    cache: StatisticsCache | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare two npz files; returns the content of the file of --json, the same on every rank. All ranks must call it.

    If `metrics` is None or all of `evaluations.metrics.default_names()`, metrics that the files or the extractor do not
    allow are skipped, with their reasons under "skipped". A metric that is named explicitly is an error instead.

    :param extractor: None: if a metric needs one, that of $CM_INCEPTION, or else Inception, on `device`.
    :param metrics: names in `METRICS`; None for all that are on by default.
    :param pr_dtype: dtype of the distances for precision and recall, a name in `PR_DTYPES`.
    :param cache: the cache for means and covariances.
    :returns: {"metrics": {key: the fields of a Result}, "skipped": {name: reason}, "warnings": [...], "extractor",
        "reference", "samples", "settings", "versions", "seconds"}; the keys of results are those of the metrics'
        `results`.
    :raises UserError: on every rank, if a file or the extractor cannot be used, the two sides come from different
        extractors, sizes or resize rules, or a metric that was asked for cannot be computed.
    """
    from evaluations.engine.two_files import compare_files

    settings = Settings(split_size, k, pr_dtype, progress)
    return compare_files(ref_path, sample_path, extractor, device, metrics, settings, batch_size, cache)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in this process."""
    _run(make_parser().parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    from cm.distributed import setup as dist
    from cm.io.storage import write_json
    from cm.io.terminal import without_controls
    from evaluations.engine.statistics_cache import open_cache
    from evaluations.features import load_extractor

    dist.setup_dist(device=args.device)
    command.prepare_output(args, "--json", "ref_batch", "sample_batch")
    named = args.inception or os.environ.get(EXTRACTOR_VARIABLE)
    result = evaluate(
        args.ref_batch,
        args.sample_batch,
        load_extractor(named, dist.dev(), trusted=args.trust_extractor) if named else None,
        device=dist.dev(),
        metrics=asked_metrics(args),
        batch_size=args.batch_size,
        split_size=args.split_size,
        k=args.k,
        pr_dtype=args.pr_dtype,
        cache=open_cache(args.cache),
        progress=True,
    )
    if dist.is_main():
        print(without_controls(report(result)))
    if args.json:
        dist.on_main(write_json, args.json, result)


if __name__ == "__main__":
    command.start(make_parser, _run)
