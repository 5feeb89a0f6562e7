"""Rows of numbers, pictures and lines of text, and the formats that they are written in."""

from cm.logging.csv_rows import CSVWriter
from cm.logging.json_lines import JSONWriter, StatsWriter
from cm.logging.tables import ScreenWriter, TableWriter
from cm.logging.tensorboard import TensorBoardWriter
from cm.logging.wandb import WandbWriter
from cm.logging.writers import Writer
from cm.registry import Table

FORMATS: Table[type[Writer]] = Table("log format", {
    "stdout": ScreenWriter,
    "log": TableWriter,
    "csv": CSVWriter,
    "json": JSONWriter,
    "stats": StatsWriter,
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
})
