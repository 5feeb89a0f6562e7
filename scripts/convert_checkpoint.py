"""Convert weights to a checkpoint of this toolkit, safetensors, a folder for model hubs, or diffusers.

python scripts/convert_checkpoint.py edm-cifar10-32x32-uncond-vp.pkl models/cifar10
python scripts/convert_checkpoint.py runs/cd models/cd --to hf --license mit
python scripts/convert_checkpoint.py runs/cd/ema_0.9999_600000.pt cd_folder --to diffusers
python scripts/convert_checkpoint.py runs/cd/checkpoint_600000.json runs/cd_files --to files
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cm.config import early_exit
from cm.config.flags import Settings, parse, words_of
from cm.config.needs import refuse_idle
from cm.config.parser import with_names
from cm.config.sampling_schema import ConvertConfig
from cm.config.schema import DiffusionConfig, LatentConfig, ModelConfig
from cm.errors import UserError
from cm.io.outputs import Output, check_outputs
from cm.logging import logger

if TYPE_CHECKING:
    from cm.setup.export import CardOptions


def read_flags() -> Settings:
    """The flags of the command line."""
    argv = with_names(sys.argv[1:], ("--source", "--dest"))
    return parse(__doc__ or "", ConvertConfig, ModelConfig, DiffusionConfig, LatentConfig, argv=argv)


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
    if config.format in ("files", "dcp"):
        refuse_idle(settings, {})                           # of a run: nothing is inherited
    kind = "file" if config.format == "safetensors" else "folder"
    dist.on_main(check_outputs, [Output("--dest", config.dest, kind)], {"--source": config.source})
    if config.format in ("files", "dcp"):
        return convert_whole(settings, config)
    if config.format == "native":
        dist.on_main(check_no_run, config.dest)
    options = dist.on_main(card_options, config)
    source = inherit_checkpoint(settings, "source", also=("training_mode",))
    refuse_idle(settings, {})
    if settings.dry_run:
        return dry_run(settings)
    about = dist.on_main(export.describe, settings, source.path, source.class_names)
    model = model_from(settings)
    loading.fit(model, source.take(), source.path)
    weights = model.state_dict()
    if config.format == "diffusers":
        dist.on_main(export.save_diffusers, config.dest, weights, settings, config.num_train_timesteps, about)
    elif options is not None:
        dist.on_main(export.save_hub_folder, config.dest, weights, about, options)
    else:
        save = export.save_native if config.format == "native" else export.save_safetensors
        dist.on_main(save, config.dest, weights, about)
    parameters = sum(param.numel() for param in model.parameters())
    logger.log(f"{parameters:,} parameters of {source.path} written to {config.dest}")


def check_no_run(dest: str) -> None:
    """:raises UserError: if the folder holds checkpoints of a run, among which the weights would get lost."""
    from cm.checkpoints import file_names

    if any(file_names.steps(dest)):                         # weights alone are saved as of step 0
        raise UserError(f"--dest {dest} holds checkpoints of a run: choose another folder")


def convert_whole(settings: Settings, config: ConvertConfig) -> None:
    """Convert a complete checkpoint of a run."""
    from cm.setup.convert_run import convert_run

    if settings.dry_run:
        return print(settings.as_text())
    saved = convert_run(config.source, config.dest, config.format, config.verify_weights)
    logger.log(f"step {saved.step} of {config.source} written to {config.dest}: {', '.join(saved.names())}")


def card_options(config: ConvertConfig) -> CardOptions | None:
    """What the flags add to the model card; None where there will be none. For one rank, before the work.

    :raises UserError: if a file cannot be read, or --dest is not free for a model folder.
    """
    from cm.checkpoints.formats import hub_folder
    from cm.setup import export

    if config.format != "hf":
        return None
    hub_folder.check_free(config.dest)
    return export.card_options(config.license, words_of(config.results), config.picture)


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
