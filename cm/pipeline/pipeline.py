"""A model that samples, edits and saves; `cm.load` makes one.

Shapes: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch as th
from PIL import Image
from torch import Tensor, nn

from cm.checkpoints.formats import described
from cm.checkpoints.formats.described import Description
from cm.config.flags import Settings, defaults_of, give
from cm.config.sampling_schema import GuidanceConfig, SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig, VaeConfig
from cm.data.class_names import number_of_name
from cm.errors import UserError
from cm.generate.editing import EDITS, Denoise, Edit, Inpaint, Stroke, SuperRes
from cm.generate.engine import SamplingPlan, at_precision, labels_of, noise_of
from cm.generate.finite import finite_images
from cm.generate.latent_edits import check_latent_task, run_picture_edit
from cm.generate.vae import Decoder
from cm.logging import logger
from cm.networks.held import weights_held
from cm.objectives.base import Objective
from cm.objectives.karras_denoiser import KarrasDenoiser
from cm.pipeline.pictures import OUTPUTS, Pictures, check_range, from_tensor, known_pixels, to_tensor
from cm.registry import lookup
from cm.samplers.sample import BindsNetworks, SampleOptions, sample
from cm.setup import export
from cm.setup.guide import SAMPLING, choose_guide
from cm.setup.latents import load_decoder
from cm.setup.objective import kind_of_result
from cm.setup.sample import guided_diffusion, load_classifier, sampling_plan
from cm.setup.sampler import sampler_of, sampler_options

SECTIONS = (SampleConfig, SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig, VaeConfig, RunConfig)
LEVELS = 40
"""Noise levels of the grid for several steps of a consistency model; the published number."""
TASKS = tuple(name for name in EDITS if name != "interpolate")      # which is between samples
FACTOR, SIGMA = 8, 0.5
TASKS_OF = {"mask": ("inpaint",), "factor": ("superres",), "sigma": ("stroke", "denoise")}
"""Argument of an edit -> the tasks that use it."""
ELSEWHERE = {"num_samples": "count", "model_path": "cm.load", "training_mode": "cm.load"}
"""Flags of image_sample.py that have another name in a pipeline -> that name."""


Labels = int | str | Sequence[int] | Sequence[str]
"""One class, by its number or name, or one class per image."""


class Pipeline:
    """A trained network with everything that is needed to sample from it.

    The same seed and image index give the same image for any batch size, up to the rounding of sums.
    """

    def __init__(
        self, model: nn.Module, diffusion: KarrasDenoiser, settings: Settings, device: th.device, precision: str
    ):
        self.model, self.diffusion = model, diffusion
        self.device, self.precision = device, precision
        self._settings = settings
        self._decoders: dict[str, Decoder | None] = {}
        self._guides: dict[tuple[Any, ...], BindsNetworks] = {}
        self._computes: AbstractContextManager = at_precision(model, precision)

    # --- properties ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The flags of the network and of its training, by name."""
        return dict(self._settings.values)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self._settings.values["image_size"]

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self._settings.values["channels"]

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the network; None if it is unconditional."""
        return sampling_plan(self._settings).num_classes

    @property
    def few_steps(self) -> bool:
        """Whether it generates an image in one evaluation, as consistency models and flow maps do."""
        return self._kind.few_step

    @property
    def _kind(self) -> type[Objective]:
        """The objective that trained it."""
        return kind_of_result(self._settings.values["training_mode"])

    def __repr__(self) -> str:
        values = self._settings.values
        count = sum(param.numel() for param in self.model.parameters())
        classes = "unconditional" if self.num_classes is None else f"{self.num_classes} classes"
        return (f"<Pipeline {values['model_path']}: {values['training_mode']}, "
                f"{values['arch']} of {count:,} parameters, {self.channels}x{self.image_size}x{self.image_size}, "
                f"{classes}, {self.precision} on {self.device}>")

    # --- sampling ------------------------------------------------------------------------------------------------

    def sample(
        self, count: int = 1, *, steps: int | None = None, labels: Labels | None = None, seed: int = 0,
        batch_size: int = 64, output: str = "pil", **options: Any,
    ) -> Any:
        """Sample images.

        :param count: number of images.
        :param steps: number of sampler steps; for a consistency model, the number of network evaluations, by default 1.
        :param labels: one class for all images, or one per image, by number or name; by default, classes are random.
        :param seed: image i depends only on the seed and on i.
        :param batch_size: images per forward pass; only memory and time depend on it.
        :param output: "pil", "array" (uint8 [N,H,W,C]) or "tensor" (float32 [N,C,H,W] in [-1, 1]).
        :param options: any other sampling flag of image_sample.py, such as sampler="dpm", s_churn=10, guide_scale=2;
            vae="FOLDER" decodes the latents of a latent diffusion model to images.
        :raises UserError: for an option that does not exist or does not fit, or images that are not finite.
        """
        _check_output(output)
        _check_options(options, labels)
        settings = self._with(flags_for(self._kind.sampler, steps, options))
        give(settings, {"num_samples": count, "batch_size": batch_size, "seed": seed}, *SECTIONS)
        diffusion, plan, how = self._guided(settings), sampling_plan(settings), sampler_options(settings)
        classes = self._classes(labels, plan)
        plan = replace(plan, decoder=self._decoder(settings))
        parts = [self._sample(diffusion, rows, classes, plan, how) for rows in batches(count, batch_size)]
        return from_tensor(finite(th.cat(parts), plan), output)

    @th.inference_mode()
    def _sample(
        self, diffusion: BindsNetworks, rows: np.ndarray, classes: np.ndarray | None, plan: SamplingPlan,
        how: SampleOptions,
    ) -> Tensor:
        shape = (len(rows), self.channels, plan.image_size, plan.image_size)
        with self._computes:
            images = sample(diffusion, self.model, shape, how, model_kwargs=self._condition(rows, classes),
                            device=self.device, generator=noise_of(rows, plan)).images
        return (images if plan.decoder is None else plan.decoder(images)).float().cpu()

    # --- editing -------------------------------------------------------------------------------------------------

    def edit(
        self, images: Pictures, task: str, *, labels: Labels | None = None, seed: int = 0,
        steps: int | None = None, batch_size: int = 64, output: str = "pil", mask: Any = None,
        factor: int = FACTOR, sigma: float = SIGMA, **options: Any,
    ) -> Any:
        """Edit images with a model that was not trained for it: Song et al. 2023 (2303.01469), algorithm 4.

        :param images: PIL images, uint8 [N,H,W,C], or float tensors [N,C,H,W] in [-1, 1], of the model's size.
        :param task: inpaint (`mask`: 1 or white where a pixel is known, [H,W]), colorize, superres (`factor`: side of
            the patches whose mean is kept), stroke (`sigma`: noise level to start from), denoise (`sigma`: standard
            deviation of the noise in the images).
        :param steps: number of sampler steps; by default, a consistency model uses all levels of its grid, as the paper
            does.
        :param options: as in `sample`; with vae="FOLDER", a latent diffusion model edits images (inpaint and stroke).
        :raises UserError: for images, a mask or an option that cannot be used.
        """
        _check_output(output)
        _check_options(options, labels)
        lookup(dict.fromkeys(TASKS), task, "task")
        self._check_parts(task, mask, factor, sigma)
        all_levels = LEVELS - 1 if self._kind.sampler == "onestep" and "ts" not in options else None
        settings = self._with(flags_for(self._kind.sampler, steps or all_levels, options))
        decoder = self._decoder(settings)
        if decoder is not None:
            check_latent_task(task, TASKS, "task")
        plan = replace(sampling_plan(settings), decoder=decoder)
        known = to_tensor(images, plan.side, plan.result_channels)
        check_range(known, noisy=task == "denoise")
        give(settings, {"num_samples": len(known), "seed": seed}, *SECTIONS)
        plan = replace(sampling_plan(settings), decoder=decoder)
        classes = self._classes(labels, plan)
        make = partial(make_edit, task, mask=mask, factor=factor, sigma=sigma)
        parts = []
        for rows in batches(len(known), batch_size):
            edit = make(known[rows].to(self.device))
            parts.append(self._edit(edit, rows, classes, plan, settings))
        return from_tensor(finite(th.cat(parts), plan), output)

    @th.inference_mode()
    def _edit(
        self, edit: Edit, rows: np.ndarray, classes: np.ndarray | None, plan: SamplingPlan, settings: Settings
    ) -> Tensor:
        sampler, sigmas = sampler_of(settings)
        how = sampler_options(settings)
        D = partial(self._guided(settings).bind(self.model), **self._condition(rows, classes))
        with self._computes, weights_held(self.model):
            images = run_picture_edit(D, edit, plan.decoder, sampler, sigmas, noise_of(rows, plan), churn=how.churn,
                                      clip_denoised=how.clip_denoised)
        return images.float().cpu()

    # --- saving --------------------------------------------------------------------------------------------------

    def save(
        self, path: str | os.PathLike[str], *, licence: str = "", results: Sequence[str | os.PathLike[str]] = (),
        picture: Image.Image | str | os.PathLike[str] | None = None,
    ) -> None:
        """Write the model so that `cm.load` and every --model_path read it without further flags.

        A path that ends in .safetensors gives one file, with the flags of the network in its metadata. Any other path
        gives a folder in the format of model hubs: model.safetensors, config.json and README.md, a model card with the
        facts that the run has stored next to the weights.

        :param licence: licence for the card, such as "mit".
        :param results: results for the card: files that evaluator.py or fid.py wrote with --json.
        :param picture: picture of samples for the card.
        :raises UserError: if the file or folder cannot be written, the folder contains other files of these names, or
            the results or the picture cannot be read.
        """
        target = os.fspath(path)
        if target.endswith(described.SUFFIX):
            if licence or results or picture is not None:
                raise UserError(f"{target}: licence, results and picture are for the card of a folder; drop them, or "
                                "give a name without .safetensors")
            return export.save_safetensors(target, self._weights(), self._description())
        drawn = isinstance(picture, Image.Image)
        path_of_picture = "" if drawn or picture is None else os.fspath(picture)
        options = export.card_options(licence, [os.fspath(each) for each in results], path_of_picture)
        options = replace(options, picture=export.png_of(picture)) if drawn else options
        export.save_hub_folder(target, self._weights(), self._description(), options)

    def to_diffusers(self, folder: str | os.PathLike[str], num_train_timesteps: int = 0) -> None:
        """Write a consistency model as a folder that diffusers' ConsistencyModelPipeline loads.

        :param num_train_timesteps: number of noise levels of the training grid; 0: read from the checkpoint.
        :raises UserError: for a diffusion model, or a network that diffusers does not have.
        """
        export.save_diffusers(
            os.fspath(folder), self._weights(), self._settings, num_train_timesteps, self._description()
        )

    # --- parts ---------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        """The weights in float32, whatever the precision of the model."""
        return {name: value.float() for name, value in self.model.state_dict().items()}

    def _description(self) -> Description:
        """The description that is stored with the weights."""
        source = self._settings.sources["model_path"]
        return export.describe(self._settings, source.path, source.class_names)

    def _with(self, options: dict[str, Any]) -> Settings:
        """The settings of the checkpoint, overridden by these options."""
        settings = Settings(
            dict(self._settings.values), dict(self._settings.given), sources=dict(self._settings.sources)
        )
        give(settings, options, SampleConfig, SolverConfig, GuidanceConfig, VaeConfig)
        return settings

    def _guided(self, settings: Settings) -> BindsNetworks:
        """The diffusion with the guide that the options select; its network is loaded only once."""
        asked = tuple(settings.values[name] for name in defaults_of(GuidanceConfig))
        if asked not in self._guides:
            guide, classifier = choose_guide(settings, SAMPLING), load_classifier(settings)
            classifier = classifier and classifier.to(self.device)
            self._guides[asked] = guided_diffusion(settings, classifier, guide, self.device)
        return self._guides[asked]

    def _decoder(self, settings: Settings) -> Decoder | None:
        """The decoder of latents that the options select; it is loaded only once."""
        asked = json.dumps([settings.values[name] for name in defaults_of(VaeConfig)])
        if asked not in self._decoders:
            self._decoders[asked] = load_decoder(settings, self.device)
        return self._decoders[asked]

    def _classes(self, labels: Labels | None, plan: SamplingPlan) -> np.ndarray | None:
        """The class of each image [count], or None."""
        rows = np.arange(plan.num_samples)
        if labels is None:
            return labels_of(rows, plan)
        if plan.num_classes is None:
            raise UserError(f"labels={labels}: this model is not class-conditional; drop them")
        found = np.asarray(labels)
        if found.dtype.kind == "U" and found.size:
            numbers = [number_of_name(str(word), plan.class_names) for word in found.flat]
            found = np.array(numbers).reshape(found.shape)
        classes = np.broadcast_to(found, rows.shape) if found.ndim == 0 else found
        if classes.shape != rows.shape or classes.dtype.kind not in "iu":
            raise UserError(f"labels of shape {classes.shape} and type {classes.dtype}: give one class, or "
                            f"{len(rows)} integers or names")
        if ((classes < 0) | (classes >= plan.num_classes)).any():
            raise UserError(f"labels={labels}: the model has classes 0 to {plan.num_classes - 1}")
        return classes.astype(np.int64)

    def _check_parts(self, task: str, mask: Any, factor: int, sigma: float) -> None:
        """:raises UserError: for an argument of another task, or a noise level that the network does not support."""
        given = {"mask": mask is not None, "factor": factor != FACTOR, "sigma": sigma != SIGMA}
        if foreign := [name for name, is_given in given.items() if is_given and task not in TASKS_OF[name]]:
            raise UserError(f"{foreign[0]} is for {' and '.join(TASKS_OF[foreign[0]])}, not for {task}; drop it")
        lowest, highest = self._settings.values["sigma_min"], self._settings.values["sigma_max"]
        if task in TASKS_OF["sigma"] and not lowest <= sigma <= highest:
            raise UserError(f"sigma={sigma}: the network supports noise levels from {lowest:g} to {highest:g}")

    def _condition(self, rows: np.ndarray, classes: np.ndarray | None) -> dict[str, Tensor]:
        return {} if classes is None else {"y": th.as_tensor(classes[rows], device=self.device)}


def flags_for(sampler: str, steps: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a sampler and its steps if the user gave no sampler.

    For a consistency model `steps` is the number of evaluations: one step, or evenly spaced levels of its grid.

    :param sampler: the usual sampler of the model.
    :raises UserError: if `ts` lists the levels already.
    """
    asked = options if steps is None else {"steps": steps, **options}
    if "sampler" in options or sampler != "onestep":
        return {"sampler": sampler, **asked}
    if "ts" in options:
        if steps is not None:
            raise UserError(f"steps={steps} and ts={options['ts']!r} both say at which levels the network is "
                            "evaluated: drop one of them")
        return {"sampler": "multistep", "steps": LEVELS, **options}
    count = steps or 1
    if count >= LEVELS:
        logger.warn(f"steps={count}: a consistency model is evaluated at levels of a grid of {LEVELS}, at most "
                    f"{LEVELS - 1} times: taking that many")
    if count == 1:
        return {"sampler": "onestep", **options}
    ts = np.linspace(0, LEVELS - 1, min(count, LEVELS - 1) + 1).round().astype(int)
    return {"sampler": "multistep", **options, "steps": LEVELS, "ts": ",".join(map(str, ts))}


def make_edit(task: str, images: Tensor, *, mask: Any, factor: int, sigma: float) -> Edit:
    """The edit of images [N,C,H,W] for a task.

    :raises UserError: if the mask is missing or not a mask.
    """
    if task == "inpaint":
        if mask is None:
            raise UserError("inpaint needs mask: [H,W], 1 or white where a pixel is known, 0 where it is filled in")
        return Inpaint(images, th.as_tensor(known_pixels(mask)))
    if task == "superres":
        return SuperRes(images, factor)
    if task == "stroke":
        return Stroke(images, sigma)
    if task == "denoise":
        return Denoise(images, sigma)
    return EDITS[task](images)


def batches(count: int, size: int) -> list[np.ndarray]:
    """The indices 0 to count-1 in batches of at most `size`."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def finite(images: Tensor, plan: SamplingPlan) -> Tensor:
    """The images, unchanged.

    :raises UserError: if some are not finite, unless the plan allows them.
    """
    bad = int((~finite_images(images)).sum())
    if bad and not plan.allow_non_finite:
        raise UserError(f"{bad} of {len(images)} images have NaN or infinite pixels: the weights are damaged or the "
                        "arithmetic overflowed; load with precision='fp32', or pass allow_non_finite=True")
    return images


def _check_output(output: str) -> None:
    if output not in OUTPUTS:
        raise UserError(f"output={output!r} is not one of: {', '.join(OUTPUTS)}")


def _check_options(options: dict[str, Any], labels: Any) -> None:
    """:raises UserError: for an option that has another name here, or is given twice."""
    for name in options.keys() & ELSEWHERE.keys():
        raise UserError(f"{name}={options[name]!r} is not an option here and would have no effect: use "
                        f"{ELSEWHERE[name]}")
    if labels is not None and "class_label" in options:
        raise UserError("labels and class_label both set the classes of the images: drop one of them")
