"""Callbacks that observe a run while it trains: pictures of its samples, and their distance from real images.

A callback draws with a network of its own and leaves the random streams as it found them, so training is the same, bit
for bit, with and without it. The images are those that image_sample.py draws from the checkpoint of the same step.
All ranks must call every method together.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from cm.checkpoints import file_names, loading, manifest
from cm.checkpoints.averages import TOO_MUCH
from cm.data.class_names import ClassNames
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate.engine import SHOWN, SamplingPlan, captions_of, draw_batches, gather_rows
from cm.generate.grids import captioned_grid, grid_scale
from cm.io import storage
from cm.io.storage import write_json
from cm.logging import logger
from cm.networks.build import to_device
from cm.objectives.karras_denoiser import KarrasDenoiser
from cm.random_util import undisturbed
from cm.samplers.sample import SampleOptions
from cm.training import state
from cm.training.loop import TrainLoop

GRIDS, BEST, BEST_FILE = "samples", "best", "best.json"     # two folders and a file in the log's folder
COLUMNS = 8                                                 # of a grid


class Metric(Protocol):
    """A distance of images from a reference."""

    @property
    def key(self) -> str:
        """The column of the log."""
        ...

    @property
    def label(self) -> str:
        """Its name in messages and figures."""
        ...

    @property
    def id(self) -> str:
        """An identifier of the features that are compared."""
        ...

    def distance(self, batches: Iterable[tuple[int, np.ndarray]]) -> float:
        """The distance of the images of all ranks; the same number on every rank.

        :param batches: this rank's share, possibly none: the row of a batch's first image, and [B,H,W,C].
        """
        ...


@dataclass(frozen=True)
class AverageSampler:
    """Samples from a weight average of the run.

    :param make_model: makes a float32 network of the run's architecture.
    :param rate: which average.
    :param options: how the images are sampled.
    """

    make_model: Callable[[], nn.Module]
    diffusion: KarrasDenoiser
    plan: SamplingPlan
    precision: str
    rate: str
    options: SampleOptions

    def weights(self, loop: TrainLoop) -> dict[str, Tensor]:
        """The whole average, on every rank. All ranks must call it together."""
        return loop.trainer.master_params_to_state_dict(loop.averages.gather(self.rate))

    def draw(self, loop: TrainLoop, num_samples: int, title: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows [n] of the result and their images [n,H,W,C], n >= 0: as many pairs on every rank.

        :raises UserError: on every rank, after the last pair, if an image is not finite and the plan does not allow it.
        """
        share = loop.averages.initial_weight[loop.averages.rates.index(self.rate)]
        if share > TOO_MUCH:
            logger.warn(f"the average {self.rate} still holds {share:.0%} of the weights that the run started from, so "
                        "its images may be no better than theirs; --ema_rampup_ratio 0.05 makes it follow faster")
        plan, model = replace(self.plan, num_samples=num_samples), self.make_model()
        loading.fit(model, self.weights(loop), f"the average {self.rate}")
        model = to_device(model, loop.device).eval()
        return draw_batches(model, self.diffusion, plan, self.precision, self.options, title)


@dataclass
class SampleGrids:
    """Writes a grid of samples from the same noise after every `interval` steps, and after the last step.

    :param interval: in steps; -1 for the loop's save_interval.
    """

    sampler: AverageSampler
    interval: int
    num_samples: int = SHOWN
    name = "sample_grids"

    def after_step(self, loop: TrainLoop) -> dict[str, float]:
        if is_due(loop, loop.save_interval if self.interval < 0 else self.interval):
            with undisturbed(loop.device):
                drawn = [tuple(map(gather_rows, pair)) for pair in self.sampler.draw(loop, self.num_samples, "samples")]
            dist.on_main(self.write, loop.step, drawn if dist.is_main() else [], loop.checkpoints.class_names)
        return {}

    def write(self, step: int, drawn: list[tuple[np.ndarray, np.ndarray]], class_names: ClassNames) -> None:
        rows, images = (np.concatenate(column) for column in zip(*drawn))
        folder, content = os.path.join(logger.get_dir(), GRIDS), io.BytesIO()
        os.makedirs(folder, exist_ok=True)
        plan = replace(self.sampler.plan, num_samples=len(rows), class_names=class_names)
        captions = captions_of(np.sort(rows), plan)
        sheet = captioned_grid(images[rows.argsort()], captions, COLUMNS, grid_scale(images.shape[1]))
        sheet.save(content, "png")
        path = os.path.join(folder, f"samples_{step:06d}.png")
        storage.write_atomically(path, lambda file: file.write(content.getvalue()))
        logger.log_images(step, GRIDS, np.asarray(sheet.convert("RGB")))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state: a grid does not depend on earlier ones."""


@dataclass
class Evaluation:
    """Measures samples after every `interval` steps and after the last step, and keeps the best weights.

    These are in best/, with a manifest, where old checkpoints are never removed. best.json has their step and value.

    :param settings: everything that values depend on. If a resumed run has other settings, the best value so far is
        discarded.
    """

    sampler: AverageSampler
    interval: int
    num_samples: int
    metric: Metric
    settings: Mapping[str, Any]
    best: dict[str, Any] = field(default_factory=dict)      # {"step": int, "value": float}, empty before the first
    name = "evaluation"

    def after_step(self, loop: TrainLoop) -> dict[str, float]:
        if not is_due(loop, self.interval):
            return {}
        start_time = time.monotonic()
        with undisturbed(loop.device):
            drawn = self.sampler.draw(loop, self.num_samples, "evaluation")
            value = self.metric.distance((int(rows[0]), images) for rows, images in drawn if len(images))
        if np.isfinite(value) and (not self.best or value < self.best["value"]):
            before, self.best = self.best, {"step": loop.step, "value": value}
            try:
                dist.on_main(self.keep, loop, self.sampler.weights(loop))
            except (UserError, OSError) as error:
                if loop.checkpoints.on_save_error == "stop":
                    raise
                self.best = before                          # its files are still there
                logger.warn(f"training continues without the weights of step {loop.step}, the best so far: {error}")
        logger.log(
            f"step {loop.step}: {self.metric.label} {value:.6g} of {self.num_samples} samples in "
            f"{time.monotonic() - start_time:.1f} s; {self.best_so_far()}"
        )
        return {self.metric.key: value}

    def best_so_far(self) -> str:
        return f"best so far {self.best['value']:.6g} at step {self.best['step']}" if self.best else "no best so far"

    def folder(self) -> str:
        """Where the best weights are."""
        return os.path.join(logger.get_dir(), BEST)

    def keep(self, loop: TrainLoop, average: dict[str, Tensor]) -> None:
        """Save the average that was measured, then name it, then remove the one that was best before."""
        folder, name = self.folder(), f"ema_{self.sampler.rate}"
        os.makedirs(folder, exist_ok=True)
        before = file_names.list_files(folder)
        kept = manifest.save(
            folder, loop.step, {name: average}, loop.flags, loop.images_seen, classes=loop.checkpoints.class_names,
            initial_weight={name: state.initial_weights(loop)[name]},
        )
        file = file_names.file_name(name, loop.step)
        about = {"metric": self.metric.label, **self.best, "file": f"{BEST}/{file}", "settings": dict(self.settings)}
        write_json(os.path.join(logger.get_dir(), BEST_FILE), about)
        for old in set(before) - {*kept.files, file_names.manifest_name(loop.step)}:
            os.remove(os.path.join(folder, old))

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self.best), "settings": dict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["settings"] == self.settings:
            self.best = dict(state["best"])
            return
        names = [name for name, value in self.settings.items() if state["settings"].get(name) != value]
        logger.warn(f"the metric is measured differently than before ({', '.join(names)}): the best value so far is "
                    "discarded")


def is_due(loop: TrainLoop, interval: int) -> bool:
    return loop.step % interval == 0 or loop.step == loop.total_training_steps
