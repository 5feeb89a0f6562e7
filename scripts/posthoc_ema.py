"""Make weight averages of any width from the snapshots of a training run, and find the best width (arXiv 2312.02696).

python scripts/posthoc_ema.py runs/edm --std 0.02:0.20
mpiexec -n 8 python scripts/posthoc_ema.py runs/edm --std 0.02:0.20 --ref ref.npz --num_samples 50000 --steps 18

The run must have power-function averages, such as --ema_rate power0.05,power0.10 --ema_snapshot_interval 1000. The
averages go to --log_dir (RUN/posthoc), with a manifest that image_sample.py reads. With --ref, the distances go to
posthoc_ema.json and posthoc_ema.png there; run the same command again to resume.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.parser import with_names
from cm.config.sampling_schema import PosthocConfig, SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig, VaeConfig
from cm.errors import UserError
from cm.io import storage
from cm.io.outputs import Output, check_outputs
from cm.io.storage import write_bytes, write_json
from cm.logging import logger

if TYPE_CHECKING:
    from cm.checkpoints.manifest import Checkpoint
    from cm.generate.vae import Decoder
    from cm.setup.posthoc import Average

STATE, RESULT, PLOT = "posthoc_ema_state.json", "posthoc_ema.json", "posthoc_ema.png"


def read_flags() -> Settings:
    """The flags of the command line, with the defaults of this command."""
    sections = (PosthocConfig, SampleConfig, SolverConfig, ModelConfig, DiffusionConfig, VaeConfig, RunConfig)
    return parse(__doc__ or "", *sections, argv=with_names(sys.argv[1:], ("--run",)), seed=42)


def main(settings: Settings) -> None:
    """Make the averages on all ranks, and measure them if there is a reference."""
    from cm.distributed import setup as dist
    from cm.setup.dry_run import dry_run
    from cm.setup.posthoc import checkpoint_for, parse_widths, plan_averages, snapshots_until, write_average
    from cm.setup.run import open_log
    from cm.training.ema_snapshots import find_snapshots

    dist.setup_dist(device=settings.values["device"])
    config = settings.section(PosthocConfig)
    check_flags(settings)
    widths = parse_widths(config.std)
    snapshots, step, images = snapshots_until(dist.on_main(find_snapshots, config.run), config.step)
    averages = plan_averages(widths, snapshots, images, config.extrapolate)
    inherit(settings, snapshots[-1].path)
    decoder = decoder_for(settings)
    if settings.dry_run:
        return dry_run(settings)
    folder = os.path.abspath(settings.values["log_dir"])
    checkpoint = dist.on_main(checkpoint_for, folder, step, images, snapshots[-1])
    open_log(settings)
    for average in averages:
        checkpoint = write_average(settings, average, snapshots, checkpoint)
        logger.log(f"width {average.std:g}: {checkpoint.path(average.name)}, profile error {average.mix.error:.2g}")
    distances, label = measure(settings, checkpoint, averages, decoder) if config.ref else ({}, "")
    dist.on_main(report, config.run, checkpoint, averages, distances, label)


def check_flags(settings: Settings) -> None:
    """Set the folder of the results.

    :raises UserError: for flags that are missing, or belong to other commands.
    """
    from cm.distributed import setup as dist
    from cm.training.ema_snapshots import FOLDER

    values = settings.values
    if not values["run"]:
        raise UserError("--run is missing: posthoc_ema.py RUN, the folder of a training run")
    if values["model_path"]:
        raise UserError(f"--model_path {values['model_path']}: this command makes its networks from --run; drop it")
    if values["vae"] and not values["ref"]:
        raise UserError(f"--vae {values['vae']} has no effect without --ref, for which samples are decoded: give both, "
                        "or neither")
    if not values["log_dir"] and storage.is_remote(values["run"]):
        raise UserError(f"--log_dir is missing: averages of {values['run']} go to a local folder")
    if not values["log_dir"]:
        settings.replace(log_dir=os.path.join(values["run"], "posthoc"))
    taken = {"the snapshots of --run": os.path.join(values["run"], FOLDER)}
    dist.on_main(check_outputs, [Output("--log_dir", values["log_dir"], "folder")], taken)


def inherit(settings: Settings, path: str) -> None:
    """Take network and training from the manifest of a snapshot, and its usual sampler where no flag names one."""
    from cm.setup.objective import kind_of_result
    from cm.setup.sample import inherit_model
    from cm.setup.sampler import sampler_of

    settings.replace(model_path=path)
    inherit_model(settings)
    if not settings.is_given("sampler"):
        settings.replace(sampler=kind_of_result(settings.values["training_mode"]).sampler)
    if settings.values["ref"]:
        sampler_of(settings)                                # raises before the work for flags that do not fit


def decoder_for(settings: Settings) -> Decoder | None:
    """What makes pictures of the samples that are compared with --ref; None if the network draws pictures, or there is
    no --ref.

    :raises UserError: if --vae is missing, or does not fit the network.
    """
    from cm.setup.channels import demand_pictures
    from cm.setup.latents import load_decoder

    decoder = load_decoder(settings)
    if settings.values["ref"] and decoder is None:
        demand_pictures(settings, "--ref")
    return decoder


def measure(
    settings: Settings, checkpoint: Checkpoint, averages: list[Average], decoder: Decoder | None
) -> tuple[dict[str, float], str]:
    """The distance of each average by its name, and what the distance is called."""
    from cm.distributed import setup as dist
    from cm.generate.score_store import open_score_store
    from cm.setup.posthoc import distance_of
    from cm.setup.run import run_precision, trusts_extractor
    from cm.setup.sample import sampling_plan
    from cm.setup.sampler import sampler_options
    from evaluations.in_training import open_metric

    config, values, options = settings.section(PosthocConfig), settings.values, sampler_options(settings)
    plan = replace(sampling_plan(settings), decoder=decoder)
    metric = open_metric(
        config.ref, config.inception, plan.side, plan.batch_size, plan.num_samples, trusts_extractor(settings)
    )
    names = ("sampler", "steps", "ts", "seed", "num_samples", "class_label", "clip_denoised", "sigma_min", "sigma_max")
    conditions = {name: values[name] for name in names} | {
        "ref": dist.on_main(storage.checksum, config.ref), "inception": metric.id,
        "precision": run_precision(settings), **(decoder.identity() if decoder else {}),
    }
    store = dist.on_main(open_score_store, os.path.join(logger.get_dir(), STATE), conditions)

    def score(average: Average) -> float:
        facts = checkpoint.facts(checkpoint.path(average.name) or "") or {}
        return store.score(                                 # of these weights, not of others of that width
            f"step {checkpoint.step}, width {average.std:g}, crc32 {facts['crc32']:08x}",
            lambda: (distance_of(settings, checkpoint, average, plan, options, metric), plan.num_samples),
        )

    return {average.name: score(average) for average in averages}, metric.label


def report(
    run: str, checkpoint: Checkpoint, averages: list[Average], distances: dict[str, float], label: str
) -> None:
    """Write what was made, and the plot of distances over widths; call it on rank 0."""
    from cm.report.plots import line_plot

    rows: list[dict[str, Any]] = [
        {"std": each.std, "file": os.path.basename(checkpoint.path(each.name) or ""), "profile_error": each.mix.error,
         **({"distance": distances[each.name]} if distances else {})}
        for each in averages
    ]
    result = {"run": run, "step": checkpoint.step, "images": checkpoint.images_seen, "metric": label, "averages": rows}
    write_json(os.path.join(checkpoint.directory, RESULT), result)
    if not distances:
        return
    points = sorted((row["std"], row["distance"]) for row in rows)
    plot = os.path.join(checkpoint.directory, PLOT)
    write_bytes(plot, line_plot({f"step {checkpoint.step}": points}, "relative width of the average", label))
    best = min(rows, key=lambda row: row["distance"])
    logger.log(f"lowest: width {best['std']:g}, {label} {best['distance']:.6g}, {best['file']}\nplot: {plot}")


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
