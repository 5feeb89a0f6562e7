"""From the flags of image_edit.py to edits: masks, pairs and noise levels, checked before anything is loaded.

Shapes: N batch, S image_size, n results of one rank in one round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch as th
from torch import Tensor, nn

from cm.config.flags import Settings
from cm.config.needs import refuse_options_of_others
from cm.config.sampling_schema import EditConfig
from cm.data.class_names import numbered_as
from cm.data.image_source import ImageSource
from cm.data.sources import open_source
from cm.diffusion.schedules import karras_grid
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate.edit_inputs import Arcs, box_mask, find_arcs, read_mask
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
)
from cm.generate.engine import RankSamples, SamplingPlan, condition, labels_of, no_images, noise_of
from cm.generate.finite import finite_images
from cm.generate.latent_edits import check_latent_task, known_latents, run_picture_edit
from cm.generate.npz import to_array
from cm.networks.held import weights_held
from cm.registry import lookup
from cm.samplers import Churn, CountingDenoiser
from cm.samplers.sample import BindsNetworks
from cm.types import NoiseSource, Sampler

STROKE_START = 16 / 39                                      # default start of strokes, as a fraction of the grid
EditMaker = Callable[[Tensor, NoiseSource], Edit]
"""Makes an edit of images [N,C,S,S] and the noise source of their samples."""


@dataclass(frozen=True)
class EditJob:
    """All that a rank needs to compute any of the results."""

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
        """The kinds of images that are written: the results and, if the edit has images, the known part of these."""
        return ("samples",) if self.source is None else ("samples", "inputs")

    def originals(self, indices: np.ndarray) -> np.ndarray:
        """The images of these results, [n,S,S,C]; if there are more results than images, images are repeated."""
        assert self.source is not None, "interpolation has no images"
        images = self.source.images(indices % len(self.source))
        repeats = self.plan.side // self.source.image_size
        return images.repeat(repeats, axis=1).repeat(repeats, axis=2)

    def images(self, indices: np.ndarray) -> Tensor:
        """[n,C,S,S] in [-1, 1] (latents: as they are) on this rank's device."""
        size, device = self.plan.side, dist.dev()
        if self.source is None:
            return th.zeros(len(indices), self.plan.result_channels, size, size, device=device)
        pixels = th.from_numpy(self.originals(indices)).to(device).permute(0, 3, 1, 2)
        return pixels.float() if pixels.is_floating_point() else pixels.float().div_(127.5).sub_(1)

    def noise(self, indices: np.ndarray) -> NoiseSource:
        """The random streams of these results."""
        if self.arcs is None:
            return noise_of(indices, self.plan)
        start, end = (noise_of(ends, self.plan) for ends in self.arcs.ends[indices].T)
        return Between(start, end, th.from_numpy(self.arcs.weights[indices]))

    def labels(self, indices: np.ndarray) -> np.ndarray | None:
        """The classes [n]: --class_label, or else the image's own, or else a random one.

        A result between two samples has the class of the first. None if the network has no classes.
        """
        if self.arcs is not None:
            return labels_of(self.arcs.ends[indices, 0], self.plan)
        own = None if self.source is None else self.source.labels
        if self.plan.num_classes is None or self.plan.classes or own is None:
            return labels_of(indices, self.plan)
        return own[indices % len(own)]


def make_job(settings: Settings, plan: SamplingPlan, sampler: Sampler, sigmas: Tensor) -> EditJob:
    """Read and check all inputs of --task.

    :raises UserError: for inputs that are missing, contradict each other, or do not fit the network's images.
    """
    config, values = settings.section(EditConfig), settings.values
    task = lookup(TASKS, config.task, "task")
    owners = {option: [name] for name, task in TASKS.items() for option in task.options}
    refuse_options_of_others(config, owners, "task", config.task)
    if plan.decoder is not None:
        check_latent_task(config.task, TASKS, "--task")
    space = ImageSpace(
        plan.side, *(values[name] for name in ("sigma_min", "sigma_max", "rho")), channels=plan.result_channels,
        patch=plan.side // plan.image_size,
    )
    make_edit = task.prepare(config, space)
    churn = Churn(*(values[name] for name in ("s_churn", "s_tmin", "s_tmax", "s_noise")))
    source = arcs = None
    if config.task == "interpolate":
        arcs = find_arcs(config)
        count = len(arcs.weights)
    else:
        source = _find_images(config, plan)
        count = config.num_samples or len(source)
    return EditJob(
        replace(plan, num_samples=count), make_edit, sampler, sigmas, churn, config.clip_denoised, source, arcs
    )


@th.inference_mode()
def edit_images(job: EditJob, model: nn.Module, diffusion: BindsNetworks, indices: np.ndarray) -> RankSamples:
    """The results of these indices, and the known part of their images."""
    labels = job.labels(indices)
    if len(indices) == 0:
        return RankSamples(dict.fromkeys(job.kinds, no_images(job.plan)), labels, 0, np.ones(0, bool))
    rng, D = job.noise(indices), CountingDenoiser(diffusion.bind(model))
    edit = job.make_edit(job.images(indices), rng)
    with weights_held(model):
        images = run_picture_edit(
            partial(D, **condition(labels)), edit, job.plan.decoder, job.sampler, job.sigmas, rng, churn=job.churn,
            clip_denoised=job.clip_denoised,
        )
    pictures = {"samples": images, "inputs": edit.known}
    pixels = {kind: to_array(pictures[kind], nearest=True) for kind in job.kinds}
    return RankSamples(pixels, labels, D.calls, finite_images(images))


# --- the tasks: from flags to edits ----------------------------------------------------------------------------------


class ImageSpace(NamedTuple):
    """The side and channels of the edited images, and the noise levels of the network's grid."""

    size: int
    sigma_min: float
    sigma_max: float
    rho: float
    channels: int = 3
    patch: int = 1                                          # pixels per latent on a side; 1: no latents


class Task(NamedTuple):
    """A --task: how its edits are made, and its own flags of `EditConfig`."""

    prepare: Callable[[EditConfig, ImageSpace], EditMaker]
    options: tuple[str, ...] = ()


def _prepare_inpainting(config: EditConfig, space: ImageSpace) -> EditMaker:
    if bool(config.mask) == bool(config.mask_box):
        raise UserError("--task inpaint needs either --mask FILE (white is known) or --mask_box top,left,height,width")
    mask = read_mask(config.mask, space.size) if config.mask else box_mask(config.mask_box, space.size)
    if mask.all():
        raise UserError(f"--mask {config.mask}: every pixel is known, so there is nothing to fill in; 0 is unknown")
    if not mask.any():
        raise UserError(
            f"{'--mask ' + config.mask if config.mask else '--mask_box ' + config.mask_box}: no pixel is known, so "
            "there is nothing to keep; white (in npy: 1) is known"
        )
    if space.patch > 1:
        known_latents(th.from_numpy(mask), space.patch)     # raises here rather than after loading the model
    return lambda images, rng: Inpaint(images, th.from_numpy(mask))


def _prepare_colorization(config: EditConfig, space: ImageSpace) -> EditMaker:
    if space.channels != 3:
        raise UserError(f"--task colorize gives a grey image its colours, but this model makes images of "
                        f"{space.channels} channel(s): take a model of RGB images, or another --task")
    return lambda images, rng: Colorize(images)


def _prepare_superres(config: EditConfig, space: ImageSpace) -> EditMaker:
    check_factor(config.superres_factor, (space.size, space.size))
    return lambda images, rng: SuperRes(images, config.superres_factor)


def _prepare_strokes(config: EditConfig, space: ImageSpace) -> EditMaker:
    last = max(config.steps - 2, 0)                         # lower levels have no noise to remove
    start = config.stroke_start if config.stroke_start >= 0 else min(last, round(STROKE_START * (config.steps - 1)))
    if start > last:
        raise UserError(
            f"--stroke_start {config.stroke_start} is not an index of {config.steps} noise levels to start at; "
            f"choose 0 to {last}, or other --steps"
        )
    sigma = karras_grid(config.steps, space.sigma_min, space.sigma_max, space.rho)[start].item()
    return lambda images, rng: Stroke(images, sigma)


def _prepare_interpolation(config: EditConfig, space: ImageSpace) -> EditMaker:
    if config.images:
        raise UserError(f"--images {config.images}: interpolation is between two noises; drop it or --task")
    return lambda images, rng: Interpolate(images)


def _prepare_denoising(config: EditConfig, space: ImageSpace) -> EditMaker:
    sigma = config.denoise_sigma
    if not space.sigma_min <= sigma <= space.sigma_max:
        raise UserError(f"--denoise_sigma {sigma}: the network supports noise levels from {space.sigma_min} to "
                        f"{space.sigma_max}")

    def make(images: Tensor, rng: NoiseSource) -> Edit:
        return Denoise(images + sigma * rng.randn_like(images) if config.add_noise else images, sigma)

    return make


TASKS = {
    "inpaint": Task(_prepare_inpainting, ("mask", "mask_box")),
    "colorize": Task(_prepare_colorization),
    "superres": Task(_prepare_superres, ("superres_factor", "low_resolution")),
    "stroke": Task(_prepare_strokes, ("stroke_start",)),
    "interpolate": Task(_prepare_interpolation, ("interpolate_pairs", "interpolate_weights")),
    "denoise": Task(_prepare_denoising, ("denoise_sigma", "add_noise")),
}


# --- reading flags ---------------------------------------------------------------------------------------------------


def _find_images(config: EditConfig, plan: SamplingPlan) -> ImageSource:
    if not config.images:
        raise UserError(f"--images is missing: --task {config.task} needs a folder, an EDM zip or an npz of images")
    shrink = config.superres_factor if config.low_resolution else 1
    source = open_source(config.images, plan.side // shrink, "--images", channels=plan.result_channels)
    if plan.num_classes is None or plan.classes or source.labels is None:
        return source
    source.labels = numbered_as(source.labels, source.class_names, plan.class_names, config.images)
    if source.labels.max() >= plan.num_classes:
        raise UserError(
            f"{config.images} has {source.num_classes} classes, the network only {plan.num_classes}; "
            "choose one of them with --class_label"
        )
    return source
