"""Image batches in npz files, as the samplers write them and as reference batches are published.

arr_0           images [N,H,W,3] uint8, or grey [N,H,W,1], which every extractor sees as RGB
arr_1           class labels [N], integers
class_names     names of the classes, whose places are the labels
mu, sigma       mean and covariance of pooled features; mu_s, sigma_s of spatial features
extractor       identity of the network that mu, sigma come from (published files have none)
num_images      how many images mu, sigma come from (published files have none)
image_size      height and width in pixels of the images that mu, sigma come from (published files have none)
resize          the extractor's resize rule at that time (published files have none)

A file holds images, statistics, or both. Images are streamed out of the zip member, never loaded all at once.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cm.data.class_names import CLASS_NAMES, ClassNames, checked
from cm.errors import UserError
from cm.io import untrusted
from cm.io.budget import open_regular
from cm.io.untrusted import DAMAGE, Header
from evaluations.metrics.arrays import Array

LARGEST_FEATURE = 1e30                                      # squares and sums of them stay far from overflow
ROUNDING = 1e-4                                             # of the largest value

Scalar = TypeVar("Scalar", str, int)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance as stored in a file."""

    mu: Array                                               # [D]
    sigma: Array                                            # [D,D]
    extractor: str | None = None
    num_images: int | None = None
    image_size: tuple[int, int] | None = None               # height and width of the images
    resize: str | None = None                               # what the extractor did to them first

    def arrays(self, suffix: str = "") -> dict[str, NDArray[Any]]:
        """The arrays of a file, by key; what is not known is left out."""
        known = {"extractor": self.extractor, "num_images": self.num_images, "image_size": self.image_size,
                 "resize": self.resize}
        return {f"mu{suffix}": self.mu, f"sigma{suffix}": self.sigma} | {
            key: np.asarray(value) for key, value in known.items() if value is not None
        }


class BatchFile:
    """An npz of images, statistics or both, opened without reading its arrays.

    :raises UserError: if the file is missing or is no npz, or holds neither images nor statistics, or its images are
        not uint8 NHWC with three channels or one.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self.keys = self._list_keys()
        if "arr_0" not in self.keys and "mu" not in self.keys:
            found = ", ".join(self.keys) or "nothing"
            raise UserError(f"{self.path} has neither images (arr_0) nor statistics (mu, sigma); it has: {found}")
        self.image_shape = self._check_images() if "arr_0" in self.keys else None       # (N, H, W, 1 or 3)

    def __len__(self) -> int:
        """Number of images; 0 for statistics alone."""
        return self.image_shape[0] if self.image_shape else 0

    @property
    def has_images(self) -> bool:
        """Whether it has arr_0."""
        return self.image_shape is not None

    def check_has_images(self) -> None:
        """:raises UserError: for statistics alone."""
        if not self.has_images:
            raise UserError(f"{self.path} holds only statistics, no images (arr_0)")

    def batches(self, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """The images in file order as uint8 [B,H,W,3], grey ones repeated; the last batch may be short.

        :raises UserError: if there are no images, or the file is damaged.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.check_has_images()
        yield from map(as_rgb, self._slice(batch_size) if self._fortran_order else self._stream(batch_size))

    def labels(self) -> NDArray[np.int64] | None:
        """Class labels [N], or None.

        :raises UserError: if they are not one integer per image.
        """
        if "arr_1" not in self.keys:
            return None
        labels = self._load("arr_1")
        if labels.dtype.kind not in "iu" or labels.shape != (len(self),) or labels.max() > np.iinfo(np.int64).max:
            raise UserError(
                f"{self.path}: labels (arr_1) must be {len(self)} integers, one per image, "
                f"not {labels.dtype} of shape {labels.shape}"
            )
        return labels.astype(np.int64)

    def class_names(self) -> ClassNames:
        """The names of the classes; none where they are not known.

        :raises UserError: if they are no list of different names, or fewer than the labels need.
        """
        if CLASS_NAMES not in self.keys:
            return ()
        labels = self.labels()
        try:
            return checked(self._load(CLASS_NAMES).tolist(), 0 if labels is None else int(labels.max()) + 1)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}; write the file again, or leave class_names out") from None

    def statistics(self, suffix: str = "") -> Statistics | None:
        """Stored statistics of pooled features, or with suffix "_s" of spatial features, or None.

        :raises UserError: if one of the two arrays is missing, or their shapes or values are unusable.
        """
        mu_key, sigma_key = f"mu{suffix}", f"sigma{suffix}"
        present = [key for key in (mu_key, sigma_key) if key in self.keys]
        if not present:
            return None
        if len(present) == 1:
            raise UserError(f"{self.path} has {present[0]}, but statistics need both {mu_key} and {sigma_key}")
        mu, sigma = self._load(mu_key), self._load(sigma_key)
        if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(
                f"{self.path}: {mu_key} must be floats [D] and {sigma_key} floats [D,D], "
                f"not {mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{self.path}: {mu_key} or {sigma_key} is not finite; make the statistics again")
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        if problem := why_no_covariance(mu, sigma):
            raise UserError(f"{self.path}: {mu_key} and {sigma_key} are no mean and covariance ({problem}); make the "
                            "statistics again")
        return Statistics(mu, sigma, self._scalar("extractor", str),
                          self._scalar("num_images", int), self._image_size(), self._scalar("resize", str))

    # --- inside ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with open_regular(self.path) as file, untrusted.open_zip(file) as archive:
            yield archive

    def _list_keys(self) -> tuple[str, ...]:
        if not os.path.exists(self.path):
            raise UserError(f"{self.path} does not exist")
        try:
            with self._archive() as archive:
                return tuple(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))
        except DAMAGE as error:
            raise UserError(
                f"{self.path} is not an npz file ({error}); write one with np.savez(path, images)"
            ) from None

    @contextlib.contextmanager
    def _open_images(self) -> Iterator[tuple[Header, IO[bytes]]]:
        """The header of arr_0, and its values as a stream."""
        try:
            with self._archive() as archive, untrusted.open_member(archive, "arr_0.npy") as (member, size):
                yield read_header(member, size, self.path), member
        except DAMAGE as error:
            raise UserError(f"{self.path}: the images (arr_0) are damaged ({error}); write the file again") from None

    def _check_images(self) -> tuple[int, int, int, int]:
        with self._open_images() as (header, member):
            sample = first_values(header, member)
        check_images(header, self.path, sample)             # outside: its UserError is no damage of the archive
        self._fortran_order = header.fortran_order
        count, height, width, channels = header.shape
        return count, height, width, channels

    def _stream(self, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        assert self.image_shape is not None
        with self._open_images() as (_, member):
            for start in range(0, len(self), batch_size):
                batch = np.empty((min(batch_size, len(self) - start), *self.image_shape[1:]), np.uint8)
                untrusted.read_into(member, batch)
                yield batch

    def _slice(self, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        images = self._load("arr_0")                        # in Fortran order an image's bytes lie all over the file
        for start in range(0, len(self), batch_size):
            yield np.ascontiguousarray(images[start : start + batch_size])

    def _load(self, key: str) -> NDArray[Any]:
        try:
            with self._archive() as archive:
                return untrusted.read_member_array(archive, key)
        except DAMAGE as error:
            raise UserError(f"{self.path}: {key} cannot be read: {error}") from None

    def _image_size(self) -> tuple[int, int] | None:
        if "image_size" not in self.keys:
            return None
        value = self._load("image_size")
        if value.dtype.kind not in "iu" or value.shape != (2,):
            raise UserError(f"{self.path}: image_size must be two integers, not {value.dtype} {value.shape}")
        return int(value[0]), int(value[1])

    def _scalar(self, key: str, kind: type[Scalar]) -> Scalar | None:
        if key not in self.keys:
            return None
        value = self._load(key)
        try:
            return kind(value.item())
        except (ValueError, OverflowError):
            found = f"{value.dtype} {value.shape}"
            raise UserError(f"{self.path}: {key} must be one {kind.__name__}, not {found}") from None


def as_rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[B,H,W,3] as they are, grey ones [B,H,W,1] repeated: what an extractor sees."""
    return images.repeat(3, axis=3) if images.shape[3] == 1 else images


def why_no_covariance(mu: Array, sigma: Array) -> str:
    """What shows that mu [D] and sigma [D,D] are of no features; empty if nothing does.

    Rounding of single precision is allowed for. The bound on a covariance by the variances is Cauchy and Schwarz's.
    """
    if max(np.abs(mu).max(initial=0), np.sqrt(np.abs(sigma).max(initial=0))) > LARGEST_FEATURE:
        return f"values beyond {LARGEST_FEATURE:g}"
    rounding = ROUNDING * np.abs(sigma).max(initial=0)
    variances = sigma.diagonal()
    if variances.min(initial=0) < -rounding:
        return f"a variance is {variances.min():.3g}"
    if np.abs(sigma - sigma.T).max(initial=0) > rounding:
        return "the covariance is not symmetric"
    deviations = np.sqrt(variances.clip(min=0))
    if (np.abs(sigma) - np.outer(deviations, deviations)).max(initial=0) > rounding:
        return "a covariance is larger than its two variances allow"
    return ""


def read_header(member: IO[bytes], size: int, path: str) -> Header:
    """Read the npy header at the front of a stream of `size` bytes, and leave the stream at the first value."""
    try:
        return untrusted.read_header(member, size)
    except ValueError as error:
        raise UserError(f"{path}: arr_0 has no readable npy header ({error}); write it with np.savez") from None


def first_values(header: Header, member: IO[bytes]) -> NDArray[Any] | None:
    """The values of the first image of a float array, behind its header; None for another type or an empty array.

    :raises DAMAGE: if they cannot be read.
    """
    if header.dtype.kind != "f" or 0 in header.shape or len(header.shape) < 2:
        return None
    values = np.empty(header.shape[1:], header.dtype)
    untrusted.read_into(member, values)
    return values


def float_remedy(sample: NDArray[Any] | None) -> str:
    """The conversion of float images to uint8, chosen by the range of the first image."""
    ways = {
        "from [-1, 1] with": "((x + 1) * 127.5).clip(0, 255).astype(np.uint8)",
        "from [0, 1] with": "(x * 255).round().clip(0, 255).astype(np.uint8)",
        "from [0, 255] with": "x.round().clip(0, 255).astype(np.uint8)",
    }
    if sample is None or not np.isfinite(sample).all():
        return ", ".join(f"{start} {way}" for start, way in ways.items())
    kind = 0 if sample.min() < 0 else 1 if sample.max() <= 1 else 2
    start, way = list(ways.items())[kind]
    return f"{start} {way} (the first image lies between {sample.min():.3g} and {sample.max():.3g})"


def check_images(header: Header, path: str, sample: NDArray[Any] | None = None) -> None:
    """Say what is wrong with an image array, and how to convert it.

    :param sample: values of the first image of a float array.
    :raises UserError: unless it is uint8 [N,H,W,3] or [N,H,W,1] with N at least 1.
    """
    shape, dtype = header.shape, header.dtype
    if dtype.kind == "f" and len(shape) == 4 and shape[3] not in (1, 3) and shape[1] not in (1, 3):
        raise UserError(f"{path}: arr_0 holds latents of {shape[3]} channels, which no feature extractor knows: decode "
                        "them to images first")
    if dtype.hasobject:
        raise UserError(
            f"{path}: arr_0 holds pickled Python objects, which are never loaded; save one uint8 array [N,H,W,3]"
        )
    if dtype != np.uint8:
        remedy = float_remedy(sample) if dtype.kind == "f" else "with x.astype(np.uint8)"
        raise UserError(f"{path}: images (arr_0) are {dtype}, but must be uint8 from 0 to 255; convert them {remedy}")
    if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        raise UserError(f"{path}: images (arr_0) of shape {shape} are NCHW, but must be NHWC: x.transpose(0, 2, 3, 1)")
    if len(shape) == 3:
        raise UserError(f"{path}: images (arr_0) of shape {shape} lack an axis of channels: x[..., None] for grey ones")
    if len(shape) != 4 or shape[3] not in (1, 3):
        raise UserError(f"{path}: images (arr_0) have shape {shape}, but must be RGB [N,H,W,3] or grey [N,H,W,1]")
    if 0 in shape:
        raise UserError(f"{path}: images (arr_0) are empty: shape {shape}")
    if header.missing > 0:
        raise UserError(
            f"{path}: the images (arr_0) are cut off: {header.missing:,} bytes are missing; write the file again"
        )


def check_same_size(sizes: Mapping[str, tuple[int, int]]) -> None:
    """:raises UserError: unless all sets of images have one (height, width)."""
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{path} {height}x{width}" for path, (height, width) in sizes.items())
        raise UserError(
            f"images of different sizes (height x width: {found}) are not compared: resize one set, or take a "
            "reference with stored statistics and metrics that need no more (fid, sfid, inception_score)"
        )
