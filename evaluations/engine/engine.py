"""The evaluation engine: one pass of an extractor over each side's images, and the chosen metrics of the two sides.

It is the same for a process alone and for the ranks of a job: each takes its share of batches, sums are added up over
ranks, and the features of single images stay where they were made. Every method that takes images or measures is one
step of all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cm.errors import UserError
from cm.registry import lookup
from evaluations.engine.accumulator import Wanted, dims_of, pass_over
from evaluations.engine.agreement import (
    check_agreement,
    notice_unrecorded,
    origin_of,
    other_classes,
    same_features,
)
from evaluations.engine.readers import Statistics
from evaluations.engine.results import Measured, Result, label
from evaluations.engine.side import SAMPLES, Side
from evaluations.engine.statistics_cache import StatisticsCache
from evaluations.features.base import Extractor, Features
from evaluations.metrics import METRICS, default_names
from evaluations.metrics.base import CACHED, COMPUTED, FeatureKind, Gaussian, Metric, Number, Settings
from evaluations.metrics.points import Ranks

OUTPUT_WORDS = {"pool": "pooled features", "spatial": "spatial features", "logits": "logits"}


@dataclass(frozen=True)
class Engine:
    """Chosen metrics and how they are computed.

    :param metrics: by their names in `METRICS`.
    :param cache: where means and covariances are looked for and kept.
    """

    metrics: Mapping[str, Metric]
    settings: Settings
    ranks: Ranks
    batch_size: int
    cache: StatisticsCache | None = None

    @property
    def kinds(self) -> tuple[FeatureKind, ...]:
        """The kinds of features whose mean and covariance are compared."""
        return tuple(dict.fromkeys(each.moments for each in self.metrics.values() if each.moments is not None))

    def without(self, names: Iterable[str]) -> Engine:
        """The engine without some of its metrics."""
        dropped = set(names)
        return replace(self, metrics={name: each for name, each in self.metrics.items() if name not in dropped})

    def needs_extractor(self, side: Side) -> bool:
        """Whether the extractor must see this side's images."""
        return side.takes_pass(self.metrics.values())

    # --- what cannot be computed -----------------------------------------------------------------------------------

    def reasons_from_side(self, side: Side) -> dict[str, str]:
        """The metrics that cannot be computed from what a side holds, and why."""
        metrics = {name: each for name, each in self.metrics.items()
                   if side.role == SAMPLES or not each.of_samples_alone}
        return _reasons(metrics, lambda metric: side.reason_against(metric, self.settings))

    def reasons_from_extractor(self, extractor: Extractor, given: Features, *sides: Side) -> dict[str, str]:
        """The metrics that cannot be computed with an extractor, and why.

        :param given: its features of a few images.
        :param sides: those that are known; a metric for which all sides have statistics needs no extractor.
        """
        def reason(metric: Metric) -> str | None:
            if sides and not any(side.takes_pass([metric]) for side in sides):
                return None
            values = getattr(given, metric.output)
            if values is None:
                return f"{extractor.name} gives no {OUTPUT_WORDS[metric.output]}"
            for side in sides:
                labels = side.labels if metric.needs_labels and side.role == SAMPLES else None
                if labels is not None and (labels.min() < 0 or labels.max() >= values.shape[1]):
                    return (f"{side.path} has labels {labels.min()} to {labels.max()}, but {extractor.name} has "
                            f"{values.shape[1]} classes")
            return None

        return _reasons(self.metrics, reason)

    def check_agreement(self, ref: Side, sample: Side, extractor: Extractor | None, given: Features | None) -> None:
        """:raises UserError: if means and covariances of two networks, sizes or resize rules would be compared.

        :param given: the extractor's features of a few images.
        """
        dims = {} if given is None else dims_of(given)
        for kind in self.kinds:
            check_agreement(kind, ref, sample, extractor, dims.get(kind, 0))
        for side in (ref, sample):
            notice_unrecorded(side, self.kinds)

    # --- a side's images -------------------------------------------------------------------------------------------

    def look_up(self, side: Side, extractor: Extractor) -> None:
        """Take from the cache the means and covariances that are wanted and there."""
        for kind in self.kinds:
            if self.cache is not None and side.is_in_files and kind not in side.gaussians:
                arguments = (side.path, extractor.id, kind.suffix, side.choice, extractor.resize)
                known = self.ranks.on_main(self.cache.load, *arguments)
                if known is not None:
                    side.gaussians[kind] = Gaussian(known.mu, known.sigma, known.num_images, CACHED)

    def gather(self, side: Side, extractor: Extractor, given: Features) -> None:
        """Show a side's images to the extractor, if a metric still needs that, and keep what the metrics declare.

        :param given: the extractor's features of a few images.
        :raises UserError: on every rank, if an image cannot be read or a feature is not finite.
        """
        dims, metrics = dims_of(given), self.metrics.values()
        wanted = Wanted({kind: dims[kind] for kind in self.kinds if kind not in side.gaussians})
        if any(metric.needs_points for metric in metrics):
            wanted.point_dim = given.pool.shape[1]
        if side.role == SAMPLES:
            made = {metric: metric.make_partial(self.settings, side.labels) for metric in metrics}
            wanted.partials = {metric: partial for metric, partial in made.items() if partial is not None}
        if not wanted or side.images is None:
            return
        gathered = pass_over(side.images, extractor, wanted, self.batch_size, self.ranks, self.settings.progress)
        side.take(gathered)
        self._check_count(side)
        for kind, moments in gathered.moments.items():
            mu, sigma = moments.finalize()
            side.gaussians[kind] = Gaussian(mu, sigma, moments.n, COMPUTED)
            if self.cache is not None and side.is_in_files:
                found = Statistics(mu, sigma, extractor.id, moments.n, side.images.size, extractor.resize)
                self.ranks.on_main(self.cache.save, side.path, found, kind.suffix, side.choice)

    def _check_count(self, side: Side) -> None:
        """:raises UserError: if images that came from a model were too few."""
        least = max([2, *(metric.least(self.settings) for metric in self.metrics.values())])
        if side.count < least:
            raise UserError(f"{side.count} images are too few: {', '.join(self.metrics)} need at least {least} images")

    # --- the numbers -----------------------------------------------------------------------------------------------

    def measure(self, ref: Side, sample: Side, extractor: Extractor | None) -> Measured:
        """The numbers of every metric, by key, and warnings of weak ones; the same on every rank."""
        measured = Measured(odd=[*other_classes(ref, sample), *same_features(ref, sample, self.kinds)])
        for metric in self.metrics.values():
            for key, number in metric.measure(ref, sample, self.settings, self.ranks).items():
                result = _described(metric, key, number, ref, sample, extractor)
                measured.results[key] = result
                measured.few += [f"{result.label}: {text}" for text in _few(metric, ref, sample)]
                measured.odd += [f"{result.label}: {text}" for text in number.warnings]
        return measured

    def reported(self, smaller: int) -> dict[str, object]:
        """The settings of all metrics, for the JSON.

        :param smaller: images of the smaller set.
        """
        found: dict[str, object] = {}
        for metric in METRICS.values():
            found |= metric.reported(self.settings, smaller)
        return found | {"ranks": self.ranks.count}


def choose_metrics(names: Sequence[str] | None) -> tuple[dict[str, Metric], frozenset[str]]:
    """The metrics of these names, None for all that are on by default, and the names of those that are optional: where
    every default one is asked for, those that cannot be computed are left out instead of refused.

    :raises UserError: for an unknown name.
    """
    default = default_names()
    chosen = {name: lookup(METRICS, name, "metric") for name in (default if names is None else names)}
    return chosen, frozenset(default if set(default) <= set(chosen) else ())


def refuse_unless(optional: Iterable[str], reasons: Mapping[str, str]) -> None:
    """:raises UserError: if a metric that is not optional cannot be computed."""
    refused = {name: why for name, why in reasons.items() if name not in set(optional)}
    if refused:
        raise UserError("; ".join(f"{name} cannot be computed: {why}" for name, why in refused.items()))


def _reasons(metrics: Mapping[str, Metric], reason: Callable[[Metric], str | None]) -> dict[str, str]:
    found = {name: reason(metric) for name, metric in metrics.items()}
    return {name: why for name, why in found.items() if why is not None}


def _described(
    metric: Metric, key: str, number: Number, ref: Side, sample: Side, extractor: Extractor | None
) -> Result:
    """A number with its name and where it comes from."""
    identity, resize = (None, None) if extractor is None else (extractor.id, extractor.resize)
    reference: tuple[int | None, str | None] = (None, None) if metric.of_samples_alone else (ref.count, COMPUTED)
    samples: tuple[int | None, str] = (sample.count, COMPUTED)
    if metric.moments is not None:
        ids = [origin_of(side, metric.moments, extractor, 0).extractor for side in (ref, sample)]
        identity = ids[0] or ids[1]
        if extractor is None or extractor.id != identity:
            resize = None
        a, b = ref.gaussian(metric.moments), sample.gaussian(metric.moments)
        reference, samples = (a.count, a.source), (b.count, b.source)
    name = label(metric.results[key], extractor, identity)
    return Result(number.value, name, identity, *samples, *reference, std=number.std, resize=resize,
                  clipped=number.clipped, by_class=number.by_class)


def _few(metric: Metric, *sides: Side) -> list[str]:
    if metric.moments is None:
        return []
    found = [(side.role, side.gaussian(metric.moments)) for side in sides]
    return [
        f"{each.count} {role} are fewer than the {len(each.mu)} feature dimensions, so the distance is strongly "
        "biased; compare it only at equal counts"
        for role, each in found if each.count is not None and each.count < len(each.mu)
    ]
