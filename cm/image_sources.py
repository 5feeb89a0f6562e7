"""The former name of `cm.data.sources`."""

from cm.data.sources import SOURCES, ImageSource, open_source

__all__ = ["SOURCES", "ImageSource", "open_source"]
