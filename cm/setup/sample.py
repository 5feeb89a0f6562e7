"""Makes the objects of the sampling commands from their flags: the network, the requested images, a guide."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch as th
from torch import nn

from cm.config.flags import Settings
from cm.config.needs import refuse_idle
from cm.config.sampling_schema import GuidanceConfig, SampleConfig, SolverConfig
from cm.config.schema import LARGEST_SEED, DiffusionConfig, ModelConfig
from cm.data.class_names import ANY, ClassNames, numbers_of, shortened
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate.engine import SamplingPlan, parse_seeds
from cm.generate.vae import Decoder
from cm.io import storage
from cm.logging import logger
from cm.networks.build import PUBLISHED_CLASSES
from cm.networks.noisy_classifier import NoisyClassifier, from_content
from cm.objectives.karras_denoiser import KarrasDenoiser
from cm.samplers.guidance import GuidedDiffusion
from cm.samplers.sample import BindsNetworks
from cm.setup.channels import apply_latent_defaults
from cm.setup.guide import Guide, guided_by
from cm.setup.inherit import inherit_checkpoint
from cm.setup.model import diffusion_from, drop_unreachable_attention
from cm.setup.network import load_network
from cm.setup.objective import kind_of_result
from cm.setup.run import run_precision
from cm.setup.sampler import choose_ablation, choose_sampler, reach_all_levels
from cm.setup.weights_path import fetch_inputs

NO_CLASS = SampleConfig.class_label                         # stands for all classes


def inherit_model(settings: Settings) -> SampleConfig:
    """Take the flags of the network and its training from the checkpoint at --model_path, and choose a fitting sampler
    if no flag names one.

    :raises UserError: if there is no such checkpoint, or a flag contradicts it or would be ignored.
    """
    if not settings.values["model_path"]:
        raise UserError("--model_path is missing: give a checkpoint, such as runs/edm/ema_0.9999_600000.pt")
    choose_ablation(settings)
    inherit_checkpoint(settings, "model_path", also=("training_mode",))
    apply_latent_defaults(settings)
    choose_sampler(settings)
    drop_unreachable_attention(settings)
    reach_all_levels(settings)
    diffusion = sampling_diffusion(settings)                # clips the noise levels to those of the network
    settings.replace(sigma_min=diffusion.sigma_min, sigma_max=diffusion.sigma_max)
    refuse_idle(settings, {})
    return settings.section(SampleConfig)


def choose_seeds(settings: Settings) -> tuple[int, ...]:
    """The sample indices that --seeds lists; empty without the flag. num_samples is set to their number.

    :raises UserError: if it is not a list of seeds, or another flag contradicts it.
    """
    values, seeds = settings.values, parse_seeds(settings.values["seeds"])
    if not seeds and settings.is_given("seeds"):
        raise UserError(f"{settings.given['seeds']} is empty: list seeds such as 0-63, or drop the flag")
    if not seeds:
        return ()
    if max(seeds) > LARGEST_SEED:
        raise UserError(f"--seeds: {max(seeds)} is too large; the largest is {LARGEST_SEED}")
    if "num_samples" in settings.given and values["num_samples"] != len(seeds):
        raise UserError(
            f"--seeds {values['seeds']} lists {len(seeds)} images, but {settings.given['num_samples']} asks for "
            f"num_samples={values['num_samples']}; drop one of them"
        )
    if values["generator"] == "dummy":
        raise UserError("--generator dummy has no seeds of single images; choose determ, or drop --seeds")
    settings.replace(num_samples=len(seeds))
    return seeds


def sampling_plan(settings: Settings, classifier: NoisyClassifier | None = None) -> SamplingPlan:
    """The images that the flags ask for.

    :param classifier: gives classes to the images of an unconditional model.
    :raises UserError: for a class that the model does not have.
    """
    config, values = settings.section(SampleConfig), settings.values
    num_classes = (values["num_classes"] or PUBLISHED_CLASSES) if values["class_cond"] else None
    if num_classes is None and classifier is not None:
        num_classes = classifier.config.num_classes
    names = class_names_of(settings, classifier)
    return SamplingPlan(
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        image_size=values["image_size"],
        seed=values["seed"],
        num_classes=num_classes,
        classes=chosen_classes(config.class_label, names, num_classes),
        generator=config.generator,
        allow_non_finite=config.allow_non_finite,
        channels=values["channels"],
        class_names=names,
    )


def class_names_of(settings: Settings, classifier: NoisyClassifier | None = None) -> ClassNames:
    """The names of the classes that the model of --model_path knows; an unconditional one gets the classifier's."""
    source = settings.sources.get("model_path")
    if source is None or not settings.values["class_cond"]:
        return () if classifier is None else classifier.config.class_names
    return source.class_names


def chosen_classes(class_label: str, names: ClassNames, num_classes: int | None) -> tuple[int, ...]:
    """The classes that --class_label lists; empty for all.

    :raises UserError: for a class that the model does not have.
    """
    if num_classes is None:
        if class_label == NO_CLASS:
            return ()
        raise UserError(f"--class_label {class_label}: this model is not class-conditional; drop the flag")
    classes = numbers_of(class_label, names, num_classes)
    for number in classes:
        if str(number) in names and names[number] != str(number) and str(number) in class_label.split(","):
            logger.warn(f"--class_label {class_label}: {number} is a class number, of the class named "
                        f"{names[number]!r}; the class named '{number}' is number {names.index(str(number))}")
    return classes


def recorded_classes(classes: tuple[int, ...]) -> int | list[int]:
    """The classes of --class_label for the record of a run: a number for one class, a list for several, -1 for all."""
    return list(classes) if len(classes) > 1 else classes[0] if classes else ANY


def load_model(settings: Settings, device: th.device | None = None) -> nn.Module:
    """The network with the weights of --model_path, on a device, by default this rank's, ready to sample."""
    return load_network(settings, "model_path", device)


def sampling_diffusion(settings: Settings) -> KarrasDenoiser:
    """The scalings around the network of --model_path, by how it was trained."""
    kind = kind_of_result(settings.values["training_mode"])
    return diffusion_from(settings, distillation=kind.distillation)


def load_classifier(settings: Settings) -> NoisyClassifier | None:
    """The classifier at --classifier_path, on this rank's device; None where there is to be no guidance.

    :raises UserError: if there is no such file, or it is for images of another size or for fewer classes.
    """
    config, values = settings.section(GuidanceConfig), settings.values
    fetch_inputs(settings, "classifier_path")
    path = settings.values["classifier_path"]
    if not path:
        if config.classifier_scale != GuidanceConfig.classifier_scale:
            raise UserError(f"--classifier_scale {config.classifier_scale:g} needs a classifier: give "
                            "--classifier_path, made by classifier_train.py --noised True")
        return None
    try:
        classifier = from_content(dist.load_state_dict(path, verify=values.get("verify_weights", True)), path)
    except FileNotFoundError:
        raise UserError(f"--classifier_path {path}: no such file") from None
    _check_classifier(settings, classifier, path)
    return classifier.to(dist.dev())


def _check_classifier(settings: Settings, classifier: NoisyClassifier, path: str) -> None:
    """:raises UserError: unless the classifier knows the images and the classes of the model."""
    values = settings.values
    own = classifier.config
    if own.channels != values["channels"]:
        raise UserError(f"--classifier_path {path} is for images of {own.channels} channels, the model makes "
                        f"{values['channels']}; train a classifier with --channels {values['channels']}")
    if own.image_size != values["image_size"]:
        raise UserError(f"--classifier_path {path} is for images of side {own.image_size}, the model makes them of "
                        f"side {values['image_size']}; train a classifier with --image_size {values['image_size']}")
    classes = (values["num_classes"] or PUBLISHED_CLASSES) if values["class_cond"] else 0
    if classes > own.num_classes:
        raise UserError(f"--classifier_path {path} has {own.num_classes} classes, the model has {classes}")
    names = class_names_of(settings)
    if names and own.class_names and own.class_names[: len(names)] != names:
        raise UserError(
            f"--classifier_path {path} numbers its classes differently from the model, so it would guide to wrong "
            f"classes. The classifier: {shortened(own.class_names)}; the model: {shortened(names)}. Train it on the "
            "data of the model"
        )


def guided_diffusion(
    settings: Settings, classifier: NoisyClassifier | None, guide: Guide | None = None, device: th.device | None = None
) -> BindsNetworks:
    """`sampling_diffusion`, guided by a classifier or by a worse network, if there is one.

    :param device: of that network; by default this rank's.
    """
    diffusion = sampling_diffusion(settings)
    if classifier is None:
        return guided_by(diffusion, guide, settings, device=device)
    scale, class_cond = settings.values["classifier_scale"], settings.values["class_cond"]
    return GuidedDiffusion(diffusion, classifier, scale, class_cond)


def png_recipe(
    settings: Settings, guide: Guide | None = None, classes: tuple[int, ...] = (), decoder: Decoder | None = None
) -> dict[str, Any]:
    """All that the image of a seed depends on: the weights, and every flag but those of which images and how many."""
    sections = (SampleConfig, SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig)
    names = {field.name for section in sections for field in fields(section)} - {
        "model_path", "classifier_path", "num_samples", "batch_size", "dropout", "dropout_resolutions",
        "use_checkpoint", "allow_non_finite", "channels", "null_class",         # the weights have their channels
        "guide_scale", "guide_path", "guide_interval",
    }
    values = {name: settings.values[name] for name in sorted(names | {"rounding", "subdirs", "seed"})}
    weights_of = dist.on_main(storage.checksum, settings.values["model_path"])
    path = settings.values["classifier_path"]
    classifier = dist.on_main(storage.checksum, path) if path else None
    made = {"class_label": recorded_classes(classes), "precision": run_precision(settings)}
    made |= {"tf32": True} if settings.values["tf32"] else {}              # older folders say nothing of it
    recipe = {"weights": weights_of, "classifier": classifier} | values | made
    if guide is not None:                                   # not a word without one, as in folders of older versions
        recipe |= guide.record()
        recipe["guide_path"] = dist.on_main(storage.checksum, recipe["guide_path"]) if recipe["guide_path"] else ""
    if decoder is not None:
        recipe |= decoder.identity()
    return recipe
