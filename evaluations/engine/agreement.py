"""Checks that two sides can be compared: same network, same size of images, same resize rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cm.data.class_names import shortened
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.logging import logger
from evaluations.engine.readers import Statistics, check_same_size
from evaluations.engine.side import Side
from evaluations.features.base import Extractor
from evaluations.metrics.base import FeatureKind


class Origin(NamedTuple):
    """The known facts about the origin of the mean and covariance of a side."""

    dim: int
    extractor: str | None
    size: tuple[int, int] | None                            # height and width of the images
    resize: str | None
    is_stored: bool


def origin_of(side: Side, kind: FeatureKind, extractor: Extractor | None, dim: int) -> Origin:
    """Of the features of one kind.

    :param extractor: the one at hand, with `dim` features of this kind.
    """
    stored = side.stored.get(kind)
    if stored is not None:
        return Origin(len(stored.mu), stored.extractor, stored.image_size, stored.resize, True)
    size = None if side.images is None else side.images.size
    if extractor is None:
        return Origin(dim, None, size, None, False)
    return Origin(dim, extractor.id, size, extractor.resize, False)


def check_agreement(kind: FeatureKind, ref: Side, sample: Side, extractor: Extractor | None, dim: int) -> None:
    """:raises UserError: if means and covariances of two networks, sizes of images or resize rules would be compared.

    :param extractor: the one at hand, with `dim` features of this kind.
    """
    origins = [(side, origin_of(side, kind, extractor, dim)) for side in (ref, sample)]
    (_, a), (_, b) = origins
    if a.dim != b.dim or _differ(a.extractor, b.extractor):
        described = [
            f"{side.path}: {each.dim} features of {each.extractor or 'an extractor it does not name'}, "
            f"{'stored in the file' if each.is_stored else 'computed now'}" for side, each in origins
        ]
        raise UserError(
            f"the two sides were not evaluated by the same network ({'; '.join(described)}): give the extractor that "
            f"the stored statistics come from, or a file without mu{kind.suffix} and sigma{kind.suffix}"
        )
    if a.is_stored or b.is_stored:
        _check_preparation(ref, a, sample, b)


def _check_preparation(ref: Side, a: Origin, sample: Side, b: Origin) -> None:
    if a.size and b.size and _differ(a.size, b.size):
        square = f" --image_size {b.size[0]}" if b.size[0] == b.size[1] else ""
        raise UserError(
            f"the statistics of {ref.path} are of images of {_shown(a.size)} and those of {sample.path} of "
            f"{_shown(b.size)} (height x width), and distances between two sizes mean nothing: make the reference "
            f"again from images prepared like the samples (fid.py ref{square})"
        )
    if _differ(a.resize, b.resize):
        raise UserError(
            f"the statistics of {ref.path} were made with the resize rule '{a.resize}' and those of {sample.path} "
            f"with '{b.resize}': make one of them again with the other's extractor file"
        )


def check_features(path: str, stored: Statistics, extractor: Extractor, dim: int) -> None:
    """:raises UserError: if the statistics of a file are not of this extractor's `dim` features."""
    if len(stored.mu) != dim or _differ(stored.extractor, extractor.id):
        raise UserError(
            f"{path} stores {len(stored.mu)} features of {stored.extractor or 'an extractor it does not name'}, and "
            f"the extractor given is {extractor.id} with {dim}: give the one that the statistics come from"
        )


def notice_unrecorded(side: Side, kinds: Iterable[FeatureKind]) -> None:
    """Say in one line, on rank 0, that a file's statistics do not record what they could be checked by."""
    stored = [side.stored[kind] for kind in kinds if kind in side.stored]
    names = (("image size", "image_size"), ("resize rule", "resize"), ("extractor", "extractor"))
    missing = [name for name, field in names if any(getattr(each, field) is None for each in stored)]
    if missing and dist.is_main():
        logger.log(f"notice: {side.path} does not record the {' and '.join(missing)} of its statistics, so they "
                   "are taken to match")


def other_classes(ref: Side, sample: Side) -> list[str]:
    """A warning if the class names of the sides differ; not an error, because distances do not depend on labels."""
    known, found = ref.class_names, sample.class_names
    if not known or not found or known == found:
        return []
    strange = [name for name in found if name not in set(known)] or [name for name in known if name not in set(found)]
    if not strange:
        return [f"{sample.path} and {ref.path} number the same classes differently ({shortened(found)} and "
                f"{shortened(known)}); an extractor that was trained on one of them knows the other's labels wrongly"]
    return [f"the classes of {sample.path} ({shortened(found)}) are not those of {ref.path} ({shortened(known)}): "
            f"only one of them has {shortened(strange)}, and a distance between them measures that too"]


def same_features(ref: Side, sample: Side, kinds: Iterable[FeatureKind]) -> list[str]:
    """A warning if all means and covariances of the sides are equal to the last digit; nothing if there are none."""
    pairs = [(ref.gaussian(kind), sample.gaussian(kind)) for kind in kinds]
    if not pairs or not all(np.array_equal(a.mu, b.mu) and np.array_equal(a.sigma, b.sigma) for a, b in pairs):
        return []
    return [f"the features of {sample.path} and of {ref.path} are equal to the last digit: these are the same images, "
            "and a distance between them says nothing about a model"]


def check_image_sizes(sides: Iterable[Side]) -> None:
    """:raises UserError: unless the images that the extractor will see have one size."""
    check_same_size({side.path: side.images.size for side in sides if side.images is not None})


def _differ(a: object, b: object) -> bool:
    return a is not None and b is not None and a != b


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
