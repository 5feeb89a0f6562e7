"""The images of a folder and the folders in it."""

from __future__ import annotations

from cm.data.decode import IMAGE_BYTES
from cm.data.image_names import images_in_folder
from cm.data.image_source import EncodedSource, Format
from cm.io import budget, storage


class FolderSource(EncodedSource):
    """The images of a folder and the folders in it."""

    def __init__(self, data_dir: str, image_size: int, channels: int = 3):
        super().__init__(data_dir, image_size, images_in_folder(data_dir), channels)

    def read(self, name: str, limit: int = IMAGE_BYTES) -> bytes:
        """The content of a file, see `EncodedSource.read`."""
        with storage.open_file(f"{self.data_dir}/{name}", random_access=True) as file:
            return budget.read_file(file, limit)


FORMAT = Format(lambda data_dir: True, FolderSource, "a folder of images", on_disk="folder", is_sent=True)
