"""Comparison of images in a folder, zip or npz with a reference: the work of `fid.py calc`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm.errors import UserError
from evaluations.engine.accumulator import dims_of
from evaluations.engine.agreement import check_features, check_image_sizes
from evaluations.engine.engine import Engine
from evaluations.engine.image_files import Pictures, open_pictures
from evaluations.engine.images import FileImages
from evaluations.engine.ranks import JobRanks
from evaluations.engine.readers import BatchFile
from evaluations.engine.results import described, too_few, versions
from evaluations.engine.side import REFERENCE, SAMPLES, Side, stored_in
from evaluations.engine.statistics_cache import StatisticsCache
from evaluations.features.base import Extractor
from evaluations.metrics import METRICS
from evaluations.metrics.base import POOLED, Settings
from evaluations.metrics.frechet import FRECHET_KEY

JPEG = (".jpg", ".jpeg")
Choose = Callable[[int, int, int], NDArray[np.int64]]       # number of images, of those wanted, seed -> indices


def distance(
    images: str, ref: str, extractor: Extractor, num: int, seed: int, batch_size: int, cache: StatisticsCache | None,
    choose: Choose,
) -> dict[str, Any]:
    """The implementation of `evaluations.fid.calc`, which describes the arguments."""
    start_time = time.monotonic()
    reference, pictures = _reference(ref), open_pictures(images, "--images")
    check_two(pictures)
    if not 2 <= num <= len(pictures):
        raise UserError(
            f"{images} has {len(pictures)} images, and --num asks for {num}: it may be 2 to {len(pictures)}. Distances "
            f"are comparable only at equal numbers, so make more images, or give --num {len(pictures)} here and for "
            "what it is compared with"
        )
    choice = f"{num}-of-{len(pictures)}-seed{seed}" if num < len(pictures) else ""
    chosen = FileImages(pictures, choose(len(pictures), num, seed))
    given = extractor.extract(chosen.first_images)
    if reference is None:
        ref_pictures = open_pictures(ref, "--ref")
        check_two(ref_pictures)
        reference = Side(ref, REFERENCE, FileImages(ref_pictures))
    sample = Side(images, SAMPLES, chosen, choice=choice)
    dim = dims_of(given)[POOLED]
    if POOLED in reference.stored:
        check_features(ref, reference.stored[POOLED], extractor, dim)
    else:
        check_image_sizes([sample, reference])
    engine = Engine({"fid": METRICS["fid"]}, Settings(progress=True), JobRanks(), batch_size, cache)
    engine.check_agreement(reference, sample, extractor, given)
    for side in (reference, sample):
        engine.look_up(side, extractor)
        engine.gather(side, extractor, given)
    measured = engine.measure(reference, sample, extractor)
    result = measured.results[FRECHET_KEY]
    warnings = [too_few(count, dim) for count in sorted({num, result.reference_count or num}) if count < dim]
    if any(pictures.name(i).lower().endswith(JPEG) for i in chosen.indices.tolist()):
        warnings.append(f"{images} holds JPEG files, whose compression changes features: keep samples as PNG or npz")
    return {
        "value": result.value,
        "label": result.label,
        "clipped": result.clipped,
        "images": images,
        "images_source": result.sample_source,
        "num_images": num,
        "seed": seed,
        "reference": ref,
        "reference_count": result.reference_count,
        "reference_source": result.reference_source,
        "extractor": described(extractor),
        "warnings": [*warnings, *measured.odd],
        "versions": versions(),
        "seconds": round(time.monotonic() - start_time, 3),
    }


def check_two(pictures: Pictures) -> None:
    """:raises UserError: for a single image."""
    if len(pictures) < 2:
        raise UserError(f"{pictures.path} has 1 image; a covariance needs at least 2")


def _reference(ref: str) -> Side | None:
    """The statistics that an npz stores; None for images, in whatever form."""
    file = BatchFile(ref) if ref.lower().endswith(".npz") else None
    stored = {} if file is None else stored_in(file, [POOLED])
    if file is None or not stored:
        return None
    return Side(ref, REFERENCE, None, stored, class_names=file.class_names())
