"""openai/consistency_models' `cm.fp16_util`; see `cm.training.mixed_precision`."""

from cm.training.mixed_precision import *  # noqa: F403
