"""openai/consistency_models' `cm.resample`; see `cm.diffusion.noise_sampling`."""

from cm.diffusion.noise_sampling import *  # noqa: F403
