"""The classes of N images, from their names or from the `dataset.json` next to them."""

from __future__ import annotations

import numpy as np

from cm.io import untrusted
from cm.io.budget import Budget, parse_json

LABEL_FILE = "dataset.json"
MAX_CLASSES = 1_000_000


def label_budget(images: int) -> Budget:
    """What a dataset.json may hold for so many images."""
    return Budget(2**20 + 4096 * images, 2**20 + 64 * images, 10)


RULES = ("auto", "folders", "names")
"""Where classes come from without a dataset.json: folders where there are several, else file names; or one of both."""


def labels_of_names(names: list[str], rule: str = "auto") -> tuple[np.ndarray | None, str]:
    """Classes by their sub-folders, or from file names `{class}_{anything}`, in alphabetical order.

    :param rule: one of `RULES`.
    :returns: int64 [N] and "", or None and the reason.
    """
    folders = [name.split("/")[0] if "/" in name else "" for name in names]
    if rule == "folders" and len(set(folders)) < 2:
        return None, f"{names[0]!r} and the others are not in sub-folders, one for each class"
    if rule != "names" and len(set(folders)) > 1:
        return np.unique(folders, return_inverse=True)[1].astype(np.int64), ""
    classes = []
    for name in names:
        label, underscore, _ = name.rpartition("/")[2].partition("_")
        if not underscore:
            return None, f"{name!r} has no class before an underscore in its name, and there is no {LABEL_FILE}"
        classes.append(label)
    return np.unique(classes, return_inverse=True)[1].astype(np.int64), ""


def labels_of_json(text: bytes, names: list[str]) -> tuple[np.ndarray | None, str]:
    """Classes from the `dataset.json` of EDM and StyleGAN: int64 [N] and "", or None and the reason."""
    try:
        pairs = parse_json(text, label_budget(len(names)))["labels"]
        table = None if pairs is None else {str(name): label for name, label in pairs}
    except (ValueError, KeyError, TypeError) as error:
        return None, f"{LABEL_FILE} is not of the form {{\"labels\": [[\"name\", 0], ...]}}: {error!r}"
    if table is None:
        return None, f"{LABEL_FILE} has no labels"
    for name in names:
        if name not in table:
            return None, f"{LABEL_FILE} has no label for {name!r}"
        if type(table[name]) is not int or not 0 <= table[name] < MAX_CLASSES:
            label = untrusted.shown(table[name])
            return None, f"{LABEL_FILE} gives {name!r} the label {label}, which is no class number"
    return np.array([table[name] for name in names], np.int64), ""
