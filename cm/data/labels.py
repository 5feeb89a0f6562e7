"""The classes of N images, from their names or from the `dataset.json` next to them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from cm.data.class_names import ClassNames, checked
from cm.io import untrusted
from cm.io.budget import Budget, check_size, parse_json

LABEL_FILE = "dataset.json"
MAX_CLASSES = 1_000_000


def label_budget(images: int) -> Budget:
    """The limits for a dataset.json of this number of images."""
    return Budget(2**20 + 4096 * images, 2**20 + 64 * images, 10)


RULES = ("auto", "folders", "names")
"""Where classes come from without a dataset.json. auto: sub-folders if there are several, else file names."""


class Labels(NamedTuple):
    """The classes of N images, or why there are none."""

    numbers: np.ndarray | None                                      # int64 [N]
    reason: str = ""                                                # why `numbers` is None
    names: ClassNames = ()                                          # of the classes; empty where they are not known
    origin: str = ""                                                # where the classes come from


def labels_of_names(names: Sequence[str], rule: str = "auto") -> Labels:
    """Classes by their sub-folders, or from file names `{class}_{anything}`, in alphabetical order.

    :param rule: one of `RULES`.
    """
    if rule != "names":
        folders = _numbered((name.split("/", 1)[0] if "/" in name else "" for name in names), "sub-folders")
        if len(folders.names) > 1:
            return folders
        if rule == "folders":
            return Labels(None, f"{names[0]!r} and the others are not in sub-folders, one for each class")
    try:
        return _numbered(map(_class_in_name, names), "file names before the first _")
    except ValueError as error:
        return Labels(None, str(error))


def _class_in_name(name: str) -> str:
    """:raises ValueError: if there is none."""
    label, underscore, _ = name.rpartition("/")[2].partition("_")
    if not underscore:
        raise ValueError(f"{name!r} has no class before an underscore in its name, and there is no {LABEL_FILE}")
    return label


def _numbered(classes: Iterable[str], origin: str) -> Labels:
    """Classes [N] by name, numbered in alphabetical order."""
    found: dict[str, int] = {}
    numbers = np.fromiter((found.setdefault(name, len(found)) for name in classes), np.int64)   # as they first occur
    names = sorted(found)
    place = np.empty(len(names), np.int64)
    place[[found[name] for name in names]] = np.arange(len(names))
    return Labels(place[numbers], "", tuple(names), origin)


# --- dataset.json ----------------------------------------------------------------------------------------------------


def labels_of_json(text: bytes, names: Sequence[str]) -> Labels:
    """Classes from the `dataset.json` of EDM and StyleGAN, which may also list their names under "class_names"."""
    try:
        limits = label_budget(len(names))
        check_size(text, limits)
        if (listed := _labels_in_order(text, names)) is not None:
            return listed
        content = parse_json(text, limits)
        pairs, classes = content["labels"], content.get("class_names") or []
        table = None if pairs is None else _one_label_each(pairs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Labels(None, f"{LABEL_FILE} is not of the form {{\"labels\": [[\"name\", 0], ...]}}: {error!r}")
    if table is None:
        return Labels(None, f"{LABEL_FILE} has no labels")
    for name in names:
        if name not in table:
            return Labels(None, f"{LABEL_FILE} has no label for {name!r}")
        if type(table[name]) is not int or not 0 <= table[name] < MAX_CLASSES:
            label = untrusted.shown(table[name])
            return Labels(None, f"{LABEL_FILE} gives {name!r} the label {label}, which is no class number")
    return _listed(np.fromiter((table[name] for name in names), np.int64), classes)


def _one_label_each(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """:raises ValueError: if an image is listed with two labels."""
    table: dict[str, Any] = {}
    for name, label in pairs:
        if table.setdefault(str(name), label) != label:
            raise ValueError(f"{name} has two labels, {untrusted.shown(table[str(name)])} and {untrusted.shown(label)}")
    return table


def _listed(numbers: np.ndarray, classes: Any) -> Labels:
    """Labels of a dataset.json, or why its class names are none."""
    try:
        return Labels(numbers, "", checked(classes, int(numbers.max()) + 1), LABEL_FILE)
    except ValueError as error:
        return Labels(None, f"{LABEL_FILE}: {error}")


BEGINNING = re.compile(rb'\s*\{\s*"labels"\s*:\s*\[\s*(?=\[)')
END = re.compile(rb"\]\s*\]")
PART_BYTES = 2**15


def _labels_in_order(text: bytes, names: Sequence[str]) -> Labels | None:
    """Classes where the pairs of a dataset.json are those of the images, in their order, as most tools write them; None
    for any other file, or one that is none.

    It is parsed in parts: a million pairs at once would be a few hundred megabytes of objects. A place that looks like
    the end of a pair may lie in a name; then the parts on either side are no JSON.
    """
    beginning = BEGINNING.match(text)
    end = END.search(text, beginning.end()) if beginning else None
    if beginning is None or end is None:
        return None
    try:
        rest = json.loads(b'{"labels": null' + text[end.end() :])
        if rest.keys() - {"class_names", "latents"} != {"labels"} or rest["labels"] is not None:
            return None
        numbers = np.empty(len(names), np.int64)
        done, rows = 0, iter(names)
        for part in _parts(text, beginning.end(), end.start() + 1):
            pairs = json.loads(part)
            found, labels = map(list, zip(*pairs, strict=True))
            if not _are_classes(labels) or found != list(islice(rows, len(found))):
                return None
            numbers[done : done + len(found)] = labels
            done += len(found)
    except (ValueError, TypeError, RecursionError, AttributeError):
        return None
    return _listed(numbers, rest.get("class_names") or []) if done == len(names) else None


def _parts(text: bytes, start: int, stop: int) -> Iterator[bytes]:
    """The list of pairs between two places, as several lists."""
    while start < stop:
        comma = text.find(b"],", start + PART_BYTES, stop)
        cut = stop if comma < 0 else comma + 1
        yield b"[" + text[start:cut] + b"]"
        start = cut + 1


def _are_classes(labels: list[Any]) -> bool:
    return set(map(type, labels)) == {int} and min(labels) >= 0 and max(labels) < MAX_CLASSES
