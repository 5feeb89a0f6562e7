"""The former name of `cm.data.sources`."""

from cm.data.image_source import ImageSource
from cm.data.sources import SOURCES, open_source

__all__ = ["SOURCES", "ImageSource", "open_source"]
