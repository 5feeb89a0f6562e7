"""Comparison of two npz files: the work of evaluator.py."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from typing import Any

import torch as th

from cm.errors import UserError
from evaluations.engine.agreement import check_image_sizes
from evaluations.engine.engine import Engine, choose_metrics, refuse_unless
from evaluations.engine.images import FileImages
from evaluations.engine.ranks import JobRanks
from evaluations.engine.results import as_json
from evaluations.engine.side import REFERENCE, SAMPLES, Side, side_of_file
from evaluations.engine.statistics_cache import StatisticsCache
from evaluations.features import Extractor, Features, load_extractor
from evaluations.features.inception_files import FILES
from evaluations.metrics.base import Settings


def compare_files(
    ref_path: str | os.PathLike[str], sample_path: str | os.PathLike[str], extractor: Extractor | None,
    device: th.device | str, metrics: Sequence[str] | None, settings: Settings, batch_size: int,
    cache: StatisticsCache | None,
) -> dict[str, Any]:
    """The implementation of `evaluations.evaluator.evaluate`, which describes the arguments."""
    start_time = time.monotonic()
    chosen, optional = choose_metrics(metrics)
    engine = Engine(chosen, settings, JobRanks(), batch_size, cache)
    ref, sample = (side_of_file(os.fspath(path), role) for path, role in ((ref_path, REFERENCE),
                                                                          (sample_path, SAMPLES)))
    sides = (ref, sample)
    skipped: dict[str, str] = {}

    def leave_out(reasons: dict[str, str]) -> Engine:
        refuse_unless(optional, reasons)
        skipped.update(reasons)
        return engine.without(reasons)

    for side in sides:
        engine = leave_out(engine.reasons_from_side(side))
    _check_more_than_one(sides)
    seen = [side for side in sides if engine.needs_extractor(side)]
    check_image_sizes(seen)
    given: Features | None = None
    if seen:
        extractor = extractor or load_extractor(None, device, _default_kind(sides))
        given = extractor.extract(_first_images(seen[0]))
        engine = leave_out(engine.reasons_from_extractor(extractor, given, *sides))
    engine.check_agreement(ref, sample, extractor, given)
    if extractor is not None and given is not None:
        for side in seen:
            engine.look_up(side, extractor)
        for side in seen:
            engine.gather(side, extractor, given)
    if not engine.metrics:
        raise UserError("nothing can be computed: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    measured = engine.measure(ref, sample, extractor)
    reported = engine.reported(min(ref.count, sample.count))
    skipped = {name: skipped[name] for name in chosen if name in skipped}
    return as_json(measured, skipped, extractor, ref.path, sample.path, reported,
                   time.monotonic() - start_time)


def _first_images(side: Side) -> Any:
    assert isinstance(side.images, FileImages)
    return side.images.first_images


def _default_kind(sides: Sequence[Side]) -> str:
    """The kind of Inception that stored statistics come from, or else TensorFlow's if TensorFlow is there."""
    kinds = [str(each.extractor).partition("-")[0] for side in sides for each in side.stored.values()]
    recorded = next((kind for kind in kinds if kind in FILES), None)
    return recorded or ("tf" if importlib.util.find_spec("tensorflow") else "torch")


def _check_more_than_one(sides: Sequence[Side]) -> None:
    for side in sides:
        if side.count == 1 and not side.stored:
            raise UserError(f"{side.path} has 1 image; sets of images are compared, of at least 2")
