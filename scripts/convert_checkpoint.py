"""Convert weights of NVlabs/edm, guided-diffusion and diffusers to this toolkit, or consistency models to diffusers.

python scripts/convert_checkpoint.py edm-cifar10-32x32-uncond-vp.pkl models/cifar10
python scripts/convert_checkpoint.py runs/cd/ema_0.9999_600000.pt cd_folder --format diffusers
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from cm.config import early_exit
from cm.config.flags import Settings, parse, with_names
from cm.config.sampling_schema import ConvertConfig
from cm.config.schema import DiffusionConfig, ModelConfig
from cm.errors import UserError
from cm.io.outputs import Output, check_outputs
from cm.logging import logger


def read_flags() -> Settings:
    """The flags of the command line."""
    argv = with_names(sys.argv[1:], ("--source", "--dest"))
    return parse(__doc__ or "", ConvertConfig, ModelConfig, DiffusionConfig, argv=argv)


def main(settings: Settings) -> None:
    """Convert --source to --dest."""
    from cm.checkpoints import loading
    from cm.distributed import setup as dist
    from cm.setup import export
    from cm.setup.dry_run import dry_run
    from cm.setup.inherit import inherit_checkpoint
    from cm.setup.model import model_from

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
    names = source.class_names if settings.values["class_cond"] else ()
    model = model_from(settings)
    loading.fit(model, source.take(), config.source)
    if config.format == "diffusers":
        levels = config.num_train_timesteps
        dist.on_main(export.save_diffusers, config.dest, model.state_dict(), settings, levels, trained, names)
    else:
        dist.on_main(export.save_native, config.dest, model.state_dict(), settings, names)
    parameters = sum(param.numel() for param in model.parameters())
    logger.log(f"{parameters:,} parameters of {config.source} written to {config.dest}")


def manifest_of(path: str) -> Mapping[str, Any]:
    """The flags of the run that made a checkpoint; none for a file without a manifest."""
    from cm.checkpoints import manifest
    from cm.distributed import setup as dist

    checkpoint = dist.on_main(manifest.beside, path)
    return {} if checkpoint is None else checkpoint.config


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
