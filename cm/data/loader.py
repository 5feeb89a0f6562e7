"""Endless batches of images in an order that depends only on the seed.

The samples of a run are counted by their position p, over all steps and ranks. Position p shows image
`permutation(seed, p // N)[p % N]`, flipped or cropped at random by a stream that depends on (seed, p) only. So 1, 2 and
4 ranks read the same samples, and a run resumes at any position without replaying the earlier ones. A stream has its
own order, see `cm.data.streams`.

Shapes: N images of the set, B images of a rank's batch, S image_size.
"""

from __future__ import annotations

import math
import signal
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch as th
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cm.data.decode import resize_shorter_side
from cm.data.image_source import ImageSource
from cm.data.latents import LatentRecord, drawn, record_for
from cm.data.order import EpochOrder, Requests, offsets_of_rank
from cm.data.sources import open_source, open_stream
from cm.data.streams import WINDOW, StreamedSource
from cm.distributed import signals
from cm.errors import UserError
from cm.random_util import stream_seed, stream_seeds
from cm.types import Batch

CROP_FRACTION = 0.8                                                 # least part of the shorter side in a random crop


@dataclass(frozen=True)
class LoaderOptions:
    """Arguments of `load_data` that consistency_models does not have.

    :param seed: of order and augmentation; the same on all ranks.
    :param global_batch: images per step over all ranks; None for batch_size on each. A step's position j goes to rank
        j mod world_size.
    :param start: samples that the run has consumed already, over all ranks.
    :param num_workers: processes that read images ahead; None means none if the set is kept in memory, else one.
    :param pin_memory: put images in page-locked memory, from which copies to a GPU are faster.
    :param cache_bytes: a set of at most so many bytes stays in memory, decoded; None for 256 MiB.
    :param labels: where classes come from, see `cm.data.labels.RULES`.
    :param channels: C, see `cm.data.sources.open_source`; of latents that are drawn, theirs.
    :param shuffle_window: of a stream, how many images are shuffled among each other, see `cm.data.streams`.
    :param num_classes: of a stream, an image with a class that is not less is an error.
    :param source: the set, if it is open already; `data_dir` then only names it.
    """

    seed: int = 0
    rank: int = 0
    world_size: int = 1
    global_batch: int | None = None
    start: int = 0
    num_workers: int | None = None
    pin_memory: bool = False
    cache_bytes: int | None = None
    labels: str = "auto"
    channels: int = 3
    shuffle_window: int = WINDOW
    num_classes: int | None = None
    source: ImageSource | None = None


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    **more: Any,
) -> BatchStream:
    """An endless iterator of this rank's batches, which unpack as `images, cond`.

    `images` is float32 [B,C,S,S], in [-1, 1] unless the set holds latents as floats; `cond` is {"y": int64 [B]} with
    `class_cond`, else empty.

    :param data_dir: what `open_source` or `open_stream` of `cm.data.sources` reads.
    :param batch_size: images per step on this rank. It may exceed the set, which is then repeated within a step.
    :param deterministic: images in the order of the set instead of a new permutation in each epoch.
    :param random_crop: a random square of random size instead of the central one.
    :param random_flip: mirror half of the samples.
    :param more: fields of `LoaderOptions`.
    :raises UserError: if there are no images, classes are asked for and missing, or the batch does not fit the ranks.
    """
    own = LoaderOptions(**more)
    options: dict[str, Any] = {"image_size": image_size, "channels": own.channels}
    if own.source is None and (stream := open_stream(data_dir)):
        options |= {"window": own.shuffle_window, "num_classes": own.num_classes, "shuffle": not deterministic}
        images = StreamedSource(stream, seed=own.seed, **options)
        order = images.order
    else:
        images = own.source or open_source(data_dir, labels=own.labels, latents=True, **options)
        _prepare(images, class_cond, own.cache_bytes, **options)
        order = EpochOrder(len(images), own.seed, shuffle=not deterministic)
    offsets = offsets_of_rank(batch_size, own.rank, own.world_size, own.global_batch)
    requests = Requests(order, offsets, own.global_batch or own.world_size * batch_size, own.start)
    workers = (0 if images.in_memory and not random_crop else 1) if own.num_workers is None else own.num_workers
    samples = Samples(images, class_cond, own.seed, random_crop, random_flip)
    return BatchStream(samples, requests, workers, own.pin_memory)


def _prepare(
    source: ImageSource, class_cond: bool, cache_bytes: int | None, image_size: int, channels: int
) -> None:
    """Prepare a set of images for training: its record of latents, and its cache of decoded images.

    :raises UserError: if classes are requested and missing, or latents have another size or number of channels.
    """
    if source.holds_moments:
        found, side = source.channels // 2, source.image_size
        if (found, side) != (channels, image_size):
            raise UserError(f"{source.data_dir} holds latents of {found} channels and side {side}, and --channels "
                            f"{channels} --image_size {image_size} asks for others")
        source.latents = record_for(source.latents, "", channels, source.data_dir)
    if cache_bytes is not None:
        source.keep_decoded(cache_bytes)
    if class_cond and source.labels is None:
        raise UserError(f"--class_cond needs a class for every image of {source.data_dir}, but {source.no_labels}")


class LoaderSource(Protocol):
    """The source of the images in batches: an `ImageSource`, or a stream."""

    image_size: int
    channels: int
    latents: LatentRecord | None                                    # of means and standard deviations of latents

    @property
    def holds_floats(self) -> bool:
        """Whether its images are floats, which are given to the network unchanged."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether every image stays in memory once it has been read."""
        ...

    def gather(self, indices: np.ndarray) -> None:
        """Prepare the images of a batch, before the other methods are called for them."""
        ...

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Their squares [B,S,S,C], a copy that the caller may change."""
        ...

    def load(self, i: int) -> Image.Image:
        """The complete image i."""
        ...

    def classes(self, indices: np.ndarray) -> np.ndarray:
        """Their classes, int64 [B]."""
        ...


class Samples(Dataset):
    """Complete batches of uint8 (latents: unchanged), so that little data passes through the pipe of a worker.

    If the source has mean and standard deviation of latents, new latents are drawn for each sample.
    """

    def __init__(self, source: LoaderSource, class_cond: bool, seed: int, random_crop: bool, random_flip: bool):
        self.source = source
        self._class_cond = class_cond
        self._seed = seed
        self._random_crop = random_crop
        self._random_flip = random_flip

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> Batch | UserError:
        """Positions and indices -> a batch whose images are still uint8 [B,C,S,S], or latents.

        If an image cannot be read, the error is returned. If a worker raised it, the message would be lost in the
        traceback of the worker.
        """
        positions, indices = request
        try:
            self.source.gather(indices)
            pixels = self._pixels(positions, indices)
            cond = {"y": th.from_numpy(self.source.classes(indices))} if self._class_cond else {}
        except UserError as error:
            return error
        images = th.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        if self.source.latents is not None:
            images = th.from_numpy(drawn(images.numpy(), self.source.latents, self._seed, positions))
        return Batch(images, cond, th.from_numpy(positions), th.from_numpy(indices))

    def _pixels(self, positions: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """[B,S,S,C], cropped and flipped."""
        if self._random_crop:
            pixels = np.stack([self._cropped(p, i) for p, i in zip(positions.tolist(), indices.tolist())])
        else:
            pixels = self.source.images(indices)
        if self._random_flip:
            flipped = stream_seeds(self._seed, "flip", positions) >> np.uint64(63) == 1
            pixels[flipped] = pixels[flipped, :, ::-1]
        return pixels

    def _cropped(self, position: int, i: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=stream_seed(self._seed, "crop", position)))
        size = self.source.image_size
        return random_crop(self.source.load(i), size, rng).reshape(size, size, self.source.channels)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of an image, with a side of 0.8 to 1 times its shorter side, as in guided-diffusion.

    :returns: uint8 [size,size,3], or [size,size] of a grey image.
    """
    shorter = int(rng.integers(size, math.ceil(size / CROP_FRACTION), endpoint=True))
    pixels = np.asarray(resize_shorter_side(image, shorter))
    top = int(rng.integers(pixels.shape[0] - size, endpoint=True))
    left = int(rng.integers(pixels.shape[1] - size, endpoint=True))
    return pixels[top : top + size, left : left + size]


def _prepare_worker(_: int) -> None:
    signals.outlive_the_signal()


class BatchStream:
    """An endless iterator of `Batch`; `source` is its set of images.

    The workers read from one endless sampler, so they live as long as the stream and no epoch starts new ones.
    """

    def __init__(self, samples: Samples, requests: Requests, num_workers: int, pin_memory: bool):
        self.source = samples.source
        self._samples, self._order = samples, requests.order
        self._pin_memory = pin_memory
        loader = DataLoader(
            samples,
            sampler=requests,
            batch_size=None,                                        # a request is a batch already
            num_workers=num_workers,
            generator=th.Generator(),                               # otherwise the loader uses the global stream
            worker_init_fn=_prepare_worker if num_workers else None,
        )
        # torch's handler raises the death of a worker at any line of the program, even inside a collective. With the
        # previous handler, the next missing batch reports it. (The handler of a C library reads as None.)
        handler = signal.getsignal(signal.SIGCHLD)
        self._batches = iter(loader)
        if num_workers and handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        """The next batch, its images float32 [B,C,S,S], pixels in [-1, 1].

        :raises UserError: if an image cannot be read; the message names it, and the stream ends.
        :raises RuntimeError: if a worker died.
        """
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise RuntimeError(
                f"{error}\nA process that reads images died, usually because memory (or /dev/shm in a container) "
                "ran out: use fewer workers, --num_workers 0 for none, or a smaller batch."
            ) from error
        if isinstance(batch, UserError):
            self.close()
            raise batch
        batch.images = self._to_float(batch.images)
        return batch

    def read(self, positions: np.ndarray) -> Batch:
        """The batch of these positions of the run, int64 [B] ascending, read by this process: its images uint8
        [B,C,S,S], or latents.

        :raises UserError: if one cannot be read.
        """
        batch = self._samples[positions, self._order(positions)]
        if isinstance(batch, UserError):
            raise batch
        return batch

    def stored(self, images: Tensor) -> Tensor:
        """Images of a batch as the set holds them: uint8, or latents as they are."""
        return images if self.source.holds_floats else to_bytes(images)

    def close(self) -> None:
        """End the workers; garbage collection would take seconds for each."""
        self._batches = iter(())

    def _to_float(self, pixels: Tensor) -> Tensor:
        """[B,C,S,S] -> float32: uint8 to [-1, 1], v / 127.5 - 1, and latents as they are."""
        images = th.empty(pixels.shape, pin_memory=self._pin_memory).copy_(pixels)
        return images if pixels.is_floating_point() else images.div_(127.5).sub_(1)


def to_bytes(images: Tensor) -> Tensor:
    """The inverse of the conversion of a batch's images: float [B,C,S,S] in [-1, 1] -> uint8 [B,C,S,S]."""
    return images.add(1).mul_(127.5).round_().to(th.uint8)
