"""The images of a training run, from its flags: each rank's share of a step, read, looked up and augmented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from cm.checkpoints.loading import WeightsFile
from cm.config.flags import Settings
from cm.config.needs import NEEDS_OF_DATA, refuse_idle
from cm.config.schema import DataConfig, TrainConfig
from cm.data.augment import AUGMENT_LABELS, AugmentBatch, AugmentPipe, augmented
from cm.data.class_names import ClassNames, require_same
from cm.data.image_source import ImageSource
from cm.data.label_dropout import with_label_dropout
from cm.data.loader import load_data
from cm.data.mapped import Batches
from cm.data.reference_batches import with_references
from cm.data.sources import choices, open_everywhere
from cm.data.sources import open_stream as open_shards
from cm.data.streams import ImageStream
from cm.distributed import setup as dist
from cm.distributed.launchers import usable_cores
from cm.errors import UserError
from cm.logging import logger
from cm.types import Batch

WORKERS_PER_CORE = 4


def share_of_batch(global_batch_size: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Images per step on one rank and on all; shares differ by at most one image.

    :param batch_size: images per step and rank, whatever global_batch_size says; -1 to leave it to that.
    :raises UserError: if there are fewer images than ranks.
    """
    if batch_size > 0:
        return batch_size, batch_size * world_size
    if global_batch_size < world_size:
        raise UserError(
            f"--global_batch_size {global_batch_size} leaves some of {world_size} ranks without an image; "
            f"choose at least {world_size}, or start fewer ranks"
        )
    return len(range(rank, global_batch_size, world_size)), global_batch_size


@dataclass(frozen=True)
class RunBatches:
    """The `Batches` of a run: its images, read as its flags say.

    :param options: the arguments of `load_data` except rank, world_size and start.
    :param references: number of reference images of every batch; 0: none.
    :param augment: a transform of a batch and its references; None: no transform, or `augmented` applies it later.
    """

    rank: int
    world_size: int
    options: Mapping[str, Any]
    references: int = 0
    augment: AugmentBatch | None = None

    def __call__(self, start: int) -> Iterator[Batch]:
        rank, world_size = self.rank, self.world_size
        stream = load_data(start=start, rank=rank, world_size=world_size, **self.options)
        if not self.references:
            return stream
        return with_references(
            stream, self.references, start, rank, world_size, dist.all_gather_object, self.augment
        )


class OpenedData(NamedTuple):
    """The images of a run.

    :param class_names: names of the classes that the network is conditioned on; empty if they are not known.
    """

    stream: RunBatches
    class_names: ClassNames
    source: ImageSource | ImageStream


def open_data(settings: Settings, references: int = 0) -> OpenedData:
    """Open the images that the flags name, and compare their classes with those of checkpoints.

    Sets num_classes from the data if no flag or checkpoint has set it.

    :param references: number of reference images of every batch.
    :raises UserError: if there is no such data, class_cond is given for data without labels, there are fewer references
        than images per step, or the classes differ from those of the checkpoint that the run starts from.
    """
    data, train = settings.section(DataConfig), settings.section(TrainConfig)
    if not data.data_dir:
        raise UserError(f"--data_dir is missing: give {choices()}")
    source: ImageSource | ImageStream
    class_names: ClassNames = ()                            # for a stream, they are not known before it is read
    shards = open_shards(data.data_dir)
    refuse_idle(settings, {"shards": shards is not None, "single_images": shards is None}, NEEDS_OF_DATA)
    if shards is not None:
        source = shards
        _check_stream(settings, shards)
    else:
        source, class_names = _open_images(settings, data)
    if data.augment and "random_flip" not in settings.given:        # the augmentation labels would miss these flips
        settings.replace(random_flip=False)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch_size, global_batch = share_of_batch(train.global_batch_size, train.batch_size, rank, world_size)
    if 0 < references < global_batch:
        raise UserError(
            f"--num_references {references} is less than the {global_batch} images of a step, which are among the "
            f"reference images: give --num_references {global_batch} or more"
        )
    _warn_of_cost(data.num_workers, references, source)
    options = _loader_options(settings) | {
        "batch_size": batch_size, "global_batch": global_batch, "source": None if shards else source,
    }
    return OpenedData(RunBatches(rank, world_size, options, references), class_names, source)


def _warn_of_cost(num_workers: int, references: int, source: ImageSource | ImageStream) -> None:
    """Warn of large numbers that make the run slow."""
    cores = len(usable_cores())
    if num_workers > WORKERS_PER_CORE * cores:
        logger.warn(f"--num_workers {num_workers} starts {num_workers} processes per rank, each with its own memory, "
                    f"but this machine has {cores} core{'s' * (cores > 1)}: the start will be slow; -1 chooses a "
                    "number")
    if isinstance(source, ImageSource) and references > len(source):
        logger.warn(f"--num_references {references} is more than the {len(source)} images of the data set: every step "
                    f"reads and compares most of them several times; {len(source)} are enough")


def _loader_options(settings: Settings) -> dict[str, Any]:
    """The arguments of `load_data` that the flags determine."""
    data, values = settings.section(DataConfig), settings.values
    same_names = ("image_size", "class_cond", "random_flip", "seed", "channels")        # some were resolved since
    return {
        "data_dir": data.data_dir,
        "random_crop": data.random_crop,
        "labels": data.labels,
        "shuffle_window": data.shuffle_window,
        "num_workers": None if data.num_workers < 0 else data.num_workers,
        "cache_bytes": int(data.cache_gib * 2**30),
        "pin_memory": dist.dev().type == "cuda",
        "num_classes": values["num_classes"] or None,
        **{name: values[name] for name in same_names},
    }


def _open_images(settings: Settings, data: DataConfig) -> tuple[ImageSource, ClassNames]:
    """Open a set of images, and set num_classes to its number of classes; returns the set and the names of its classes.

    :raises UserError: if there is no such data, or its classes are not those of the network.
    """
    values = settings.values
    source = settings.sources.get("data_dir")               # latents were opened for their channels
    if source is None:
        source = open_everywhere(data.data_dir, values["image_size"], data.labels, values["channels"])
    if not values["class_cond"]:
        return source, ()
    if source.num_classes is None:
        raise UserError(
            f"class_cond=True, as {settings.given.get('class_cond', 'this command')} asks, but {data.data_dir} has "
            f"no class labels: {source.no_labels}"
        )
    _warn_of_odd_classes(source)
    class_names = _compare_classes(settings, source)
    if not values["num_classes"]:
        settings.replace(num_classes=source.num_classes)
    if source.num_classes > values["num_classes"]:
        raise UserError(f"{data.data_dir} has {source.num_classes} classes, the network only {values['num_classes']}")
    return source, class_names


def _check_stream(settings: Settings, stream: ImageStream) -> None:
    """:raises UserError: if class_cond is given for a stream, without num_classes."""
    if settings.values["class_cond"] and not settings.values["num_classes"]:
        raise UserError(f"{stream.data_dir} is a stream, whose classes are not known before it is read: give "
                        "--num_classes, or leave out --class_cond")


def _warn_of_odd_classes(source: ImageSource) -> None:
    """Warn of labels that are probably not meant as classes: training with them gives no error."""
    classes = 0 if source.labels is None else len(np.unique(source.labels))
    if classes == 1 or classes > len(source) / 2:
        logger.warn(
            f"{len(source)} images are in {classes} class{'es' * (classes > 1)}: classes come from a dataset.json, "
            "from sub-folders, or from file names up to the first _ (see --labels); without any, leave out --class_cond"
        )
    if source.labels is not None and "" in source.class_names:
        count = int(np.count_nonzero(source.labels == source.class_names.index("")))
        logger.warn(
            f"{count} of {len(source)} images are in no sub-folder, or have nothing before the first _ of their name: "
            "they form a class without a name. If they belong to none of the classes, move them to another folder"
        )


def _compare_classes(settings: Settings, source: ImageSource) -> ClassNames:
    """Compare the classes of the data with those of the files that the run starts from; returns their names.

    :raises UserError: see `require_same`.
    """
    names = source.class_names
    files = {flag: file for flag, file in settings.sources.items() if isinstance(file, WeightsFile)}
    for flag, file in files.items():
        allowed = settings.section(TrainConfig).allow_other_classes
        warning = require_same(file.class_names, source.class_names, f"--{flag} {file.path}", source.data_dir, allowed)
        if warning and flag == "teacher_model_path":        # of the other flags the loop warns, which resumes
            logger.warn(warning)
        names = names or file.class_names
    return names


def augment(settings: Settings, data: Batches, model: nn.Module) -> Batches:
    """The data of `open_data` with --augment's transforms.

    :raises UserError: if the network cannot be conditioned on them.
    """
    p = settings.section(DataConfig).augment
    if not p:
        return data
    if p > 1:
        raise UserError(f"--augment {p:g} is a probability: at most 1, such as 0.12")
    if getattr(model, "augment_dim", 0) != AUGMENT_LABELS:
        raise UserError(
            f"--augment {p:g} needs a network that is conditioned on the augmentation, by {AUGMENT_LABELS} numbers, "
            f"and this one is not: choose --arch ddpmpp or ncsnpp with --augment_dim {AUGMENT_LABELS}, or drop "
            "--augment"
        )
    seed = settings.values["seed"]
    if isinstance(data, RunBatches) and data.references and settings.values["augment_references"]:
        return replace(data, augment=AugmentBatch(AugmentPipe(p), seed, dist.dev()))
    return augmented(data, p, seed, dist.dev())


def drop_labels(settings: Settings, data: Batches) -> Batches:
    """The data of `open_data` where some samples have lost their class, as --label_dropout asks."""
    p = settings.section(DataConfig).label_dropout
    return with_label_dropout(data, p, settings.values["seed"], settings.values["num_classes"]) if p else data
