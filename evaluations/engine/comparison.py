"""The metrics of two sets of images; `METRICS` lists them.

FID, sFID, KID and Inception Score are the names of numbers in Inception-v3's features. In those of another network
they get plain names that say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cm.errors import UserError
from evaluations.defaults import NEIGHBOURS, SPLIT_SIZE
from evaluations.engine.accumulator import POOLED, SPATIAL, FeatureKind
from evaluations.engine.image_sets import COMPUTED, ImageSet, Unavailable
from evaluations.features import Extractor, Features
from evaluations.metrics.frechet import frechet
from evaluations.metrics.kid import kid
from evaluations.metrics.precision_recall import precision_recall

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
DAMAGED = 1e-4                                              # share of negative eigenvalues that no rounding explains

# key of a result -> its name in Inception's features, and in those of another network
NAMES = {
    "inception_score": ("Inception Score", "Classifier score"),
    "frechet_distance": ("FID", "Frechet distance"),
    "spatial_frechet_distance": ("sFID", "Spatial Frechet distance"),
    "precision": ("Precision", "Precision"),
    "recall": ("Recall", "Recall"),
    "kernel_distance": ("KID", "Kernel distance"),
    "class_accuracy": ("Class accuracy", "Class accuracy"),
}
OUTPUT_WORDS = {"pool": "pooled features", "spatial": "spatial features", "logits": "logits"}


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


@dataclass
class Comparison:
    """Two sets, the network that looks at them, and what came out so far."""

    ref: ImageSet
    sample: ImageSet
    extractor: Extractor | None = None
    split_size: int = SPLIT_SIZE
    k: int = NEIGHBOURS
    pr_dtype: str = "float32"                               # of the distances of precision and recall
    progress: bool = False                                  # whether long work shows a bar
    probe: Features | None = None                           # the extractor's outputs for a few of the images
    results: dict[str, Result] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def sides(self) -> tuple[ImageSet, ImageSet]:
        return self.ref, self.sample

    @property
    def smaller(self) -> int:
        """Images of the smaller set."""
        return min(len(self.ref), len(self.sample))

    @property
    def kid_subset_size(self) -> int:
        return min(KID_SUBSET_SIZE, self.smaller)

    def record(self, key: str, value: float, std: float | None = None, *, of_samples_alone: bool = False) -> None:
        """Note a result that was computed from images."""
        reference = () if of_samples_alone else (len(self.ref), COMPUTED)
        label = self.label(key, self.extractor.id)
        self.results[key] = Result(
            value, label, self.extractor.id, len(self.sample), COMPUTED, *reference, std=std,
            resize=self.extractor.resize,
        )

    def label(self, key: str, extractor_id: str | None) -> str:
        """The name of a result in the features of an extractor; only Inception's have the famous names."""
        famous, plain = NAMES[key]
        if extractor_id is None:
            return f"{plain} (the files do not say in which features)"
        if self.extractor is None or self.extractor.id != extractor_id:
            return f"{plain} ({extractor_id} features)"
        return famous if self.extractor.is_inception else f"{plain} ({self.extractor.name} features, not Inception)"

    def resize_of(self, extractor_id: str | None) -> str | None:
        """What happens to images in the features of an extractor, if it is the one at hand."""
        known = self.extractor is not None and self.extractor.id == extractor_id
        return self.extractor.resize if known else None

    def check_output(self, field_name: str) -> None:
        """:raises Unavailable: if the extractor does not give this field of `Features`."""
        if getattr(self.probe, field_name) is None:
            raise Unavailable(f"{self.extractor.name} gives no {OUTPUT_WORDS[field_name]}")


class Metric:
    """One line of `METRICS`. Every step may raise Unavailable until the images are read."""

    def prepare(self, run: Comparison) -> None:
        """Ask both sides for what is needed."""

    def check(self, run: Comparison) -> None:
        """Whether the extractor, tried on a few images, and the stored statistics fit."""

    def measure(self, run: Comparison) -> None:
        """Put results into `run.results`."""


class Score(Metric):
    """Inception Score of the samples."""

    def prepare(self, run: Comparison) -> None:
        run.sample.check_images()
        run.sample.want_score(run.split_size)

    def check(self, run: Comparison) -> None:
        run.check_output("logits")

    def measure(self, run: Comparison) -> None:
        run.record("inception_score", run.sample.accumulator.score.finalize(), of_samples_alone=True)


class ClassAccuracy(Metric):
    """Share of the samples that the extractor takes for their label."""

    def prepare(self, run: Comparison) -> None:
        run.sample.check_images()
        run.sample.want_accuracy()

    def check(self, run: Comparison) -> None:
        run.check_output("logits")
        labels, classes = run.sample.labels, run.probe.logits.shape[1]
        if labels.min() < 0 or labels.max() >= classes:
            named = f"{labels.min()} to {labels.max()}"
            raise Unavailable(f"{run.sample.path} has labels {named}, but {run.extractor.name} has {classes} classes")

    def measure(self, run: Comparison) -> None:
        run.record("class_accuracy", run.sample.correct / len(run.sample), of_samples_alone=True)


class FrechetDistance(Metric):
    """FID from pooled features, sFID from spatial ones."""

    def __init__(self, key: str, kind: FeatureKind):
        self.key, self.kind = key, kind

    def prepare(self, run: Comparison) -> None:
        for side in run.sides:
            side.check_gaussian(self.kind)
        for side in run.sides:
            side.want_gaussian(self.kind)

    def check(self, run: Comparison) -> None:
        if any(side.stored[self.kind] is None for side in run.sides):
            run.check_output(self.kind.field)
        (ref_dim, ref_id), (sample_dim, sample_id) = (self.origin(run, side) for side in run.sides)
        if ref_dim != sample_dim or (ref_id and sample_id and ref_id != sample_id):
            described = [
                f"{side.path}: {dim} features of {extractor or 'an extractor it does not name'}, "
                f"{'computed now' if side.stored[self.kind] is None else 'stored in the file'}"
                for side, dim, extractor in ((run.ref, ref_dim, ref_id), (run.sample, sample_dim, sample_id))
            ]
            raise UserError(
                f"the two sides are not seen by the same network ({'; '.join(described)}): give the extractor that the "
                f"stored statistics come from, or a file without mu{self.kind.suffix} and sigma{self.kind.suffix}"
            )

    def origin(self, run: Comparison, side: ImageSet) -> tuple[int, str | None]:
        """How many features this side has, and the identity of their network."""
        stored = side.stored[self.kind]
        if stored is not None:
            return len(stored.mu), stored.extractor
        return getattr(run.probe, self.kind.field).shape[1], run.extractor.id

    def measure(self, run: Comparison) -> None:
        ref, sample = (side.gaussian(self.kind) for side in run.sides)
        parts = frechet(ref.mu, ref.sigma, sample.mu, sample.sigma)
        ids = [self.origin(run, side)[1] for side in run.sides]
        label = run.label(self.key, ids[0] or ids[1])
        run.results[self.key] = Result(
            parts.distance, label, ids[0] or ids[1], sample.count, sample.source, ref.count, ref.source,
            resize=run.resize_of(ids[0] or ids[1]), clipped=parts.clipped,
        )
        for side, gaussian in zip(run.sides, (ref, sample)):
            if gaussian.count is not None and gaussian.count < len(gaussian.mu):
                run.warnings.append(
                    f"{label}: {gaussian.count} {side.role} are fewer than the {len(gaussian.mu)} feature dimensions, "
                    "so the distance is strongly biased; compare it only at equal counts"
                )
        if parts.clipped > DAMAGED:
            run.warnings.append(f"{label}: a covariance has negative eigenvalues, so stored statistics are damaged")


class PointMetric(Metric):
    """A metric of the features of single images; both sides must have images, more than `least` of them."""

    def least(self, run: Comparison) -> int:
        raise NotImplementedError

    def prepare(self, run: Comparison) -> None:
        for side in run.sides:
            side.check_images()
        if run.smaller <= self.least(run):
            raise Unavailable(f"it needs more than {self.least(run)} images on each side, and one has {run.smaller}")
        for side in run.sides:
            side.want_points()


class PrecisionRecall(PointMetric):
    """Improved precision and recall."""

    def least(self, run: Comparison) -> int:
        return run.k

    def measure(self, run: Comparison) -> None:
        precision, recall = precision_recall(
            run.ref.points, run.sample.points, run.k, dtype=run.pr_dtype, progress=run.progress
        )
        run.record("precision", precision)
        run.record("recall", recall)


class KernelDistance(PointMetric):
    """KID."""

    def least(self, run: Comparison) -> int:
        return 1

    def measure(self, run: Comparison) -> None:
        distance = kid(
            run.ref.points, run.sample.points, KID_SUBSETS, run.kid_subset_size, KID_SEED, progress=run.progress
        )
        run.record("kernel_distance", distance.mean, distance.std)


METRICS: dict[str, Metric] = {
    "inception_score": Score(),
    "fid": FrechetDistance("frechet_distance", POOLED),
    "sfid": FrechetDistance("spatial_frechet_distance", SPATIAL),
    "precision_recall": PrecisionRecall(),
    "kid": KernelDistance(),
    "class_accuracy": ClassAccuracy(),
}
