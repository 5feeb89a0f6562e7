"""Features, logits and the numbers that other programs gave for them (tests/data/golden_metrics.npz)."""

from pathlib import Path

import numpy as np

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "golden_metrics.npz", allow_pickle=False)


def expected(name):
    return float(GOLDEN[f"expected_{name}"])


def golden(*names):
    return [GOLDEN[name] for name in names]
