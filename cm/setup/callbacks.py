"""The callbacks that the flags request: sample grids, their distance from real images, a profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from cm.config.flags import Settings, defaults_of
from cm.config.plugin_flags import with_registered
from cm.config.sampling_schema import SampleConfig, SolverConfig
from cm.config.schema import EvalConfig
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage
from cm.logging import logger
from cm.setup.channels import are_pictures, demand_pictures
from cm.setup.latents import load_decoder
from cm.setup.model import model_from
from cm.setup.objective import kind_of_result
from cm.setup.run import run_precision, trusts_extractor
from cm.setup.sample import sampling_diffusion, sampling_plan
from cm.setup.sampler import fits, reach_all_levels, sampler_of, sampler_options
from cm.training.callbacks import AverageSampler, Evaluation, Metric, SampleGrids
from cm.training.ema_rates import parse_rates
from cm.training.ema_snapshots import EmaSnapshots
from cm.training.profiler import Profile
from cm.types import Callback


def sampling_settings(settings: Settings) -> Settings:
    """The flags of image_sample.py that give the same images as grids and evaluations during training."""
    config, mode = settings.section(EvalConfig), settings.values["training_mode"]
    usual = kind_of_result(mode).sampler
    asked = {
        "sampler": config.eval_sampler or usual, "steps": config.eval_steps, "ts": config.eval_ts,
        "seed": config.eval_seed, "num_samples": config.eval_samples, "batch_size": config.eval_batch_size,
        "clip_denoised": are_pictures(settings.values["channels"]),
        "compile": False,                                   # a network is made for each drawing
    }
    sections = with_registered((SampleConfig, SolverConfig))
    defaults = {name: value for section in sections for name, value in defaults_of(section).items()}
    given = {name: settings.given[f"eval_{name}"] for name in ("sampler", "steps", "ts") if
             settings.is_given(f"eval_{name}")}
    drawing = Settings(defaults | settings.values | asked, given)
    reach_all_levels(drawing)
    return drawing


def check_flags(settings: Settings) -> None:
    """Check the flags of `EvalConfig` at the start of the run.

    :raises UserError: for flags that cannot be used.
    """
    config, rates = settings.section(EvalConfig), parse_rates(settings.values["ema_rate"])
    _check_snapshots(settings)
    if not (config.eval_interval or config.sample_interval):
        return
    if config.eval_interval and not config.eval_ref:
        raise UserError(
            f"--eval_interval {config.eval_interval} needs --eval_ref: an npz of reference images or statistics, such "
            "as `evaluations/fid.py ref` writes"
        )
    if config.eval_interval and not settings.values["vae"]:
        demand_pictures(settings, f"--eval_interval {config.eval_interval}: the network behind the Frechet distance")
    if not rates or config.eval_ema_rate and config.eval_ema_rate not in map(str, rates):
        raise UserError(f"--eval_ema_rate {config.eval_ema_rate!r} is none of --ema_rate {settings.values['ema_rate']}")
    kind = kind_of_result(settings.values["training_mode"])
    if config.eval_sampler and not fits(kind, config.eval_sampler):
        logger.warn(f"--eval_sampler {config.eval_sampler} does not fit this training: leave it out for {kind.sampler}")
    try:
        sampler_of(sampling_settings(settings))
    except ValueError as error:
        raise UserError(f"--eval_sampler, --eval_steps, --eval_ts: {error}") from None


def _check_snapshots(settings: Settings) -> None:
    """:raises UserError: if snapshots are requested and there is no power-function average."""
    interval, rates = settings.values["ema_snapshot_interval"], settings.values["ema_rate"]
    if interval and all(rate.power_std is None for rate in parse_rates(rates)):
        raise UserError(f"--ema_snapshot_interval {interval} is for power-function averages, and --ema_rate {rates} "
                        "names none: add them, such as --ema_rate power0.05,power0.10")


def open_callbacks(settings: Settings, open_metric: Callable[..., Metric]) -> list[Callback]:
    """The callbacks that the flags ask for.

    :param open_metric: from (ref, inception, image_size in pixels, batch_size, num_samples, trusted).
    """
    config, drawing = settings.section(EvalConfig), sampling_settings(settings)
    callbacks: list[Callback] = [Profile(settings.values["profile"])] if settings.values["profile"] else []
    if settings.values["ema_snapshot_interval"]:
        callbacks.append(EmaSnapshots(settings.values["ema_snapshot_interval"]))
    if not (config.eval_interval or config.sample_interval):
        return callbacks
    decoder = load_decoder(settings)
    sampler = AverageSampler(
        partial(model_from, settings), sampling_diffusion(drawing),
        replace(sampling_plan(drawing), decoder=decoder), run_precision(settings),
        config.eval_ema_rate or str(parse_rates(settings.values["ema_rate"])[0]), sampler_options(drawing),
    )
    if config.sample_interval:
        callbacks.append(SampleGrids(sampler, config.sample_interval))
    if config.eval_interval:
        metric = open_metric(
            config.eval_ref, config.inception, sampler.plan.side, config.eval_batch_size,
            config.eval_samples, trusts_extractor(settings),
        )
        names = ("sampler", "steps", "ts", "seed", "num_samples")
        about = {name: drawing.values[name] for name in names} | {
            "ema_rate": sampler.rate, "features": metric.id, "reference": dist.on_main(content_of, config.eval_ref)
        } | ({"vae": decoder.vae.loaded.sha256} if decoder else {})
        callbacks.append(Evaluation(sampler, config.eval_interval, config.eval_samples, metric, about))
    return callbacks


def content_of(path: str) -> str:
    """An identifier of the content of a file, whatever its path is. Call it on one rank."""
    return "{size} bytes, crc32 {crc32:08x}".format(**storage.checksum(path))
