"""The metrics, one file for each; `METRICS` lists them. A new metric is a file and a line here."""

from cm.registry import Table
from evaluations.metrics.base import Metric
from evaluations.metrics.class_accuracy import ClassAccuracy
from evaluations.metrics.frechet import FID, SFID
from evaluations.metrics.inception_score import Score
from evaluations.metrics.kid import KernelMetric
from evaluations.metrics.precision_recall import PrecisionRecallMetric

METRICS: Table[Metric] = Table("metric", {
    "inception_score": Score(),
    "fid": FID,
    "sfid": SFID,
    "precision_recall": PrecisionRecallMetric(),
    "kid": KernelMetric(),
    "class_accuracy": ClassAccuracy(),
})


def default_names() -> tuple[str, ...]:
    """The metrics of "--metrics all"."""
    return tuple(name for name, metric in METRICS.items() if metric.in_all)
