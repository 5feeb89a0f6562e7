"""The classes of N images, from their names or from the `dataset.json` next to them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cm.data.class_names import ClassNames, checked
from cm.io import untrusted

LABEL_FILE = "dataset.json"
LABEL_BYTES = 4096                                                  # of dataset.json for each image
MAX_CLASSES = 1_000_000


def label_bytes(images: int) -> int:
    """The largest size of a dataset.json, in bytes, that is read for so many images."""
    return 2**20 + LABEL_BYTES * images


RULES = ("auto", "folders", "names")
"""Where classes come from without a dataset.json: folders where there are several, else file names; or one of both."""


class Labels(NamedTuple):
    """The classes of N images, or why there are none."""

    numbers: np.ndarray | None                                      # int64 [N]
    reason: str = ""                                                # why `numbers` is None
    names: ClassNames = ()                                          # of the classes; empty where they are not known
    origin: str = ""                                                # where the classes come from


def labels_of_names(names: list[str], rule: str = "auto") -> Labels:
    """Classes by their sub-folders, or from file names `{class}_{anything}`, in alphabetical order.

    :param rule: one of `RULES`.
    """
    folders = [name.split("/")[0] if "/" in name else "" for name in names]
    if rule == "folders" and len(set(folders)) < 2:
        return Labels(None, f"{names[0]!r} and the others are not in sub-folders, one for each class")
    if rule != "names" and len(set(folders)) > 1:
        return _numbered(folders, "sub-folders")
    classes = []
    for name in names:
        label, underscore, _ = name.rpartition("/")[2].partition("_")
        if not underscore:
            return Labels(None, f"{name!r} has no class before an underscore in its name, and there is no {LABEL_FILE}")
        classes.append(label)
    return _numbered(classes, "file names before the first _")


def _numbered(classes: list[str], origin: str) -> Labels:
    """Classes [N] by name, numbered in alphabetical order."""
    names, numbers = np.unique(classes, return_inverse=True)
    return Labels(numbers.astype(np.int64), "", tuple(names.tolist()), origin)


def labels_of_json(text: bytes, names: list[str]) -> Labels:
    """Classes from the `dataset.json` of EDM and StyleGAN, which may also list their names under "class_names"."""
    try:
        content = untrusted.parse_json(text)
        pairs, classes = content["labels"], content.get("class_names") or []
        table = None if pairs is None else {str(name): label for name, label in pairs}
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
    numbers = np.array([table[name] for name in names], np.int64)
    try:
        return Labels(numbers, "", checked(classes, int(numbers.max()) + 1), LABEL_FILE)
    except ValueError as error:
        return Labels(None, f"{LABEL_FILE}: {error}")
