"""Sets of latents: the mean and the standard deviation that a VAE gives for each image, and how they are scaled.

The files are those of NVlabs/edm2 (Karras et al. 2023, arXiv 2312.02696): an array [2C,H,W] for each image, the C means
and then the C standard deviations. Each time that an image is used a new latent z is drawn,

    z = mean + std n,    n ~ N(0, 1),
    x = (z - m) s / d,   s = 0.5 = sigma_data,

where m and d are the mean and the standard deviation of a channel over the whole set, so x has mean 0 and standard
deviation 0.5. x is what a network is trained on and what it samples.

Shapes: N images, C channels, H and W height and width of latents.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np

from cm.data.labels import LABEL_FILE, label_budget
from cm.errors import UserError
from cm.io import untrusted
from cm.io.budget import SETTINGS, parse_json
from cm.io.untrusted import shown

Numbers = TypeVar("Numbers", bound=Any)
"""An array, or a tensor on any device; torch is not imported here, because --help must not import it."""

FINAL_STD = 0.5
"""Standard deviation of x: sigma_data."""
PIXELS = ("unit", "symmetric")
"""Range of the pixels that a VAE encodes and decodes: [0, 1] in EDM2, [-1, 1] in diffusers."""
ARRAY_SUFFIX = ".npy"
AT_END = re.compile(rb'"latents"\s*:\s*(\{[^{}]*\})\s*\}\s*\Z')
RECORD = "latents"
"""Name of the record in dataset.json and checkpoints, and of its flag."""


@dataclass(frozen=True)
class LatentRecord:
    """The facts that are needed to scale latents for a network, and to decode them to pictures.

    :param mean, std: m and d, of each of the C channels.
    :param pixels: one of `PIXELS`.
    :param vae: the name of the VAE, for messages; empty if it is not known.
    :param sha256: of its weights; empty if it is not known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: str = "unit"
    vae: str = ""
    sha256: str = ""

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    def normalised(self, z: Numbers) -> Numbers:
        """z -> x, of shape [N,C,H,W] or [C,H,W]."""
        mean, scale = self._constants(z)
        return (z - mean) * scale

    def raw(self, x: Numbers) -> Numbers:
        """x -> z, of shape [N,C,H,W] or [C,H,W]."""
        mean, scale = self._constants(x)
        return x / scale + mean

    def _constants(self, like: Any) -> tuple[Any, Any]:
        """m and s / d, [C,1,1], as arrays or as tensors."""
        mean = np.array(self.mean, np.float32)[:, None, None]
        scale = (FINAL_STD / np.array(self.std))[:, None, None].astype(np.float32)
        return (mean, scale) if isinstance(like, np.ndarray) else (like.new_tensor(mean), like.new_tensor(scale))

    def text(self) -> str:
        """The record as the value of a flag; `parse` reads it back."""
        return json.dumps(asdict(self))

    def about_vae(self) -> str:
        """'the VAE sd-vae (SHA-256 0123456789ab...)', for messages."""
        digest = f" (SHA-256 {self.sha256[:12]}...)" if self.sha256 else ""
        return f"the VAE {shown(self.vae)}{digest}" if self.vae or digest else "a VAE that is not known"


EDM2 = LatentRecord(mean=(5.81, 3.25, 0.12, -2.15), std=(4.17, 4.62, 3.71, 3.28))
"""The record of the published networks and sets of EDM2; their VAE is stabilityai/sd-vae-ft-mse."""


def from_content(content: Any) -> LatentRecord:
    """A record from parsed JSON; unknown keys are an error.

    :raises ValueError: if it is not a record.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{shown(content)} is not a record of latents")
    numbers = {name: _numbers(content.get(name), name) for name in ("mean", "std")}
    words = {name: content[name] for name in ("pixels", "vae", "sha256") if name in content}
    strange = set(content) - set(numbers) - set(words)
    if strange or not all(isinstance(word, str) for word in words.values()):
        raise ValueError(f"it is not of the form {EDM2.text()}")
    record = LatentRecord(**numbers, **words)
    if len(record.mean) != len(record.std) or min(record.std) <= 0:
        raise ValueError(f"mean {record.mean} and std {record.std} are not one for each channel, with std above 0")
    if record.pixels not in PIXELS:
        raise ValueError(f"pixels {shown(record.pixels)} is none of: {', '.join(PIXELS)}")
    return record


def _numbers(values: Any, name: str) -> tuple[float, ...]:
    good = isinstance(values, (list, tuple)) and bool(values) and all(
        type(value) in (int, float) and math.isfinite(value) for value in values
    )
    if not good:
        raise ValueError(f"{name} is not a list of numbers")
    return tuple(map(float, values))


def parse(text: str, source: str) -> LatentRecord | None:
    """The record that a flag or a checkpoint holds; None if it is empty.

    :param source: its place, for messages.
    :raises UserError: if it is not a record.
    """
    if not text:
        return None
    try:
        return from_content(parse_json(text, SETTINGS))
    except ValueError as error:
        raise UserError(f"{source}: {shown(text)} is not a record of latents: {error}") from None


def record_of_json(text: bytes, data_dir: str, count: int) -> LatentRecord | None:
    """The record in the dataset.json of so many latents; None where EDM2's tool has written it, which makes none.

    :raises UserError: if it has one that cannot be read.
    """
    at_end = AT_END.search(text, max(0, len(text) - SETTINGS.bytes))
    try:                                                    # a million labels need not be parsed once more
        content = {RECORD: parse_json(at_end[1])} if at_end else parse_json(text, label_budget(count))
        found = content.get(RECORD) if isinstance(content, Mapping) else None
        return None if found is None else from_content(found)
    except ValueError as error:
        raise UserError(f"{data_dir}: {RECORD!r} in {LABEL_FILE} cannot be used: {error}") from None


def record_for(
    own: LatentRecord | None, given: str, channels: int, data_dir: str, given_by: str = f"--{RECORD}"
) -> LatentRecord:
    """The record of a set of latents of C channels: its own, or the one that is given; without either, EDM2's, whose
    tool writes no record and whose latents have 4 channels.

    :param given: a record as the value of a flag; empty if there is none.
    :param given_by: its place, for messages.
    :raises UserError: if the two contradict each other, there is none, or it has another number of channels.
    """
    asked = parse(given, given_by)
    if own and asked:
        record = merged(asked, own, (given_by, data_dir))
    elif own or asked:
        record = own or asked
    elif channels == EDM2.channels:
        record = EDM2
    else:
        raise UserError(f"{data_dir} has latents of {channels} channels, and no record of their mean and standard "
                        f"deviation in its {LABEL_FILE}: make it with datasets/encode.py, or give --{RECORD} "
                        f"'{EDM2.text()}', with a number for each channel")
    assert record is not None
    if record.channels != channels:
        raise UserError(f"{data_dir} has latents of {channels} channels, but their record has {record.channels}")
    return record


def arrays_among(names: list[str]) -> list[str]:
    """The arrays among these files, in order of their paths and without hidden files."""
    arrays = [
        name for name in names
        if name.lower().endswith(ARRAY_SUFFIX) and not name.rpartition("/")[2].startswith(".")
    ]
    return sorted(arrays, key=lambda name: name.split("/"))


def moments_of(data: bytes) -> np.ndarray:
    """The array of an npy file, [2C,H,W], as float32 [H,W,2C].

    :raises ValueError: if it is no such array, is not finite, or has a standard deviation below 0.
    """
    array = untrusted.read_array(io.BytesIO(data), len(data))
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size or len(array) % 2:
        raise ValueError(f"it is {array.dtype} {list(array.shape)}, not floats [2C,H,W], means and then standard "
                         "deviations")
    if not np.isfinite(array).all():
        raise ValueError("some of its numbers are NaN or infinite")
    if array[len(array) // 2 :].min() < 0:
        raise ValueError("the second half of its channels, the standard deviations, has numbers below 0")
    return np.ascontiguousarray(array.transpose(1, 2, 0), np.float32)


def merged(ours: LatentRecord, theirs: LatentRecord, places: tuple[str, str]) -> LatentRecord:
    """Merge two records of the same latents; the VAE is known if one of them knows it.

    :param places: their places, for messages.
    :raises UserError: if the records are of different latents, which cannot be used for the same network.
    """
    for name in ("mean", "std", "pixels"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(f"{places[0]} and {places[1]} have different latents: {name} is {getattr(ours, name)} in "
                            f"the first and {getattr(theirs, name)} in the second; use a data set and a network that "
                            "belong together (datasets/encode.py --scaling edm2 is for EDM2's networks)")
    if ours.sha256 and theirs.sha256 and ours.sha256 != theirs.sha256:
        raise UserError(f"{places[0]} has latents of {ours.about_vae()}, {places[1]} of {theirs.about_vae()}: use a "
                        "data set and a network that belong together")
    return ours if ours.sha256 or not theirs.sha256 else replace(ours, vae=theirs.vae, sha256=theirs.sha256)


def require_same(before: str, now: str, places: tuple[str, str]) -> None:
    """:raises UserError: if two records, as the values of flags, are of different latents; an empty one fits any.

    :param places: see `merged`.
    """
    records = [parse(text, place) for text, place in zip((before, now), places)]
    if records[0] and records[1]:
        merged(records[0], records[1], places)


def drawn(moments: np.ndarray, record: LatentRecord, seed: int, positions: np.ndarray) -> np.ndarray:
    """New latents x [N,C,H,W] for the samples at these positions of a run, int64 [N].

    They depend only on the seed and the position, so they are the same on any number of ranks and in a resumed run.

    :param moments: mean and standard deviation, float32 [N,2C,H,W].
    """
    from cm.random_util import SampleStreams

    mean, std = np.split(moments, 2, axis=1)
    noise = SampleStreams(seed, positions, stream="latent").randn(*mean.shape).numpy()
    return record.normalised(mean + std * noise)
