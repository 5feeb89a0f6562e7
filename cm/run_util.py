"""What the scripts do between their flags and their loop."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch as th
from torch import Tensor, nn

from cm import dist_util, durations, logger, stopping
from cm.augment import AUGMENT_LABELS, augmented
from cm.checkpoints import run_lock, state, storage, weights
from cm.config import (
    CONSISTENCY_MODES,
    AblationConfig,
    DataConfig,
    DiffusionConfig,
    GuidanceConfig,
    ModelConfig,
    SampleConfig,
    SolverConfig,
    TrainConfig,
)
from cm.flags import Settings
from cm.image_datasets import load_data
from cm.image_sources import open_source
from cm.interfaces import Sampler
from cm.karras_diffusion import KarrasDenoiser
from cm.memory_plan import PlannedRun, activations, line, plan
from cm.noisy_classifier import NoisyClassifier, from_content
from cm.precond import PRECONDS
from cm.reference_images import with_references
from cm.registry import UserError
from cm.samplers import SAMPLERS, make_sampler
from cm.samplers.ablation import DISCRETIZATIONS
from cm.samplers.guidance import GuidedDiffusion
from cm.sampling import SamplingPlan, parse_seeds
from cm.script_util import (
    PUBLISHED_CLASSES,
    adopt,
    adopt_checkpoint,
    attend_where_possible,
    choose_precision,
    diffusion_from,
    model_from,
    parse_ts,
    place,
)

OWN_ETA = SolverConfig.eta                                  # stands for the sampler's own


def share_of_batch(global_batch_size: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Images per step on one rank and on all; shares differ by at most one image.

    :param batch_size: images per step and rank, whatever global_batch_size says; -1 to leave it to that.
    :raises UserError: if there are fewer images than ranks.
    """
    if batch_size > 0:
        return batch_size, batch_size * world_size
    if global_batch_size < world_size:
        raise UserError(
            f"--global_batch_size {global_batch_size} leaves some of {world_size} ranks without an image; "
            f"choose at least {world_size}, or start fewer ranks"
        )
    return len(range(rank, global_batch_size, world_size)), global_batch_size


def open_run(settings: Settings) -> None:
    """Lock the folder of a training run against a second job, and start its log.

    :raises UserError: on every rank, if another job has it.
    """
    directory = settings.values["log_dir"] or os.environ.get("OPENAI_LOGDIR", "")
    if directory and not storage.is_remote(directory):      # a new temporary folder is nobody else's
        dist_util.on_main(run_lock.take, os.path.expanduser(directory))
    stopping.allow(settings.values["grace_seconds"])
    open_log(settings)


def adopt_resumed(settings: Settings) -> None:
    """Take the architecture from the checkpoint that --resume or --resume_checkpoint names.

    :raises UserError: if there is no such checkpoint, or another flag contradicts it.
    """
    resume = settings.values["resume"]
    if resume not in ("auto", "never"):
        adopt(settings, dist_util.on_main(state.find, resume).config, (), resume)
    elif settings.values["resume_checkpoint"]:
        adopt_checkpoint(settings, "resume_checkpoint")


def resolve_durations(settings: Settings) -> None:
    """Turn the durations that are given in images into steps; see `cm.durations`."""
    train, rank, world_size = settings.section(TrainConfig), dist_util.get_rank(), dist_util.get_world_size()
    _, global_batch = share_of_batch(train.global_batch_size, train.batch_size, rank, world_size)
    durations.resolve_durations(settings, global_batch)


def open_log(settings: Settings) -> None:
    """Start the log in --log_dir and leave the resolved flags there."""
    also = ("stats",) if settings.values.get("tick") else ()
    logger.configure(settings.values["log_dir"] or None, rank=dist_util.get_rank(), also=also)
    dist_util.on_main(save_config, settings)
    logger.log(f"logging to {logger.get_dir()} on {dist_util.get_world_size()} rank(s), device {dist_util.dev()}")


def save_config(settings: Settings) -> None:
    text = settings.as_text().encode()
    storage.write_whole(os.path.join(logger.get_dir(), "config.json"), lambda file: file.write(text))


def open_data(settings: Settings, references: int = 0) -> Any:
    """A function from the samples already consumed to the endless iterator of this rank's batches.

    Sets num_classes from the data, where no flag or checkpoint has set it.

    :param references: how many reference images every batch carries.
    :raises UserError: if there is no such data, class_cond is asked of data without labels, or there are to be fewer
        references than images of a step.
    """
    data, train, values = settings.section(DataConfig), settings.section(TrainConfig), settings.values
    if not data.data_dir:
        raise UserError("--data_dir is missing: give a folder, an EDM zip or an npz of images, or `digits`")
    source = open_source(data.data_dir, values["image_size"])
    if values["class_cond"]:
        if source.num_classes is None:
            raise UserError(
                f"--class_cond True, but {data.data_dir} has no class labels (its first image is {source.name(0)})"
            )
        if not values["num_classes"]:
            settings.replace(num_classes=source.num_classes)
        if source.num_classes > values["num_classes"]:
            raise UserError(
                f"{data.data_dir} has {source.num_classes} classes, the network only {values['num_classes']}"
            )
    if data.augment and "random_flip" not in settings.given:        # the network would not be told of these flips
        settings.replace(random_flip=False)
    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    batch_size, global_batch = share_of_batch(train.global_batch_size, train.batch_size, rank, world_size)
    if 0 < references < global_batch:
        raise UserError(
            f"--rbatch {references} is less than the {global_batch} images of a step, which are among the reference "
            f"images: give --rbatch {global_batch} or more"
        )
    return partial(
        open_stream,
        references=references,
        data_dir=data.data_dir,
        batch_size=batch_size,
        global_batch=global_batch,
        image_size=values["image_size"],
        class_cond=values["class_cond"],
        random_crop=data.random_crop,
        random_flip=values["random_flip"],
        seed=values["seed"],
        rank=rank,
        world_size=world_size,
        num_workers=None if data.num_workers < 0 else data.num_workers,
        pin_memory=dist_util.dev().type == "cuda",
        cache_bytes=int(data.cache_gib * 2**30),
    )


def open_stream(start: int, references: int, rank: int, world_size: int, **options: Any) -> Any:
    stream = load_data(start=start, rank=rank, world_size=world_size, **options)
    if not references:
        return stream
    return with_references(stream, references, start, rank, world_size, dist_util.all_gather_object)


def augment(settings: Settings, data: Any, model: nn.Module) -> Any:
    """The data of `open_data` with --augment's transforms.

    :raises UserError: if the network cannot be told of them.
    """
    p = settings.section(DataConfig).augment
    if not p:
        return data
    if p > 1:
        raise UserError(f"--augment {p:g} is a probability: at most 1, such as 0.12")
    if getattr(model, "augment_dim", 0) != AUGMENT_LABELS:
        raise UserError(
            f"--augment {p:g} needs a network that is told how its images were augmented, by {AUGMENT_LABELS} numbers, "
            f"and this one is not: take --arch ddpmpp or ncsnpp with --augment_dim {AUGMENT_LABELS}, or drop --augment"
        )
    return augmented(data, p, settings.values["seed"], dist_util.dev())


def loop_arguments(settings: Settings) -> dict[str, Any]:
    """What both training loops take from the flags."""
    train, values = settings.section(TrainConfig), settings.values
    same_names = (
        "microbatch", "lr", "ema_rate", "log_interval", "save_interval", "resume_checkpoint", "fp16_scale_growth",
        "weight_decay", "lr_anneal_steps", "optimizer", "resume", "total_training_steps", "lr_rampup_kimg",
        "ema_rampup_ratio", "checkpoint_dir", "keep_checkpoints", "milestone_interval", "on_save_error",
        "ema_device", "shard_ema", "shard_optimizer",
    )
    batch_size, global_batch = share_of_batch(
        train.global_batch_size, train.batch_size, dist_util.get_rank(), dist_util.get_world_size()
    )
    return {name: getattr(train, name) for name in same_names} | {
        "with_ticks": train.tick > 0,
        "batch_size": batch_size,
        "global_batch_size": global_batch,
        "precision": run_precision(settings),
        "seed": values["seed"],
        "config": dict(values),
        "start": settings.sources.get("resume_checkpoint"),
    }


def adopt_model(settings: Settings) -> SampleConfig:
    """Take from the checkpoint at --model_path what it knows of its network and how it was trained.

    :raises UserError: if there is no such checkpoint, or a flag contradicts it.
    """
    if not settings.values["model_path"]:
        raise UserError("--model_path is missing: give a checkpoint, such as runs/edm/ema_0.9999_600000.pt")
    choose_ablation(settings)
    adopt_checkpoint(settings, "model_path", also=("training_mode",))
    attend_where_possible(settings)
    reach_all_levels(settings)
    diffusion = sampling_diffusion(settings)                # which knows what noise levels its network knows
    settings.replace(sigma_min=diffusion.sigma_min, sigma_max=diffusion.sigma_max)
    return settings.section(SampleConfig)


def reach_all_levels(settings: Settings) -> None:
    """Samplers with noise levels of their own go all the way through them, unless a flag asks for less.

    A network of DDPM knows every timestep; its checkpoint only says which levels its training was reported at. The
    grids of the ablation sampler have ends of their own.
    """
    values, levels = settings.values, None
    on_timesteps = values["sampler"] == "ddim" or values["sampler"] == "pc" and values.get("pc_sde") == "vp"
    if on_timesteps and values["precond"] == "ddpm":
        levels = PRECONDS["ddpm"].levels
    if values["sampler"] == "ablation":
        levels = DISCRETIZATIONS[values.get("disc", AblationConfig.disc)][1:]
    if levels is not None:
        for name, level in zip(("sigma_min", "sigma_max"), levels):
            if settings.given.get(name, "the checkpoint").startswith("the checkpoint"):
                settings.replace(**{name: level})


def choose_ablation(settings: Settings) -> None:
    """Any flag of the ablation sampler chooses it, as in EDM's generate.py, unless another is asked for."""
    asked = any(field.name in settings.given for field in fields(AblationConfig))
    if asked and "sampler" not in settings.given:
        settings.replace(sampler="ablation")


def sampler_of(settings: Settings) -> tuple[Sampler, Tensor]:
    """The sampler that the flags describe, and its grid of noise levels.

    :raises UserError: if it cannot have such a grid, or a flag belongs to other samplers.
    """
    config, solver, values = settings.section(SampleConfig), settings.section(SolverConfig), settings.values
    refuse_flags_of_other_samplers(config.sampler, solver)
    options = {
        **asdict(solver), "ts": parse_ts(config.ts), "sigma_min": values["sigma_min"],
        "sigma_max": values["sigma_max"], "s_tmin": config.s_tmin, "s_tmax": config.s_tmax,
    }
    if solver.eta == OWN_ETA:
        del options["eta"]
    sampler = make_sampler(config.sampler, options)
    return sampler, sampler.grid(config.steps, values["sigma_min"], values["sigma_max"], solver.rho)


def refuse_flags_of_other_samplers(name: str, solver: SolverConfig) -> None:
    for field in fields(solver):
        owners = [
            other for other, kind in SAMPLERS.items()
            if (kind.uses_rho if field.name == "rho" else field.name in kind.__dataclass_fields__)
        ]
        value = getattr(solver, field.name)
        if value != field.default and name not in owners:
            raise UserError(f"--{field.name} {value} belongs to --sampler {', '.join(owners)}, not to {name}; "
                            "drop one of them")


def sampler_options(settings: Settings) -> dict[str, Any]:
    """What `cm.karras_diffusion.sample` takes from the flags of `SampleConfig` and `SolverConfig`."""
    names = ("steps", "clip_denoised", "sigma_min", "sigma_max", "rho", "s_churn", "s_tmin", "s_tmax", "s_noise")
    return {name: settings.values[name] for name in names} | {"sampler": sampler_of(settings)[0]}


def png_recipe(settings: Settings) -> dict[str, Any]:
    """All that the image of a seed depends on: the weights, and every flag but those of which images and how many."""
    sections = (SampleConfig, SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig)
    names = {field.name for section in sections for field in fields(section)} - {
        "model_path", "classifier_path", "num_samples", "batch_size", "dropout", "use_checkpoint",
    }
    values = {name: settings.values[name] for name in sorted(names | {"rounding", "subdirs", "seed"})}
    weights_of = dist_util.on_main(storage.checksum, settings.values["model_path"])
    guide = settings.values["classifier_path"]
    classifier = dist_util.on_main(storage.checksum, guide) if guide else None
    return {"weights": weights_of, "classifier": classifier} | values | {"precision": run_precision(settings)}


def choose_seeds(settings: Settings) -> tuple[int, ...]:
    """The sample indices that --seeds lists, none if it is empty; their number becomes num_samples.

    :raises UserError: if it is no list of seeds, or another flag contradicts it.
    """
    values, seeds = settings.values, parse_seeds(settings.values["seeds"])
    if not seeds:
        return ()
    if "num_samples" in settings.given and values["num_samples"] != len(seeds):
        raise UserError(
            f"--seeds {values['seeds']} lists {len(seeds)} images, but {settings.given['num_samples']} asks for "
            f"num_samples={values['num_samples']}; drop one of them"
        )
    if values["generator"] == "dummy":
        raise UserError("--generator dummy knows no seeds of single images; choose determ, or drop --seeds")
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
    if config.class_label >= 0 and num_classes is None:
        raise UserError(f"--class_label {config.class_label}: this model is not class-conditional; drop the flag")
    if num_classes is not None and config.class_label >= num_classes:
        raise UserError(f"--class_label {config.class_label}: the model has classes 0 to {num_classes - 1}")
    return SamplingPlan(
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        image_size=values["image_size"],
        seed=values["seed"],
        num_classes=num_classes,
        class_label=config.class_label,
        generator=config.generator,
    )


def load_model(settings: Settings) -> nn.Module:
    """The network with the weights of --model_path, on this rank's device, ready to sample."""
    model, source = model_from(settings), settings.sources["model_path"]
    weights.fit(model, source.take(), source.path)
    return place(model, dist_util.dev()).eval()


def sampling_diffusion(settings: Settings) -> KarrasDenoiser:
    """The scalings around the network of --model_path, by how it was trained."""
    consistency = settings.values["training_mode"] in CONSISTENCY_MODES
    return diffusion_from(settings, distillation=consistency)


def load_classifier(settings: Settings) -> NoisyClassifier | None:
    """The classifier at --classifier_path, on this rank's device; None where there is to be no guidance.

    :raises UserError: if there is no such file, or it is for images of another size or for fewer classes.
    """
    config, values = settings.section(GuidanceConfig), settings.values
    path = config.classifier_path
    if not path:
        if config.classifier_scale != GuidanceConfig.classifier_scale:
            raise UserError(f"--classifier_scale {config.classifier_scale:g} needs a classifier: give "
                            "--classifier_path, made by classifier_train.py --noised True")
        return None
    try:
        classifier = from_content(dist_util.load_state_dict(path), path)
    except FileNotFoundError:
        raise UserError(f"--classifier_path {path}: no such file") from None
    own = classifier.config
    if own.image_size != values["image_size"]:
        raise UserError(f"--classifier_path {path} knows images of side {own.image_size}, the model makes them of side "
                        f"{values['image_size']}; train a classifier with --image_size {values['image_size']}")
    classes = (values["num_classes"] or PUBLISHED_CLASSES) if values["class_cond"] else 0
    if classes > own.num_classes:
        raise UserError(f"--classifier_path {path} knows {own.num_classes} classes, the model has {classes}")
    return classifier.to(dist_util.dev())


def guided_diffusion(settings: Settings, classifier: NoisyClassifier | None) -> KarrasDenoiser | GuidedDiffusion:
    """`sampling_diffusion`, with the classifier's pull if there is one."""
    diffusion = sampling_diffusion(settings)
    if classifier is None:
        return diffusion
    scale, tell_class = settings.values["classifier_scale"], settings.values["class_cond"]
    return GuidedDiffusion(diffusion, classifier, scale, tell_class)


def run_precision(settings: Settings) -> str:
    return choose_precision(settings.values["precision"], settings.values["use_fp16"], dist_util.dev())


def describe(settings: Settings) -> None:
    """--dry_run: print the resolved run as JSON, with the network's size, and do nothing.

    Of a training run also the memory that it takes on the fullest rank, in bytes, and on stderr as a table.
    """
    with th.device("meta"):
        model = model_from(settings)
    facts = {
        "parameters": sum(param.numel() for param in model.parameters()), "ranks": dist_util.get_world_size()
    }
    if not dist_util.is_main():
        return
    if "ema_rate" in settings.values:
        run, images = planned_run(settings)
        memory = plan(model, run)
        kept = activations(
            model, images, settings.values["image_size"], run.precision, settings.values["class_cond"]
        )
        facts["memory"] = {
            "ranks": run.ranks, **memory.as_dict(), "activations_estimate": kept, "images_per_pass": images
        }
        print(f"memory of one of {run.ranks} ranks\n{memory.table()}", file=sys.stderr)
        print(line(f"estimate: {images} images at a time", kept), file=sys.stderr)
    print(json.dumps(settings.values | facts, indent=2))


def planned_run(settings: Settings) -> tuple[PlannedRun, int]:
    """What the flags of a training run say about its memory, and the images of a forward pass."""
    train, values = settings.section(TrainConfig), settings.values
    ranks = train.plan_ranks or dist_util.get_world_size()
    images, _ = share_of_batch(train.global_batch_size, train.batch_size, 0, ranks)
    mode = values["training_mode"]
    run = PlannedRun(
        precision=run_precision(settings),
        optimizer=train.optimizer,
        ema_rates=durations.parse_rates(train.ema_rate),
        ranks=ranks,
        ema_device=train.ema_device,
        shard_ema=train.shard_ema,
        shard_optimizer=train.shard_optimizer,
        has_target=mode in CONSISTENCY_MODES,
        teacher={"consistency_distillation": "still", "progdist": "moving"}.get(mode, "none"),
        on_gpu=train.plan_ranks > 0 or dist_util.dev().type == "cuda",
    )
    return run, min(images, train.microbatch) if train.microbatch > 0 else images
