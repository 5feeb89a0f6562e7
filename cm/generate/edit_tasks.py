"""From the flags of image_edit.py to edits: masks, pairs and noise levels, checked before anything is loaded.

Shapes: N batch, S image_size, n results of one rank in one round.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch as th
from torch import Tensor, nn

from cm.config.flags import Settings
from cm.config.schema import EditConfig
from cm.data.decode import IMAGE_BYTES, decode
from cm.data.sources import ImageSource, open_source
from cm.diffusion.schedules import karras_grid
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate.editing import (
    Between,
    Colorize,
    Denoise,
    Edit,
    Inpaint,
    Interpolate,
    Stroke,
    SuperRes,
    check_factor,
    run_edit,
)
from cm.generate.engine import RankSamples, SamplingPlan, condition, labels_of, no_images, noise_of
from cm.generate.npz import to_uint8
from cm.io import untrusted
from cm.io.storage import open_file
from cm.objectives.karras_denoiser import KarrasDenoiser
from cm.registry import lookup
from cm.samplers import Churn, CountingDenoiser
from cm.types import NoiseSource, Sampler

EditMaker = Callable[[Tensor, NoiseSource], Edit]           # from images [N,3,S,S] and the noise of their samples

OPTIONS = {                                                 # flags that mean something to one task only
    "mask": "inpaint", "mask_box": "inpaint",
    "superres_factor": "superres", "low_resolution": "superres",
    "stroke_start": "stroke",
    "interpolate_pairs": "interpolate", "interpolate_weights": "interpolate",
    "denoise_sigma": "denoise", "add_noise": "denoise",
}


@dataclass(frozen=True)
class Arcs:
    """Which results lie between which samples; one row per result."""

    ends: np.ndarray                                        # [R,2], sample indices
    weights: np.ndarray                                     # [R], 0 for the first of the two
    per_pair: int                                           # how many results a pair has


@dataclass(frozen=True)
class EditJob:
    """What every rank needs to edit any of the results."""

    plan: SamplingPlan
    make_edit: EditMaker
    sampler: Sampler
    sigmas: Tensor                                          # the sampler's grid
    churn: Churn
    clip_denoised: bool
    source: ImageSource | None                              # None: interpolation, which has `arcs`
    arcs: Arcs | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What an edit leaves: its results and, of images, what it knew of them."""
        return ("samples",) if self.source is None else ("samples", "inputs")

    def originals(self, indices: np.ndarray) -> np.ndarray:
        """The images of these results, [n,S,S,3] uint8; images are used again when there are fewer than results."""
        images = self.source.images(indices % len(self.source))
        repeats = self.plan.image_size // self.source.image_size
        return images.repeat(repeats, axis=1).repeat(repeats, axis=2)

    def images(self, indices: np.ndarray) -> Tensor:
        """[n,3,S,S] in [-1, 1] on this rank's device."""
        size, device = self.plan.image_size, dist.dev()
        if self.source is None:
            return th.zeros(len(indices), 3, size, size, device=device)
        pixels = th.from_numpy(self.originals(indices)).to(device).permute(0, 3, 1, 2)
        return pixels.float().div_(127.5).sub_(1)

    def noise(self, indices: np.ndarray) -> NoiseSource:
        if self.arcs is None:
            return noise_of(indices, self.plan)
        start, end = (noise_of(ends, self.plan) for ends in self.arcs.ends[indices].T)
        return Between(start, end, th.from_numpy(self.arcs.weights[indices]))

    def labels(self, indices: np.ndarray) -> np.ndarray | None:
        """--class_label, or else the image's own class, or else a random one; between two samples, the first one's."""
        if self.arcs is not None:
            return labels_of(self.arcs.ends[indices, 0], self.plan)
        if self.plan.num_classes is None or self.plan.class_label >= 0 or self.source.labels is None:
            return labels_of(indices, self.plan)
        return self.source.labels[indices % len(self.source)]


def make_job(settings: Settings, plan: SamplingPlan, sampler: Sampler, sigmas: Tensor) -> EditJob:
    """Read and check all that --task needs.

    :raises UserError: for whatever is missing, contradicts itself, or does not fit the network's images.
    """
    config, values = settings.section(EditConfig), settings.values
    refuse_options_of_others(config)
    levels = (values[name] for name in ("sigma_min", "sigma_max", "rho"))
    make_edit = lookup(MAKERS, config.task, "task")(config, plan.image_size, *levels)
    churn = Churn(*(values[name] for name in ("s_churn", "s_tmin", "s_tmax", "s_noise")))
    source, arcs = (None, find_arcs(config)) if config.task == "interpolate" else (find_images(config, plan), None)
    count = len(arcs.weights) if arcs else config.num_samples or len(source)
    return EditJob(
        replace(plan, num_samples=count), make_edit, sampler, sigmas, churn, config.clip_denoised, source, arcs
    )


@th.inference_mode()
def edit_images(job: EditJob, model: nn.Module, diffusion: KarrasDenoiser, indices: np.ndarray) -> RankSamples:
    """The results of these indices, and what was known."""
    labels = job.labels(indices)
    if len(indices) == 0:
        return RankSamples(dict.fromkeys(job.kinds, no_images(job.plan)), labels, 0)
    rng, D = job.noise(indices), CountingDenoiser(diffusion.bind(model))
    edit = job.make_edit(job.images(indices), rng)
    images = run_edit(
        partial(D, **condition(labels)), edit, job.sampler, job.sigmas, rng, churn=job.churn,
        clip_denoised=job.clip_denoised,
    )
    pictures = {"samples": images, "inputs": edit.known}
    return RankSamples({kind: to_uint8(pictures[kind], nearest=True) for kind in job.kinds}, labels, D.calls)


# --- one maker a task: from its flags to edits -----------------------------------------------------------------------


def inpaint_maker(config: EditConfig, size: int, sigma_min: float, sigma_max: float, rho: float) -> EditMaker:
    if bool(config.mask) == bool(config.mask_box):
        raise UserError("--task inpaint needs either --mask FILE (white is known) or --mask_box top,left,height,width")
    mask = read_mask(config.mask, size) if config.mask else box_mask(config.mask_box, size)
    if mask.all():
        raise UserError(f"--mask {config.mask}: every pixel is known, so there is nothing to fill in; 0 is unknown")
    if not mask.any():
        raise UserError(
            f"{'--mask ' + config.mask if config.mask else '--mask_box ' + config.mask_box}: no pixel is known, so "
            "there is nothing to keep; white (in npy: 1) is known"
        )
    return lambda images, rng: Inpaint(images, th.from_numpy(mask))


def colorize_maker(config: EditConfig, size: int, sigma_min: float, sigma_max: float, rho: float) -> EditMaker:
    return lambda images, rng: Colorize(images)


def superres_maker(config: EditConfig, size: int, sigma_min: float, sigma_max: float, rho: float) -> EditMaker:
    check_factor(config.superres_factor, (size, size))
    return lambda images, rng: SuperRes(images, config.superres_factor)


def stroke_maker(config: EditConfig, size: int, sigma_min: float, sigma_max: float, rho: float) -> EditMaker:
    last = max(config.steps - 2, 0)                         # below that there is no noise to take away
    if config.stroke_start > last:
        raise UserError(
            f"--stroke_start {config.stroke_start} is no index into {config.steps} noise levels to begin at; "
            f"choose 0 to {last}, or other --steps"
        )
    sigma = karras_grid(config.steps, sigma_min, sigma_max, rho)[config.stroke_start].item()
    return lambda images, rng: Stroke(images, sigma)


def denoise_maker(config: EditConfig, size: int, sigma_min: float, sigma_max: float, rho: float) -> EditMaker:
    sigma = config.denoise_sigma
    if not sigma_min <= sigma <= sigma_max:
        raise UserError(f"--denoise_sigma {sigma}: the network knows noise levels from {sigma_min} to {sigma_max}")

    def make(images: Tensor, rng: NoiseSource) -> Edit:
        return Denoise(images + sigma * rng.randn_like(images) if config.add_noise else images, sigma)

    return make


def interpolate_maker(config: EditConfig, size: int, sigma_min: float, sigma_max: float, rho: float) -> EditMaker:
    if config.images:
        raise UserError(f"--images {config.images}: interpolation goes between two noises; drop it or --task")
    return lambda images, rng: Interpolate(images)


MAKERS = {
    "inpaint": inpaint_maker,
    "colorize": colorize_maker,
    "superres": superres_maker,
    "stroke": stroke_maker,
    "interpolate": interpolate_maker,
    "denoise": denoise_maker,
}


# --- reading flags ---------------------------------------------------------------------------------------------------


def refuse_options_of_others(config: EditConfig) -> None:
    for field in fields(config):
        task = OPTIONS.get(field.name, config.task)
        if task != config.task and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name} belongs to --task {task}, not to {config.task}; drop one of them")


def find_images(config: EditConfig, plan: SamplingPlan) -> ImageSource:
    if not config.images:
        raise UserError(f"--images is missing: --task {config.task} needs a folder, an EDM zip or an npz of images")
    shrink = config.superres_factor if config.low_resolution else 1
    source = open_source(config.images, plan.image_size // shrink, "--images")
    if plan.num_classes is not None and plan.class_label < 0 and (source.num_classes or 0) > plan.num_classes:
        raise UserError(
            f"{config.images} has {source.num_classes} classes, the network only {plan.num_classes}; "
            "choose one of them with --class_label"
        )
    return source


def read_mask(path: str, size: int) -> np.ndarray:
    """[S,S] boolean, True where known."""
    try:
        with open_file(path) as file:
            data = untrusted.read_file(file, IMAGE_BYTES)
        if path.lower().endswith(".npy"):
            mask = untrusted.read_array(io.BytesIO(data), len(data))
        else:
            mask = np.asarray(decode(data).convert("L")) >= 128
    except MemoryError:
        raise
    except Exception as error:                              # decoders raise many kinds
        raise UserError(f"--mask {path} cannot be read as a picture or npy: {error}") from None
    if mask.shape != (size, size):
        raise UserError(f"--mask {path} is {list(mask.shape)}; the network's images need a mask of [{size}, {size}]")
    if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise UserError(f"--mask {path} must hold 1 where a pixel is known and 0 where it is not, nothing else")
    return mask.astype(bool)


def box_mask(box: str, size: int) -> np.ndarray:
    """[S,S] boolean, False inside top,left,height,width."""
    numbers = parse_numbers("mask_box", box, int, "8,8,16,16 for top,left,height,width")
    if len(numbers) != 4 or min(numbers) < 0 or min(numbers[2:]) == 0:
        raise UserError(f"--mask_box {box} is not top,left,height,width in pixels, such as 8,8,16,16")
    top, left, height, width = numbers
    if top + height > size or left + width > size:
        raise UserError(f"--mask_box {box} reaches outside of images of {size}x{size} pixels")
    mask = np.ones((size, size), bool)
    mask[top : top + height, left : left + width] = False
    return mask


def find_arcs(config: EditConfig) -> Arcs:
    weights = parse_numbers("interpolate_weights", config.interpolate_weights, float, "0,0.5,1")
    if not weights or min(weights) < 0 or max(weights) > 1:
        raise UserError(f"--interpolate_weights {config.interpolate_weights!r} must lie between 0 and 1")
    pairs = np.array(find_pairs(config), np.int64)          # [P,2]
    return Arcs(pairs.repeat(len(weights), axis=0), np.tile(np.array(weights), len(pairs)), len(weights))


def find_pairs(config: EditConfig) -> list[tuple[int, int]]:
    if not config.interpolate_pairs:
        count = config.num_samples or 2
        if count < 2:
            raise UserError(f"--num_samples {count}: interpolation needs two at least")
        return [(i, i + 1) for i in range(count - 1)]
    if config.num_samples:
        raise UserError("--num_samples and --interpolate_pairs both say what to interpolate; drop one of them")
    pairs = []
    for pair in config.interpolate_pairs.split(","):
        ends = parse_numbers("interpolate_pairs", pair, int, "0:1,4:7", separator=":")
        if len(ends) != 2 or min(ends) < 0 or ends[0] == ends[1]:
            raise UserError(f"--interpolate_pairs: {pair!r} is not a pair of two sample indices such as 0:1")
        pairs.append((ends[0], ends[1]))
    return pairs


def parse_numbers(flag: str, text: str, kind: type, example: str, separator: str = ",") -> list[Any]:
    try:
        return [kind(word) for word in text.split(separator)]
    except ValueError:
        raise UserError(f"--{flag} {text!r} is no list of numbers such as {example}") from None
