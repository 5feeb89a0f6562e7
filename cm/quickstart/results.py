"""The results of a chain of commands: a table of methods, and a picture of real images above the samples of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm.data.image_source import ImageSource
from cm.generate.grids import grid_scale, labelled_rows, save_picture
from cm.io.atomic import AtomicFile

REAL_SEED = 7
COLUMNS = {
    "frechet_distance": ("Frechet distance*", "{:.3f}"), "precision": ("precision*", "{:.3f}"),
    "recall": ("recall*", "{:.3f}"), "class_accuracy": ("class accuracy*", "{:.1%}"),
}
"""Metric -> its heading in the table, and the form of its values."""


def write_real(path: Path, source: ImageSource, at_most: int | None = None) -> None:
    """Real images as a batch for the evaluator, with their classes if they have some; all, or a random choice."""
    rows = np.arange(len(source))
    if at_most is not None and at_most < len(rows):
        rows = np.sort(np.random.default_rng(REAL_SEED).choice(rows, at_most, replace=False))
    images = source.images(rows)
    with AtomicFile(path) as file:
        if source.labels is None:
            np.savez(file, arr_0=images)
        else:
            np.savez(file, arr_0=images, arr_1=source.labels[rows])


def samples_in(folder: Path) -> Path:
    """The npz of samples in a folder."""
    return next(folder.glob("samples_*.npz"))


def row(name: str, folder: Path) -> dict[str, Any]:
    """A row of the table: a method's name, its cost and, where they were computed, its metrics."""
    summary = json.loads(samples_in(folder).with_suffix(".json").read_text())
    result = folder / "metrics.json"
    metrics = json.loads(result.read_text())["metrics"] if result.exists() else {}
    return {
        "method": name, "nfe": summary["network_evaluations"], "images_per_second": summary["images_per_second"],
        "metrics": metrics,
    }


def table(rows: Sequence[Mapping[str, Any]], note: str = "") -> str:
    """The table of methods, as text.

    :param note: explains the columns with a star.
    """
    shown = [name for name in COLUMNS if any(name in each["metrics"] for each in rows)]
    lines: list[tuple[str, ...]] = [("method", "NFE", *(COLUMNS[name][0] for name in shown), "images/s")]
    for each in rows:
        values = [COLUMNS[name][1].format(each["metrics"][name]["value"]) if name in each["metrics"] else ""
                  for name in shown]
        lines.append((each["method"], str(each["nfe"]), *values, f"{each['images_per_second']:.0f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*text, *([note] if note and shown else [])])


def picture(path: Path, real: Path, title: str, methods: Mapping[str, Path], columns: int = 16, scale: int = 0) -> None:
    """Real images above the samples of each method; a column starts from one noise, and has one class if there are
    classes.

    :param real: the npz of `write_real`.
    :param methods: name -> folder of its samples; the first gives the classes.
    :param scale: by how much to enlarge; 0: by what makes small images visible.
    """
    rows = []
    for name, folder in methods.items():
        with np.load(samples_in(folder)) as samples:
            if not rows:
                labels = samples["arr_1"][:columns] if "arr_1" in samples else None
                rows.append((title, real_like(real, labels, columns)))
            rows.append((name, samples["arr_0"][:columns]))
    save_picture(path, labelled_rows(rows, scale or grid_scale(rows[0][1].shape[1])))


def real_like(real: Path, labels: np.ndarray | None, columns: int) -> np.ndarray:
    """Real images [n,H,W,C], of these classes if the samples have some."""
    rng = np.random.default_rng(REAL_SEED)
    with np.load(real) as batch:
        if labels is None or "arr_1" not in batch:
            return batch["arr_0"][np.sort(rng.permutation(len(batch["arr_0"]))[:columns])]
        return batch["arr_0"][[rng.choice(members_of(batch["arr_1"], label)) for label in labels]]


def members_of(labels: np.ndarray, label: int) -> np.ndarray:
    """The images of a class, or all images if there is none of this class."""
    found = np.flatnonzero(labels == label)
    return found if len(found) else np.arange(len(labels))
