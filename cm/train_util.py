"""openai/consistency_models' `cm.train_util`; see `cm.training.consistency`."""

from cm.training.consistency import *  # noqa: F403
