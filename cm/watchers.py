"""What looks at a run while it trains: pictures of its samples, and their distance from real images.

A watcher draws with a network of its own and leaves the random streams as it found them, so training is the same, bit
for bit, with and without it. The images are those that image_sample.py draws from the checkpoint of the same step.
Every method is one step of all ranks together.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch as th
from torch import Tensor, nn
from tqdm import tqdm

from cm import dist_util, logger, run_util, sample_util, script_util
from cm.checkpoints import state, storage, weights
from cm.config import CONSISTENCY_MODES, EvalConfig, SampleConfig, SolverConfig
from cm.flags import Settings
from cm.interfaces import Watcher
from cm.karras_diffusion import KarrasDenoiser
from cm.profiling import Profile
from cm.registry import UserError
from cm.sample_files import grid_scale, image_grid
from cm.sampling import SHOWN, SamplingPlan, at_precision, draw, labels_of, rounds, together
from cm.score_ledger import write_json
from cm.train_loop import TrainLoop, parse_rates

GRIDS, BEST, BEST_FILE = "samples", "best", "best.json"     # two folders and a file in the log's folder
COLUMNS = 8                                                 # of a grid


class Metric(Protocol):
    """How far images are from a reference."""

    key: str                                                # column of the log
    label: str                                              # for people
    id: str                                                 # of the features that it compares

    def distance(self, batches: Iterable[tuple[int, np.ndarray]]) -> float:
        """The distance of the images of all ranks; the same number on every rank.

        :param batches: this rank's share, possibly none: the row of a batch's first image, and [B,H,W,3] uint8.
        """


@dataclass(frozen=True)
class AverageSampler:
    """Draws with a weight average of the run.

    :param make_model: makes a float32 network of the run's architecture.
    :param rate: which average.
    :param options: what `cm.karras_diffusion.sample` takes.
    """

    make_model: Callable[[], nn.Module]
    diffusion: KarrasDenoiser
    plan: SamplingPlan
    precision: str
    rate: str
    options: Mapping[str, Any]

    def weights(self, loop: TrainLoop) -> dict[str, Tensor]:
        """The whole average, on every rank; one step of all ranks together."""
        return loop.trainer.master_params_to_state_dict(loop.averages.whole(self.rate))

    def draw(self, loop: TrainLoop, num_samples: int, title: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows [n] of the result and their images [n,H,W,3] uint8, n >= 0: as many pairs on every rank."""
        plan = replace(self.plan, num_samples=num_samples)
        model = self.make_model()
        weights.fit(model, self.weights(loop), f"the average {self.rate}")
        model = script_util.place(model, loop.device).eval()
        shares = list(rounds(plan, loop.rank, loop.world_size))
        for rows in tqdm(shares, title, unit="batch", disable=not dist_util.is_main(), leave=False):
            with at_precision(model, self.precision):       # left before others compute with the images
                images, _ = draw(model, self.diffusion, plan, rows, labels_of(rows, plan), **self.options)
            yield rows, images


@dataclass
class SampleGrids:
    """Leaves a picture of the same noises after every `interval` steps, and after the last.

    :param interval: in steps; -1 for the loop's save_interval.
    """

    sampler: AverageSampler
    interval: int
    num_samples: int = SHOWN
    name = "sample_grids"

    def after_step(self, loop: TrainLoop) -> dict[str, float]:
        if is_due(loop, loop.save_interval if self.interval < 0 else self.interval):
            with undisturbed(loop.device):
                drawn = [tuple(map(together, pair)) for pair in self.sampler.draw(loop, self.num_samples, "samples")]
            dist_util.on_main(self.write, loop.step, drawn if dist_util.is_main() else [])
        return {}

    def write(self, step: int, drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
        rows, images = (np.concatenate(column) for column in zip(*drawn))
        folder, content = os.path.join(logger.get_dir(), GRIDS), io.BytesIO()
        os.makedirs(folder, exist_ok=True)
        sheet = image_grid(images[rows.argsort()], COLUMNS, grid_scale(images.shape[1]))
        sheet.save(content, "png")
        path = os.path.join(folder, f"samples_{step:06d}.png")
        storage.write_whole(path, lambda file: file.write(content.getvalue()))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A picture depends on no other."""


@dataclass
class Evaluation:
    """Measures samples after every `interval` steps and after the last, and keeps the weights that did best.

    They lie in best/, with a manifest, where no clean-up of checkpoints comes; best.json says which and how good.

    :param settings: all that makes values comparable; a run that is resumed with others begins its best anew.
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
        begun = time.monotonic()
        with undisturbed(loop.device):
            drawn = self.sampler.draw(loop, self.num_samples, "evaluation")
            value = self.metric.distance((int(rows[0]), images) for rows, images in drawn if len(images))
        if np.isfinite(value) and (not self.best or value < self.best["value"]):
            before, self.best = self.best, {"step": loop.step, "value": value}
            try:
                dist_util.on_main(self.keep, loop, self.sampler.weights(loop))
            except (UserError, OSError) as error:
                if loop.shelf.on_save_error == "stop":
                    raise
                self.best = before                          # it still lies where best.json says
                logger.warn(f"training goes on without the weights of step {loop.step}, the best so far: {error}")
        logger.log(
            f"step {loop.step}: {self.metric.label} {value:.6g} of {self.num_samples} samples in "
            f"{time.monotonic() - begun:.1f} s; {self.best_so_far()}"
        )
        return {self.metric.key: value}

    def best_so_far(self) -> str:
        return f"best so far {self.best['value']:.6g} at step {self.best['step']}" if self.best else "no best so far"

    def keep(self, loop: TrainLoop, average: dict[str, Tensor]) -> None:
        """Save the average that was measured, then name it, then remove the one that was best before."""
        folder, name = os.path.join(logger.get_dir(), BEST), f"ema_{self.sampler.rate}"
        os.makedirs(folder, exist_ok=True)
        before = state.list_files(folder)
        kept = state.save(folder, loop.step, {name: average}, loop.config, loop.images_seen)
        file = state.file_name(name, loop.step)
        about = {"metric": self.metric.label, **self.best, "file": f"{BEST}/{file}", "settings": dict(self.settings)}
        write_json(os.path.join(logger.get_dir(), BEST_FILE), about)
        for old in set(before) - {*kept.files, state.manifest_name(loop.step)}:
            os.remove(os.path.join(folder, old))

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self.best), "settings": dict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["settings"] == self.settings:
            self.best = dict(state["best"])
            return
        names = [name for name, value in self.settings.items() if state["settings"].get(name) != value]
        logger.warn(f"samples are measured otherwise than before ({', '.join(names)}): the best of them is forgotten")


def is_due(loop: TrainLoop, interval: int) -> bool:
    return loop.step % interval == 0 or loop.step == loop.total_training_steps


def undisturbed(device: th.device) -> Any:
    """A context after which torch's random streams stand where they stood."""
    return th.random.fork_rng([device] if device.type == "cuda" else [])


# --- from flags ----------------------------------------------------------------------------------------------------


def sampling_settings(settings: Settings) -> Settings:
    """The flags of image_sample.py that draw the images to be looked at."""
    config, mode = settings.section(EvalConfig), settings.values["training_mode"]
    usual = "onestep" if mode in CONSISTENCY_MODES else {"edm": "heun"}.get(mode, mode)
    asked = {
        "sampler": config.eval_sampler or usual, "steps": config.eval_steps, "ts": config.eval_ts,
        "seed": config.eval_seed, "num_samples": config.eval_samples, "batch_size": config.eval_batch_size,
        "compile": False,                                   # a network is made for each drawing
    }
    defaults = script_util.defaults_of(SampleConfig) | script_util.defaults_of(SolverConfig)
    drawing = Settings(defaults | settings.values | asked, {})
    sample_util.reach_all_levels(drawing)
    return drawing


def check_flags(settings: Settings) -> None:
    """Find out before the work whether the flags of `EvalConfig` make sense.

    :raises UserError: if they do not, naming the flag.
    """
    config, rates = settings.section(EvalConfig), parse_rates(settings.values["ema_rate"])
    if config.eval_ref and not config.eval_interval:
        raise UserError(f"--eval_ref {config.eval_ref} has no effect without --eval_interval: give both, or neither")
    if not (config.eval_interval or config.sample_interval):
        return
    if config.eval_interval and not config.eval_ref:
        raise UserError(
            f"--eval_interval {config.eval_interval} needs --eval_ref: an npz of reference images or statistics, such "
            "as `evaluations/fid.py ref` writes"
        )
    if not rates or config.eval_ema_rate and config.eval_ema_rate not in rates:
        raise UserError(f"--eval_ema_rate {config.eval_ema_rate!r} is none of --ema_rate {settings.values['ema_rate']}")
    try:
        sample_util.sampler_of(sampling_settings(settings))
    except ValueError as error:
        raise UserError(f"--eval_sampler, --eval_steps, --eval_ts: {error}") from None


def open_watchers(settings: Settings, open_metric: Callable[..., Metric]) -> list[Watcher]:
    """The watchers that the flags ask for.

    :param open_metric: from (ref, inception, image_size in pixels, batch_size, num_samples).
    """
    config, drawing = settings.section(EvalConfig), sampling_settings(settings)
    watchers: list[Watcher] = [Profile(settings.values["profile"])] if settings.values["profile"] else []
    if not (config.eval_interval or config.sample_interval):
        return watchers
    sampler = AverageSampler(
        partial(script_util.model_from, settings), sample_util.sampling_diffusion(drawing),
        sample_util.sampling_plan(drawing), run_util.run_precision(settings),
        config.eval_ema_rate or str(parse_rates(settings.values["ema_rate"])[0]), sample_util.sampler_options(drawing),
    )
    if config.sample_interval:
        watchers.append(SampleGrids(sampler, config.sample_interval))
    if config.eval_interval:
        metric = open_metric(
            config.eval_ref, config.inception, settings.values["image_size"], config.eval_batch_size,
            config.eval_samples,
        )
        names = ("sampler", "steps", "ts", "seed", "num_samples")
        about = {name: drawing.values[name] for name in names} | {
            "ema_rate": sampler.rate, "features": metric.id, "reference": dist_util.on_main(content_of, config.eval_ref)
        }
        watchers.append(Evaluation(sampler, config.eval_interval, config.eval_samples, metric, about))
    return watchers


def content_of(path: str) -> str:
    """What tells a file from others, wherever it lies; for one rank."""
    return "{size} bytes, crc32 {crc32:08x}".format(**storage.checksum(path))
