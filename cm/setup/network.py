"""The network of a file that a flag names, with its weights, ready to be evaluated."""

from __future__ import annotations

import torch as th
from torch import nn

from cm.checkpoints import loading
from cm.config.flags import Settings
from cm.setup.model import model_from
from cm.setup.run import on_device


def load_network(settings: Settings, flag: str, device: th.device | None = None) -> nn.Module:
    """The network of resolved settings with the weights of the file `settings.sources[flag]`.

    :param device: where it is put; by default this rank's.
    """
    source = settings.sources[flag]
    with th.device("meta"):
        model = model_from(settings)
    loading.make(model, source.take(), source.path)
    return on_device(settings, model, device).eval()
