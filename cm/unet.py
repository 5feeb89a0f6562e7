"""openai/consistency_models' `cm.unet`; see `cm.networks.unet`."""

from cm.networks.unet import *  # noqa: F403
