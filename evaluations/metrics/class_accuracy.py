"""The share of labelled samples that the extractor takes for their label."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluations.metrics.arrays import Array
from evaluations.metrics.base import Metric, Number, Settings, Side
from evaluations.metrics.points import Ranks


class CorrectCount:
    """How many of the images seen have their largest logit at their label.

    :param labels: of the complete set, [N].
    """

    def __init__(self, labels: NDArray[np.int64], correct: int = 0):
        self.labels, self.correct = labels, correct

    def update(self, values: Array, start: int) -> None:
        """Take in the logits [B,K] of images start, start+1, ..."""
        self.correct += int((values.argmax(1) == self.labels[start : start + len(values)]).sum())

    def sums(self) -> list[NDArray[Any]]:
        """The count, [1]."""
        return [np.array([self.correct])]

    def with_sums(self, sums: list[NDArray[Any]]) -> CorrectCount:
        """The count of all ranks."""
        return CorrectCount(self.labels, int(sums[0][0]))


class ClassAccuracy(Metric):
    """Share of the samples whose largest logit is their label's."""

    results = {"class_accuracy": ("Class accuracy", "Class accuracy")}
    output, needs_labels, of_samples_alone, in_all = "logits", True, True, False

    def make_partial(self, settings: Settings, labels: NDArray[np.int64] | None) -> CorrectCount:
        """An empty count."""
        assert labels is not None
        return CorrectCount(labels)

    def measure(self, ref: Side, sample: Side, settings: Settings, ranks: Ranks) -> dict[str, Number]:
        """The share."""
        return {"class_accuracy": Number(sample.partial(self).correct / sample.count)}
