"""Log format wandb: a run of Weights & Biases, with curves, grids of samples and the flags.

It reads W&B's own variables: WANDB_MODE (`offline` writes below wandb/ for a later `wandb sync`), WANDB_PROJECT,
WANDB_NAME, WANDB_RUN_ID and the others. The id of a run is kept next to its log, so that resuming it continues it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cm.distributed import failure
from cm.errors import UserError
from cm.logging.files import readable_text, replace_file
from cm.logging.writers import Row, Status, Writer

PROJECT = "consistency-toolkit"
"""The project if WANDB_PROJECT is not set."""

SECONDS_TO_SEND = {"finished": 60.0, "stopped": 10.0, "failed": 3.0}
"""Time that the end of a run waits for W&B's server; data that was not sent is in wandb/ and can be synced later."""


class WandbWriter(Writer):
    """Numbers and pictures over the column `step`, since W&B's own counter cannot go back where a run resumes.

    :raises UserError: if W&B refuses the run, for instance because nobody is logged in.
    """

    package = "wandb"

    def __init__(self, directory: Path, suffix: str = ""):
        import wandb

        self.id_file = directory / f"wandb_id{suffix}.txt"
        directory.mkdir(parents=True, exist_ok=True)
        offline = os.environ.get("WANDB_MODE") == "offline"     # where `wandb sync` joins the starts of a run by its id
        try:
            self.run: Any = wandb.init(
                dir=str(directory), id=self._id(), resume=None if offline else "allow",
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=os.environ.get("WANDB_NAME") or directory.name + suffix,
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )
        except wandb.Error as error:
            raise UserError(f"log format 'wandb': {error}; run `wandb login`, or set WANDB_MODE=offline") from None
        self.run.define_metric("*", step_metric="step")
        self.picture = wandb.Image

    @classmethod
    def open(cls, directory: Path, suffix: str) -> Writer:
        return cls(directory, suffix)

    def _id(self) -> str:
        """The id of the run: from the environment, else from an earlier start of this run, else a new one."""
        known = readable_text(self.id_file).strip() if self.id_file.exists() else ""
        run_id = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
        replace_file(self.id_file, run_id + "\n")
        return run_id

    def config(self, flags: Mapping[str, Any]) -> None:
        """The flags as the run's config; a resumed run may have changed some."""
        if self.run:
            self.run.config.update(dict(flags), allow_val_change=True)

    def scalars(self, step: int | None, row: Row) -> None:
        """A point of each curve."""
        if self.run:
            self.run.log({name: value for name, value in row.items() if value is not None})

    def images(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture over the step."""
        if self.run:
            self.run.log({"step": step, name: self.picture(picture)})

    def close(self, status: Status) -> None:
        """Tell W&B how the run ended, and wait for it no longer than `SECONDS_TO_SEND`."""
        run, self.run = self.run, None
        if run:
            failure.within(SECONDS_TO_SEND[status], lambda: run.finish(exit_code=int(status == "failed")), None)
