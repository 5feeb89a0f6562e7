"""The share of labelled samples that the extractor classifies as their label, overall and for each class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluations.metrics.arrays import Array
from evaluations.metrics.base import ClassShare, Metric, Number, Settings, Side
from evaluations.metrics.points import Ranks


class CorrectCount:
    """The number of images with the largest logit at their label, by class.

    :param labels: of the complete set, [N].
    :param correct: [K], for the K classes up to the largest label.
    """

    def __init__(self, labels: NDArray[np.int64], correct: NDArray[np.int64] | None = None):
        self.labels = labels
        self.correct = np.zeros(int(labels.max()) + 1, np.int64) if correct is None else correct

    def update(self, values: Array, start: int) -> None:
        """Add the logits [B,K] of images start, start+1, ..."""
        labels = self.labels[start : start + len(values)]
        self.correct += np.bincount(labels[values.argmax(1) == labels], minlength=len(self.correct))

    def sums(self) -> list[NDArray[Any]]:
        """The counts, [K]."""
        return [self.correct]

    def with_sums(self, sums: list[NDArray[Any]]) -> CorrectCount:
        """The counts of all ranks."""
        return CorrectCount(self.labels, sums[0])


class ClassAccuracy(Metric):
    """The share of samples with the largest logit at their label."""

    results = {"class_accuracy": ("Class accuracy", "Class accuracy")}
    output, needs_labels, of_samples_alone, in_all = "logits", True, True, False

    def make_partial(self, settings: Settings, labels: NDArray[np.int64] | None) -> CorrectCount:
        """An empty count."""
        assert labels is not None
        return CorrectCount(labels)

    def measure(self, ref: Side, sample: Side, settings: Settings, ranks: Ranks) -> dict[str, Number]:
        """The share of all samples, and of those of each class that has any."""
        found, names = sample.partial(self), sample.class_names
        counts = np.bincount(found.labels, minlength=len(found.correct))
        by_class: dict[str, ClassShare] = {
            names[number] if names else str(number):
                {"value": float(found.correct[number] / counts[number]), "count": int(counts[number])}
            for number in map(int, np.flatnonzero(counts))
        }
        return {"class_accuracy": Number(float(found.correct.sum() / sample.count), by_class=by_class)}
