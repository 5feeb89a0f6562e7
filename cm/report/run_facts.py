"""The facts about the training of a model, for its card and for the metadata of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

LARGEST = 1e300                                                     # more than is ever counted or measured


@dataclass(frozen=True)
class Measurement:
    """A result of an evaluation, with what it depends on."""

    label: str
    value: float
    images: int = 0                                                 # samples that were measured; 0: not recorded
    extractor: str = ""                                             # of the features; empty: not recorded, or none


@dataclass(frozen=True)
class RunFacts:
    """The facts about the training of a model; empty text and 0 mean that a fact is not known."""

    data: str = ""                                                  # name of the data set, without its folders
    images: int = 0                                                 # in it
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0                                            # of training
    command: str = ""                                               # that trains the same
    measured: tuple[Measurement, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The facts as JSON; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> RunFacts:
        """The facts in a file that anybody may have written.

        :raises ValueError: if a value is of another kind than it should be.
        """
        values = _of_kinds(content, cls())
        return cls(**{**values, "measured": tuple(
            Measurement(**_of_kinds(each, Measurement("", 0.0))) for each in values.get("measured", ())
        )})


def _of_kinds(content: Any, example: RunFacts | Measurement) -> dict[str, Any]:
    """The values of an object that an example has, too.

    :raises ValueError: if one is of another kind than that of the example, or one without a default is missing.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    required = {each.name for each in fields(example) if each.default is MISSING}
    found: dict[str, Any] = {}
    for name, value in vars(example).items():
        if name not in content:
            if name in required:
                raise ValueError(f"{name} is missing")
            continue
        kinds = {tuple: (list, tuple), float: (int, float)}.get(type(value), type(value))
        given = content[name]
        if not isinstance(given, kinds) or isinstance(given, bool):
            raise ValueError(f"{name} is a {type(given).__name__}")
        if isinstance(value, (int, float)) and not 0 <= given <= LARGEST:
            raise ValueError(f"{name} is not a number from 0 to {LARGEST:g}")
        found[name] = given
    return found


def measurements_of(content: Mapping[str, Any]) -> Iterator[Measurement]:
    """The results in a file that evaluator.py or fid.py wrote with --json; none in any other."""
    metrics = content.get("metrics")
    rows = list(metrics.values()) if isinstance(metrics, dict) else []
    if "label" in content and "value" in content:
        rows.append(content)
    for row in rows:
        if not isinstance(row, dict) or not _is_number(row.get("value")):
            continue
        extractor = row.get("extractor") or ""
        if isinstance(extractor, dict):                             # of fid.py
            extractor = f"{extractor.get('name')} ({extractor.get('id')})"
        images = row.get("sample_count") or row.get("num_images") or 0
        yield Measurement(str(row.get("label", "")), float(row["value"]), images if type(images) is int else 0,
                          str(extractor))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST
