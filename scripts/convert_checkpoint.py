"""Convert weights of NVlabs/edm, guided-diffusion and diffusers to this toolkit, or consistency models to diffusers.

python scripts/convert_checkpoint.py edm-cifar10-32x32-uncond-vp.pkl models/cifar10
python scripts/convert_checkpoint.py runs/cd/ema_0.9999_600000.pt cd_folder --format diffusers
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.schema import ConvertConfig, DiffusionConfig, ModelConfig
from cm.errors import UserError
from cm.io import storage
from cm.io.outputs import Output, check_outputs
from cm.logging import logger

DISTILLED_LEVELS = 40                                               # of the published distilled models


def read_flags() -> Settings:
    """The flags of the command line."""
    return parse(__doc__ or "", ConvertConfig, ModelConfig, DiffusionConfig, argv=with_names(sys.argv[1:]))


def with_names(arguments: Sequence[str]) -> list[str]:
    """SOURCE and DEST at the front become --source SOURCE --dest DEST."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    named = [part for pair in zip(("--source", "--dest"), arguments[:count]) for part in pair]
    return [*named, *arguments[min(count, 2):]]


def main(settings: Settings) -> None:
    """Convert --source to --dest."""
    from cm.checkpoints import loading
    from cm.checkpoints.formats import diffusers
    from cm.distributed import setup as dist
    from cm.setup.dry_run import dry_run
    from cm.setup.inherit import inherit_checkpoint
    from cm.setup.model import model_from
    from cm.setup.objective import kind_of_result

    dist.setup_dist()
    config = settings.section(ConvertConfig)
    for name in ("source", "dest"):
        if not settings.values[name]:
            raise UserError(f"--{name} is missing: convert_checkpoint.py SOURCE DEST")
    dist.on_main(check_outputs, [Output("--dest", config.dest, "folder")], {"--source": config.source})
    trained = manifest_of(config.source)
    source = inherit_checkpoint(settings, "source", also=("training_mode",))
    if settings.dry_run:
        return dry_run(settings)
    model = model_from(settings)
    loading.fit(model, source.take(), config.source)
    if config.format == "diffusers":
        mode = settings.values["training_mode"]
        if not kind_of_result(mode).distillation:
            raise UserError(f"a {diffusers.PIPELINE} holds consistency models alone; this one was trained as {mode}")
        levels = config.num_train_timesteps or training_levels(trained, settings)
        dist.on_main(diffusers.write, config.dest, model.state_dict(), settings.values, levels)
    else:
        dist.on_main(write_native, config.dest, model.state_dict(), settings)
    parameters = sum(param.numel() for param in model.parameters())
    logger.log(f"{parameters:,} parameters of {config.source} written to {config.dest}")


def write_native(folder: str, tensors: Mapping[str, Any], settings: Settings) -> None:
    """Write a checkpoint of step 0 with a manifest, so that no flag needs to be given with it."""
    from cm.checkpoints import manifest
    from cm.script_util import model_and_diffusion_defaults

    storage.make_folder(folder)
    known = {**model_and_diffusion_defaults(), "training_mode": ""}
    manifest.save(folder, 0, {"model": tensors}, {name: settings.values[name] for name in known}, 0)


def manifest_of(path: str) -> Mapping[str, Any]:
    """The flags of the run that made a checkpoint; none for a file without a manifest."""
    from cm.checkpoints import manifest
    from cm.distributed import setup as dist

    checkpoint = dist.on_main(manifest.beside, path)
    return {} if checkpoint is None else checkpoint.config


def training_levels(trained: Mapping[str, Any], settings: Settings) -> int:
    """How many noise levels the grid had at the end of training.

    :raises UserError: if neither the checkpoint nor a flag says it.
    """
    if trained.get("scale_mode") == "fixed":
        return trained["start_scales"]
    if trained.get("scale_mode") in ("progressive", "doubling"):
        return trained["end_scales"] + 1
    if settings.values["training_mode"] != "consistency_training":
        return DISTILLED_LEVELS
    raise UserError("how many noise levels the training grid had is not known: give --num_train_timesteps, such as 201 "
                    "for ct_imagenet64.pt or 151 for ct_bedroom256.pt")


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
