"""Log format tensorboard: curves, grids of samples and the flags, in event files below tb/.

Events are written by the protocol buffers of the package tensorboard, not by torch.utils.tensorboard: that imports
TensorFlow where it is installed, and writes in a thread whose failures are reported too late.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cm.logging.files import append
from cm.logging.writers import Row, Writer


class TensorBoardWriter(Writer):
    """An event file for each start of the run; TensorBoard shows those of a folder as one run.

    :raises ImportError: if the package is not installed.
    """

    package = "tensorboard"

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (generated)

        self.make_event, self.rows = Event, 0
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self.path = folder / name
        self._write(file_version="brain.Event:2")

    @classmethod
    def open(cls, directory: Path, suffix: str) -> Writer:
        return cls(directory / f"tb{suffix}")

    def config(self, flags: Mapping[str, Any]) -> None:
        """The flags as a table on the page of texts."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        cells = [(name, str(value).replace("|", "\\|")) for name, value in flags.items()]
        rows = ["| flag | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]
        self._write(step=0, summary=text_pb("config", "\n".join(rows)))

    def scalars(self, step: int | None, row: Row) -> None:
        """A point of each curve; rows without a step are numbered."""
        self.rows += 1
        values = [{"tag": name, "simple_value": value} for name, value in row.items()
                  if isinstance(value, (int, float)) and name != "step"]
        self._write(step=self.rows if step is None else step, summary={"value": values})

    def images(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture on the page of images."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(picture).save(png, "png")
        height, width, channels = picture.shape
        image = {"height": height, "width": width, "colorspace": channels, "encoded_image_string": png.getvalue()}
        self._write(step=step, summary={"value": [{"tag": name, "image": image}]})

    def drop_after(self, step: int) -> None:
        """Let viewers hide the points whose step is larger."""
        self._write(step=step + 1, session_log={"status": "START"})

    def _write(self, **what: Any) -> None:
        """Append an event, framed as TensorFlow's records are."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(self.make_event(wall_time=time.time(), **what).SerializeToString())
        append(self.path, record.getvalue())
