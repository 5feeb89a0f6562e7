"""Sample images on all ranks: exactly as many as requested. An image depends only on the seed and its own index."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch import nn

from cm.data.class_names import CLASS_NAMES, ClassNames
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate.finite import NonFiniteCount, finite_images
from cm.generate.npz import NpzWriter, to_array, type_of
from cm.generate.png import PngFolder, PngWriter
from cm.generate.vae import Decoder
from cm.io.progress import progress
from cm.networks.held import weights_held
from cm.random_util import get_generator, labels_for
from cm.samplers.sample import BindsNetworks, SampleOptions, sample
from cm.types import NoiseSource

SHOWN = 64                                      # images in a grid
MOST_SEEDS = 10**8                              # of one command; more numbers would not fit into memory


@dataclass(frozen=True)
class SamplingPlan:
    """The images to draw; `cm.config.sampling_schema.SampleConfig` explains the fields."""

    num_samples: int
    batch_size: int
    image_size: int
    seed: int
    num_classes: int | None                     # None: unconditional
    classes: tuple[int, ...] = ()               # each sample has a random class of these; empty: of all
    generator: str = "determ"
    seeds: tuple[int, ...] = ()                 # sample indices to draw, num_samples of them; empty: 0, 1, 2, ...
    rounding: str = "truncate"
    allow_non_finite: bool = False
    channels: int = 3
    class_names: ClassNames = ()                # of all the network's classes; empty where they are not known
    decoder: Decoder | None = None              # makes pictures of the latents that are drawn; None: they stay latents

    @property
    def side(self) -> int:
        """The side of the result in pixels."""
        return self.image_size if self.decoder is None else self.decoder.side(self.image_size)

    @property
    def result_channels(self) -> int:
        """Channels of the result."""
        return self.channels if self.decoder is None else self.decoder.channels

    def indices(self, rows: np.ndarray) -> np.ndarray:
        """The sample indices of these rows of the result."""
        return np.asarray(self.seeds, np.int64)[rows] if self.seeds else rows


@dataclass(frozen=True)
class RankSamples:
    """The images of n sample indices that one rank has made."""

    images: dict[str, np.ndarray]               # by kind, [n,H,W,C] uint8, or latents as float32
    labels: np.ndarray | None                   # [n]
    evaluations: int                            # network evaluations per image (NFE)
    finite: NDArray[np.bool_]                   # [n], False where a pixel was NaN or infinite


class Drawn(NamedTuple):
    """Images of n sample indices."""

    images: np.ndarray                          # [n,H,W,C] uint8, or latents as float32
    evaluations: int                            # network evaluations per image (NFE)
    finite: NDArray[np.bool_]                   # [n], False where a pixel was NaN or infinite


@dataclass(frozen=True)
class SamplingResult:
    """The result of sampling to npz files."""

    paths: dict[str, str]                       # of the npz of each kind, on rank 0
    first_images: dict[str, np.ndarray]         # the first of each, [<=64,H,W,C], on rank 0: to look at
    evaluations: int                            # network evaluations per image (NFE)
    seconds: float


@dataclass(frozen=True)
class PngResult:
    """The result of sampling to a folder of PNGs."""

    drawn: int                                  # images of this run
    there: int                                  # images of earlier runs
    evaluations: int                            # network evaluations per image (NFE) on this rank; 0 if it drew none
    seconds: float


def rank_batches(plan: SamplingPlan, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """The rows of the result that this rank makes, one array per round.

    All ranks have the same number of rounds; in the last round, some may have no rows.
    """
    per_round = plan.batch_size * world_size
    for first in range(0, plan.num_samples, per_round):
        start = first + rank * plan.batch_size
        yield np.arange(start, max(start, min(start + plan.batch_size, plan.num_samples)))


def parse_seeds(seeds: str) -> tuple[int, ...]:
    """'0-3,100' -> (0, 1, 2, 3, 100), in this order; () when empty.

    :raises UserError: if a part is neither a number nor a rising range, a seed is named twice, or there are too many.
    """
    found: list[int] = []
    count = 0
    for part in seeds.split(",") if seeds.strip() else []:
        match = re.fullmatch(r"(\d{1,30})(?:-(\d{1,30}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds {seeds!r}: {part.strip()!r} is neither a number nor a rising range such as 0-63")
        listed = range(int(match[1]), int(match[2] or match[1]) + 1)
        count += listed.stop - listed.start
        if count > MOST_SEEDS:
            raise UserError(f"--seeds {seeds!r} lists {count:,} images; the most for one command are {MOST_SEEDS:,}")
        found += listed
    if twice := [seed for seed, times in Counter(found).items() if times > 1]:
        raise UserError(f"--seeds {seeds!r} names {twice[0]} twice")
    return tuple(found)


def labels_of(indices: np.ndarray, plan: SamplingPlan) -> np.ndarray | None:
    """The classes [n] of these samples, drawn at random from those of the plan; None if the network has no classes."""
    if plan.num_classes is None:
        return None
    drawn = np.asarray(labels_for(indices, plan.seed, len(plan.classes) or plan.num_classes), np.int64)
    return np.asarray(plan.classes, np.int64)[drawn] if plan.classes else drawn


def captions_of(rows: np.ndarray, plan: SamplingPlan) -> list[str]:
    """The names of the classes of these rows of the result; empty without classes or without names."""
    labels = labels_of(plan.indices(rows), plan) if plan.class_names else None
    if labels is None:
        return []
    return [plan.class_names[label] if label < len(plan.class_names) else str(label) for label in labels]


class ConvertsToFp16(Protocol):
    """A network that can be converted in place."""

    def convert_to_fp16(self) -> None:
        """Let the network compute in float16."""
        ...


def at_precision(model: nn.Module, precision: str) -> AbstractContextManager:
    """The context in which a float32 model samples in fp32, bf16 or fp16."""
    if precision == "fp16":
        cast(ConvertsToFp16, model).convert_to_fp16()
    if precision == "bf16":
        return th.autocast(next(model.parameters()).device.type, dtype=th.bfloat16)
    return nullcontext()


@th.inference_mode()
def draw(
    model: nn.Module, diffusion: BindsNetworks, plan: SamplingPlan, indices: np.ndarray, labels: np.ndarray | None,
    options: SampleOptions,
) -> Drawn:
    """Images of these indices."""
    if len(indices) == 0:
        return Drawn(no_images(plan), 0, np.ones(0, bool))
    size = plan.image_size
    result = sample(
        diffusion, model, (len(indices), plan.channels, size, size), options, model_kwargs=condition(labels),
        device=dist.dev(), generator=noise_of(indices, plan),
    )
    images = result.images if plan.decoder is None else plan.decoder(result.images)
    pixels = to_array(images, nearest=plan.rounding == "nearest")
    return Drawn(pixels, result.evaluations, finite_images(result.images))


def draw_batches(
    model: nn.Module, diffusion: BindsNetworks, plan: SamplingPlan, precision: str, options: SampleOptions, title: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's part of the plan: pairs of rows [n] of the result and their images [n,H,W,C], n >= 0.

    All ranks must iterate together; they have the same number of pairs.

    :param title: title of the progress bar.
    :raises UserError: on every rank, after the last pair, if an image is not finite and the plan does not allow it.
    """
    non_finite = NonFiniteCount(plan.allow_non_finite)
    shares = list(rank_batches(plan, dist.get_rank(), dist.get_world_size()))
    for rows in progress(shares, title, unit="batch", shown=dist.is_main(), leave=False):
        with at_precision(model, precision):                # closed before the caller computes with the images
            drawn = draw(model, diffusion, plan, rows, labels_of(rows, plan), options)
        non_finite.add(drawn.finite)
        yield rows, drawn.images
    non_finite.check()
    non_finite.warn()


def no_images(plan: SamplingPlan) -> np.ndarray:
    """An empty array of images [0,H,W,C], for a rank without rows."""
    return np.zeros((0, plan.side, plan.side, plan.result_channels), type_of(plan.result_channels))


def noise_of(indices: np.ndarray, plan: SamplingPlan) -> NoiseSource:
    """The random streams of these samples."""
    return get_generator(plan.generator, plan.num_samples, plan.seed).for_samples(th.as_tensor(indices))


def condition(labels: np.ndarray | None) -> dict[str, th.Tensor]:
    """The network's keyword arguments for these classes."""
    return {} if labels is None else {"y": th.as_tensor(labels, device=dist.dev())}


def sample_to_npz(
    model: nn.Module, diffusion: BindsNetworks, plan: SamplingPlan, directory: str, precision: str,
    options: SampleOptions,
) -> SamplingResult:
    """Draw the plan on all ranks, into an npz in `directory`.

    :raises UserError: for the reasons of `collect_to_npz`.
    """

    def make(indices: np.ndarray) -> RankSamples:
        labels = labels_of(indices, plan)
        drawn = draw(model, diffusion, plan, indices, labels, options)
        return RankSamples({"samples": drawn.images}, labels, drawn.evaluations, drawn.finite)

    with th.no_grad(), at_precision(model, precision), weights_held(model):
        return collect_to_npz(make, plan, directory)


def collect_to_npz(
    make: Callable[[np.ndarray], RankSamples], plan: SamplingPlan, directory: str, kinds: Sequence[str] = ("samples",)
) -> SamplingResult:
    """Make the images of the plan on all ranks, and write them to npz files in `directory`, on rank 0.

    Rank 0 writes each round when it is complete; the other ranks only keep their own part.

    :param make: sample indices [n], n >= 0 -> images of these `kinds`.
    :raises UserError: on every rank, if an image is not finite and the plan does not allow it; then no npz is written.
    """
    main, start, evaluations = dist.is_main(), time.monotonic(), 0
    non_finite = NonFiniteCount(plan.allow_non_finite)
    writers = _open_writers(plan, directory, kinds) if main else {}
    bar = progress(title="sampling", total=plan.num_samples, unit="image", shown=main)
    with bar:
        for own in rank_batches(plan, dist.get_rank(), dist.get_world_size()):
            drawn = make(plan.indices(own))
            non_finite.add(drawn.finite)
            non_finite.check()
            evaluations = max(evaluations, drawn.evaluations)
            rows, labels = gather_rows(own), gather_rows(drawn.labels)
            for kind in kinds:
                images = gather_rows(drawn.images[kind])
                if rows is not None and images is not None:         # on rank 0
                    writers[kind].put(rows, images, labels)
            bar.update(0 if rows is None else len(rows))
    non_finite.warn()
    first_images = {kind: writer.images[:SHOWN].copy() for kind, writer in writers.items()}
    extra = {"seeds": np.asarray(plan.seeds, np.int64)} if plan.seeds else {}
    if plan.num_classes is not None and plan.class_names:
        extra[CLASS_NAMES] = np.asarray(plan.class_names)
    paths = {kind: writer.close(**extra) for kind, writer in writers.items()}
    return SamplingResult(paths, first_images, evaluations, time.monotonic() - start)


def sample_to_pngs(
    model: nn.Module, diffusion: BindsNetworks, plan: SamplingPlan, folder: PngFolder, precision: str,
    options: SampleOptions,
) -> PngResult:
    """Draw the images of the plan's seeds that are not in the folder yet; each rank writes its own images.

    Every batch has the full size; the last one is padded with its last seed. So with the same batch size, the image of
    a seed has the same bits for any other seeds in the plan.

    :raises UserError: on every rank, if an image of a round is not finite and the plan does not allow it; then no
        image of this round is written.
    """
    seeds = plan.indices(np.arange(plan.num_samples)).tolist()
    missing = tuple(dist.on_main(folder.missing, seeds))
    rest = replace(plan, num_samples=len(missing), seeds=missing)
    main, start, evaluations = dist.is_main(), time.monotonic(), 0
    per_round, non_finite = plan.batch_size * dist.get_world_size(), NonFiniteCount(plan.allow_non_finite)
    there = len(seeds) - len(missing)
    bar = progress(title="sampling", total=len(seeds), initial=there, unit="image", shown=main)
    with th.no_grad(), at_precision(model, precision), weights_held(model), PngWriter(folder) as writer, bar:
        for done, rows in enumerate(rank_batches(rest, dist.get_rank(), dist.get_world_size())):
            own, images = rest.indices(rows), no_images(rest)
            if len(own):
                filled = np.pad(own, (0, plan.batch_size - len(own)), mode="edge")
                images, evaluations, finite = draw(model, diffusion, rest, filled, labels_of(filled, rest), options)
                non_finite.add(finite[: len(own)])
            non_finite.check()
            writer.put(own.tolist(), images[: len(own)])
            bar.update(min(per_round, len(missing) - done * per_round))
    dist.barrier()
    dist.on_main(folder.write_labels, lambda seeds: labels_of(seeds, plan), plan.class_names)
    non_finite.warn()
    return PngResult(len(missing), there, evaluations, time.monotonic() - start)


def _open_writers(plan: SamplingPlan, directory: str, kinds: Sequence[str]) -> dict[str, NpzWriter]:
    """An open npz for each kind of image."""
    size, with_labels, channels = plan.side, plan.num_classes is not None, plan.result_channels
    return {
        kind: NpzWriter(directory, plan.num_samples, size, size, with_labels, kind, channels=channels)
        for kind in kinds
    }


def gather_rows(rows: np.ndarray | None) -> np.ndarray | None:
    """The rows of all ranks on rank 0; None on the others, and if there are no rows."""
    parts = None if rows is None else dist.gather_to_main(rows)
    return None if parts is None else np.concatenate(parts)
