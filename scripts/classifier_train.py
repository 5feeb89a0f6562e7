"""Train a small classifier on labelled images, as the feature extractor of evaluations/evaluator.py.

python scripts/classifier_train.py --data_dir digits --image_size 8 --out classifier.ts

Leaves a TorchScript file (uint8 [N,3,H,W] -> features [N,64], logits [N,K]) and beside it a JSON file of facts.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cm import dist_util
from cm.flags import option, parse
from cm.image_sources import ImageSource, open_source
from cm.registry import UserError
from evaluations.classifier import accuracy, stratified_split, train_classifier
from evaluations.features import TorchScriptExtractor, save_torchscript


@dataclass(frozen=True)
class ClassifierConfig:
    """classifier"""

    data_dir: str = option("digits", "labelled images: a folder, EDM zip, npz, or `digits`")
    image_size: int = option(8, "side of the square images in pixels", minimum=4)
    out: str = option("classifier.ts", "the TorchScript file to write")
    epochs: int = option(15, "passes over the training images", minimum=1)
    batch_size: int = option(64, "images per step", minimum=2)
    holdout: float = option(0.25, "share of every class that is not trained on but measures the accuracy")
    seed: int = option(0, "seed of the split and the training", minimum=0)


def main() -> None:
    settings = parse(__doc__.splitlines()[0], ClassifierConfig)
    config = settings.section(ClassifierConfig)
    if settings.dry_run:
        return print(settings.as_text())
    if dist_util.get_world_size() > 1:
        raise UserError("training a classifier is one process; start it without mpiexec")
    dist_util.setup_dist()
    start = time.monotonic()
    images, labels, num_classes = load_labelled(open_source(config.data_dir, config.image_size), config.data_dir)
    try:
        kept, held_out = stratified_split(labels, config.holdout, config.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    os.makedirs(os.path.dirname(os.path.abspath(config.out)), exist_ok=True)

    model = train_classifier(
        images[kept], labels[kept], num_classes,
        epochs=config.epochs, batch_size=config.batch_size, seed=config.seed, device=dist_util.dev(),
    )
    held_out_accuracy = accuracy(model, images[held_out], labels[held_out])
    name = f"{Path(config.data_dir).stem}-classifier"
    save_torchscript(model.cpu(), config.out, name, f"none (trained at {config.image_size}x{config.image_size})")
    facts = {
        "held_out_accuracy": held_out_accuracy,
        "held_out_images": len(held_out),
        "training_images": len(kept),
        "classes": num_classes,
        "extractor": TorchScriptExtractor(config.out).id,
        "seconds": round(time.monotonic() - start, 2),
    }
    Path(config.out).with_suffix(".json").write_text(json.dumps(facts, indent=2))
    print(f"held-out accuracy: {held_out_accuracy:.2%} of {len(held_out)} images ({len(kept)} trained on)")
    print(f"{config.out}: {facts['extractor']}")


def load_labelled(source: ImageSource, data_dir: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Images [N,H,W,3], labels [N], number of classes.

    :raises UserError: if the images have no classes, or only one.
    """
    if source.num_classes is None:
        raise UserError(f"--data_dir {data_dir} has no class labels, which a classifier learns from")
    if source.num_classes < 2:
        raise UserError(f"--data_dir {data_dir} has only one class; a classifier needs at least 2")
    images = np.stack([source.image(i) for i in range(len(source))])
    return images, np.array([source.label(i) for i in range(len(source))]), source.num_classes


if __name__ == "__main__":
    dist_util.run(main)
