"""Metric values with their provenance, and their names.

FID, sFID, KID and Inception Score are the names of numbers in Inception-v3's features. In those of another network
they get plain names that say so.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch as th

from evaluations.features.base import Extractor
from evaluations.metrics.base import ClassShare

DESCRIPTION = ("id", "name", "resize", "is_inception")      # of an extractor, in the JSON


@dataclass(frozen=True)
class Result:
    """A number and where it comes from."""

    value: float
    label: str
    extractor: str | None                                   # identity; None where the files do not record it
    sample_count: int | None                                # None where stored statistics do not record it
    sample_source: str                                      # STORED, COMPUTED or CACHED
    reference_count: int | None = None
    reference_source: str | None = None                     # None where the reference plays no part
    std: float | None = None                                # over subsets
    resize: str | None = None                               # of the images; None where the files do not record it
    clipped: float | None = None                            # share of negative eigenvalues that were set to 0
    by_class: Mapping[str, ClassShare] | None = None        # by name, or by number where there are no names


@dataclass
class Measured:
    """The results of the chosen metrics."""

    results: dict[str, Result] = field(default_factory=dict)
    few: list[str] = field(default_factory=list)            # warnings of numbers of too few images
    odd: list[str] = field(default_factory=list)            # warnings of what the metrics found strange

    @property
    def warnings(self) -> list[str]:
        """All of them."""
        return [*self.few, *self.odd]


def label(names: tuple[str, str], extractor: Extractor | None, identity: str | None) -> str:
    """The name of a number in the features of `identity`; only Inception's have the famous names.

    :param names: in Inception's features, and in those of another network.
    :param extractor: the one at hand, if there is one.
    """
    famous, plain = names
    if identity is None:
        return f"{plain} (the files do not say in which features)"
    if extractor is None or extractor.id != identity:
        return f"{plain} ({identity} features)"
    return famous if extractor.is_inception else f"{plain} ({extractor.name} features, not Inception)"


def as_json(
    measured: Measured, skipped: Mapping[str, str], extractor: Extractor | None, reference: str, samples: str,
    settings: Mapping[str, Any], seconds: float,
) -> dict[str, Any]:
    """The content of the file of --json."""
    return {
        "metrics": {key: asdict(result) for key, result in measured.results.items()},
        "skipped": dict(skipped),
        "warnings": measured.warnings,
        "extractor": None if extractor is None else described(extractor),
        "reference": reference,
        "samples": samples,
        "settings": dict(settings),
        "versions": versions(),
        "seconds": round(seconds, 3),
    }


def described(extractor: Extractor) -> dict[str, Any]:
    """An extractor, for the JSON."""
    return {name: getattr(extractor, name) for name in DESCRIPTION}


def versions() -> dict[str, str]:
    """Versions of the programs that the numbers come from."""
    found = {"python": platform.python_version(), "numpy": np.__version__, "torch": th.__version__}
    tensorflow = sys.modules.get("tensorflow")
    return found | ({"tensorflow": tensorflow.__version__} if tensorflow else {})


def too_few(num_images: int, dim: int) -> str:
    """The warning of a distance of fewer images than dimensions."""
    return (f"{num_images} images are fewer than the {dim} feature dimensions, so their distance is strongly biased; "
            "compare it only at equal counts")
