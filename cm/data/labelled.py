"""Every set of images that the toolkit reads, one image and its label after the other, for commands that convert them.

Besides what `cm.data.raw` opens these are npz files, shards of a WebDataset and the digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from PIL import Image

from cm.data.class_names import ClassNames
from cm.data.decode import decode, why_unreadable
from cm.data.formats import folder, zip_archive
from cm.data.image_source import ImageSource
from cm.data.mnist import MNIST_SUFFIX
from cm.data.raw import open_raw
from cm.data.raw_images import RawImages
from cm.data.sources import find_format, open_source
from cm.data.streams import ImageStream, Sequence
from cm.errors import UserError

Images = TypeVar("Images", RawImages, ImageSource)

PACKED = (".tar.gz", MNIST_SUFFIX)                                  # endings that `open_raw` knows


class LabelledImages(Protocol):
    """N images; they are read in ascending order."""

    @property
    def class_names(self) -> ClassNames:
        """The names of the classes, where these are numbers and the names are known."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[Image.Image, Any]:
        """Image i in RGB or grey, and its label, None if it has none.

        :raises UserError: if it cannot be read; the message names it.
        """
        ...

    def name(self, i: int) -> str:
        """The name of image i in messages; of a stream, of the one that was read last."""
        ...


@dataclass(frozen=True)
class _Indexed(Generic[Images]):
    """Images that any index opens."""

    images: Images

    @property
    def class_names(self) -> ClassNames:
        """See `LabelledImages`."""
        return self.images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """See `LabelledImages`."""
        return self.images.name(i)


class Raw(_Indexed[RawImages]):
    """Images of a published format."""

    def read(self, i: int) -> tuple[Image.Image, Any]:
        """See `LabelledImages`."""
        try:
            return self.images.image(i), self.images.labels[i] if self.images.labels else None
        except MemoryError:
            raise
        except Exception as error:                                  # decoders raise many kinds
            raise _unreadable(self.name(i), error) from error


class Loaded(_Indexed[ImageSource]):
    """Images of a source that training reads."""

    def read(self, i: int) -> tuple[Image.Image, Any]:
        """See `LabelledImages`."""
        return self.images.load(i), self.images.label(i)


class Streamed:
    """Images of a stream; all parts are counted first."""

    class_names: ClassNames = ()

    def __init__(self, stream: ImageStream):
        self._length = sum(stream.count(part) for part in range(stream.num_parts))
        self._sequence, self._last = Sequence(stream, seed=0, shuffle=False), stream.data_dir

    def __len__(self) -> int:
        return self._length

    def name(self, i: int) -> str:
        """See `LabelledImages`."""
        return self._last

    def read(self, i: int) -> tuple[Image.Image, Any]:
        """See `LabelledImages`."""
        [item] = self._sequence.take(i, 1)
        self._last = item.name
        try:
            return decode(item.data), item.label
        except MemoryError:
            raise
        except Exception as error:                                  # decoders raise many kinds
            raise _unreadable(item.name, error) from error


def open_labelled(source: str) -> LabelledImages:
    """Open the images that --source names.

    :raises UserError: if there are none.
    """
    kind = find_format(source, "--source")
    if source.endswith(PACKED) or kind in (zip_archive.FORMAT, folder.FORMAT):
        return Raw(open_raw(source))
    if kind.is_stream:
        return Streamed(kind.open(source.rstrip("/")))
    return Loaded(open_source(source, image_size=1, flag="--source"))       # the size would matter for crops only


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"{name} cannot be read: {why_unreadable(error)}. Replace or remove it, or let "
                     "datasets/dataset_tool.py convert the set, which leaves such images out")
