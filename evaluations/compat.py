"""The classes of guided-diffusion's evaluator and of openai/consistency_models' th_evaluator, in front of this package.

`evaluations.evaluator` and `evaluations.th_evaluator` hand these names on. The numbers are this package's: features
come from an extractor that looks at uint8 images as they would be saved, distances and scores from
`evaluations.metrics`. There is no TensorFlow session and no CLIP.

Shapes: N images, B of a batch, H and W height and width, D pooled features, S spatial features.
"""

from __future__ import annotations

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import torch as th
import torch.distributed
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import untrusted
from cm.io.budget import open_regular
from cm.io.progress import progress
from evaluations.defaults import BATCH_SIZE, SPLIT_SIZE
from evaluations.engine.readers import BatchFile
from evaluations.features import Extractor, InceptionExtractor, load_extractor
from evaluations.features.inception_files import GRAPH
from evaluations.metrics.frechet import frechet_distance
from evaluations.metrics.inception_score import inception_score
from evaluations.metrics.precision_recall import precision_recall

__all__ = [
    "BatchIterator", "Evaluator", "FIDAndIS", "FIDStatistics", "INCEPTION_V3_PATH", "INCEPTION_V3_URL",
    "InvalidFIDException", "MemoryNpzArrayReader", "NpzArrayReader", "StreamingNpzArrayReader", "all_gather",
    "open_npz_array",
]

INCEPTION_V3_PATH, INCEPTION_V3_URL = GRAPH.name, GRAPH.url
TOLERANCE = 1e-4                                            # of a grey level, for the rounding of float32
SUFFIXES = ("", "_s", "_clip")                              # of mu and sigma: pooled, spatial, CLIP's features

Activations = NDArray[np.floating]                          # [N,D]


class InvalidFIDException(Exception):
    """A distance that cannot be computed; never raised here, where no matrix root turns complex."""


class FIDStatistics:
    """A Gaussian of features.

    :param mu: [D].
    :param sigma: [D,D].
    :param resolution: kept, and without effect.
    """

    def __init__(self, mu: Activations, sigma: Activations, resolution: int = -1):
        self.mu, self.sigma, self.resolution = mu, sigma, resolution

    def frechet_distance(self, other: FIDStatistics, eps: float = 1e-6) -> float:
        """Squared Frechet distance from another Gaussian of the same features.

        :param eps: without effect: singular covariances need no help, see `evaluations.metrics.frechet`.
        :raises ValueError: if dimensions differ or values are not finite.
        """
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma)


def statistics_of(activations: Activations, resolution: int = -1) -> FIDStatistics:
    """Mean and covariance of features [N,D], with N at least 2, in float64."""
    points = np.asarray(activations, np.float64)
    return FIDStatistics(points.mean(0), np.cov(points, rowvar=False), resolution)


def score_of(extractor: Extractor, activations: Activations, split_size: int, batch_size: int) -> float:
    """The Inception Score of pooled features [N,2048].

    :raises UserError: if the extractor is not Inception on PyTorch, whose last layer this needs.
    """
    if not isinstance(extractor, InceptionExtractor):
        raise UserError(f"an Inception Score of features needs the last layer of Inception-v3, and {extractor.name} "
                        "has none to give; name a file of Inception's weights by CM_INCEPTION, or compute the score "
                        "from images with evaluations/evaluator.py")
    weight = extractor.network.output.weight.detach()
    logits = [
        (th.from_numpy(np.ascontiguousarray(activations[i : i + batch_size])).to(weight) @ weight.T).cpu().numpy()
        for i in range(0, len(activations), batch_size)
    ]
    return inception_score(np.concatenate(logits), split_size)


# --- guided-diffusion's evaluator ------------------------------------------------------------------------------------


class Evaluator:
    """Statistics and metrics of npz files.

    :param session: an extractor; anything else, such as a session of TensorFlow, stands for the one that $CM_INCEPTION
        names, or else Inception.
    :param batch_size: images per pass.
    :param softmax_batch_size: features per pass of the Inception Score.
    """

    def __init__(self, session: Any, batch_size: int = BATCH_SIZE, softmax_batch_size: int = 512):
        self.extractor = session if hasattr(session, "extract") else load_extractor(None, dist.dev())
        self.batch_size, self.softmax_batch_size = batch_size, softmax_batch_size

    def warmup(self) -> None:
        """Make the first pass, which is slower than others, with a blank image."""
        self.compute_activations([np.zeros((1, 64, 64, 3), np.uint8)])

    def read_activations(self, npz_path: str) -> tuple[Activations, Activations]:
        """Pooled [N,D] and spatial [N,S] features of the images (arr_0) of a file.

        :raises UserError: if the file cannot be used.
        """
        return self.compute_activations(BatchFile(npz_path).batches(self.batch_size))

    def compute_activations(self, batches: Iterable[NDArray[Any]]) -> tuple[Activations, Activations]:
        """Pooled [N,D] and spatial [N,S] features of batches [B,H,W,3], values 0 to 255.

        :raises UserError: if the extractor has no spatial features.
        """
        pooled, spatial = [], []
        for batch in batches:
            features = self.extractor.extract(np.asarray(batch).astype(np.uint8))
            if features.spatial is None:
                raise UserError(f"the extractor {self.extractor.name} gives no spatial features; choose Inception")
            pooled.append(features.pool)
            spatial.append(features.spatial)
        return np.concatenate(pooled), np.concatenate(spatial)

    def read_statistics(
        self, npz_path: str, activations: Sequence[Activations]
    ) -> tuple[FIDStatistics, FIDStatistics]:
        """Pooled and spatial statistics that a file stores, else those of the activations of its images."""
        stored = stored_statistics(npz_path)
        if stored[0] is not None and stored[1] is not None:
            return stored[0], stored[1]
        return self.compute_statistics(activations[0]), self.compute_statistics(activations[1])

    def compute_statistics(self, activations: Activations) -> FIDStatistics:
        """Mean and covariance of features [N,D]."""
        return statistics_of(activations)

    def compute_inception_score(self, activations: Activations, split_size: int = SPLIT_SIZE) -> float:
        """The Inception Score of pooled features [N,2048], a mean over chunks of `split_size`."""
        return score_of(self.extractor, activations, split_size, self.softmax_batch_size)

    def compute_prec_recall(self, activations_ref: Activations, activations_sample: Activations) -> tuple[float, float]:
        """Precision and recall of samples [N,D] against a reference [M,D], by three neighbours."""
        found = precision_recall(activations_ref, activations_sample)
        return found.precision, found.recall


def stored_statistics(npz_path: str) -> tuple[FIDStatistics | None, FIDStatistics | None, FIDStatistics | None]:
    """Pooled, spatial and CLIP's statistics of a file, None for those that it does not store."""
    file = BatchFile(npz_path)
    pooled, spatial, clip = (
        None if found is None else FIDStatistics(found.mu, found.sigma) for found in map(file.statistics, SUFFIXES)
    )
    return pooled, spatial, clip


# --- arrays of an npz, in batches ------------------------------------------------------------------------------------


class BatchIterator:
    """An iterator with a length.

    :param gen_fn: makes the iterator.
    :param length: how many batches come.
    """

    def __init__(self, gen_fn: Callable[[], Iterator[NDArray[Any]]], length: int):
        self.gen_fn, self.length = gen_fn, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return self.gen_fn()


class NpzArrayReader(ABC):
    """An array that is read in batches along its first axis, once."""

    @abstractmethod
    def read_batch(self, batch_size: int) -> NDArray[Any] | None:
        """The next rows, fewer at the end; None after it."""

    @abstractmethod
    def remaining(self) -> int:
        """How many rows are left."""

    def read_batches(self, batch_size: int) -> BatchIterator:
        """All that is left, in batches."""

        def batches() -> Iterator[NDArray[Any]]:
            while (batch := self.read_batch(batch_size)) is not None:
                yield batch

        return BatchIterator(batches, -(-self.remaining() // batch_size))


class StreamingNpzArrayReader(NpzArrayReader):
    """Rows from an open file that stands at the first value of an array in C order."""

    def __init__(self, arr_f: IO[bytes], shape: Sequence[int], dtype: DTypeLike):
        self.arr_f, self.shape, self.dtype, self.idx = arr_f, tuple(shape), np.dtype(dtype), 0

    def read_batch(self, batch_size: int) -> NDArray[Any] | None:
        rows = min(batch_size, self.remaining())
        if rows == 0:
            return None
        self.idx += rows
        size = rows * math.prod(self.shape[1:]) * self.dtype.itemsize
        data = np.empty(size, np.uint8)
        untrusted.read_into(self.arr_f, data)
        return data.view(self.dtype).reshape(rows, *self.shape[1:])

    def remaining(self) -> int:
        return self.shape[0] - self.idx


class MemoryNpzArrayReader(NpzArrayReader):
    """Rows of an array in memory."""

    def __init__(self, arr: NDArray[Any]):
        self.arr, self.idx = arr, 0

    @classmethod
    def load(cls, path: str | os.PathLike[str], arr_name: str) -> MemoryNpzArrayReader:
        """The array `arr_name` of an npz file."""
        with open_regular(path) as file, untrusted.open_zip(file) as archive:
            return cls(untrusted.read_member_array(archive, arr_name))

    def read_batch(self, batch_size: int) -> NDArray[Any] | None:
        if self.remaining() == 0:
            return None
        rows = self.arr[self.idx : self.idx + batch_size]
        self.idx += len(rows)
        return rows

    def remaining(self) -> int:
        return len(self.arr) - self.idx


@contextlib.contextmanager
def open_npz_array(path: str | os.PathLike[str], arr_name: str) -> Iterator[NpzArrayReader]:
    """A reader of the array `arr_name` of an npz file, which is streamed where its rows lie one after the other.

    :raises UserError: if the file is no npz, or has no such array.
    """
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(open_regular(path))
            archive = opened.enter_context(untrusted.open_zip(file))
            member, size = opened.enter_context(untrusted.open_member(archive, f"{arr_name}.npy"))
            header = untrusted.read_header(member, size)
            in_memory = header.fortran_order or header.dtype.hasobject
            reader = (
                MemoryNpzArrayReader.load(path, arr_name) if in_memory
                else StreamingNpzArrayReader(member, header.shape, header.dtype)
            )
        except untrusted.DAMAGE as error:
            raise UserError(f"{os.fspath(path)}: the array {arr_name} cannot be read ({error}); write the file with "
                            "np.savez, or look for the name among its keys") from None
        yield reader


# --- consistency_models' th_evaluator --------------------------------------------------------------------------------


def all_gather(x: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all ranks, of one shape, joined along an axis. All ranks must call it together."""
    if not torch.distributed.is_initialized():
        return x
    parts = [th.zeros_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return th.cat(parts, dim=dim)


class FIDAndIS:
    """FID and Inception Score of images from a model, on all ranks; all ranks must call the constructor together.

    What the original returns for CLIP's features is None here, or an array without columns. Images are rounded down to
    uint8 first, as the scripts save them; a value within TOLERANCE of the next level counts as that level, so that the
    images of a data set stay what they are.

    :param softmax_batch_size: features per pass of the Inception Score.
    :param clip_score_batch_size: without effect.
    :param path: a file of Inception's weights, or what else `load_extractor` takes; None, and an address, stand
        for the extractor that $CM_INCEPTION names, or else Inception's published weights.
    :param trusted: see `load_extractor`.
    :raises UserError: if the weights cannot be had.
    """

    def __init__(self, softmax_batch_size: int = 512, clip_score_batch_size: int = 512, path: str | None = None,
                 trusted: bool = False):
        self.softmax_batch_size, self.clip_score_batch_size = softmax_batch_size, clip_score_batch_size
        self.extractor = load_extractor(None if path is None or "://" in path else path, dist.dev(),
                                        trusted=trusted)
        self.ref_features: dict[str, tuple[FIDStatistics | None, ...]] = {}

    def get_statistics(self, activations: Activations, resolution: int) -> FIDStatistics:
        """Mean and covariance of features [N,D]; the resolution is kept beside them."""
        return statistics_of(activations, resolution)

    def get_preds(
        self, batch: Tensor, captions: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor | None, None, None, NDArray[np.uint8]]:
        """Features of this rank's images: (pooled [B,D], spatial [B,S] or None, None, None, the images [B,H,W,3]).

        :param batch: [B,3,H,W] in [-1, 1].
        :param captions: must be None: there is no CLIP.
        """
        if captions is not None:
            raise UserError("captions are compared by CLIP, which this toolkit does not have: leave captions out")
        levels = ((batch + 1) * 127.5 + TOLERANCE).clamp(0, 255).to(th.uint8)
        images = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        features = self.extractor.extract(images)
        spatial = None if features.spatial is None else th.from_numpy(features.spatial).to(batch.device)
        return th.from_numpy(features.pool).to(batch.device), spatial, None, None, images

    def get_inception_score(self, activations: Activations, split_size: int = SPLIT_SIZE) -> float:
        """The Inception Score of pooled features [N,2048], a mean over chunks of `split_size`."""
        return score_of(self.extractor, activations, split_size, self.softmax_batch_size)

    def get_activations(
        self, data: Iterator[Any], num_samples: int, global_batch_size: int, pr_samples: int = 50_000
    ) -> tuple[Any, Any, Any, Any]:
        """Features of images from all ranks. All ranks must call it together.

        :param data: this rank's batches, tuples that begin with images [B,3,H,W] in [-1, 1]; B is the same everywhere.
        :param num_samples: how many features are returned.
        :param global_batch_size: images of a batch on all ranks together.
        :param pr_samples: how many images are returned.
        :returns: on rank 0 (pooled [N,D], spatial [N,S], [N,0], its images [M,H,W,3]); else four empty lists.
        """
        pooled, spatial, images = [], [], []
        for _ in progress(range(math.ceil(num_samples / global_batch_size)), "features", shown=dist.is_main()):
            batch, *_ = next(data)
            pool, places, _, _, pixels = self.get_preds(batch)
            places = pool[:, :0] if places is None else places
            pooled.append(all_gather(pool).cpu().numpy())
            spatial.append(all_gather(places).cpu().numpy())
            if len(images) * len(pixels) < pr_samples:
                images.append(pixels)
        if not dist.is_main():
            return [], [], [], []
        points = np.concatenate(pooled)[:num_samples]
        return points, np.concatenate(spatial)[:num_samples], points[:, :0], np.concatenate(images)[:pr_samples]

    def get_virtual_batch(
        self, data: Iterator[Any], num_samples: int, global_batch_size: int, resolution: int
    ) -> tuple[NDArray[np.uint8] | None, Mapping[str, Activations]]:
        """Images and statistics of a reference file, mu, sigma, mu_s and sigma_s; None and {} except on rank 0."""
        pooled, spatial, _, images = self.get_activations(data, num_samples, global_batch_size, pr_samples=10_000)
        if not dist.is_main():
            return None, {}
        found = {"": self.get_statistics(pooled, resolution), "_s": self.get_statistics(spatial, resolution)}
        named = {f"mu{suffix}": each.mu for suffix, each in found.items()}
        return images, named | {f"sigma{suffix}": each.sigma for suffix, each in found.items()}

    def set_ref_batch(self, ref_batch: str) -> None:
        """Read the statistics of a reference file.

        :raises UserError: if it cannot be used, or stores no statistics.
        """
        found = stored_statistics(ref_batch)
        if found[0] is None:
            raise UserError(f"{ref_batch} stores no statistics (mu, sigma); make them with `fid.py ref`, or compare "
                            "images with evaluations.th_evaluator.ThEvaluator")
        self.ref_features[ref_batch] = found

    def get_ref_batch(self, ref_batch: str) -> tuple[FIDStatistics | None, ...]:
        """(pooled, spatial, CLIP's) statistics of a file that `set_ref_batch` has read; None for those it lacks."""
        return self.ref_features[ref_batch]
