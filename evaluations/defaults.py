"""The default settings of an evaluation. This module imports nothing slow."""

from __future__ import annotations

import os
from pathlib import Path

SPLIT_SIZE = 5000                                           # images per chunk of the Inception Score, as published
NEIGHBOURS = 3                                              # k of precision and recall, as published
PR_DTYPES = ("float32", "float64", "float16")               # of the distances of precision and recall
NUM_IMAGES = 50_000                                         # behind a published FID
BATCH_SIZE = 64                                             # images per pass

WITH_PUBLISHED_WEIGHTS = ("tf", "torch")
EXTRACTOR_VARIABLE = "CM_INCEPTION"                         # environment variable that names the extractor
EXTRACTOR_CHOICES = f"PATH, KIND:PATH, or {' or '.join(WITH_PUBLISHED_WEIGHTS)} alone for Inception's published weights"

NO_CACHE = "off"


def cache_folder() -> Path:
    """The default folder of cached means and covariances."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "consistency-toolkit" / "statistics"
