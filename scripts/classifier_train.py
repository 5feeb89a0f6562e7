"""Train a small classifier on labelled images, as a feature extractor for evaluation or for classifier guidance.

python scripts/classifier_train.py --data_dir digits --image_size 8 --out classifier.ts
python scripts/classifier_train.py --data_dir digits --image_size 8 --noised True --out guide.pt

The first command writes a TorchScript file (uint8 [N,3,H,W] -> features [N,64], logits [N,K]). The second writes a
classifier of noisy images, for --classifier_path of image_sample.py. Both also write a JSON file with the accuracy and
other facts.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cm.config import early_exit
from cm.config.flags import Settings, option, parse
from cm.config.needs import refuse_idle
from cm.data.class_names import ClassNames
from cm.data.image_source import ImageSource
from cm.data.sources import open_source
from cm.distributed.launchers import DEVICES
from cm.errors import UserError
from cm.io.outputs import Output, check_outputs
from cm.io.storage import write_json

SHOWN_LEVELS = (0.25, 0.5, 1.0, 2.0)                        # noise levels at which a guide is judged
Labelled = tuple[NDArray[Any], NDArray[np.int64]]           # images [N,H,W,C], labels [N]


class Classes(NamedTuple):
    """What a classifier tells apart."""

    count: int
    names: ClassNames                                       # empty where they are not known


@dataclass(frozen=True)
class ClassifierConfig:
    """classifier"""

    data_dir: str = option("digits", "labelled images: a folder, EDM zip, npz, or `digits`")
    image_size: int = option(8, "side of the square images in pixels", minimum=4)
    channels: int = option(
        3, "noised: channels of the images, equal to --channels of the guided model; an extractor has 3", minimum=1
    )
    out: str = option("", "the file to write; empty: classifier.ts, or noisy_classifier.pt")
    noised: bool = option(False, "train a classifier of noisy images, conditioned on the noise level, for guidance")
    classifier_width: int = option(32, "noised: channels at the first resolution level, a multiple of 32", minimum=32)
    classifier_depth: int = option(1, "noised: residual blocks per resolution level", minimum=1)
    classifier_attention_resolutions: str = option(
        "32,16,8", "noised: resolutions with attention layers, in pixels; others are ignored"
    )
    epochs: int = option(15, "number of passes over the training images", minimum=1)
    batch_size: int = option(64, "images per step", minimum=2)
    holdout: float = option(0.25, "fraction of every class that is held out to measure the accuracy")
    device: str = option(
        "auto", "where to compute; auto: on a GPU if there is one, else on the CPU", choices=tuple(DEVICES)
    )
    seed: int = option(0, "random seed of the split and of the training", minimum=0)


def read_flags() -> Settings:
    """The flags of the command line."""
    return parse((__doc__ or "").splitlines()[0], ClassifierConfig)


def main(settings: Settings) -> None:
    """Train one classifier, and write it with its accuracy on images that it was not trained on."""
    from cm.distributed import setup as dist
    from evaluations.features.classifier import stratified_split

    config = settings.section(ClassifierConfig)
    refuse_idle(settings, {})
    if settings.dry_run:
        return print(settings.as_text())
    if dist.get_world_size() > 1:
        raise UserError("training a classifier is one process; start it without mpiexec")
    if config.channels != 3 and not config.noised:
        raise UserError(f"--channels {config.channels}: a feature extractor is for images of 3 channels, and sees grey "
                        "ones as RGB; drop the flag, or give --noised True")
    dist.setup_dist(device=config.device)
    start = time.monotonic()
    out = config.out or ("noisy_classifier.pt" if config.noised else "classifier.ts")
    facts_path = Path(out).with_suffix(".json")
    outputs = [Output("--out", out), Output("the JSON file of facts next to it", facts_path)]
    check_outputs(outputs, {"--data_dir": config.data_dir})
    source = open_source(config.data_dir, config.image_size, channels=config.channels)
    images, labels, classes = load_labelled(source, config.data_dir)
    try:
        kept, held_out = stratified_split(labels, config.holdout, config.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    train = train_guide if config.noised else train_extractor
    facts, lines = train(config, out, (images[kept], labels[kept]), (images[held_out], labels[held_out]), classes)
    facts |= {
        "held_out_images": len(held_out),
        "training_images": len(kept),
        "classes": classes.count,
        "class_names": classes.names,
        "seconds": round(time.monotonic() - start, 2),
    }
    write_json(facts_path, facts)
    print(f"held-out accuracy: {facts['held_out_accuracy']:.2%} of {len(held_out)} images ({len(kept)} trained on)")
    print("\n".join(lines))


def train_extractor(
    config: ClassifierConfig, out: str, training: Labelled, held_out: Labelled, classes: Classes
) -> tuple[dict[str, Any], list[str]]:
    """Write a feature extractor to `out`: facts for the JSON file, and lines to print."""
    from cm.distributed import setup as dist
    from evaluations.features import TorchScriptExtractor, save_torchscript
    from evaluations.features.classifier import accuracy, train_classifier

    model = train_classifier(
        *training, classes.count,
        epochs=config.epochs, batch_size=config.batch_size, seed=config.seed, device=dist.dev(),
    )
    held_out_accuracy = accuracy(model, *held_out)
    name = f"{Path(config.data_dir).stem}-classifier"
    save_torchscript(model.cpu(), out, name, f"none (trained at {config.image_size}x{config.image_size})")
    extractor = TorchScriptExtractor(out).id
    return {"held_out_accuracy": held_out_accuracy, "extractor": extractor}, [f"{out}: {extractor}"]


def train_guide(
    config: ClassifierConfig, out: str, training: Labelled, held_out: Labelled, classes: Classes
) -> tuple[dict[str, Any], list[str]]:
    """As `train_extractor`, for a guide; the accuracy at the lowest noise level stands for that of clean images."""
    from cm.checkpoints import serialization
    from cm.distributed import setup as dist
    from cm.networks.build import parse_channel_mult, parse_resolutions
    from cm.networks.noisy_classifier import NoisyClassifierConfig, to_content
    from cm.networks.unet import attention_factors
    from cm.training.classifier import accuracy_at, train_noisy_classifier

    widths = parse_channel_mult("", config.image_size)
    sides = [config.image_size >> level for level in range(len(widths))]
    attended = [side for side in parse_resolutions(config.classifier_attention_resolutions) if side in sides]
    network = NoisyClassifierConfig(
        config.image_size, classes.count, config.classifier_width, config.classifier_depth, widths,
        attention_factors(config.image_size, attended), channels=config.channels, class_names=classes.names,
    )
    model = train_noisy_classifier(
        *training, network, epochs=config.epochs, batch_size=config.batch_size, seed=config.seed, device=dist.dev()
    )
    by_level = {sigma: accuracy_at(model, *held_out, sigma) for sigma in (network.sigma_min, *SHOWN_LEVELS)}
    serialization.save_tensors(out, to_content(model.cpu()))
    facts = {"held_out_accuracy": by_level[network.sigma_min], "accuracy_by_sigma": by_level}
    return facts, [f"at noise level {sigma:g}: {share:.1%}" for sigma, share in by_level.items()] + [out]


def load_labelled(source: ImageSource, data_dir: str) -> tuple[NDArray[Any], NDArray[np.int64], Classes]:
    """Images [N,H,W,C], labels [N], and the classes.

    :raises UserError: if the images have no classes, or only one.
    """
    if source.num_classes is None:
        raise UserError(f"--data_dir {data_dir} has no class labels, which a classifier learns from")
    if source.num_classes < 2:
        raise UserError(f"--data_dir {data_dir} has only one class; a classifier needs at least 2")
    images = np.stack([source.image(i) for i in range(len(source))])
    classes = Classes(source.num_classes, source.class_names)
    return images, np.array([source.label(i) for i in range(len(source))]), classes


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
