"""Files of weights of a small U-Net, and a command that is given one."""

import torch as th

from cm.config.flags import parse
from cm.config.sampling_schema import SampleConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.script_util import create_model
from cm.setup.inherit import inherit_checkpoint

TINY = dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4",
            num_head_channels=16, class_cond=True, num_classes=5, use_scale_shift_norm=True)


def sampling(*argv):
    return parse("", SampleConfig, ModelConfig, DiffusionConfig, RunConfig, argv=list(map(str, argv)))


def adopt(path, *argv):
    settings = sampling("--model_path", path, *argv)
    return settings, inherit_checkpoint(settings, "model_path", also=("training_mode",))


def tiny(**changes):
    th.manual_seed(0)
    model = create_model(**{**TINY, **changes})
    for param in model.parameters():
        th.nn.init.normal_(param, std=0.1)
    return model
